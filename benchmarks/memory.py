"""What a training step needs in memory: this package, without and with `remat`, beside timm, without and with its own.

    python -m benchmarks.memory --rounds 3

Each way runs in a process of its own. Three figures tell its memory, in MiB:

- *whole*: peak of the process's resident memory during steps that are not the first;
- *above*: the same, less what the loaded libraries take, less parameters and the optimizer's state (twice the
  parameters). Gradients count: not all of them need be there at once;
- *tensors above*: the most that TensorFlow's allocator had given out at once, less parameters and state. It is what the
  step itself needs, free of gaps and of the traced graph. PyTorch counts nothing on a CPU.

Seconds of a step stand beside them; ours without and with `remat` take turns.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator

import numpy as np

from benchmarks import parameters
from benchmarks.protocol import Process, SideError, Sides, in_turn
from benchmarks.results import Part, Requirement, Result, main, unless_quick
from benchmarks.sides import memory_side

CASES = (
    ("timm_dm_nfnet_f0", 192, 8),
    ("timm_dm_nfnet_f0", 192, 1),
    ("timm_dm_nfnet_f1", 224, 8),
    ("timm_dm_nfnet_f1", 224, 1),
)
QUICK = (("timm_test_nfnet", 64, 2),)
REMAT_CASE = ("timm_dm_nfnet_f1", 224, 8)
# Of what a step needs above parameters and state, `remat` leaves at most this; and its time at most this.
LEFT, TIME = 0.5, 1.4


@dataclasses.dataclass
class _Measured:
    """One way: seconds of its steps, and its memory in MiB."""

    seconds: list[float]
    whole: float
    above: float
    tensors_above: float


def run(options) -> Iterator[Part]:
    """Measures all cases."""
    if options.device != "cpu":
        yield [Result("not run", "memory", "", [], note="it is the memory of processes, measured on CPUs")], []
        return
    with Sides(options) as sides:
        for model, size, batch in QUICK if options.quick else CASES:
            found = _case(options, sides, model, size, batch)
            title = f"memory of a training step, {model}, {size} x {size}, batch {batch}"
            results, requirements = [], []
            for name, each in found.items():
                results += _rows(title, name, each)
            if (model, size, batch) == REMAT_CASE:
                requirements += _remat(title, found)
            requirements += _beside_timm(title, found)
            yield results, unless_quick(options, requirements)
        yield sides.remarks(), []


def _case(options, sides: Sides, model: str, size: int, batch: int) -> dict[str, _Measured]:
    weights = sides.folder / f"{model}.safetensors"
    if not weights.exists() and sides.draw(model, size, 1000, weights) is None:
        return {}
    path = sides.folder / f"{model}-{size}-{batch}.npz"
    inputs = parameters.write_inputs(path, batch, size, 1000, options.seed)
    given = {"model": model, "size": size, "classes": 1000, "weights": str(weights), "learning_rate": 1e-3}
    own, timm = memory_side.ways()
    found = {}
    # Ours without and with `remat` take turns. The others are alone: all at once would not fit in every machine.
    for together in (own, *([way] for way in timm)):
        started = [process for way in together if (process := sides.start(way, "training", **given)) is not None]
        able = sides.feed(started, inputs)
        for process in able:
            process.ask("reset")
        times = in_turn(able, 2 if options.quick else options.rounds, sides=sides)
        for process in able:
            if process.way.name in times:
                found[process.way.name] = _measured(process, sides, times[process.way.name])
        sides.stop(started)
    return {name: each for name, each in found.items() if each is not None}


def _measured(process: Process, sides: Sides, seconds: list[float]) -> _Measured | None:
    path = sides.folder / "memory.npz"
    try:
        whole = process.ask("peak")["running"]
        process.ask("outputs", path=str(path))
    except SideError as error:
        sides.fail(process.way.name, error)
        return None
    with np.load(path) as arrays:
        own, libraries, tensors = (float(value) for value in arrays["outputs"])
    return _Measured(seconds, whole, whole - libraries - 2 * own, tensors - 2 * own)


def _rows(title: str, name: str, each: _Measured) -> list[Result]:
    rows = [
        Result(title, name, "s", each.seconds, memory=each.whole),
        Result(title, f"{name}: whole", "MiB", [each.whole]),
        Result(title, f"{name}: above", "MiB", [each.above]),
    ]
    if not math.isnan(each.tensors_above):
        rows.append(Result(title, f"{name}: tensors above", "MiB", [each.tensors_above]))
    return rows


def _remat(title: str, found: dict[str, _Measured]) -> list[Requirement]:
    if not {"ours", "ours, remat"} <= found.keys():
        return []
    plain, again = found["ours"], found["ours, remat"]
    seconds = statistics.median(again.seconds) / statistics.median(plain.seconds)
    return [
        Requirement(
            f"{title}: tensors above with remat / without",
            again.tensors_above / plain.tensors_above,
            LEFT,
            at_most=True,
        ),
        Requirement(f"{title}: time with remat / without", seconds, TIME, at_most=True),
    ]


def _beside_timm(title: str, found: dict[str, _Measured]) -> list[Requirement]:
    """Ours beside the least of timm's that trains as ours does: with AGC, and keeping what it needs."""
    peers = [each for name, each in found.items() if ", AGC" in name and "checkpointing" not in name]
    if "ours" not in found or not peers:
        return []
    return [
        Requirement(
            f"{title}: {what} of ours / timm's least", value(found["ours"]) / min(map(value, peers)), 1.0, at_most=True
        )
        for what, value in (("whole", lambda each: each.whole), ("above", lambda each: each.above))
    ]


if __name__ == "__main__":
    main(run)
