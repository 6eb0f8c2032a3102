"""Convolutions as TensorFlow trains them fastest on a CPU, with their gradients."""

import dataclasses
import functools
import math
from collections.abc import Callable

import tensorflow as tf

from nfnet_keras.layers.grouped_conv2d import CPUConvolution
from nfnet_keras.tensorflow_calls import gradient_of
from nfnet_keras.tensorflow_step import likely_batch
from nfnet_keras.tensorflow_winograd import along_rows, in_squares, pays, pays_in_squares


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution and its gradient, as functions of tensors.

    Args:
        forward: Function of inputs, kernel and bias (`None` without) to outputs, all but the kernel in one dtype.
        gradient: Function of inputs, kernel and the gradient of the outputs to the gradients of inputs and kernel.
        gradient_of_bias: Function of the gradient of the outputs to that of the bias.

    Example:

    >>> found = convolution_for(CPUConvolution((1, 1), (1, 1), "same", (1, 1), 1, "channels_last", (0, 0)))
    >>> found.forward(tf.ones((1, 2, 2, 3)), tf.ones((1, 1, 3, 4)), tf.ones(4)).shape
    TensorShape([1, 2, 2, 4])
    """

    forward: Callable
    gradient: Callable
    gradient_of_bias: Callable


@functools.cache
def uses_onednn() -> bool:
    """Whether TensorFlow's convolutions on a CPU are oneDNN's.

    TensorFlow decides as it is loaded: by what the processor has (AVX-512, AMX), or as `TF_ENABLE_ONEDNN_OPTS` says.

    Returns:
        `True` or `False`; `False` as well where this TensorFlow does not tell.

    Example:

    >>> uses_onednn() in (True, False)
    True
    """
    try:
        # TensorFlow has no public name for this.
        from tensorflow.python.util import _pywrap_util_port
    except ImportError:
        return False
    return bool(_pywrap_util_port.IsMklEnabled())


@functools.cache
def convolution_for(settings: CPUConvolution) -> Convolution:
    """Returns the fastest way to convolve in training.

    Kernels are taken as they are stored (float32 in mixed precision) and cast.

    Args:
        settings: Of the convolution.

    Returns:
        The `Convolution`.

    Example:

    >>> found = convolution_for(CPUConvolution((3, 3), (1, 1), "same", (1, 1), 2, "channels_first", (0, 0)))
    >>> found.gradient(tf.ones((1, 4, 5, 5)), tf.ones((3, 3, 2, 6)), tf.ones((1, 6, 5, 5)))[0].shape
    TensorShape([1, 4, 5, 5])
    """
    last = settings.data_format == "channels_last"
    forward, derive = _channels_last(settings)
    vertical, horizontal = settings.pads
    around = [[0, 0], [vertical, vertical], [horizontal, horizontal], [0, 0]]

    def prepared(images):
        images = images if last else tf.transpose(images, (0, 2, 3, 1))
        return tf.pad(images, around) if any(settings.pads) else images

    def convolve(inputs, kernel, bias):
        outputs = forward(prepared(inputs), tf.cast(kernel, inputs.dtype), bias)
        return outputs if last else tf.transpose(outputs, (0, 3, 1, 2))

    def gradient(inputs, kernel, upstream):
        upstream = upstream if last else tf.transpose(upstream, (0, 2, 3, 1))
        of_inputs, of_kernel = derive(prepared(inputs), tf.cast(kernel, inputs.dtype), upstream)
        if any(settings.pads):
            bottom, right = tf.shape(of_inputs)[1] - vertical, tf.shape(of_inputs)[2] - horizontal
            of_inputs = of_inputs[:, vertical:bottom, horizontal:right]
        return of_inputs if last else tf.transpose(of_inputs, (0, 3, 1, 2)), tf.cast(of_kernel, kernel.dtype)

    def gradient_of_bias(upstream):
        if last and upstream.dtype == tf.float32 and uses_onednn():
            return _column_sums(tf.reshape(upstream, (-1, upstream.shape[-1])))
        if upstream.dtype.size >= 4:
            return tf.raw_ops.BiasAddGrad(out_backprop=upstream, data_format="NHWC" if last else "NCHW")
        # On a CPU, TensorFlow's own in bfloat16 is summed in bfloat16, where 256 + 1 is 256.
        total = tf.reduce_sum(tf.cast(upstream, tf.float32), (0, 1, 2) if last else (0, 2, 3))
        return tf.cast(total, upstream.dtype)

    return Convolution(convolve, gradient, gradient_of_bias)


def _channels_last(settings: CPUConvolution) -> tuple[Callable, Callable]:
    """Returns a convolution of images that have their border, channels last, and its gradient."""
    if settings.is_matrix_product:
        return _pixels, _gradient_of_pixels
    if settings.is_dilated or (settings.groups > 1 and not settings.splits):
        return _as_keras(settings)
    options = {"strides": [1, *settings.strides, 1], "padding": settings.padding.upper()}
    direct = _of_groups(settings.groups, options) if settings.splits else _of_one(options)
    square = settings.kernel_size == (3, 3) and settings.strides == (1, 1) and settings.padding == "same"
    if not square or not uses_onednn():
        return direct
    return _by_size(direct, along_rows(*_of_one(options)), in_squares(settings.groups))


def _by_size(direct: tuple, rows: tuple, squares: tuple) -> tuple[Callable, Callable]:
    """A 3 x 3 convolution, and its gradient, by Winograd's algorithm where sizes are such that it pays."""

    def way(inputs, kernel, backwards: bool) -> tuple[Callable, Callable]:
        if pays_in_squares(inputs, kernel, backwards):
            return squares
        return rows if pays(inputs, kernel) else direct

    def forward(inputs, kernel, bias):
        return way(inputs, kernel, False)[0](inputs, kernel, bias)

    def gradient(inputs, kernel, upstream):
        return way(inputs, kernel, True)[1](inputs, kernel, upstream)

    return forward, gradient


def _column_sums(matrix):
    # oneDNN multiplies by a row of ones in half of the time that TensorFlow takes to sum.
    return tf.squeeze(tf.matmul(tf.ones((1, tf.shape(matrix)[0])), matrix), 0)


def _with_bias(outputs, bias):
    return outputs if bias is None else tf.nn.bias_add(outputs, bias)


def _pixels(inputs, kernel, bias):
    """A 1 x 1 convolution as the matrix product that it is: the gradient of the convolution is slower by a third."""
    channels, filters = kernel.shape[-2:]
    # The bias here and not behind: TensorFlow makes one operation of a product and the bias that follows it.
    product = _with_bias(tf.reshape(inputs, (-1, channels)) @ tf.reshape(kernel, (channels, filters)), bias)
    return _as_images(product, inputs)


def _gradient_of_pixels(inputs, kernel, upstream):
    channels, filters = kernel.shape[-2:]
    rows, of_rows = tf.reshape(inputs, (-1, channels)), tf.reshape(upstream, (-1, filters))
    sizes = inputs.shape[1:-1]
    pixels = 0 if None in sizes else likely_batch(inputs) * math.prod(sizes)
    of_inputs = _by_transposed(of_rows, tf.reshape(kernel, (channels, filters)), pixels > filters)
    return _as_images(of_inputs, inputs), tf.reshape(tf.matmul(rows, of_rows, transpose_a=True), kernel.shape)


def _by_transposed(rows, matrix, many: bool):
    """Multiplies rows, more of them than the matrix has columns or not, by the transpose of a matrix."""
    if not uses_onednn():
        # Eigen loses more by reading a matrix the other way than the transpose takes.
        return tf.matmul(rows, tf.transpose(matrix))
    channels, filters = matrix.shape
    if rows.dtype != tf.float32 or (many and filters < channels):
        return tf.matmul(rows, matrix, transpose_b=True)
    # One product of a batch: oneDNN has another kernel for these, which loses nothing by the transpose.
    return tf.squeeze(tf.matmul(rows[None], matrix[None], transpose_b=True), 0)


def _as_images(rows, like):
    static = like.shape.as_list()[:-1]
    if static.count(None) < 2:
        return tf.reshape(rows, (*(-1 if size is None else size for size in static), rows.shape[-1]))
    return tf.reshape(rows, tf.concat([tf.shape(like)[:-1], [rows.shape[-1]]], 0))


def _of_one(options: dict) -> tuple[Callable, Callable]:
    def forward(inputs, kernel, bias):
        return _with_bias(tf.raw_ops.Conv2D(input=inputs, filter=kernel, **options), bias)

    def gradient(inputs, kernel, upstream):
        sizes = inputs.shape if inputs.shape.is_fully_defined() else tf.shape(inputs)
        of_inputs = tf.raw_ops.Conv2DBackpropInput(input_sizes=sizes, filter=kernel, out_backprop=upstream, **options)
        # oneDNN has only its reference for the kernel's in float16, which takes a hundred times as long.
        wide = tf.float32 if inputs.dtype == tf.float16 else inputs.dtype
        of_kernel = tf.raw_ops.Conv2DBackpropFilter(
            input=tf.cast(inputs, wide), filter_sizes=kernel.shape, out_backprop=tf.cast(upstream, wide), **options
        )
        # What is too large for float16 has to overflow, or a loss scale would not come down.
        return of_inputs, tf.cast(of_kernel, inputs.dtype)

    return forward, gradient


def _of_groups(groups: int, options: dict) -> tuple[Callable, Callable]:
    """A grouped convolution: one operation with oneDNN, forward and back, one a group without it.

    Without it, TensorFlow would make one operation of the convolution and of the bias behind it, which refuses groups.
    """
    convolve, derive = _of_one(options)
    # oneDNN loses a fifth of the kernel's gradient where two groups stride.
    at_once = groups > 2 or max(options["strides"]) == 1

    def forward(inputs, kernel, bias):
        if uses_onednn():
            return convolve(inputs, kernel, bias)
        pairs = zip(tf.split(inputs, groups, -1), tf.split(kernel, groups, -1), strict=True)
        return _with_bias(tf.concat([convolve(x, w, None) for x, w in pairs], -1), bias)

    def gradient(inputs, kernel, upstream):
        # What oneDNN does not compute in a dtype is TensorFlow's own, which refuses groups.
        if at_once and uses_onednn() and inputs.dtype == tf.float32:
            return derive(inputs, kernel, upstream)
        parts = (tf.split(tensor, groups, -1) for tensor in (inputs, kernel, upstream))
        of_inputs, of_kernel = zip(*(derive(*each) for each in zip(*parts, strict=True)), strict=True)
        return tf.concat(of_inputs, -1), tf.concat(of_kernel, -1)

    return forward, gradient


def _as_keras(settings: CPUConvolution) -> tuple[Callable, Callable]:
    """A convolution as Keras has TensorFlow compute it; TensorFlow derives its gradient."""
    plain = dataclasses.replace(settings, data_format="channels_last", pads=(0, 0))
    derive = gradient_of(plain, 2)

    def gradient(inputs, kernel, upstream):
        return derive(upstream, inputs, kernel)

    return lambda inputs, kernel, bias: _with_bias(plain(inputs, kernel), bias), gradient
