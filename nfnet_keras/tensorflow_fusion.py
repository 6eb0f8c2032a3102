"""Passes over memory that XLA makes one of, where TensorFlow trains on a CPU.

TensorFlow's graph runs an activation as seven operations, and each reads and writes the whole tensor; its gradient and
the standardization of a kernel are no better. A convolution takes longer to compile with XLA and then is slower. So a
training step stays a graph, and only what is bound by memory is compiled, function by function.
"""

import functools
import math
from collections.abc import Callable

import tensorflow as tf

from nfnet_keras.layers.devices import runs_on_cpu
from nfnet_keras.tensorflow_ahead import compiled
from nfnet_keras.tensorflow_convolution import Convolution
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

    >>> from nfnet_keras.tensorflow_convolution import PIXELS
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
            of_bias = [convolution.gradient_of_bias(upstream)] if bias else []
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
