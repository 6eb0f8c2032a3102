"""Convolutions as TensorFlow trains them on a CPU: the numbers of the plain ones."""

import platform

import keras
import numpy as np
import pytest

from nfnet_keras.layers import WSConv2D
from nfnet_keras.layers.grouped_conv2d import CPUConvolution

tf = pytest.importorskip("tensorflow")
convolution = pytest.importorskip("nfnet_keras.tensorflow_convolution")
fusion = pytest.importorskip("nfnet_keras.tensorflow_fusion")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")


@pytest.mark.parametrize("batch", [3, None])
@pytest.mark.parametrize("pads", [(0, 0), (1, 2)])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
def test_images_of_any_size(batch, pads, groups, size):
    settings = CPUConvolution((size, size), (1, 1), "valid", (1, 1), groups, "channels_last", pads)
    found = convolution.convolution_for(settings)
    kernel = tf.random.stateless_normal((size, size, 4 // groups, 6), (1, 2))

    @tf.function(input_signature=[tf.TensorSpec((batch, None, None, 4))])
    def compute(x):
        y = found.forward(x, kernel, tf.ones(6))
        return [y, *found.gradient(x, kernel, tf.sin(y))]

    x = tf.random.stateless_normal((3, 5, 4, 4), (3, 4))
    with tf.GradientTape() as tape:
        tape.watch((x, kernel))
        padded = tf.pad(x, [[0, 0], [pads[0]] * 2, [pads[1]] * 2, [0, 0]])
        pairs = zip(tf.split(padded, groups, -1), tf.split(kernel, groups, -1), strict=True)
        y = tf.concat([tf.nn.conv2d(images, part, 1, "VALID") for images, part in pairs], -1) + 1
    for a, b in zip(compute(x), [y, *tape.gradient(y, (x, kernel), tf.sin(y))], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16", "float32"])
@pytest.mark.parametrize("smallest", [1, 2**19])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3, "groups": 2}])
def test_gradient_of_a_bias_is_not_summed_in_half_precision(dtype, smallest, data_format, options, monkeypatch):
    monkeypatch.setattr(fusion, "MIN_KERNEL_SIZE", smallest)
    shape = (4, 64, 64, 6) if data_format == "channels_last" else (4, 6, 64, 64)
    layer = WSConv2D(4, padding="same", dtype=dtype, data_format=data_format, **options)
    layer.build(shape)

    @tf.function(autograph=False)
    def compute(x):
        with tf.GradientTape() as tape:
            y = layer(x, training=True)
        return tape.gradient(y, layer.bias, tf.ones_like(y))

    x = tf.random.stateless_normal(shape, (1, 2), dtype=layer.compute_dtype)
    # In bfloat16, 256 + 1 is 256.
    assert compute(x).numpy().tolist() == [4 * 64 * 64] * 4


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 5, None])
@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
def test_gradient_of_a_bias_is_the_sum_of_all_pixels(onednn, batch, data_format, monkeypatch):
    monkeypatch.setattr(convolution, "uses_onednn", lambda: onednn)
    settings = CPUConvolution((3, 3), (1, 1), "same", (1, 1), 1, data_format, (0, 0))
    found = convolution.convolution_for.__wrapped__(settings).gradient_of_bias
    shape = (9, 70, 30) if data_format == "channels_first" else (70, 30, 9)
    compute = tf.function(found, input_signature=[tf.TensorSpec((batch, *shape))])
    upstream = np.random.default_rng(0).normal(1, 1, (5 if batch is None else batch, *shape)).astype("float32")
    exact = upstream.sum((0, 2, 3) if data_format == "channels_first" else (0, 1, 2), dtype="float64")
    # TensorFlow's own sum of five images is off by up to 3e-6.
    np.testing.assert_allclose(compute(upstream), exact, rtol=1e-5)


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [0, 1, 40, None])
@pytest.mark.parametrize(("channels", "filters"), [(12, 30), (30, 12), (20, 20)])
def test_gradient_of_a_product(onednn, dtype, batch, channels, filters, monkeypatch):
    monkeypatch.setattr(convolution, "uses_onednn", lambda: onednn)
    settings = CPUConvolution((1, 1), (1, 1), "same", (1, 1), 1, "channels_last", (0, 0))
    rng, images = np.random.default_rng(0), 5 if batch is None else batch
    x, kernel = rng.standard_normal((images, 3, 2, channels)), rng.standard_normal((1, 1, channels, filters))
    upstream = rng.standard_normal((images, 3, 2, filters))
    x, kernel, upstream = (tf.cast(each, dtype) for each in (x, kernel, upstream))
    specs = [tf.TensorSpec((batch, 3, 2, channels), dtype), tf.TensorSpec((batch, 3, 2, filters), dtype)]

    @tf.function(input_signature=specs)
    def compute(x, upstream):
        return convolution.convolution_for.__wrapped__(settings).gradient(x, kernel, upstream)

    x, kernel, upstream, of_inputs, of_kernel = (
        np.asarray(tf.cast(each, "float64")) for each in (x, kernel, upstream, *compute(x, upstream))
    )
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    expected = upstream @ kernel[0, 0].T
    np.testing.assert_allclose(of_inputs, expected, atol=tolerance * np.abs(expected).max(initial=1))
    expected = np.einsum("nhwi,nhwo->io", x, upstream)[None, None]
    np.testing.assert_allclose(of_kernel, expected, atol=tolerance * np.abs(expected).max(initial=1))


@pytest.mark.parametrize(("value", "expected"), [(1.0, 3600.0), (20.0, np.inf)])
@pytest.mark.parametrize("groups", [1, 2])
def test_gradient_of_a_kernel_in_float16(groups, value, expected):
    settings = CPUConvolution((3, 3), (1, 1), "valid", (1, 1), groups, "channels_last", (0, 0))
    x, upstream = tf.fill((4, 32, 32, 4), tf.constant(value, tf.float16)), tf.ones((4, 30, 30, 6), tf.float16)
    found = convolution.convolution_for(settings).gradient(x, tf.ones((3, 3, 4 // groups, 6)), upstream)
    assert [gradient.dtype for gradient in found] == [tf.float16, tf.float32]
    # The largest number in float16 is 65504; a loss scale comes down by what overflows.
    assert np.unique(found[1]).tolist() == [expected]


TRAIN = """
import keras, nfnet_keras as nfk
from nfnet_keras.tensorflow_convolution import uses_onednn

keras.utils.set_random_seed(0)
images = np.random.default_rng(0).standard_normal((4, 32, 32, 3)).astype("float32")
losses = []
tiny = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10)
# The last has more groups than are split. One is dilated: without oneDNN those have no gradient of their own.
several = [{}, {"groups": 2}, {"groups": 2, "dilation_rate": 2}, {"groups": 32}]
layers = [nfk.layers.WSConv2D(64 if options else 4, 3, **options) for options in several]
grouped = keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(10, "softmax")])
for model in (tiny, grouped):
    model.compile(nfk.optimizers.SGD_AGC(0.1), "sparse_categorical_crossentropy", jit_compile=False)
    losses += [float(model.train_on_batch(images, np.arange(4))) for _ in range(2)]
report([uses_onednn(), losses])
"""


@pytest.mark.slow
def test_grouped_convolutions_train_with_and_without_onednn(new_process):
    # The processor decides which it is, and without oneDNN a bias fused into a grouped convolution is refused.
    without, plain = new_process(TRAIN, env={"TF_ENABLE_ONEDNN_OPTS": "0"})
    with_it, fused = new_process(TRAIN, env={"TF_ENABLE_ONEDNN_OPTS": "1"})
    assert not without
    assert with_it or platform.machine() not in ("x86_64", "AMD64")
    np.testing.assert_allclose(fused, plain, rtol=1e-4)
