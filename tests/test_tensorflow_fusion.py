"""Compiled parts of a TensorFlow training step on a CPU: the numbers of the parts they stand for."""

import keras
import numpy as np
import pytest

import nfnet_keras as nfk
from nfnet_keras.layers import ACTIVATION_GAINS, ScaledActivation, WSConv2D

tf = pytest.importorskip("tensorflow")
fusion = pytest.importorskip("nfnet_keras.tensorflow_fusion")
COMPILES = getattr(fusion, "compiles", None)
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")


def both_ways(layer, x, upstream, monkeypatch):
    """Returns output and gradients of a layer in a graph: with compiled parts, and without."""
    found = []
    for compiles in (COMPILES, lambda tensor: False):
        monkeypatch.setattr(fusion, "compiles", compiles)

        @tf.function
        def compute(x, upstream):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True)
            return y, tape.gradient(y, [x, *layer.trainable_variables], upstream)

        y, gradients = compute(x, upstream)
        types = {op.type for op in compute.get_concrete_function(x, upstream).graph.get_operations()}
        found.append(([y, *gradients], types))
    return found


def assert_equal(layer, x, monkeypatch, tolerance=2e-6):
    upstream = tf.random.stateless_normal(layer(x).shape, (3, 4), dtype=layer.compute_dtype)
    (fused, types), (plain, plain_types) = both_ways(layer, x, upstream, monkeypatch)
    # Otherwise nothing is compared.
    assert types != plain_types
    for a, b in zip(fused, plain, strict=True):
        a, b = np.asarray(a, "float32"), np.asarray(b, "float32")
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("name", sorted(ACTIVATION_GAINS))
def test_activations(name, monkeypatch):
    x = 3 * tf.random.stateless_normal((2, 3, 3, 8), (1, 2))
    assert_equal(ScaledActivation(name, 0.7), x, monkeypatch)


def test_exact_gelu_and_half_precision(monkeypatch):
    x = 3 * tf.random.stateless_normal((2, 3, 3, 8), (1, 2))
    assert_equal(ScaledActivation("gelu", approximate=False), x, monkeypatch)
    assert_equal(ScaledActivation("gelu", dtype="mixed_bfloat16"), tf.cast(x, "bfloat16"), monkeypatch, 2e-2)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"use_bias": False}, {"variance_epsilon": 1e-5, "scale": 1.7}])
@pytest.mark.parametrize("padding", ["same", "symmetric"])
def test_convolutions(kernel_size, strides, options, padding, monkeypatch):
    monkeypatch.setattr(fusion, "MIN_KERNEL_SIZE", 1)
    layer = WSConv2D(8, kernel_size, strides=strides, padding=padding, **options)
    assert_equal(layer, tf.random.stateless_normal((2, 7, 6, 16), (1, 2)), monkeypatch)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_channels_first(kernel_size, groups, monkeypatch):
    monkeypatch.setattr(fusion, "MIN_KERNEL_SIZE", 1)
    layer = WSConv2D(8, kernel_size, padding="same", groups=groups, data_format="channels_first")
    assert_equal(layer, tf.random.stateless_normal((2, 16, 7, 8), (1, 2)), monkeypatch)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("groups", [1, 4])
def test_half_precision_and_double(kernel_size, groups, monkeypatch):
    monkeypatch.setattr(fusion, "MIN_KERNEL_SIZE", 1)
    x = tf.random.stateless_normal((2, 7, 6, 16), (1, 2))
    for dtype, kind, tolerance in (("mixed_bfloat16", "bfloat16", 2e-2), ("float64", "float64", 2e-6)):
        layer = WSConv2D(8, kernel_size, padding="same", groups=groups, dtype=dtype)
        assert_equal(layer, tf.cast(x, kind), monkeypatch, tolerance)


@pytest.mark.parametrize("groups", [1, 2, 32])
@pytest.mark.parametrize("padding", ["same", "symmetric", "valid"])
def test_dilated(groups, padding, monkeypatch):
    monkeypatch.setattr(fusion, "MIN_KERNEL_SIZE", 1)
    layer = WSConv2D(64, 3, padding=padding, groups=groups, dilation_rate=2)
    assert_equal(layer, tf.random.stateless_normal((2, 7, 6, 64), (1, 2)), monkeypatch)


def test_kernel_at_the_floor(monkeypatch):
    monkeypatch.setattr(fusion, "MIN_KERNEL_SIZE", 1)
    layer = WSConv2D(8, 3, epsilon=2.0)
    assert_equal(layer, tf.random.stateless_normal((2, 7, 6, 16), (1, 2)), monkeypatch)


def test_size_that_is_not_known_is_not_compiled_for():
    layer = ScaledActivation("gelu")

    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 4))])
    def compute(x):
        return layer(x, training=True)

    assert not any("Call" in op.type for op in compute.get_concrete_function().graph.get_operations())
    assert compute(tf.ones((2, 5, 3, 4))).shape == (2, 5, 3, 4)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_inference_is_plain(name):
    # Exporters do not take compiled functions, and make outputs of what a gradient of its own would need.
    layer = ScaledActivation(name)
    graph = tf.function(layer).get_concrete_function(tf.ones((2, 4))).graph
    assert not any("Call" in op.type or op.type == "IdentityN" for op in graph.get_operations())


def test_three_steps_of_training(monkeypatch):
    monkeypatch.setattr(fusion, "MIN_KERNEL_SIZE", 1)
    images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype("float32")
    labels = np.eye(10, dtype="float32")[:4]
    ends = []
    for compiles in (COMPILES, lambda tensor: False):
        monkeypatch.setattr(fusion, "compiles", compiles)
        keras.utils.set_random_seed(0)
        model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10)
        start = [v.numpy() for v in model.trainable_variables]
        model.compile(nfk.optimizers.SGD_AGC(0.1, weight_decay=1e-3), "categorical_crossentropy")
        for _ in range(3):
            model.train_on_batch(images, labels)
        ends.append([v.numpy() for v in model.trainable_variables])
    moved = max(np.abs(a - b).max() for a, b in zip(start, ends[0], strict=True))
    assert moved > 1e-3
    for a, b in zip(*ends, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * moved)
