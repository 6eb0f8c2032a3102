"""A network run forwards and backwards on JAX, outside of training; as in `tensorflow_passes.py`."""

from collections.abc import Callable, Sequence

import keras


def forward(function: Callable, variables: Sequence, changed: Sequence) -> Callable:
    """Makes a function run without gradients, and without changing a variable.

    Args:
        function: Takes tensors and returns a structure of tensors.
        variables: The variables that it may read.
        changed: Pairs of a variable and the value that it is taken to have.

    Returns:
        A function of the same tensors.
    """
    import jax

    new = {id(variable): value for variable, value in changed}
    state = [keras.ops.cast(new.get(id(v), v.value), v.dtype) for v in variables]

    # Compiled whole: operation by operation takes many times as long. Weights go in, or they would be constants of it.
    @jax.jit
    def compiled(state, tensors):
        with keras.StatelessScope(state_mapping=list(zip(variables, state, strict=True))):
            return function(*tensors)

    return lambda *tensors: compiled(state, tensors)


def backward(function: Callable, variables: Sequence) -> Callable:
    """Makes a function give the gradient of a number by a value inside of it.

    Args:
        function: Takes a function `at` and tensors. It calls `at(value)` once, goes on with what that returns, and
            returns a number and a further structure of tensors.
        variables: The variables that it may read.

    Returns:
        A function of the same tensors that returns the value, the gradient (zeros where the number does not depend on
        the value) and the further structure.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def compiled(state, tensors):
        def scored(change):
            kept = []

            def at(value):
                kept.append(value)
                return value if change is None else value + change

            with keras.StatelessScope(state_mapping=list(zip(variables, state, strict=True))):
                number, further = function(at, *tensors)
            return number, (kept[0], further)

        _, (value, _) = jax.eval_shape(lambda: scored(None))
        gradient, (value, further) = jax.grad(scored, has_aux=True)(jnp.zeros(value.shape, value.dtype))
        return value, gradient, further

    return lambda *tensors: compiled([variable.value for variable in variables], tensors)
