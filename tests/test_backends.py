"""The backends against each other: the same logits, the same steps, each other's files, mixed precision on each."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import kinds
import numpy as np
import pytest
import seeded
from judge import error

from tests import quick_jax

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="starts processes of its own for every backend"),
]

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")
PAIRS = list(itertools.permutations(BACKENDS, 2))
# Nothing is compiled twice in the two processes of JAX.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quick_jax.XLA_FLAGS,
    **quick_jax.cache("jax_cache"),
}

# What a process does with a kind of network. The last two are held against the first.
TASKS = ("logits", "sgd_agc", "agc_adam", "mixed_bfloat16", "mixed_float16")
SOME = ("nfnet_f0", "nf_regnet_b0", "timm_nf_seresnet101")
CASES = {
    "logits": tuple(kinds.kinds()),
    "sgd_agc": SOME,
    "agc_adam": SOME[-1:],
    "mixed_bfloat16": SOME[:1],
    "mixed_float16": SOME[1:],
}


def every_kind(*tasks: str):
    """Parametrizes a test by kind and task."""
    return pytest.mark.parametrize(("kind", "task"), [(kind, task) for task in tasks for kind in CASES[task]])


START = """
import json
import sys
import time

import keras
import nfnet_keras
import numpy as np

begin = time.time()
backend = keras.backend.backend()
tasks = json.loads(sys.argv[1])
with np.load("data.npz") as data:
    x, y = data["x"], data["y"]
arrays, notes = {}, {}

def keep(name, variables):
    arrays.update({f"{name}|{v.path}": keras.ops.convert_to_numpy(v) for v in variables})

def logits(model):
    # Compiled whole on JAX: one operation at a time takes much longer there, and elsewhere much shorter.
    made = model.predict(x[:4], verbose=0) if backend == "jax" else model(x[:4], training=False)
    return keras.ops.convert_to_numpy(made)

def fit(model, first, last):
    history = model.fit(x[4 * first : 4 * last], y[4 * first : 4 * last], batch_size=4, shuffle=False, verbose=0)
    return {name: values[-1] for name, values in history.history.items()}

def finish(name):
    np.savez(f"{backend}_{name}.npz", **arrays)
    with open(f"{backend}_{name}.json", "w") as file:
        json.dump({**notes, "seconds": time.time() - begin}, file)
"""

# Makes networks, trains them and saves them.
MAKE = """
import kinds
import seeded
from nfnet_keras.optimizers import SGD_AGC

def make(kind, policy="float32", **options):
    keras.backend.clear_session()
    keras.config.set_dtype_policy(policy)
    options = {"stochastic_depth_rate": 0.0, "drop_rate": 0.0, **options}
    model = kinds.make(kind, classes=5, classifier_activation=None, **options)
    for variable in model.trainable_variables:
        layer, _, parameter = variable.path.rpartition("/")
        variable.assign(seeded.array(layer, parameter, variable.shape, 1))
    return model

def compile(model, optimizer, **kwargs):
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **kwargs)

for kind, task in tasks:
    name = f"{kind}|{task}"
    start = time.time()
    if task == "logits":
        model = make(kind)
        arrays[name] = logits(model)
        keep(f"{name}|after", model.trainable_variables)
        model.save(f"{backend}_{kind}_{task}.keras")
    elif task.startswith("mixed"):
        model = make(kind, task)
        arrays[name] = logits(model)
        compile(model, SGD_AGC(0.05, momentum=0.9, clip_factor=0.02))
        notes[name] = {**fit(model, 0, 1), "optimizer": type(model.optimizer).__name__}
        if task == "mixed_float16":
            notes[name]["scale"] = float(model.optimizer.dynamic_scale) / model.optimizer.initial_scale
        keep(f"{name}|after", model.trainable_variables)
    else:
        # ReLU's gradient jumps: a change of 1e-6 in the weights, or another order of sums, moves it by 1e-3 once an
        # element changes sign. So the ResNets are trained with an activation that is smooth.
        model = make(kind, activation="silu") if "resnet" in kind else make(kind)
        keep(f"{name}|before", model.trainable_variables)
        if task == "sgd_agc":
            compile(model, SGD_AGC(0.05, momentum=0.9, weight_decay=1e-3, clip_factor=0.02))
        else:
            compile(model, keras.optimizers.Adam(1e-3), clip_factor=0.01)
        notes[name] = fit(model, 0, 3)
        keep(f"{name}|after", model.trainable_variables)
        keep(f"{name}|optimizer", model.optimizer.variables)
        model.save(f"{backend}_{kind}_{task}.keras")
        fit(model, 3, 4)
        keep(f"{name}|next", model.trainable_variables)
    notes[f"{name}|seconds"] = time.time() - start
finish("made")
"""

# Loads what the other backends have saved, and goes on with it.
LOAD = """
import traceback

for saved_on, kind, task in tasks:
    keras.backend.clear_session()
    start = time.time()
    name = f"{saved_on}|{kind}|{task}"
    try:
        model = keras.models.load_model(f"{saved_on}_{kind}_{task}.keras")
        keep(f"{name}|after", model.trainable_variables)
        if task == "logits":
            arrays[name] = logits(model)
        else:
            keep(f"{name}|optimizer", model.optimizer.variables)
            fit(model, 3, 4)
            keep(f"{name}|next", model.trainable_variables)
    except Exception:
        notes[f"{name}|error"] = traceback.format_exc()
    notes[f"{name}|seconds"] = time.time() - start
finish("loaded")
"""


def on_every_backend(folder: Path, code: str, result: str, tasks: dict[str, list]) -> tuple[dict, dict]:
    """Runs a program on all backends at once; returns its arrays and its notes, by backend."""
    path = os.pathsep.join(p for p in (str(HERE.parent), str(HERE / "golden"), os.environ.get("PYTHONPATH")) if p)
    running = {}
    for backend in BACKENDS:
        with open(folder / f"{backend}_{result}.txt", "w") as log:
            running[backend] = subprocess.Popen(
                [sys.executable, "-c", START + code, json.dumps(tasks[backend])],
                cwd=folder,
                env={**os.environ, **ENVIRONMENT, "KERAS_BACKEND": backend, "PYTHONPATH": path},
                stdout=log,
                stderr=log,
            )
    try:
        codes = {backend: process.wait(timeout=3000) for backend, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    for backend, done in codes.items():
        assert done == 0, f"{backend}:\n{(folder / f'{backend}_{result}.txt').read_text()[-4000:]}"
    arrays, notes = {}, {}
    for backend in BACKENDS:
        with np.load(folder / f"{backend}_{result}.npz") as file:
            arrays[backend] = dict(file)
        notes[backend] = json.loads((folder / f"{backend}_{result}.json").read_text())
    return arrays, notes


class Found:
    """What the backends found."""

    def __init__(self, folder: Path, cases: list):
        images = seeded.image((16, 64, 64, 3), 0)
        np.savez(folder / "data.npz", x=images, y=np.arange(16, dtype="int32") * 7 % 5)
        self.made, self.notes = on_every_backend(folder, MAKE, "made", dict.fromkeys(BACKENDS, cases))
        files = {
            here: [(there, *case) for there in BACKENDS if there != here for case in cases if "mixed" not in case[1]]
            for here in BACKENDS
        }
        self.loaded, self.load_notes = on_every_backend(folder, LOAD, "loaded", files)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the three backends found about all cases together: starting them takes longer than any one case."""
    cases = [(kind, task) for task in TASKS for kind in CASES[task]]
    return Found(tmp_path_factory.mktemp("backends"), cases)


def values(arrays: dict, name: str) -> dict[str, np.ndarray]:
    """Arrays by variable."""
    return {key.removeprefix(f"{name}|"): array for key, array in arrays.items() if key.startswith(f"{name}|")}


def norm(arrays) -> float:
    return np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in arrays))


def step_errors(got: dict, reference: dict, before: dict) -> tuple[float, float]:
    """The difference as a share of the distance moved: of all parameters together, and the largest of any one.

    For one alone, its rounding to float32 is left out (a gain near 1 moves by a few thousand of those in a step),
    and one that hardly moved counts as if it had moved by a hundredth of what its number of elements makes its part.
    """
    assert got.keys() == reference.keys() == before.keys()
    assert all(np.isfinite(array).all() for array in got.values())
    difference = {key: got[key] - reference[key] for key in got}
    moved = {key: reference[key] - before[key] for key in got}
    distance = norm(moved.values())
    rms = distance / np.sqrt(sum(array.size for array in moved.values()))
    each = [
        (norm([difference[key]]) - np.finfo("float32").eps * norm([reference[key]]))
        / max(norm([moved[key]]), 0.01 * rms * np.sqrt(moved[key].size))
        for key in difference
    ]
    return norm(difference.values()) / distance, max(each)


@every_kind("logits")
def test_logits(found, kind, task):
    made = found.made
    for a, b in PAIRS:
        assert error(made[a][f"{kind}|{task}"], made[b][f"{kind}|{task}"]) < 2e-5, (a, b)


@every_kind("sgd_agc", "agc_adam")
def test_three_steps(found, kind, task):
    name = f"{kind}|{task}"
    for backend in BACKENDS:
        # Some units are clipped and some are not.
        assert 0.05 < found.notes[backend][name]["agc_clipped"] < 1
    for a, b in PAIRS:
        before = values(found.made[a], f"{name}|before")
        after, reference = (values(found.made[backend], f"{name}|after") for backend in (a, b))
        together, each = step_errors(after, reference, before)
        assert together < 1e-4 and each < 1e-4, (a, b)


@pytest.mark.parametrize(("there", "here"), [pytest.param(*pair, id="-".join(pair)) for pair in PAIRS])
@every_kind("logits", "sgd_agc", "agc_adam")
def test_files_of_the_others(found, kind, task, there, here):
    """Everything that was saved is there, and the logits or the next step are what they were without saving."""
    made, loaded = found.made[there], found.loaded[here]
    name = f"{kind}|{task}"
    problem = found.load_notes[here].get(f"{there}|{name}|error")
    assert problem is None, problem
    for part in ("after", "optimizer"):
        saved, got = values(made, f"{name}|{part}"), values(loaded, f"{there}|{name}|{part}")
        assert saved.keys() == got.keys() and (saved or task == "logits")
        for path in saved:
            np.testing.assert_array_equal(got[path], saved[path], err_msg=path)
    if task == "logits":
        assert error(loaded[f"{there}|{name}"], made[name]) < 2e-5
    else:
        got = values(loaded, f"{there}|{name}|next")
        together, each = step_errors(got, values(made, f"{name}|next"), values(made, f"{name}|after"))
        assert together < 1e-4 and each < 1e-4


@every_kind("mixed_bfloat16", "mixed_float16")
def test_mixed_precision(found, kind, task):
    for backend in BACKENDS:
        reference, got = found.made[backend][f"{kind}|logits"], found.made[backend][f"{kind}|{task}"]
        difference = np.linalg.norm(got - reference) / np.linalg.norm(reference)
        assert 0 < difference < (0.03 if task == "mixed_bfloat16" else 0.005), backend
        logs = found.notes[backend][f"{kind}|{task}"]
        assert np.isfinite(logs["loss"]), backend
        assert (logs["optimizer"] == "LossScaleOptimizer") == (task == "mixed_float16"), backend
        before = values(found.made[backend], f"{kind}|logits|after")
        after = values(found.made[backend], f"{kind}|{task}|after")
        assert all(np.isfinite(array).all() for array in after.values())
        moved = any((after[path] != before[path]).any() for path in after)
        # Under Keras's first loss scale, 2**15, the gradients of a network may overflow: no step, and half the scale.
        assert moved == (logs["agc_clipped"] > 0) == (logs.get("scale", 1) == 1), backend
        assert moved or logs["scale"] == 0.5, backend
