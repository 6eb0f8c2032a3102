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
from nfnet_keras.tensorflow_calls import TracedOnce, gradient_of
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
    # The factor is a tensor, so that blocks that scale differently share one compiled function.
    return _scaled(function)(x, shared_constant(factor, x.dtype))[0]


@functools.cache
def _scaled(function: Callable) -> TracedOnce:
    def times(x, factor):
        return function(x) * factor

    derive = gradient_of(times, 1)
    return TracedOnce(
        lambda x, factor: ([times(x, factor)], []),
        lambda x, kept, upstream, skipped: derive(*upstream, *x),
        jit_compile=True,
    )


_product_and_sum = compiled(lambda x, factor, addend: x * factor + addend)


def product_and_sum(x, factor, addend):
    """Computes `x * factor + addend` in one pass over memory.

    Args:
        x: Tensor.
        factor: Tensor that broadcasts with it.
        addend: Tensor that broadcasts with both.

    Returns:
        Tensor.

    Example:

    >>> float(product_and_sum(tf.constant(2.0), tf.constant(3.0), tf.constant(4.0)))
    10.0
    """
    return _product_and_sum(x, factor, addend)


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
            return product_and_sum(weights, constant, gradient)
        return gradient + weights * constant
