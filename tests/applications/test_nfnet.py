"""NFNets: the authors' numbers, and the interface of keras.applications."""

import itertools
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import nfnet_keras as nfk
from nfnet_keras.applications.nfnet import VARIANTS, NFNet, NFNetVariant, preprocess_input
from nfnet_keras.layers import StochasticDepth

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = [name for name in VARIANTS if name != "nfnet_tiny"]
structure = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="shapes alone, the same on every backend, and slow to build"
)


def key(name) -> str:
    """'nfnet_f0_plus' to 'NFNet-F0+'."""
    return "NFNet-" + name.removeprefix("nfnet_").replace("_plus", "+").replace("f", "F")


def count_by_hand(row: NFNetVariant, classes: int = 1000) -> int:
    def conv(size, inputs, outputs):
        return size * size * inputs * outputs + 2 * outputs

    channels = (3, *row.stem_widths, row.widths[0] // 2)
    total = sum(conv(3, a, b) for a, b in itertools.pairwise(channels))
    inputs = channels[-1]
    for width, depth in zip(row.widths, row.depths, strict=True):
        inner, hidden = width // 2 // row.group_width * row.group_width, width // 2
        for block in range(depth):
            total += conv(1, inputs, width) if block == 0 else 0
            total += conv(1, inputs, inner) + 2 * conv(3, row.group_width, inner) + conv(1, inner, width)
            total += 2 * width * hidden + width + hidden + 1
            inputs = width
    return total + conv(1, inputs, 2 * inputs) + (2 * inputs + 1) * classes


@pytest.mark.parametrize("name", PUBLISHED)
def test_table(name):
    published = json.loads((GOLDEN / "variants.json").read_text())[key(name)]
    row = VARIANTS[name]
    assert row.train_size == published["train_imsize"]
    assert row.test_size == published["test_imsize"]
    assert row.drop_rate == published["drop_rate"]
    assert (list(row.widths), list(row.depths)) == (published["width"], published["depth"])
    assert count_by_hand(row) == published["params"]


def test_all_constructors_are_public_and_listed():
    assert len(PUBLISHED) == 16
    assert nfk.list_models("nfnet_*") == sorted(VARIANTS)
    for name in VARIANTS:
        title = "NFNetTiny" if name == "nfnet_tiny" else key(name).replace("-", "").replace("+", "Plus")
        constructor = getattr(nfk, title)
        assert constructor.__name__ == title
        assert constructor is nfk.applications.get_constructor(name)


@structure
def test_default_input_is_the_test_size():
    for name, size in (("nfnet_tiny", 32), ("nfnet_f0", 256)):
        with keras.StatelessScope():
            assert nfk.create_model(name, weights=None).input_shape == (None, size, size, 3)
            headless = nfk.create_model(name, weights=None, include_top=False)
        assert headless.input_shape == (None, None, None, 3)


# The rest is on the tiny one.


@pytest.fixture(scope="module")
def tiny():
    return nfk.NFNetTiny(weights=None, classes=5)


def test_positional_arguments(tiny):
    with keras.StatelessScope():
        model = nfk.NFNetTiny(True, None, None, (64, 48, 3), None, 5, None, "mine")
    assert (model.name, model.input_shape, model.output_shape) == ("mine", (None, 64, 48, 3), (None, 5))
    assert [v.path for v in model.trainable_variables] == [v.path for v in tiny.trainable_variables]


def test_probabilities_and_logits(tiny):
    x = np.random.default_rng(0).standard_normal((3, 32, 32, 3)).astype("float32")
    logits_model = nfk.NFNetTiny(weights=None, classes=5, classifier_activation=None)
    logits_model.set_weights(tiny.get_weights())
    probabilities, logits = (m.predict(x, verbose=0) for m in (tiny, logits_model))
    np.testing.assert_allclose(probabilities.sum(1), np.ones(3), rtol=1e-5)
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-4)


def test_head(tiny):
    head = tiny.get_layer("predictions")
    assert isinstance(head, keras.layers.Dense)
    assert abs(ops.convert_to_numpy(head.kernel).std() - 0.01) < 0.001
    assert tiny.get_layer("dropout").rate == VARIANTS["nfnet_tiny"].drop_rate
    assert all(float(v) == 0 for v in tiny.trainable_variables if v.path.endswith("skip_gain"))
    with keras.StatelessScope():
        model = nfk.NFNetTiny(weights=None, drop_rate=0.0)
    assert "dropout" not in [layer.name for layer in model.layers]


def test_without_top_any_size_and_pooling():
    """Sizes that do not halve evenly, too."""
    rng = np.random.default_rng(0)
    model = nfk.NFNetTiny(include_top=False, weights=None)
    assert model.output_shape == (None, None, None, 256)
    for pooling, reduce in (("avg", np.mean), ("max", np.max)):
        pooled = nfk.NFNetTiny(include_top=False, weights=None, pooling=pooling)
        assert pooled.output_shape == (None, 256)
        pooled.set_weights(model.get_weights())
        x = rng.standard_normal((2, 75, 101, 3)).astype("float32")
        features = model.predict(x, verbose=0)
        assert features.shape == (2, 3, 4, 256)
        np.testing.assert_allclose(pooled.predict(x, verbose=0), reduce(features, axis=(1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels):
    with keras.StatelessScope():
        model = nfk.NFNetTiny(include_top=False, weights=None, input_shape=(32, None, channels))
    assert model.input_shape == (None, 32, None, channels)
    assert tuple(model.get_layer("stem_conv0").kernel.shape) == (3, 3, channels, 16)


def test_input_tensor(tiny):
    inputs = keras.Input((32, 32, 3), name="image")
    direct = nfk.NFNetTiny(weights=None, classes=5, input_tensor=inputs)
    assert keras.tree.flatten(direct.input) == [inputs]
    scaled = keras.layers.Rescaling(0.5)(inputs)
    behind = nfk.NFNetTiny(weights=None, classes=5, input_tensor=scaled)
    assert keras.tree.flatten(behind.input) == [inputs]
    for model in (direct, behind):
        model.set_weights(tiny.get_weights())
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(direct.predict(x, verbose=0), tiny.predict(x, verbose=0), atol=1e-5)
    np.testing.assert_allclose(behind.predict(x, verbose=0), tiny.predict(0.5 * x, verbose=0), atol=1e-5)


def test_stochastic_depth_rates_grow_linearly(small_row):
    with keras.StatelessScope():
        model = NFNet(small_row, weights=None, stochastic_depth_rate=0.3)
    rates = [layer.rate for layer in model.layers if isinstance(layer, StochasticDepth)]
    # Block i of 6 has 0.3 * i / 6; the first has none and so no layer.
    np.testing.assert_allclose(rates, [0.3 * i / 6 for i in range(1, 6)])
    with keras.StatelessScope():
        model = NFNet(small_row, weights=None)
        assert max(layer.rate for layer in model.layers if isinstance(layer, StochasticDepth)) == pytest.approx(
            0.25 * 5 / 6
        )


def test_a_row_of_ones_own():
    row = NFNetVariant("mine", (32, 64, 96, 96), (1, 1, 1, 1), 0.0, 32, 40, group_width=16)
    with keras.StatelessScope():
        model = NFNet(row, weights=None, classes=7, width=2.0, group_width=8, se_ratio=None)
    assert (model.name, model.input_shape, model.output_shape) == ("mine", (None, 40, 40, 3), (None, 7))
    conv = model.get_layer("stage1_block1_conv1")
    assert (conv.filters, conv.groups) == (32, 4)
    assert not any("_se" in layer.name for layer in model.layers)


def test_preprocess_input():
    x = np.random.default_rng(0).uniform(0, 255, (2, 3, 4, 3)).astype("float32")
    expected = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    kept = x.copy()
    np.testing.assert_allclose(preprocess_input(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(x, kept)
    first = preprocess_input(x.transpose(0, 3, 1, 2), data_format="channels_first")
    np.testing.assert_allclose(first, expected.transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    got = ops.convert_to_numpy(preprocess_input(ops.convert_to_tensor(x)))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
def test_weights_from_a_file(tiny, tmp_path, suffix):
    path = tmp_path / f"tiny{suffix}"
    (tiny.save if suffix == ".keras" else tiny.save_weights)(path)
    for given in (path, str(path)):
        model = nfk.NFNetTiny(weights=given, classes=5, input_shape=(64, 64, 3))
        for a, b in zip(model.get_weights(), tiny.get_weights(), strict=True):
            np.testing.assert_array_equal(a, b)
    for options in ({"classes": 5, "se_ratio": 0.25}, {"classes": 5, "use_two_convs": False}):
        with pytest.raises(
            ValueError, match=r"does not fit the model 'nfnet_tiny': .*By its blocks the file is for 'nfnet_tiny', but"
        ):
            nfk.NFNetTiny(weights=path, **options)


def test_a_broken_file(tmp_path):
    path = tmp_path / "broken.weights.h5"
    path.write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match=r"broken\.weights\.h5.*no checkpoint"):
        nfk.NFNetTiny(weights=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": __file__}, "no checkpoint"),
        ({"weights": 3}, "None, 'imagenet' or the path of a file. Received: 3"),
        ({"input_shape": (31, 64, 3)}, r"at least 32 x 32.*\(31, 64, 3\)"),
        ({"input_shape": (64, 16, 3)}, "at least 32 x 32"),
        ({"input_shape": (64, 64)}, r"Received: \(64, 64\)"),
        ({"input_shape": (64, 64, None)}, "height, width, channels"),
        ({"input_shape": 64}, "height, width, channels"),
        ({"input_tensor": np.zeros((1, 32, 32, 3))}, "Keras tensor.*ndarray"),
        ({"include_top": False, "pooling": "mean"}, "pooling='mean'"),
        ({"activation": "gelo"}, "Did you mean 'gelu'"),
        ({"drop_rate": 1.0}, "drop_rate=1.0"),
        ({"drop_rate": -0.5}, "drop_rate=-0.5"),
        ({"stochastic_depth_rate": 1.5}, "stochastic_depth_rate=1.5"),
        ({"group_width": 64}, "less than one group of 64"),
        ({"width": 0.1}, "less than one group"),
        ({"classes": 0}, "classes=0"),
    ],
    ids=str,
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        nfk.NFNetTiny(**{"weights": None, **options})


def test_input_shape_must_be_that_of_the_input_tensor():
    with pytest.raises(ValueError, match=r"\(64, 64, 3\) is not the shape of `input_tensor`, \(32, 32, 3\)"):
        nfk.NFNetTiny(weights=None, input_tensor=keras.Input((32, 32, 3)), input_shape=(64, 64, 3))
    with pytest.raises(ValueError, match="at least 32"):
        nfk.NFNetTiny(weights=None, input_tensor=keras.Input((16, 16, 3)))


def test_channels_first_setting():
    before = keras.config.image_data_format()
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ValueError, match="channels last"):
            nfk.NFNetTiny(weights=None)
    finally:
        keras.config.set_image_data_format(before)


def test_mixed_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        with keras.StatelessScope():
            model = nfk.NFNetTiny(weights=None, classes=5)
    finally:
        keras.config.set_dtype_policy(before)
    assert model.output.dtype == "float32"
    assert model.get_layer("final_conv").output.dtype == "bfloat16"
    assert model.get_layer("final_conv").compute_dtype == "bfloat16"
    assert {keras.backend.standardize_dtype(v.dtype) for v in model.trainable_variables} == {"float32"}
