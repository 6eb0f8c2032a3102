"""How long a user waits: for the import, the first training step, the first prediction and the command line.

    python -m benchmarks.startup [--rounds 5] [--quick]

Every value is of a process of its own. Import: Keras, then this package. First step: the network is built, with random
weights, and compiled with SGD_AGC and cross-entropy; the first `train_on_batch` (tracing and all), and the median of
three later ones. First prediction: the network is built; the first `predict`, and the later ones. Command line: the
whole process of `nfnet predict` with a `.keras` file and one picture.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks import parameters
from benchmarks.protocol import ROOT, SideError, Sides
from benchmarks.results import Part, Requirement, Result, main, unless_quick
from benchmarks.sides.networks import way

IMPORT_SECONDS, PREDICT_SECONDS = 0.3, 4.0
STEPS = (("nfnet_f0", 192, 10.0), ("nfnet_f0", 256, 10.0), ("nfnet_f3", 320, 35.0))
"""Network, size of its images, seconds that the first training step may take at most."""
LATER = 3

_IMPORTS = """
import json, time
began = time.perf_counter()
import keras
loaded = time.perf_counter()
import nfnet_keras
print(json.dumps([loaded - began, time.perf_counter() - loaded]))
"""


def run(options) -> Iterator[Part]:
    """Measures the four waits."""
    results, requirements = _imports(1 if options.quick else options.rounds)
    yield results, unless_quick(options, requirements)
    with Sides(options) as sides:
        steps = (("nfnet_tiny", 32, 10.0),) if options.quick else STEPS
        for model, size, bound in steps:
            # A large network takes a minute a process.
            rounds = 1 if options.quick else min(options.rounds, 2 if bound > 10 else 3)
            results, first = _first_and_later(sides, "train_on_batch", model, size, rounds)
            name = f"first training step, {model}, {size} x {size}, seconds"
            yield results, unless_quick(options, _at_most(name, first, bound))
        model, size, _ = steps[0] if options.quick else ("nfnet_f0", 256, None)
        rounds = 1 if options.quick else min(options.rounds, 3)
        results, first = _first_and_later(sides, "predict", model, size, rounds)
        name = f"first predict, {model}, {size} x {size}, seconds"
        yield results, unless_quick(options, _at_most(name, first, PREDICT_SECONDS))
        yield _command_line(sides, model, size, rounds), []
        yield sides.remarks(), []


def _at_most(name: str, seconds: float | None, bound: float) -> list[Requirement]:
    return [Requirement(name, seconds, bound, at_most=True)] if seconds else []


def _imports(rounds: int) -> Part:
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _IMPORTS]
    found = []
    # The first brings the files into memory and is not counted.
    for _ in range(rounds + 1):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
    keras, ours = ([values[i] for values in found[1:]] for i in range(2))
    results = [Result("import", "Keras", "s", keras), Result("import", "this package, after Keras", "s", ours)]
    name = "import nfnet_keras adds to importing Keras, seconds"
    return results, [Requirement(name, statistics.median(ours), IMPORT_SECONDS, at_most=True)]


def _first_and_later(sides: Sides, kind: str, model: str, size: int, rounds: int) -> tuple[list[Result], float | None]:
    """Returns the results, and the median of the first calls."""
    title = {"train_on_batch": "training step", "predict": "predict"}[kind]
    side = way(f"ours, {title}")
    path = sides.folder / f"{kind}-{model}-{size}.npz"
    inputs = parameters.write_inputs(path, 1, size, 1000, sides.options.seed)
    first, later, memory = [], [], []
    for _ in range(rounds):
        process = sides.start(side, kind, model=model, size=size, seed=sides.options.seed)
        if process is None:
            return [], None
        try:
            first.append(process.ask("feed", path=str(inputs))["first"])
            later.append(statistics.median(process.ask("time", repeats=LATER)["seconds"]))
            memory.append(process.ask("peak")["life"])
        except SideError as error:
            sides.fail(f"{title}, {model}, {size} x {size}", error)
            return [], None
        finally:
            sides.stop([process])
    case, peak = f"{title}, {model}, {size} x {size}, batch 1", statistics.median(memory)
    results = [Result(case, f"first {title}", "s", first), Result(case, f"later {title}", "s", later, memory=peak)]
    return results, statistics.median(first)


def _command_line(sides: Sides, model: str, size: int, rounds: int) -> list[Result]:
    side = way("ours, a saved network")
    process = sides.start(side, "saved", model=model, size=size, seed=sides.options.seed, folder=str(sides.folder))
    if process is None:
        return []
    sides.stop([process])
    files = [f"--model={sides.folder / 'network.keras'}", str(sides.folder / "picture.png")]
    times = [_seconds([sys.executable, "-m", "nfnet_keras", "predict", *files], ROOT) for _ in range(rounds)]
    return [Result("command line", f"nfnet predict, {model}, one picture, the whole process", "s", times)]


def _seconds(command: list[str], folder: pathlib.Path) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SideError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - began


if __name__ == "__main__":
    main(run)
