"""A network run forwards and backwards outside of training, on Keras's backend."""

import importlib
from collections.abc import Callable, Sequence

import keras


def forward(function: Callable, variables: Sequence, changed: Sequence = ()) -> Callable:
    """Makes a function run without gradients, and without changing a variable.

    Args:
        function: Takes tensors and returns a structure of tensors.
        variables: The variables that it may read.
        changed: Pairs of a variable and the value that it is taken to have. Defaults to none.

    Returns:
        A function of the same tensors.

    Raises:
        ValueError: If the backend is none of TensorFlow, JAX and PyTorch.

    Example:

    >>> run = forward(lambda x: x + 1.0, [])
    >>> float(run(keras.ops.convert_to_tensor(1.0)))
    2.0
    """
    return _backend().forward(function, variables, changed)


def backward(function: Callable, variables: Sequence) -> Callable:
    """Makes a function give the gradient of a number by a value inside of it.

    Args:
        function: Takes a function `at` and tensors. It calls `at(value)` once, goes on with what that returns, and
            returns a number.
        variables: The variables that it may read.

    Returns:
        A function of the same tensors that returns the value and the gradient. Where the number does not depend on the
        value, that is `None`, on JAX zeros.

    Raises:
        ValueError: If the backend is none of TensorFlow, JAX and PyTorch.

    Example:

    >>> square = backward(lambda at, x: keras.ops.sum(at(2.0 * x) ** 2), [])
    >>> [float(y) for y in square(keras.ops.convert_to_tensor(3.0))]
    [6.0, 12.0]
    """
    return _backend().backward(function, variables)


def _backend():
    """Returns the module with the two functions for Keras's backend; their contract is the one above."""
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax", "torch"):
        raise ValueError(f"This needs Keras on TensorFlow, JAX or PyTorch. The backend is {backend!r}.")
    return importlib.import_module(f"nfnet_keras.diagnostics.{backend}_passes")
