"""Winograd's convolution along rows: the numbers of the direct one, as exact as it is, and where it is taken."""

import keras
import numpy as np
import pytest

from nfnet_keras.layers import WSConv2D
from nfnet_keras.layers.grouped_conv2d import CPUConvolution

tf = pytest.importorskip("tensorflow")
winograd = pytest.importorskip("nfnet_keras.tensorflow_winograd")
convolution = pytest.importorskip("nfnet_keras.tensorflow_convolution")
fusion = pytest.importorskip("nfnet_keras.tensorflow_fusion")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")

OPTIONS = {"strides": [1, 1, 1, 1], "padding": "SAME"}


def numbers(shape, seed: int, dtype="float32"):
    return tf.cast(tf.random.stateless_normal(shape, (seed, 0), dtype="float64"), dtype)


def outputs_and_gradients(way, x, kernel, bias, upstream) -> list:
    forward, gradient = way
    run = tf.function(lambda x, kernel, upstream: [forward(x, kernel, bias), *gradient(x, kernel, upstream)])
    return run(x, kernel, upstream)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(4, 3), (7, 5), (10, 1), (12, 12), (1, 4)])
def test_it_is_the_convolution(height, width, bias):
    x, upstream = numbers((2, height, width, 3), 1, "float64"), numbers((2, height, width, 5), 2, "float64")
    kernel, bias = numbers((3, 3, 3, 5), 3, "float64"), numbers((5,), 4, "float64") if bias else None
    direct = convolution._of_one(OPTIONS)
    found = outputs_and_gradients(winograd.along_rows(*direct), x, kernel, bias, upstream)
    wanted = outputs_and_gradients(direct, x, kernel, bias, upstream)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_it_rounds_little_more_than_the_direct_convolution():
    shape = (4, 12, 12, 128)
    x, upstream = numbers(shape, 1), numbers(shape, 2)
    kernel, bias = numbers((3, 3, 128, 128), 3) * (9 * 128) ** -0.5, numbers((128,), 4)
    direct = convolution._of_one(OPTIONS)
    wide = [tf.cast(each, tf.float64) for each in (x, kernel, bias, upstream)]
    exact = outputs_and_gradients(direct, *wide)

    def errors(way):
        found = outputs_and_gradients(way, x, kernel, bias, upstream)
        return [np.sqrt(np.mean((a - b.numpy()) ** 2) / np.mean(b**2)) for a, b in zip(found, exact, strict=True)]

    for rows, plain in zip(errors(winograd.along_rows(*direct)), errors(direct), strict=True):
        # Measured: 1.4 times the direct one's for outputs and inputs, 1.9 for kernels, where that is small.
        assert rows < max(3 * plain, 3e-7)


@pytest.mark.parametrize(
    ("shape", "channels", "outputs", "pays"),
    [
        ((8, 12, 12), 128, 128, True),
        ((8, 14, 14), 128, 128, True),
        ((8, 6, 6), 128, 128, False),  # two rows of eight are not wanted
        ((8, 8, 8), 128, 128, False),  # few pixels
        ((1, 48, 48), 128, 128, False),
        ((8, 48, 48), 32, 64, False),
        ((8, 48, 48), 64, 32, False),
        ((None, 48, 48), 128, 128, True),
        ((None, 6, 8), 128, 128, False),
        ((8, None, 48), 128, 128, False),
    ],
)
def test_sizes_for_which_it_pays(shape, channels, outputs, pays):
    images, kernel = tf.TensorSpec((*shape, channels)), tf.TensorSpec((3, 3, channels, outputs))
    assert winograd.pays(images, kernel) == pays
    half = tf.TensorSpec(images.shape, tf.bfloat16)
    assert not winograd.pays(half, kernel)


@pytest.mark.parametrize(
    ("changed", "is_along_rows"),
    [
        ({}, True),
        ({"data_format": "channels_first"}, True),
        ({"strides": (2, 2)}, False),
        ({"dilation_rate": (2, 2)}, False),
        ({"padding": "valid"}, False),
        ({"kernel_size": (5, 5)}, False),
        ({"groups": 2}, True),
    ],
    ids=str,
)
def test_convolutions_that_it_takes_the_place_of(changed, is_along_rows, monkeypatch):
    monkeypatch.setattr(convolution, "pays", lambda *_: True)
    settings = {
        "kernel_size": (3, 3),
        "strides": (1, 1),
        "padding": "same",
        "dilation_rate": (1, 1),
        "groups": 1,
        "data_format": "channels_last",
        "pads": (0, 0),
    }
    settings = CPUConvolution(**{**settings, **changed})
    shape = (2, 4, 12, 12) if settings.data_format == "channels_first" else (2, 12, 12, 4)
    kernel = tf.TensorSpec((*settings.kernel_size, 4 // settings.groups, 6))

    def kernels(onednn: bool) -> set:
        monkeypatch.setattr(convolution, "uses_onednn", lambda: onednn)
        found = convolution.convolution_for.__wrapped__(settings)
        graph = tf.function(lambda x, w: found.forward(x, w, None)).get_concrete_function(tf.TensorSpec(shape), kernel)
        return {tuple(op.inputs[1].shape[:2]) for op in graph.graph.get_operations() if op.type == "Conv2D"}

    assert (kernels(True) == {(1, 3)}) == is_along_rows
    assert (1, 3) not in kernels(False)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("batch", [3, None])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_layer(groups, data_format, batch, monkeypatch):
    if not convolution.uses_onednn():
        pytest.skip("TensorFlow trains without oneDNN here")
    layer = WSConv2D(128, 3, padding="same", groups=groups, data_format=data_format)
    channels = 64 * groups
    x = numbers((3, 26, 13, channels) if data_format == "channels_last" else (3, channels, 26, 13), groups)
    layer(x)
    layer.bias.assign(numbers((128,), 5))
    taken = []
    monkeypatch.setattr(convolution, "pays", lambda *tensors: taken.append(winograd.pays(*tensors)) or taken[-1])
    found = []
    for compiles in (fusion.compiles, lambda tensor: False):
        monkeypatch.setattr(fusion, "compiles", compiles)

        @tf.function(autograph=False, input_signature=[tf.TensorSpec((batch, *x.shape[1:]))])
        def compute(x):
            by = [x, *(v.value for v in layer.trainable_variables)]
            with tf.GradientTape() as outer:
                outer.watch(x)
                with tf.GradientTape() as inner:
                    inner.watch(x)
                    y = layer(x, training=True)
                    loss = tf.reduce_sum(tf.sin(y))
                first = inner.gradient(loss, by)
                again = tf.reduce_sum(tf.cos(first[0]))
            return [y, *first, *outer.gradient(again, [x, layer.kernel.value])]

        found.append(compute(x))
        assert taken and all(taken)
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
