"""What all tests share: one CPU, golden numbers, gradients on any backend, programs in a process of their own."""

import os

from tests import quick_jax

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# The tests' tolerances are those of float32 arithmetic on a CPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ.get("KERAS_BACKEND") == "jax":
    # JAX compiles every operation that runs outside of a function; here that is most of the time.
    shared = quick_jax.cache(os.path.join(os.path.dirname(__file__), "../.pytest_cache/jax"))
    for name, value in {"XLA_FLAGS": quick_jax.XLA_FLAGS, **shared}.items():
        os.environ.setdefault(name, value)

import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

# Each takes minutes on one core; begun last, it would be waited for.
LONGEST = ("test_backends.py", "training/test_run.py", "training/test_kill.py", "training/test_strategies.py")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(os.path.relpath(item.path, Path(__file__).parent), len(LONGEST)))


@pytest.fixture(autouse=True)
def _fixed_seeds():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict]:
    """Reads tests/golden/golden_NAME.npz."""

    @functools.cache
    def read(name: str) -> dict:
        with np.load(GOLDEN / f"golden_{name}.npz") as file:
            return dict(file)

    return read


def _gradients(fn: Callable, variables: list) -> list[np.ndarray]:
    variables = list(variables)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = fn()
        found = tape.gradient(loss, [v.value for v in variables], unconnected_gradients="zero")
    elif keras.backend.backend() == "jax":
        import jax

        def loss_of(values):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return fn()

        # Compiled whole: operation by operation takes several times as long.
        found = jax.jit(jax.grad(loss_of))([v.value for v in variables])
    else:
        import torch

        values = [v.value for v in variables]
        found = torch.autograd.grad(fn(), values, allow_unused=True)
        found = [torch.zeros_like(v) if g is None else g for g, v in zip(found, values, strict=True)]
    return [keras.ops.convert_to_numpy(g) for g in found]


@pytest.fixture(scope="session")
def gradients() -> Callable[[Callable, list], list[np.ndarray]]:
    """gradients(fn, variables): those of the scalar that `fn()` computes, by Keras variables, on any backend.

    For the gradient by an input, make the input a `keras.Variable` and give the layer its tensor.
    """
    return _gradients


@pytest.fixture
def new_process(tmp_path) -> Callable:
    """new_process(code, **values): runs a program that knows nothing of this one; returns what it hands to `report`.

    The program finds `values` as its variables, and `np` and `report` defined. `env` is added to this
    process's environment variables; a value of `None` removes one.
    """

    def run(code: str, env: dict | None = None, **values):
        out = tmp_path / "report.json"
        head = (
            "import json\nimport numpy as np\n"
            f"globals().update(json.loads({json.dumps(json.dumps(values))}))\n"
            f"def report(result):\n    open({str(out)!r}, 'w').write(json.dumps(result))\n"
        )
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            **(env or {}),
        }
        environment = {name: value for name, value in environment.items() if value is not None}
        done = subprocess.run(
            [sys.executable, "-c", head + code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def small_row():
    """The small NFNet of the golden numbers."""
    from nfnet_keras.applications.nfnet import NFNetVariant

    return NFNetVariant("small", (16, 32, 48, 48), (1, 2, 2, 1), 0.0, 32, 32, group_width=8)


@pytest.fixture(scope="session")
def small_nfnet(small_row) -> Callable:
    """small_nfnet(**options): the small NFNet of the golden numbers, logits, stochastic depth off."""
    from nfnet_keras.applications.nfnet import NFNet

    def make(**options):
        defaults = {"weights": None, "classes": 10, "classifier_activation": None, "stochastic_depth_rate": 0.0}
        return NFNet(small_row, **{**defaults, **options})

    return make


def _numpy_norm(x, axis=None) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if axis is None:
        if np.squeeze(x).ndim <= 1:
            return np.sqrt(np.sum(x * x))
        axis = 0 if x.ndim in (2, 3) else tuple(range(x.ndim - 1))
    return np.sqrt(np.sum(x * x, axis=axis, keepdims=True))


def _numpy_clip(gradient, parameter, clip_factor=0.01, eps=1e-3, axis=None) -> np.ndarray:
    gradient = np.asarray(gradient, np.float64)
    limit = clip_factor * np.maximum(_numpy_norm(parameter, axis), eps)
    norm = _numpy_norm(gradient, axis)
    return np.where(norm > limit, gradient * (limit / np.maximum(norm, 1e-6)), gradient)


@pytest.fixture(scope="session")
def numpy_norm() -> Callable:
    """Unit-wise norms in NumPy, written from the paper's code and not from this package's."""
    return _numpy_norm


@pytest.fixture(scope="session")
def numpy_clip() -> Callable:
    """Adaptive gradient clipping in NumPy, written from the paper's code and not from this package's."""
    return _numpy_clip
