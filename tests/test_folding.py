"""Folding for inference: the same logits from plain convolutions, and the engines that run them."""

import keras
import kinds
import numpy as np
import pytest
import seeded
from keras import ops

import nfnet_keras as nfk
from nfnet_keras.layers import ScaledActivation, SkipGain, StochasticDepth, WSConv2D

FIRST = ("nfnet_f0", "nf_regnet_b0", "timm_dm_nfnet_f0", "timm_eca_nfnet_l0", "timm_nf_seresnet101", "nf_resnet101")
FEW = FIRST if keras.backend.backend() == "tensorflow" else FIRST[:2]
ALL = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in kinds.kinds()]


def draw(model) -> None:
    """Gives every parameter a value: what starts at zero would hide the branches and the classifier."""
    for variable in model.trainable_variables:
        layer, _, parameter = variable.path.rpartition("/")
        variable.assign(seeded.array(layer, parameter, variable.shape, 1))


def assert_same(model, folded, images, tolerance=1e-4) -> None:
    wanted, found = (ops.convert_to_numpy(each(images)) for each in (model, folded))
    spread = np.linalg.norm(wanted - wanted.mean(0), axis=-1).max()
    assert np.abs(wanted - found).max() < tolerance * spread


def tiny(**options):
    model = nfk.create_model("nfnet_tiny", **{"weights": None, "input_shape": (32, 32, 3), "classes": 5, **options})
    draw(model)
    return model


IMAGES = seeded.image((4, 32, 32, 3), 0)


@pytest.mark.parametrize("name", ALL)
def test_logits(name):
    model = kinds.make(name, classes=5, classifier_activation=None)
    draw(model)
    folded = nfk.fold_weight_standardization(model)
    assert_same(model, folded, seeded.image((3, *(64 if n is None else n for n in model.input_shape[1:])), 0))
    kept = [type(layer) for layer in folded.layers]
    assert not {WSConv2D, SkipGain, StochasticDepth, keras.layers.Rescaling} & set(kept)
    # The last activation goes to no convolution: its gain has nowhere to go.
    gains = [layer.gain for layer in folded.layers if isinstance(layer, ScaledActivation)]
    assert all(gain == 1.0 for gain in gains[:-1])


def test_model_is_left_alone_and_folded_twice_is_folded_once():
    model = tiny()
    before = [ops.convert_to_numpy(v) for v in model.variables]
    folded = nfk.fold_weight_standardization(model)
    for a, b in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(a, ops.convert_to_numpy(b))
    again = nfk.fold_weight_standardization(folded)
    assert_same(folded, again, IMAGES, 1e-6)
    assert not folded.trainable_variables


def test_metadata_and_saving(tmp_path):
    model = tiny()
    model.metadata = {"class_names": list("abcde"), "image_size": 32}
    folded = nfk.fold_weight_standardization(model)
    assert folded.metadata == model.metadata
    folded.save(tmp_path / "folded.keras")
    loaded = keras.models.load_model(tmp_path / "folded.keras")
    np.testing.assert_array_equal(*(ops.convert_to_numpy(each(IMAGES)) for each in (folded, loaded)))
    assert loaded.metadata == model.metadata


@pytest.mark.parametrize(
    "options", [{"features": True}, {"include_top": False}, {"include_top": False, "pooling": "avg"}]
)
def test_models_without_a_classifier(options):
    model = tiny(**options)
    folded = nfk.fold_weight_standardization(model)
    for a, b in zip(keras.tree.flatten(model(IMAGES)), keras.tree.flatten(folded(IMAGES)), strict=True):
        a, b = ops.convert_to_numpy(a), ops.convert_to_numpy(b)
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())


def test_head_of_ones_own_and_nested_models():
    backbone = tiny(include_top=False, pooling="avg")
    head = keras.layers.Dense(3, name="predictions")
    flat = nfk.NormalizerFreeModel(backbone.input, head(backbone.output))
    assert_same(flat, nfk.fold_weight_standardization(flat), IMAGES)
    nested = keras.Sequential([keras.Input((32, 32, 3)), backbone, keras.layers.Dense(3)])
    folded = nfk.fold_weight_standardization(nested)
    assert_same(nested, folded, IMAGES)
    assert not any(isinstance(layer, WSConv2D) for layer in folded._flatten_layers())


def test_layer_that_is_called_twice_keeps_its_factor():
    images = keras.Input((8, 8, 3))
    shared = WSConv2D(3, 3, padding="same")
    first = ScaledActivation("relu", 0.5)(images)
    second = ScaledActivation("relu", 2.0)(shared(first))
    gained = SkipGain(0.2, initializer="ones")(shared(second))
    model = keras.Model(images, keras.layers.Flatten()(keras.layers.Add()([gained, second])))
    assert_same(model, nfk.fold_weight_standardization(model), IMAGES[:, :8, :8])


def test_output_that_is_used_elsewhere_is_not_scaled():
    images = keras.Input((8, 8, 3))
    convolved = WSConv2D(4, 3)(images)
    branch = SkipGain(0.2, initializer="ones")(convolved)
    model = keras.Model(images, keras.layers.Flatten()(keras.layers.Concatenate()([convolved, branch])))
    assert_same(model, nfk.fold_weight_standardization(model), IMAGES[:, :8, :8])


def test_half_precision():
    model = tiny(classifier_activation=None)
    folded = nfk.fold_weight_standardization(model, dtype="bfloat16")
    assert {layer.compute_dtype for layer in folded.layers if layer.weights} == {"bfloat16", "float32"}
    assert_same(model, folded, IMAGES, 0.1)
    assert keras.backend.standardize_dtype(folded(IMAGES).dtype) == "float32"


def test_model_that_cannot_be_seen_is_refused():
    class Own(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match=r"built functional model.*Own"):
        nfk.fold_weight_standardization(Own())


def test_predictor_of_keras():
    model = tiny()
    predictor = nfk.Predictor(model, engine="keras")
    wanted = ops.convert_to_numpy(model(IMAGES))
    np.testing.assert_allclose(predictor(IMAGES), wanted, atol=1e-5)
    # The last batch is filled up, and what filled it is cut off.
    np.testing.assert_allclose(predictor.predict(IMAGES, batch_size=3), wanted, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() == "tensorflow", reason="other backends'")
def test_openvino_is_for_tensorflow():
    pytest.importorskip("openvino")
    with pytest.raises(ValueError, match="KERAS_BACKEND=tensorflow"):
        nfk.Predictor(tiny(), engine="openvino")
    assert nfk.Predictor(tiny()).engine == "keras"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="OpenVINO takes TensorFlow's graphs")
def test_predictor_of_openvino():
    pytest.importorskip("openvino")
    model = tiny()
    predictor = nfk.Predictor(model)
    assert predictor.engine == "openvino"
    wanted = ops.convert_to_numpy(model(IMAGES))
    found = [predictor(IMAGES), predictor(IMAGES[::-1])]
    # The engine's own memory would have been overwritten by the second call.
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)
    np.testing.assert_allclose(found[1], wanted[::-1], atol=1e-5)
    np.testing.assert_allclose(predictor.predict(IMAGES, batch_size=3), wanted, atol=1e-5)
    half = nfk.Predictor(model, "openvino", "bfloat16")(IMAGES)
    np.testing.assert_allclose(half, wanted, atol=0.05)


def _features(as_dictionary):
    model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), features=True)
    if not as_dictionary:
        return model
    # Alike in shape, so that only their order tells them apart; and the second is the first in the alphabet.
    first, *_ = model.outputs
    return keras.Model(model.input, {"z": first, "a": keras.layers.Rescaling(-2.0)(first)})


@pytest.mark.parametrize("as_dictionary", [False, True])
@pytest.mark.parametrize("engine", ["keras", "openvino"])
def test_predictor_gives_all_outputs(engine, as_dictionary):
    if engine == "openvino":
        pytest.importorskip("openvino")
        if keras.backend.backend() != "tensorflow":
            pytest.skip("OpenVINO takes TensorFlow's graphs")
    model = _features(as_dictionary)
    wanted = keras.tree.map_structure(ops.convert_to_numpy, model(IMAGES))
    predictor = nfk.Predictor(model, engine)
    for found in (predictor(IMAGES), predictor.predict(IMAGES, batch_size=3)):
        assert type(found) is type(wanted)
        keras.tree.map_structure(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, wanted)


def test_predictor_names_what_is_no_model_or_no_image():
    for model in ("model.keras", None):
        with pytest.raises(ValueError, match=f"built functional model. Received: {model!r}.*load_model"):
            nfk.Predictor(model)
    inputs = [keras.Input((4, 4, 3)) for _ in range(2)]
    with pytest.raises(ValueError, match=r"one input\. Received one of 2"):
        nfk.Predictor(keras.Model(inputs, keras.layers.Add()(inputs)))
    predictor = nfk.Predictor(tiny(), engine="keras")
    with pytest.raises(ValueError, match=r"array of numbers.*'cat\.jpg'"):
        predictor.predict("cat.jpg")
    with pytest.raises(ValueError, match=r"at least one image. .* shape \(\)"):
        predictor.predict(5.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"engine": "onnx"}, "engine='onnx'"), ({"dtype": "int8"}, "dtype='int8'")],
)
def test_predictor_refuses(options, words):
    with pytest.raises(ValueError, match=words):
        nfk.Predictor(tiny(), **options)
    predictor = nfk.Predictor(tiny(), engine="keras")
    with pytest.raises(ValueError, match="at least one image"):
        predictor.predict(IMAGES[:0])
    with pytest.raises(ValueError, match="batch_size=0"):
        predictor.predict(IMAGES, batch_size=0)
    for images in (IMAGES[:, :20, :20], IMAGES[..., :1], IMAGES[0]):
        # OpenVINO would take them.
        predictor._run = lambda images: images
        with pytest.raises(ValueError, match="takes images of shape"):
            predictor.predict(images)


def test_openvino_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        nfk.Predictor(tiny(), engine="openvino")
    assert nfk.Predictor(tiny()).engine == "keras"


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a SavedModel is TensorFlow's")
def test_export(tmp_path):
    model = tiny()
    nfk.fold_weight_standardization(model).export(tmp_path / "saved", verbose=False)
    import tensorflow as tf

    artifact = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(artifact.serve(IMAGES), ops.convert_to_numpy(model(IMAGES)), atol=1e-5)
