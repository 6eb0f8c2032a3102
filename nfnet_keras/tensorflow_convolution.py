"""Convolutions as TensorFlow trains them fastest on a CPU, with their gradients."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import tensorflow as tf

from nfnet_keras.tensorflow_step import shared_constant


def _is_half(tensor) -> bool:
    """Whether TensorFlow's `bias_add` or its sums might add up a tensor in its own, half precision, on a CPU."""
    return tensor.dtype.size < 4


def _sum_in_full(upstream, data_format: str):
    axes = tuple(range(len(upstream.shape) - 1)) if data_format == "channels_last" else (0, 2, 3)
    return tf.cast(tf.reduce_sum(tf.cast(upstream, tf.float32), axes), upstream.dtype)


def add_bias(outputs, bias, data_format: str = "channels_last"):
    """Adds a bias, whose gradient is summed in float32.

    On a CPU, TensorFlow's own gradient of a bias in bfloat16 is summed in bfloat16, where 256 + 1 is 256.

    Args:
        outputs: Tensor of shape (..., channels), or (batch, channels, height, width) with channels first.
        bias: Tensor of shape (channels,).
        data_format: `"channels_last"` or `"channels_first"`. Defaults to `"channels_last"`.

    Returns:
        Tensor of the shape of `outputs`.

    Example:

    >>> float(add_bias(tf.ones((1, 2)), tf.ones(2))[0, 0])
    2.0
    """

    @tf.custom_gradient
    def run(outputs, bias):
        row = bias if data_format == "channels_last" else bias[:, None, None]
        return outputs + row, lambda upstream: (upstream, _sum_in_full(upstream, data_format))

    return run(tf.convert_to_tensor(outputs), tf.convert_to_tensor(bias))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of which `convolve_standardized` knows the gradient.

    Args:
        forward: Function of inputs, kernel and bias (`None` without) to outputs. Kernels are matrices of shape
            (weights of a unit, outputs).
        gradient: Function of inputs, kernel and the gradient of the outputs to the gradients of inputs and kernel.
        data_format: Of the outputs, `"channels_last"` or `"channels_first"`. Defaults to `"channels_last"`.

    Example:

    >>> PIXELS.forward(tf.ones((1, 2, 2, 3)), tf.ones((3, 4)), None).shape
    TensorShape([1, 2, 2, 4])
    """

    forward: Callable
    gradient: Callable
    data_format: str = "channels_last"

    def gradient_of_bias(self, upstream):
        """Returns the gradient of the bias, given that of the outputs."""
        last = self.data_format == "channels_last"
        if _is_half(upstream):
            return _sum_in_full(upstream, self.data_format)
        return tf.raw_ops.BiasAddGrad(out_backprop=upstream, data_format="NHWC" if last else "NCHW")


def convolution_by_tape(convolve: Callable, shape: Sequence[int], data_format: str) -> Convolution:
    """Makes a `Convolution` of any function; its gradient is derived by TensorFlow.

    Args:
        convolve: Function of inputs, kernel and bias (a tensor or `None`) that reads no variable.
        shape: Of its kernel.
        data_format: Of its outputs.

    Returns:
        The `Convolution`.

    Example:

    >>> convolve = lambda x, kernel, bias: tf.nn.conv2d(x, kernel, 1, "SAME")
    >>> found = convolution_by_tape(convolve, (1, 1, 2, 3), "channels_last")
    >>> found.gradient(tf.ones((1, 4, 4, 2)), tf.ones((2, 3)), tf.ones((1, 4, 4, 3)))[1].shape
    TensorShape([2, 3])
    """

    def forward(inputs, rows, bias):
        return convolve(inputs, tf.reshape(rows, shape), bias)

    def gradient(inputs, rows, upstream):
        with tf.GradientTape() as tape:
            tape.watch((inputs, rows))
            # Pruned from the graph: no gradient of a convolution needs its outputs.
            outputs = forward(inputs, rows, None)
        return tape.gradient(outputs, (inputs, rows), upstream)

    return Convolution(forward, gradient, data_format)


def convolve_pixels(inputs, kernel, bias=None):
    """A 1 x 1 convolution of stride 1 as the matrix product that it is.

    The gradient of the convolution with respect to its kernel is slower by a third, and more on large images.

    Args:
        inputs: Tensor of shape (batch, height, width, channels).
        kernel: Tensor of shape (1, 1, channels, filters).
        bias: Tensor of shape (filters,), or `None`.

    Returns:
        Tensor of shape (batch, height, width, filters).

    Example:

    >>> convolve_pixels(tf.ones((1, 2, 2, 3)), tf.ones((1, 1, 3, 4)), tf.ones(4)).shape
    TensorShape([1, 2, 2, 4])
    """
    return _multiply_pixels(inputs, tf.reshape(kernel, shared_constant(tuple(kernel.shape[-2:]))), bias)


def _multiply_pixels(inputs, matrix, bias=None):
    channels, filters = matrix.shape
    product = tf.matmul(tf.reshape(inputs, shared_constant((-1, channels))), matrix)
    if bias is not None:
        # Here and not behind: TensorFlow makes one operation of a product and the bias that follows it.
        product = add_bias(product, bias) if _is_half(product) else tf.nn.bias_add(product, bias)
    return _as_images(product, inputs, filters)


def _as_images(pixels, like, channels: int):
    static = like.shape.as_list()[:-1]
    if static.count(None) < 2:
        return tf.reshape(pixels, shared_constant((*(-1 if size is None else size for size in static), channels)))
    return tf.reshape(pixels, tf.concat([tf.shape(like)[:-1], [channels]], 0))


def _gradient_of_pixels(inputs, matrix, upstream):
    channels, filters = matrix.shape
    rows = tf.reshape(inputs, shared_constant((-1, channels)))
    upstream = tf.reshape(upstream, shared_constant((-1, filters)))
    of_inputs = tf.matmul(upstream, matrix, transpose_b=True)
    return _as_images(of_inputs, inputs, channels), tf.matmul(rows, upstream, transpose_a=True)


PIXELS = Convolution(_multiply_pixels, _gradient_of_pixels)
"""`convolve_pixels` as a `Convolution`."""


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


def convolve_groups(inputs, kernel, groups: int, strides: Sequence[int], padding: str):
    """A grouped convolution whose gradient is one operation a group, and for which nothing is kept but its input.

    The gradient of the grouped operation is several times slower than that of its groups. Forward, the grouped
    operation is the faster one with oneDNN. Without it, TensorFlow would make one operation of the convolution and of
    the bias behind it, and this operation refuses groups. Kernels are not dilated: without oneDNN there is no gradient.

    Args:
        inputs: Tensor of shape (batch, height, width, channels).
        kernel: Tensor of shape (height, width, channels / groups, filters).
        groups: Number of groups.
        strides: Pair of strides.
        padding: `"same"` or `"valid"`.

    Returns:
        Tensor of shape (batch, height, width, filters).

    Example:

    >>> convolve_groups(tf.ones((1, 4, 4, 4)), tf.ones((3, 3, 2, 6)), 2, (1, 1), "same").shape
    TensorShape([1, 4, 4, 6])
    """
    forward, gradient = _grouped(groups, strides, padding)

    @tf.custom_gradient
    def run(inputs, kernel):
        return forward(inputs, kernel), lambda upstream: gradient(inputs, kernel, upstream)

    return run(tf.convert_to_tensor(inputs), tf.convert_to_tensor(kernel))


def convolution_of_groups(shape: Sequence[int], groups: int, strides: Sequence[int], padding: str) -> Convolution:
    """`convolve_groups`, and a bias behind it, as a `Convolution`.

    Args:
        shape: Of the kernel.
        groups: As in `convolve_groups`.
        strides: As in `convolve_groups`.
        padding: As in `convolve_groups`.

    Returns:
        The `Convolution`.

    Example:

    >>> found = convolution_of_groups((3, 3, 2, 6), 2, (1, 1), "same")
    >>> found.forward(tf.ones((1, 4, 4, 4)), tf.ones((18, 6)), tf.ones(6)).shape
    TensorShape([1, 4, 4, 6])
    """
    run, derive = _grouped(groups, strides, padding)

    def forward(inputs, rows, bias):
        outputs = run(inputs, tf.reshape(rows, shape))
        return outputs if bias is None else tf.nn.bias_add(outputs, bias)

    def gradient(inputs, rows, upstream):
        of_inputs, of_kernel = derive(inputs, tf.reshape(rows, shape), upstream)
        return of_inputs, tf.reshape(of_kernel, rows.shape)

    return Convolution(forward, gradient)


def _grouped(groups: int, strides: Sequence[int], padding: str) -> tuple:
    """Returns a grouped convolution and its gradient, as functions of tensors."""
    options = {"strides": [1, *strides, 1], "padding": padding.upper()}

    def forward(inputs, kernel):
        if uses_onednn():
            return tf.raw_ops.Conv2D(input=inputs, filter=kernel, **options)
        pairs = zip(tf.split(inputs, groups, -1), tf.split(kernel, groups, -1), strict=True)
        return tf.concat([tf.raw_ops.Conv2D(input=x, filter=w, **options) for x, w in pairs], -1)

    def gradient(inputs, kernel, upstream):
        parts = (tf.split(inputs, groups, -1), tf.split(kernel, groups, -1), tf.split(upstream, groups, -1))
        # The same for all groups.
        x, w = parts[0][0], parts[1][0]
        sizes = shared_constant(tuple(x.shape)) if x.shape.is_fully_defined() else tf.shape(x)
        kernel_sizes = shared_constant(tuple(w.shape))
        of_inputs, of_kernel = [], []
        for x, w, dy in zip(*parts, strict=True):
            of_inputs.append(tf.raw_ops.Conv2DBackpropInput(input_sizes=sizes, filter=w, out_backprop=dy, **options))
            of_kernel.append(
                tf.raw_ops.Conv2DBackpropFilter(input=x, filter_sizes=kernel_sizes, out_backprop=dy, **options)
            )
        return tf.concat(of_inputs, -1), tf.concat(of_kernel, -1)

    return forward, gradient
