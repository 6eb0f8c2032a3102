"""Winograd's convolution, along rows and in squares: the direct one's numbers, as exact, and where it is taken."""

import pathlib
import sys
import types

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


def along_rows(groups: int):
    return winograd.along_rows(*convolution._of_one(OPTIONS))


WAYS = pytest.mark.parametrize("way", [along_rows, winograd.in_squares], ids=["rows", "squares"])


# In float64 TensorFlow has no gradients of grouped convolutions.
@pytest.mark.parametrize(("way", "groups"), [(along_rows, 1), (winograd.in_squares, 1), (winograd.in_squares, 2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(4, 3), (7, 5), (10, 1), (12, 12), (1, 4)])
def test_it_is_the_convolution(height, width, bias, way, groups):
    x, upstream = numbers((2, height, width, 3 * groups), 1, "float64"), numbers((2, height, width, 10), 2, "float64")
    kernel, bias = numbers((3, 3, 3, 10), 3, "float64"), numbers((10,), 4, "float64") if bias else None
    direct = convolution._of_one(OPTIONS)
    found = outputs_and_gradients(way(groups), x, kernel, bias, upstream)
    wanted = by_group(direct, groups, x, kernel, bias, upstream)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-12)


def by_group(way, groups: int, x, kernel, bias, upstream) -> list:
    """Returns outputs and gradients of one convolution a group."""
    biases = [None] * groups if bias is None else tf.split(bias, groups)
    parts = [tf.split(each, groups, -1) for each in (x, kernel, upstream)]
    each = [outputs_and_gradients(way, x, w, b, u) for x, w, u, b in zip(*parts, biases, strict=True)]
    return [tf.concat(found, -1) for found in zip(*each, strict=True)]


@WAYS
def test_it_rounds_little_more_than_the_direct_convolution(way):
    shape = (4, 12, 12, 128)
    x, upstream = numbers(shape, 1), numbers(shape, 2)
    kernel, bias = numbers((3, 3, 128, 128), 3) * (9 * 128) ** -0.5, numbers((128,), 4)
    direct = convolution._of_one(OPTIONS)
    wide = [tf.cast(each, tf.float64) for each in (x, kernel, bias, upstream)]
    exact = outputs_and_gradients(direct, *wide)

    def errors(way):
        found = outputs_and_gradients(way, x, kernel, bias, upstream)
        return [np.sqrt(np.mean((a - b.numpy()) ** 2) / np.mean(b**2)) for a, b in zip(found, exact, strict=True)]

    # Measured, of the size of each: outputs and gradients by inputs 2.1e-7 to 5.9e-7 directly (TensorFlow's own
    # convolution, oneDNN's), 5e-7 to 8.2e-7 along rows, 1.2e-6 in squares.
    for sums, plain in zip(errors(way(1)), errors(direct), strict=True):
        assert sums < (1.6e-6 if way is winograd.in_squares else max(3 * plain, 3e-7))


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
    ("shape", "channels", "groups", "outputs", "forward", "back"),
    [
        ((8, 12, 12), 128, 6, 768, False, True),
        ((8, 24, 24), 128, 2, 256, True, True),
        ((8, 14, 14), 256, 1, 256, False, True),
        ((16, 14, 14), 256, 1, 256, True, True),
        ((32, 7, 7), 512, 1, 512, False, True),
        ((64, 6, 6), 128, 6, 768, False, False),  # eight by eight for six by six
        ((8, 48, 2), 128, 1, 128, False, False),
        ((8, 8, 8), 128, 1, 128, False, False),  # few pixels
        ((1, 48, 48), 128, 1, 128, False, False),
        ((8, 96, 96), 32, 1, 64, False, True),
        ((8, 48, 48), 64, 2, 128, False, True),
        ((8, 48, 48), 32, 8, 256, False, False),
        ((None, 24, 24), 128, 1, 128, True, True),
        ((8, None, 48), 128, 1, 128, False, False),
        ((8, 48, None), 128, 1, 128, False, False),
    ],
)
def test_sizes_for_which_squares_pay(shape, channels, groups, outputs, forward, back, monkeypatch):
    images, kernel = tf.TensorSpec((*shape, channels * groups)), tf.TensorSpec((3, 3, channels, outputs))
    half = tf.TensorSpec(images.shape, tf.bfloat16)
    for narrow in (True, False):
        monkeypatch.setattr(winograd, "has_narrow_vectors", lambda narrow=narrow: narrow)
        found = [winograd.pays_in_squares(images, kernel, backwards) for backwards in (False, True)]
        assert found == [narrow and forward, narrow and back]
        assert not winograd.pays_in_squares(half, kernel, True)


@pytest.mark.parametrize(
    ("features", "narrow"),
    [
        ({"AVX2": True, "AVX512F": False}, True),
        ({"AVX2": True, "AVX512F": True}, False),
        ({"AVX2": False, "AVX512F": False}, False),
        ({"NEON": True}, False),
        (None, False),
    ],
)
def test_processors(features, narrow, monkeypatch):
    # None: a NumPy that has no such module.
    told = features if features is None else types.SimpleNamespace(__cpu_features__=features)
    monkeypatch.setitem(sys.modules, "numpy._core._multiarray_umath", told)
    assert winograd.has_narrow_vectors.__wrapped__() == narrow


@pytest.mark.skipif(not pathlib.Path("/proc/cpuinfo").exists(), reason="Linux tells what a processor has")
def test_this_processor():
    flags = pathlib.Path("/proc/cpuinfo").read_text().split()
    assert winograd.has_narrow_vectors() == ("avx2" in flags and "avx512f" not in flags)


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
    monkeypatch.setattr(convolution, "pays_in_squares", lambda *_: False)
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
@pytest.mark.parametrize("squares", [False, True])
def test_layer(groups, data_format, batch, squares, monkeypatch):
    if not convolution.uses_onednn():
        pytest.skip("TensorFlow trains without oneDNN here")
    layer = WSConv2D(128, 3, padding="same", groups=groups, data_format=data_format)
    channels = 64 * groups
    # Another size: what was traced for one is taken for all layers of the same.
    size = (28, 13) if squares else (26, 13)
    x = numbers((3, *size, channels) if data_format == "channels_last" else (3, channels, *size), groups)
    layer(x)
    layer.bias.assign(numbers((128,), 5))
    taken = []
    monkeypatch.setattr(convolution, "pays", lambda *tensors: taken.append(winograd.pays(*tensors)) or taken[-1])
    monkeypatch.setattr(convolution, "pays_in_squares", lambda *_: squares and (taken.append(True) or True))
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
