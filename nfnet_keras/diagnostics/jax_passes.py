"""What `passes.py` promises, on JAX."""

from collections.abc import Callable, Sequence

import keras


def forward(function: Callable, variables: Sequence, changed: Sequence) -> Callable:
    """As in `passes.py`."""
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
    """As in `passes.py`."""
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
                return function(at, *tensors), kept[0]

        _, value = jax.eval_shape(lambda: scored(None))
        gradient, value = jax.grad(scored, has_aux=True)(jnp.zeros(value.shape, value.dtype))
        return value, gradient

    return lambda *tensors: compiled([variable.value for variable in variables], tensors)
