"""Passes over memory that XLA makes one of, where TensorFlow trains on a CPU.

TensorFlow's graph runs an activation as seven operations, and each reads and writes the whole tensor; its gradient and
the standardization of a kernel are no better. A convolution takes longer to compile with XLA and then is slower. So a
training step stays a graph, and only what is bound by memory is compiled, function by function.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import tensorflow as tf

from nfnet_keras.layers.devices import runs_on_cpu
from nfnet_keras.tensorflow_ahead import compiled
from nfnet_keras.tensorflow_step import shared_constant

# Below this number of elements a kernel stays in the cache, and compiling for its shape costs more than it ever saves.
MIN_KERNEL_SIZE = 2**19


def compiles(tensor) -> bool:
    """Whether a compiled function is worth having for a tensor: in a graph, and with no size but the batch's unknown.

    An image size that changes from batch to batch would be compiled for again and again.

    Args:
        tensor: `tf.Tensor`.

    Returns:
        `True` or `False`.

    Example:

    >>> compiles(tf.ones((2, 2)))
    False
    """
    return not tf.executing_eagerly() and tensor.shape.rank is not None and None not in tensor.shape[1:]


def is_large(kernel) -> bool:
    """Whether compiling for the shape of a kernel pays.

    Args:
        kernel: Tensor or variable of a known shape.

    Returns:
        `True` or `False`.

    Example:

    >>> is_large(tf.ones((3, 3, 8, 8)))
    False
    """
    return math.prod(kernel.shape) >= MIN_KERNEL_SIZE


@functools.cache
def _with_gradient(function: Callable, by: int) -> tuple[Callable, Callable]:
    """Compiles a function, and its gradient by its first arguments from all arguments and the upstream gradient."""

    def backward(upstream, *arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments[:by])
            y = function(*arguments)
        return tape.gradient(y, arguments[:by], upstream)

    return compiled(function), compiled(backward)


@functools.cache
def _times_factor(function: Callable) -> Callable:
    return lambda x, factor: function(x) * factor


def scaled(function: Callable, x, factor: float):
    """Computes `function(x) * factor` in one pass over memory, and its gradient in one more.

    What is kept for the gradient is `x` alone.

    Args:
        function: Differentiable function of a tensor, element by element. One and the same object at every call: it is
            compiled once for each.
        x: Tensor for which `compiles` holds.
        factor: Constant.

    Returns:
        Tensor of the shape of `x`.

    Example:

    >>> float(tf.function(lambda x: scaled(tf.nn.relu, x, 2.0))(tf.ones(())))
    2.0
    """
    forward, backward = _with_gradient(_times_factor(function), 1)

    @tf.custom_gradient
    def run(x):
        # A tensor, so that blocks that scale differently share one compiled function.
        constant = shared_constant(factor, x.dtype)
        return forward(x, constant), lambda upstream: backward(upstream, x, constant)[0]

    return run(tf.convert_to_tensor(x))


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution of which `convolve_standardized` knows the gradient.

    Args:
        forward: Function of inputs, kernel and bias (`None` without) to outputs. Kernels are matrices of shape
            (weights of a unit, outputs).
        gradient: Function of inputs, kernel and the gradient of the outputs to the gradients of inputs and kernel.

    Example:

    >>> PIXELS.forward(tf.ones((1, 2, 2, 3)), tf.ones((3, 4)), None).shape
    TensorShape([1, 2, 2, 4])
    """

    forward: Callable
    gradient: Callable


def convolution_by_tape(convolve: Callable, shape: Sequence[int]) -> Convolution:
    """Makes a `Convolution` of any function; its gradient is derived by TensorFlow.

    Args:
        convolve: Function of inputs, kernel and bias (a tensor or `None`) that reads no variable.
        shape: Of its kernel.

    Returns:
        The `Convolution`.

    Example:

    >>> found = convolution_by_tape(lambda x, kernel, bias: tf.nn.conv2d(x, kernel, 1, "SAME"), (1, 1, 2, 3))
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

    return Convolution(forward, gradient)


def convolve_standardized(standardize: Callable, convolution: Convolution, inputs, kernel, gain, bias=None):
    """Convolves with a large kernel that is standardised first, and keeps nothing but the kernel for the gradient.

    The standardised kernel is computed again on the way back, right before it is used: kept, those of all layers are a
    second copy of the network.

    Args:
        standardize: Function of a kernel and its gain. One and the same object at every call.
        convolution: With it.
        inputs: Tensor of shape (batch, height, width, channels).
        kernel: Tensor of shape (..., inputs, outputs).
        gain: Tensor of shape (outputs,).
        bias: Tensor of shape (outputs,), or `None`.

    Returns:
        What `convolution` returns.

    Example:

    >>> x, kernel, gain = tf.ones((1, 4, 4, 2)), tf.ones((1, 1, 2, 3)), tf.ones(3)
    >>> convolve_standardized(tf.multiply, PIXELS, x, kernel, gain).shape
    TensorShape([1, 4, 4, 3])
    """
    forward, backward = _with_gradient(standardize, 2)

    @tf.custom_gradient
    def run(inputs, rows, gain, *bias):
        def gradient(upstream):
            with tf.control_dependencies([upstream]):
                weights = forward(rows, gain)
            of_inputs, of_weights = convolution.gradient(inputs, weights, upstream)
            of_bias = [tf.raw_ops.BiasAddGrad(out_backprop=upstream)] if bias else []
            return of_inputs, *backward(of_weights, rows, gain), *of_bias

        # Kernels depend on nothing that a step computes: without an order all are standardised as it begins.
        with tf.control_dependencies([inputs]):
            weights = forward(rows, gain)
        # Nothing of this run is to be on a tape that somebody holds.
        arguments = [tf.stop_gradient(tensor) for tensor in (inputs, weights, *bias)]
        return convolution.forward(*arguments, *([] if bias else [None])), gradient

    # XLA sums the columns of a matrix several times as fast as the channels of a kernel.
    rows = tf.reshape(tf.convert_to_tensor(kernel), shared_constant((math.prod(kernel.shape[:-1]), kernel.shape[-1])))
    arguments = [inputs, rows, gain] + ([] if bias is None else [bias])
    return run(*(tf.convert_to_tensor(argument) for argument in arguments))


@functools.cache
def _decay() -> Callable:
    return compiled(lambda gradient, weights, weight_decay: gradient + weights * weight_decay)


def add_decay(gradient, variable, weight_decay: float):
    """Adds coupled weight decay to a gradient.

    Args:
        gradient: Tensor.
        variable: `tf.Variable` or Keras variable of the same shape.
        weight_decay: Factor on the weights.

    Returns:
        `gradient + weight_decay * variable`.

    Example:

    >>> float(add_decay(tf.constant(1.0), tf.Variable(2.0), 0.5))
    2.0
    """
    gradient = tf.convert_to_tensor(gradient)
    # The product waits for the gradient. It depends on nothing else, so TensorFlow would compute it for all weights as
    # a step starts, and hold a copy of the network until the step ends.
    with tf.control_dependencies([gradient]):
        weights = tf.convert_to_tensor(variable)
        constant = shared_constant(weight_decay, weights.dtype)
        if runs_on_cpu() and compiles(gradient) and is_large(gradient):
            return _decay()(gradient, weights, constant)
        return gradient + weights * constant


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
        product = tf.nn.bias_add(product, bias)
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


def convolve_groups(inputs, kernel, groups: int, strides: Sequence[int], padding: str, dilation_rate: Sequence[int]):
    """A grouped convolution whose gradient is one operation a group, and for which nothing is kept but its input.

    The gradient of the grouped operation is several times slower than that of its groups. Forward, the grouped
    operation is the faster one with oneDNN. Without it, TensorFlow would make one operation of the convolution and of
    the bias behind it, and this operation refuses groups.

    Args:
        inputs: Tensor of shape (batch, height, width, channels).
        kernel: Tensor of shape (height, width, channels / groups, filters).
        groups: Number of groups.
        strides: Pair of strides.
        padding: `"same"` or `"valid"`.
        dilation_rate: Pair of dilation rates.

    Returns:
        Tensor of shape (batch, height, width, filters).

    Example:

    >>> convolve_groups(tf.ones((1, 4, 4, 4)), tf.ones((3, 3, 2, 6)), 2, (1, 1), "same", (1, 1)).shape
    TensorShape([1, 4, 4, 6])
    """
    forward, gradient = _grouped(groups, strides, padding, dilation_rate)

    @tf.custom_gradient
    def run(inputs, kernel):
        return forward(inputs, kernel), lambda upstream: gradient(inputs, kernel, upstream)

    return run(tf.convert_to_tensor(inputs), tf.convert_to_tensor(kernel))


def convolution_of_groups(
    shape: Sequence[int], groups: int, strides: Sequence[int], padding: str, dilation_rate: Sequence[int]
) -> Convolution:
    """`convolve_groups`, and a bias behind it, as a `Convolution`.

    Args:
        shape: Of the kernel.
        groups: As in `convolve_groups`.
        strides: As in `convolve_groups`.
        padding: As in `convolve_groups`.
        dilation_rate: As in `convolve_groups`.

    Returns:
        The `Convolution`.

    Example:

    >>> found = convolution_of_groups((3, 3, 2, 6), 2, (1, 1), "same", (1, 1))
    >>> found.forward(tf.ones((1, 4, 4, 4)), tf.ones((18, 6)), tf.ones(6)).shape
    TensorShape([1, 4, 4, 6])
    """
    run, derive = _grouped(groups, strides, padding, dilation_rate)

    def forward(inputs, rows, bias):
        outputs = run(inputs, tf.reshape(rows, shape))
        return outputs if bias is None else tf.nn.bias_add(outputs, bias)

    def gradient(inputs, rows, upstream):
        of_inputs, of_kernel = derive(inputs, tf.reshape(rows, shape), upstream)
        return of_inputs, tf.reshape(of_kernel, rows.shape)

    return Convolution(forward, gradient)


def _grouped(groups: int, strides: Sequence[int], padding: str, dilation_rate: Sequence[int]) -> tuple:
    """Returns a grouped convolution and its gradient, as functions of tensors."""
    options = {"strides": [1, *strides, 1], "padding": padding.upper(), "dilations": [1, *dilation_rate, 1]}

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
