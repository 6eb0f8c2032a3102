"""OpenVINO: the network that it gets."""

import keras
import numpy as np
import pytest

import nfnet_keras as nfk
from nfnet_keras import openvino_engine as engine
from nfnet_keras.layers import EfficientChannelAttention, ScaledActivation, SqueezeExcite

pytest.importorskip("openvino")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="OpenVINO takes TensorFlow's graphs")
IMAGES = np.random.default_rng(0).standard_normal((8, 32, 32, 3)).astype("float32")


def types(network) -> list[str]:
    return [node.get_type_name() for node in network.get_ops()]


def counted(network, name: str) -> int:
    return types(network).count(name)


@pytest.mark.parametrize("approximate", [True, False])
def test_gelu_is_one_operation(approximate):
    # As several, OpenVINO runs it behind a convolution and not with it.
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(5, 1)(ScaledActivation("gelu", approximate=approximate)(inputs))
    model = keras.Model(inputs, ScaledActivation("gelu", 0.5, approximate=approximate)(x))
    network = engine._network(model)
    assert counted(network, "Gelu") == 2
    assert {"Erf", "Sigmoid", "Tanh"}.isdisjoint(types(network))
    x = 4 * IMAGES[:2, :4, :4]
    np.testing.assert_allclose(engine.openvino_engine(model, "float32")(x)[0], model(x), atol=3e-6)


def test_activations_of_models_inside_of_models():
    backbone = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), include_top=False, pooling="avg")
    model = keras.Sequential([keras.Input((32, 32, 3)), backbone, keras.layers.Dense(3)])
    gelus = sum(isinstance(layer, ScaledActivation) for layer in backbone.layers)
    assert gelus and counted(engine._network(model), "Gelu") >= gelus


def test_means_are_poolings_where_the_size_is_known():
    inputs = keras.Input((None, None, 6))
    x = keras.layers.Conv2D(6, 3, padding="same")(inputs)
    model = keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(SqueezeExcite(4)(x)))
    network = engine._network(model)
    engine.pool_means(network)
    assert (counted(network, "ReduceMean"), counted(network, "AvgPool")) == (2, 0)
    network.reshape([2, 5, 7, 6])
    engine.pool_means(network)
    assert (counted(network, "ReduceMean"), counted(network, "AvgPool")) == (0, 2)
    images = np.random.default_rng(1).standard_normal((2, 5, 7, 6)).astype("float32")
    np.testing.assert_allclose(engine.openvino_engine(model, "float32")(images)[0], model(images), atol=1e-6)


def test_other_means_stay():
    inputs = keras.Input((4, 5, 3))
    model = keras.Model(inputs, keras.ops.mean(inputs, axis=3))
    network = engine._network(model)
    engine.pool_means(network)
    assert counted(network, "AvgPool") == 0


def widening(attention, filters: int = 12, **options) -> keras.Model:
    """A 1 x 1 convolution with attention behind it."""
    inputs = keras.Input((6, 6, 5))
    options = {"kernel_size": 1, "bias_initializer": keras.initializers.RandomNormal(seed=1), **options}
    return keras.Model(inputs, attention(keras.layers.Conv2D(filters, **options)(inputs)))


def squeezed(model: keras.Model, batch: int) -> list[tuple]:
    """Returns the shapes of what a network takes means of."""
    network = engine._network(model)
    network.reshape([batch, 6, 6, 5])
    engine.squeeze_first(network)
    means = [node for node in network.get_ops() if node.get_type_name() == "ReduceMean"]
    return [tuple(node.input_value(0).get_shape())[1:] for node in means]


@pytest.mark.parametrize("attention", [SqueezeExcite(0.5), EfficientChannelAttention()], ids=["se", "eca"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_means_are_taken_before_a_convolution(attention, use_bias):
    model = widening(attention, use_bias=use_bias)
    assert squeezed(model, 3) == [(5, 6, 6)]
    images = np.random.default_rng(2).standard_normal((3, 6, 6, 5)).astype("float32")
    np.testing.assert_allclose(engine.openvino_engine(model, "float32")(images)[0], model(images), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({"filters": 4}, (4, 6, 6)),  # it narrows
        ({"kernel_size": 3, "padding": "same"}, (12, 6, 6)),
        ({"strides": 2}, (12, 3, 3)),
        ({"activation": "relu"}, (12, 6, 6)),
    ],
    ids=str,
)
def test_means_stay_behind_what_does_not_commute(options, seen):
    model = widening(SqueezeExcite(0.5), **options)
    assert squeezed(model, 3) == [seen]
    images = np.random.default_rng(2).standard_normal((3, 6, 6, 5)).astype("float32")
    np.testing.assert_allclose(engine.openvino_engine(model, "float32")(images)[0], model(images), atol=2e-6)


def test_means_stay_where_the_kernel_is_more_than_the_image():
    # Without a fully connected layer to join it with, the kernel is read twice.
    inputs = keras.Input((6, 6, 5))
    x = keras.layers.Conv2D(2000, 1)(keras.layers.AveragePooling2D(6)(inputs))
    network = engine._network(keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(x)))
    network.reshape([1, 6, 6, 5])
    engine.squeeze_first(network)
    assert [n.input_value(0).get_shape()[1] for n in network.get_ops() if n.get_type_name() == "ReduceMean"] == [2000]


@pytest.mark.parametrize(
    ("cores", "dtype"),
    [
        (3, "float32"),
        (2, "bfloat16"),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in ((1, "float32"), (2, "float32"), (1, "bfloat16"), (3, "bfloat16"))
        ),
    ],
)
def test_batches_of_all_sizes(cores, dtype, small_nfnet, monkeypatch):
    monkeypatch.setattr(engine, "usable_cores", lambda: cores)
    compute = engine.openvino_engine(small_nfnet(input_shape=(32, 32, 3)), dtype)

    def run(images):
        (found,) = compute(images)
        return found

    whole = np.concatenate([run(image[None]) for image in IMAGES])
    for size in range(1, 9):
        for _ in range(2):
            found = run(IMAGES[:size])
            np.testing.assert_allclose(found, whole[:size], atol=2e-5 if dtype == "float32" else 0.2)
    assert found.dtype == "float32"
    first = run(IMAGES[:4])
    kept = first.copy()
    run(IMAGES[4:])
    np.testing.assert_array_equal(first, kept)


def test_ctrl_c_after_two_engines_is_an_interrupt(new_process):
    # Where the processor has AMX, two `Core`s left the thread a stack for signal handlers that was freed memory.
    code = """
import gc, os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
import nfnet_keras as nfk
from nfnet_keras.openvino_engine import openvino_engine
model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=2)
engines = [openvino_engine(model, "float32") for _ in range(2)]
for engine in engines:
    engine(np.zeros((1, 32, 32, 3), "float32"))
del engine
while engines:
    del engines[0]
    gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
    report("nothing")
except KeyboardInterrupt:
    report("interrupted")
"""
    assert new_process(code) == "interrupted"


def test_nothing_is_reported(new_process, tmp_path):
    code = """
import os, sys
import nfnet_keras as nfk
model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=2)
engine = nfk.Predictor(model, "openvino").engine
nfk.export(model, "exported.xml")
report([engine, "openvino_telemetry" in sys.modules, os.listdir(os.environ["HOME"])])
"""
    home = tmp_path / "home"
    home.mkdir()
    engine, reports, found = new_process(code, env={"HOME": str(home), "CI": ""})
    # Its telemetry would keep its numbers in ~/intel.
    assert engine == "openvino" and not reports and "intel" not in found
