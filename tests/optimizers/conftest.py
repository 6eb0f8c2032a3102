"""Variables, gradients and steps of the optimizer tests."""

from collections.abc import Callable

import keras
import numpy as np
import pytest

SHAPES = {
    "conv/kernel": (3, 3, 4, 6),
    "conv/gain": (6,),
    "dense/kernel": (5, 4),
    "dense/bias": (4,),
    "block/skip_gain": (),
    "predictions/kernel": (4, 3),
    "predictions/bias": (3,),
}


class Named:
    """An owner of variables: gives them paths, as a layer does."""

    def __init__(self, shapes, seed):
        rng = np.random.default_rng(seed)
        self.variables = []
        for path, shape in shapes.items():
            owner, name = path.rsplit("/", 1)
            with keras.name_scope(owner):
                value = (0.5 * rng.standard_normal(shape)).astype("float32")
                self.variables.append(keras.Variable(value, name=name))


@pytest.fixture(scope="session")
def make_variables() -> Callable:
    """make_variables(): one variable of each kind; equal values at every call."""
    return lambda shapes=None, seed=0: Named(shapes or SHAPES, seed).variables


@pytest.fixture(scope="session")
def make_gradients() -> Callable:
    """make_gradients(seed): one array a variable; some units are over the clipping limit and some under."""

    def make(seed, shapes=None):
        rng = np.random.default_rng(100 + seed)
        arrays = []
        for shape in (shapes or SHAPES).values():
            array = 0.3 * rng.standard_normal(shape)
            if shape:
                array = array * np.where(np.arange(shape[-1]) % 2, 1.0, 1e-3)
            arrays.append(array.astype("float32"))
        return arrays

    return make


@pytest.fixture(scope="session")
def apply() -> Callable:
    """apply(optimizer, arrays, variables): one update."""

    def apply_(optimizer, arrays, variables):
        optimizer.apply([keras.ops.convert_to_tensor(a) for a in arrays], variables)

    return apply_


@pytest.fixture(scope="session")
def values() -> Callable:
    return lambda variables: [np.array(keras.ops.convert_to_numpy(v)) for v in variables]


@pytest.fixture(scope="session")
def same() -> Callable:
    """same(a, b): whether two lists of variables or arrays agree."""

    def check(a, b, tolerance=1e-6):
        assert len(a) == len(b)
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(x),
                keras.ops.convert_to_numpy(y),
                rtol=10 * tolerance,
                atol=tolerance,
                err_msg=str(i),
            )

    return check
