"""A network run forwards and backwards on TensorFlow, outside of training."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf


def forward(function: Callable, variables: Sequence, changed: Sequence) -> Callable:
    """Makes a function run without gradients, and without changing a variable.

    Args:
        function: Takes tensors and returns a structure of tensors.
        variables: The variables that it may read.
        changed: Pairs of a variable and the value that it is taken to have.

    Returns:
        A function of the same tensors.

    Example:

    >>> float(forward(lambda x: x + 1.0, [], [])(tf.constant(1.0)))
    2.0
    """

    def run(*tensors):
        with keras.StatelessScope(state_mapping=list(changed)):
            return function(*tensors)

    return run


def backward(function: Callable, variables: Sequence) -> Callable:
    """Makes a function give the gradient of a number by a value inside of it.

    Args:
        function: Takes a function `at` and tensors. It calls `at(value)` once, goes on with what that returns, and
            returns a number and a further structure of tensors.
        variables: The variables that it may read.

    Returns:
        A function of the same tensors that returns the value, the gradient (`None` where the number does not depend on
        the value) and the further structure.

    Example:

    >>> square = backward(lambda at, x: (tf.reduce_sum(at(2.0 * x) ** 2), ()), [])
    >>> [float(y) for y in square(tf.constant(3.0))[:2]]
    [6.0, 12.0]
    """

    def run(*tensors):
        kept = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:

            def at(value):
                tape.watch(value)
                kept.append(value)
                return value

            with keras.StatelessScope():
                number, further = function(at, *tensors)
        return kept[0], tape.gradient(number, kept[0]), further

    return run
