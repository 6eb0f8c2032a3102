"""NormalizerFreeModel: clipping in every training step, whatever way the model is trained, saved and put together."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

import nfnet_keras as nfk
from nfnet_keras.optimizers import AGC, SGD_AGC, clips_adaptively, warmup_cosine

K = keras.optimizers
BACKEND = keras.backend.backend()
LR, FACTOR = 0.5, 0.2


def make(cls=nfk.NormalizerFreeModel, seed=1, trunk_only=False, dtype=None):
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6, 6, 3))
    x = nfk.layers.WSConv2D(4, 3, name="conv", dtype=dtype)(inputs)
    x = nfk.layers.ScaledActivation("relu", dtype=dtype)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    if not trunk_only:
        # In float32 like the package's own heads: in float16 the scaled loss would overflow.
        x = keras.layers.Dense(3, "softmax", name="predictions", dtype="float32")(x)
    return cls(inputs, x)


def data(count=8):
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 6, 6, 3)).astype("float32"), np.eye(3, dtype="float32")[
        rng.integers(0, 3, count)
    ]


def values(model):
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]


def same(a, b, tolerance=1e-5):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@pytest.fixture
def manual_step(gradients, numpy_clip, numpy_norm):
    """manual_step(model, x, y): weights after one clipped step of SGD, and the share of units clipped."""

    def step(model, x, y, factor=FACTOR, lr=LR, weights=None, axes=None):
        axes, weights = axes or {}, np.ones(len(y), "float32") if weights is None else weights
        variables = model.trainable_variables

        def loss():
            return ops.mean(ops.categorical_crossentropy(y, model(x, training=False)) * ops.convert_to_tensor(weights))

        after, over, units = [], 0, 0
        for v, g, p in zip(variables, gradients(loss, variables), values(model), strict=True):
            if not v.path.endswith("predictions/kernel"):
                axis = axes.get(v.path)
                norm = numpy_norm(g, axis)
                over += np.sum(norm > factor * np.maximum(numpy_norm(p, axis), 1e-3))
                units += norm.size
                g = numpy_clip(g, p, factor, axis=axis)
            after.append(p - lr * g)
        return after, over / units

    return step


def compiled(optimizer=None, model=None, **options):
    model = model or make()
    optimizer = optimizer or K.SGD(LR)
    model.compile(optimizer, "categorical_crossentropy", **{"clip_factor": FACTOR, **options})
    return model


def test_compile_wraps_the_optimizer():
    for given in (K.Adam(0.01), "adam", "sgd"):
        model = make()
        model.compile(given, "categorical_crossentropy")
        assert type(model.optimizer) is AGC
        assert model.optimizer.clipper.clip_factor == 0.01
    model = compiled(clip_factor=None)
    assert isinstance(model.optimizer, K.SGD)
    assert not clips_adaptively(model.optimizer)
    with pytest.raises(ValueError, match="clip_factor=0"):
        compiled(clip_factor=0)


@pytest.mark.parametrize("optimizer", [lambda: SGD_AGC(0.1, clip_factor=0.3), lambda: AGC(K.Adam(), clip_factor=0.3)])
def test_an_optimizer_that_clips_is_used_as_it_is(optimizer):
    optimizer = optimizer()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = compiled(optimizer)
    assert model.optimizer is optimizer
    assert model.optimizer.clipper.clip_factor == 0.3


@pytest.mark.parametrize("setting", [{"clipnorm": 1.0}, {"clipvalue": 0.5}, {"global_clipnorm": 2.0}], ids=str)
def test_other_clipping_is_left_alone_with_a_warning(setting):
    optimizer = K.SGD(0.1, **setting)
    ((name, value),) = setting.items()
    with pytest.warns(UserWarning, match=f"{name}={value}"):
        model = compiled(optimizer)
    assert model.optimizer is optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(K.SGD(0.1, **setting), clip_factor=None)
        both = compiled(AGC(K.SGD(0.1, **setting)))
    assert clips_adaptively(both.optimizer)


WAYS = ["train_on_batch", "fit", "eager"] + (["jit", "dataset"] if BACKEND == "tensorflow" else [])


@pytest.mark.parametrize("way", WAYS)
def test_one_step_is_a_clipped_step(way, manual_step):
    x, y = data()
    model = compiled(run_eagerly=way == "eager", **({"jit_compile": True} if way == "jit" else {}))
    expected, share = manual_step(model, x, y)
    unclipped, _ = manual_step(model, x, y, factor=1e9)
    assert 0 < share < 1
    if way == "train_on_batch":
        logs = model.train_on_batch(x, y, return_dict=True)
    elif way == "dataset":
        import tensorflow as tf

        history = model.fit(tf.data.Dataset.from_tensor_slices((x, y)).batch(8), verbose=0).history
        logs = {k: v[0] for k, v in history.items()}
    else:
        logs = {k: v[0] for k, v in model.fit(x, y, batch_size=8, verbose=0).history.items()}
    same(values(model), expected)
    assert max(np.max(np.abs(a - b)) for a, b in zip(expected, unclipped, strict=True)) > 1e-3
    assert float(logs["agc_clipped"]) == pytest.approx(share)


def test_logs_and_history():
    x, y = data()
    model = compiled(metrics=["accuracy"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        history = model.fit(x, y, batch_size=4, epochs=2, validation_data=(x, y), verbose=0).history
        evaluated = model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(history) == {"loss", "accuracy", "agc_clipped", "val_loss", "val_accuracy"}
    assert all(0 <= value <= 1 for value in history["agc_clipped"])
    assert set(evaluated) == {"loss", "accuracy"}
    assert len(model.evaluate(x, y, verbose=0)) == 2
    assert set(model.test_on_batch(x, y, return_dict=True)) == {"loss", "accuracy"}
    assert model.predict(x, verbose=0).shape == (8, 3)


def test_logged_share_is_the_mean_over_the_epoch(manual_step):
    x, y = data()
    model = compiled()
    shares = []
    start = values(model)
    for part in (slice(0, 4), slice(4, 8)):
        after, share = manual_step(model, x[part], y[part])
        shares.append(share)
        for variable, value in zip(model.trainable_variables, after, strict=True):
            variable.assign(value)
    for variable, value in zip(model.trainable_variables, start, strict=True):
        variable.assign(value)
    history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    assert history["agc_clipped"] == [pytest.approx(np.mean(shares))]
    same(values(model), after)


def test_without_clipping_there_is_no_log():
    x, y = data()
    assert set(compiled(clip_factor=None).fit(x, y, verbose=0).history) == {"loss"}


def test_sample_and_class_weights(manual_step):
    x, y = data()
    weights = np.linspace(0.1, 3, 8).astype("float32")
    model = compiled()
    # Keras divides by the number of samples, not by the sum of the weights.
    expected, _ = manual_step(model, x, y, weights=weights)
    model.fit(x, y, sample_weight=weights, batch_size=8, shuffle=False, verbose=0)
    same(values(model), expected)
    by_class = {0: 0.5, 1: 2.0, 2: 1.0}
    model = compiled()
    expected, _ = manual_step(model, x, y, weights=np.float32([by_class[i] for i in y.argmax(1)]))
    model.fit(x, y, class_weight=by_class, batch_size=8, verbose=0)
    same(values(model), expected)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution above 1 with PyTorch")
def test_steps_per_execution():
    x, y = data(16)
    results = []
    for steps in (1, 2):
        model = compiled(steps_per_execution=steps)
        history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
        results.append([*values(model), np.array(history["agc_clipped"])])
    same(*results)


def test_gradient_accumulation(manual_step):
    x, y = data()
    model = compiled(K.SGD(LR, gradient_accumulation_steps=2))
    # The mean of two gradients of half the images each is that of all.
    expected, share = manual_step(model, x, y)
    history = model.fit(x, y, batch_size=4, shuffle=False, verbose=0).history
    same(values(model), expected)
    # Batches that only accumulate clip nothing and do not count.
    assert history["agc_clipped"] == [pytest.approx(share)]


def test_frozen_layers_do_not_count(manual_step):
    x, y = data()
    model = make()
    model.get_layer("conv").trainable = False
    before = np.array(ops.convert_to_numpy(model.get_layer("conv").kernel))
    compiled(model=model)
    expected, share = manual_step(model, x, y, factor=FACTOR)
    assert float(model.train_on_batch(x, y, return_dict=True)["agc_clipped"]) == pytest.approx(share)
    same(values(model), expected)
    np.testing.assert_array_equal(ops.convert_to_numpy(model.get_layer("conv").kernel), before)


def test_float16_scales_the_loss_and_clips_unscaled_gradients():
    x, y = data()
    results = {}
    for dtype in ("mixed_float16", None):
        keras.config.set_dtype_policy(dtype or "float32")
        try:
            model = make(dtype=dtype)
        finally:
            keras.config.set_dtype_policy("float32")
        before = values(model)
        compiled(model=model)
        logs = model.train_on_batch(x, y, return_dict=True)
        results[dtype] = ([b - a for a, b in zip(before, values(model), strict=True)], float(logs["agc_clipped"]))
        assert (type(model.optimizer) is K.LossScaleOptimizer) == (dtype == "mixed_float16")
        assert clips_adaptively(model.optimizer)
    for half, full in zip(results["mixed_float16"][0], results[None][0], strict=True):
        np.testing.assert_allclose(half, full, atol=0.03 * np.max(np.abs(full)) + 1e-6)
    assert results["mixed_float16"][1] == pytest.approx(results[None][1])


def test_loss_scaling_inside_is_not_doubled():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = make()
    finally:
        keras.config.set_dtype_policy("float32")
    optimizer = AGC(K.LossScaleOptimizer(K.SGD(LR)), clip_factor=FACTOR)
    assert compiled(optimizer, model).optimizer is optimizer


def test_outer_models(manual_step):
    """What the documentation says of a backbone in other models."""
    x, y = data()
    for outer, clips in ((nfk.NormalizerFreeModel, True), (keras.Model, False)):
        backbone = make(trunk_only=True)
        keras.utils.set_random_seed(2)
        model = outer(backbone.input, keras.layers.Dense(3, "softmax", name="predictions")(backbone.output))
        clipped, _ = manual_step(model, x, y)
        plain, _ = manual_step(model, x, y, factor=1e9)
        model.compile(K.SGD(LR), "categorical_crossentropy", **({"clip_factor": FACTOR} if clips else {}))
        model.train_on_batch(x, y)
        same(values(model), clipped if clips else plain)


@pytest.mark.parametrize("optimizer", [lambda: AGC(K.SGD(LR), clip_factor=FACTOR)])
def test_plain_model_with_an_optimizer_that_clips(optimizer, manual_step):
    x, y = data()
    backbone = make(trunk_only=True)
    model = keras.Sequential([backbone, keras.layers.Dense(3, "softmax", name="predictions")])
    model.build((None, 6, 6, 3))
    expected, _ = manual_step(model, x, y)
    model.compile(optimizer(), "categorical_crossentropy")
    model.train_on_batch(x, y)
    same(values(model), expected)


def test_layers_of_other_kinds_get_their_axes(manual_step):
    x, y = data()
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6, 6, 3))
    h = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(inputs)
    h = keras.layers.Conv2DTranspose(4, 3, name="transposed")(h)
    inner = keras.Sequential([keras.layers.SeparableConv2D(5, 3, name="separable"), keras.layers.GlobalMaxPooling2D()])
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(3, "softmax", name="predictions")(inner(h)))
    by_layer = {
        "depthwise/kernel": (0, 1),
        "transposed/kernel": (0, 1, 3),
        "separable/depthwise_kernel": (0, 1),
        "separable/pointwise_kernel": (0, 1, 2),
    }
    axes = {v.path: a for v in model.trainable_variables for end, a in by_layer.items() if v.path.endswith(end)}
    assert len(axes) == 4
    compiled(model=model)
    expected, share = manual_step(model, x, y, axes=axes)
    assert float(model.train_on_batch(x, y, return_dict=True)["agc_clipped"]) == pytest.approx(share)
    same(values(model), expected)


def test_subclass_of_a_functional_model():
    class Mine(nfk.NormalizerFreeModel):
        def __init__(self):
            inputs = keras.Input((6, 6, 3))
            super().__init__(inputs, keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(inputs)))

    x, y = data()
    model = Mine()
    model.compile("sgd", "categorical_crossentropy")
    assert "agc_clipped" in model.fit(x, y, verbose=0).history


def test_multiple_outputs_and_metrics():
    x, y = data()
    inputs = keras.Input((6, 6, 3))
    h = keras.layers.GlobalAveragePooling2D()(nfk.layers.WSConv2D(4, 3)(inputs))
    outputs = {"a": keras.layers.Dense(3, "softmax", name="a")(h), "b": keras.layers.Dense(1, name="b")(h)}
    model = nfk.NormalizerFreeModel(inputs, outputs)
    model.compile("sgd", {"a": "categorical_crossentropy", "b": "mse"}, metrics={"a": ["accuracy"]})
    history = model.fit(x, {"a": y, "b": y[:, :1]}, verbose=0).history
    assert {"loss", "a_accuracy", "agc_clipped"} <= set(history)


def test_save_keeps_the_compile_state(tmp_path):
    x, y = data()
    model = compiled(K.SGD(warmup_cosine(LR, 20, 1), momentum=0.9), metrics=["accuracy"])
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert type(loaded) is nfk.NormalizerFreeModel
    assert type(loaded.optimizer) is AGC
    assert loaded.optimizer.clipper.clip_factor == FACTOR
    same(
        [ops.convert_to_numpy(v) for v in loaded.optimizer.variables],
        [ops.convert_to_numpy(v) for v in model.optimizer.variables],
    )
    histories = [m.fit(x, y, shuffle=False, epochs=2, verbose=0).history for m in (model, loaded)]
    assert histories[0].keys() == histories[1].keys()
    for name in histories[0]:
        np.testing.assert_allclose(histories[1][name], histories[0][name], rtol=1e-5, err_msg=name)
    same(values(loaded), values(model))


@pytest.mark.parametrize("clip_factor", [None, 0.3])
def test_clip_factor_survives_compile_from_config(clip_factor, tmp_path):
    model = compiled(clip_factor=clip_factor)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.get_compile_config()["clip_factor"] == clip_factor
    assert clips_adaptively(loaded.optimizer) == (clip_factor is not None)


ELSEWHERE = """
import keras, nfnet_keras
x, y = np.load("x.npy"), np.load("y.npy")
result = {}
for name in names:
    model = keras.models.load_model(f"{name}.keras")
    logs = [model.train_on_batch(x, y, return_dict=True) for _ in range(2)]
    result[name] = [[float(log["loss"]), float(log["agc_clipped"])] for log in logs]
report(result)
"""


def test_training_goes_on_in_a_new_process(tmp_path, new_process):
    x, y = data()
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    expected = {}
    made = {"wrapped": K.Adam(0.01), "sgd_agc": SGD_AGC(LR, clip_factor=FACTOR, use_ema=True)}
    for name, optimizer in made.items():
        model = compiled(optimizer)
        for _ in range(2):
            model.train_on_batch(x, y)
        model.save(tmp_path / f"{name}.keras")
        logs = [model.train_on_batch(x, y, return_dict=True) for _ in range(2)]
        expected[name] = [[float(log["loss"]), float(log["agc_clipped"])] for log in logs]
    got = new_process(ELSEWHERE, names=list(made))
    for name in made:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, err_msg=name)


def test_compile_again_and_clone():
    x, y = data()
    model = compiled()
    model.fit(x, y, verbose=0)
    model.compile("adam", "categorical_crossentropy", clip_factor=0.5)
    assert "agc_clipped" in model.fit(x, y, verbose=0).history
    model.compile("sgd", "categorical_crossentropy", clip_factor=None)
    assert "agc_clipped" not in model.fit(x, y, verbose=0).history
    assert type(keras.models.clone_model(model)) is nfk.NormalizerFreeModel


def test_a_single_clippable_parameter(manual_step):
    """A head alone: its kernel is left unclipped, its bias is all there is to clip."""
    x, y = data()
    keras.utils.set_random_seed(4)
    inputs = keras.Input((6, 6, 3))
    h = keras.layers.GlobalAveragePooling2D()(inputs)
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(3, "softmax", name="predictions")(h))
    compiled(model=model)
    expected, share = manual_step(model, x, y)
    assert float(model.train_on_batch(x, y, return_dict=True)["agc_clipped"]) == pytest.approx(share)
    same(values(model), expected)


def test_metadata_is_kept_however_it_is_set(tmp_path):
    inputs = keras.Input((4,))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(2)(inputs))
    assert model.metadata == {} and "metadata" not in model.get_config()
    model.metadata = {"image_size": 32}
    model.metadata["class_names"] = ["cat", "dog"]
    config = model.get_config()
    model.save(tmp_path / "model.keras")
    model.metadata["class_names"].append("mouse")
    assert config["metadata"] == {"image_size": 32, "class_names": ["cat", "dog"]}
    assert keras.models.load_model(tmp_path / "model.keras").metadata == config["metadata"]
    with pytest.raises(TypeError):
        model.metadata = {"class_names": object()}
    with pytest.raises(TypeError, match=r"must be a dictionary.*'abc'"):
        model.metadata = "abc"
