"""Whether cost grows with the work: larger networks, and more devices on the same cores.

    python -m benchmarks.scaling [--rounds 5] [--quick]

NFNet-F0 to F3 at one image size, so that their multiply-adds grow with depth alone: seconds of a forward pass and of a
training step, and the peak memory of the process less that of one that has only loaded the libraries. Each network is
measured in turn with F0; its time and memory as multiples of F0's are held against its multiply-adds as a multiple of
F0's.

One device and two mirrored virtual ones (`tf.distribute.MirroredStrategy`) on the same cores take training steps in
turn, at the same global batch.
"""

import dataclasses
import os
import statistics
from collections.abc import Iterator

from benchmarks import parameters
from benchmarks.protocol import Process, SideError, Sides, in_turn
from benchmarks.results import Part, Requirement, Result, main, unless_quick
from benchmarks.sides.networks import way

NETWORKS = ("nfnet_f0", "nfnet_f1", "nfnet_f2", "nfnet_f3")
SIZE, BATCH = 192, 4
# Of parameters, F3 has 3.57 times those of F0 and 3.51 times its multiply-adds; the rest is noise.
GROWTH = 1.05
SPREAD_SIZE, SPREAD_BATCH, REPLICAS, SPREAD_COST = 128, 16, 2, 1.2


def run(options) -> Iterator[Part]:
    """Measures growth with the network, and the cost of two devices."""
    with Sides(options) as sides:
        base = _base(sides)
        for kind, title in (("predict_on_batch", "forward"), ("train_on_batch", "training step")):
            results, requirements = _growth(sides, kind, title, base)
            yield results, unless_quick(options, requirements)
        results, requirements = _spread(sides)
        yield results, unless_quick(options, requirements)
        yield sides.remarks(), []


def _base(sides: Sides) -> float:
    """Returns the memory of a process that has loaded the libraries, in MiB."""
    process = sides.start(way("ours, libraries"), "libraries")
    if process is None:
        return 0.0
    memory = process.ask("peak")["life"]
    sides.stop([process])
    return memory


@dataclasses.dataclass
class _Measured:
    """One network beside F0: its seconds and F0's, and its memory, that of the libraries taken off."""

    seconds: list[float]
    reference: list[float]
    memory: float


def _growth(sides: Sides, kind: str, title: str, base: float) -> Part:
    options = sides.options
    size, batch = (32, 1) if options.quick else (SIZE, BATCH)
    path = sides.folder / f"growth-{size}-{batch}.npz"
    inputs = parameters.write_inputs(path, batch, size, 1000, options.seed)
    names = ("nfnet_tiny", "nfnet_f0") if options.quick else NETWORKS
    first = _started(sides, kind, names[0], size, inputs)
    if first is None:
        return [], []
    measured: dict[str, _Measured] = {}
    for name in names[1:]:
        process = _started(sides, kind, name, size, inputs)
        if process is None:
            continue
        rounds = 1 if options.quick else options.rounds
        times = in_turn([first, process], rounds, sides=sides)
        if len(times) == 2:
            seconds, reference = (times[each.way.name] for each in (process, first))
            measured[name] = _Measured(seconds, reference, process.ask("peak")["life"] - base)
        sides.stop([process])
    memory = first.ask("peak")["life"] - base
    sides.stop([first])
    case = f"{title}, F0 to F3, {size} x {size}, batch {batch}"
    work = {name: _multiply_adds(name, size) for name in names}
    reference = [value for each in measured.values() for value in each.reference]
    flops = 2 * batch * (3 if kind == "train_on_batch" else 1)
    results = [Result(case, f"ours, {names[0]}", "s", reference, flops * work[names[0]], memory=memory)]
    requirements = []
    for name, each in measured.items():
        results.append(Result(case, f"ours, {name}", "s", each.seconds, flops * work[name], memory=each.memory))
        more = work[name] / work[names[0]]
        slower = statistics.median(each.seconds) / statistics.median(each.reference)
        about = f"{title}, {name} over {names[0]}, over the multiply-adds' {more:.2f}"
        requirements.append(Requirement(f"time of a {about}", slower / more, GROWTH, at_most=True))
        requirements.append(Requirement(f"memory of a {about}", each.memory / memory / more, GROWTH, at_most=True))
    return results, requirements


def _started(sides: Sides, kind: str, name: str, size: int, inputs) -> Process | None:
    process = sides.start(way(f"ours, {name}"), kind, model=name, size=size, seed=sides.options.seed)
    return process if process is not None and sides.feed([process], inputs) else None


def _multiply_adds(name: str, size: int) -> int:
    # Only shapes are computed here; TensorFlow's messages have no place in the table.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import nfnet_keras as nfk
    from nfnet_keras.complexity import multiply_adds, without_weights

    with without_weights():
        return multiply_adds(nfk.create_model(name, weights=None), (size, size, 3))


def _spread(sides: Sides) -> Part:
    options = sides.options
    if options.device != "cpu":
        return [], []
    model, size = ("nfnet_tiny", 32) if options.quick else ("nfnet_f0", SPREAD_SIZE)
    path = sides.folder / "spread.npz"
    inputs = parameters.write_inputs(path, SPREAD_BATCH, size, 1000, options.seed)
    processes = []
    for replicas in (1, REPLICAS):
        name = "ours, one device" if replicas == 1 else f"ours, {replicas} mirrored virtual devices"
        process = sides.start(way(name), "spread", model=model, size=size, seed=options.seed, replicas=replicas)
        if process is None:
            return [], []
        processes += sides.feed([process], inputs)
    times = in_turn(processes, 1 if options.quick else options.rounds, sides=sides)
    case = f"training step, {model}, {size} x {size}, global batch {SPREAD_BATCH}, devices"
    results = [_with_memory(case, process, times) for process in processes if process.way.name in times]
    sides.stop(processes)
    if len(results) < 2:
        return results, []
    cost = statistics.median([two / one for one, two in zip(*(each.values for each in results), strict=True)])
    name = f"{REPLICAS} mirrored virtual devices over one, {model}, {size} x {size}, global batch {SPREAD_BATCH}"
    return results, [Requirement(name, cost, SPREAD_COST, at_most=True)]


def _with_memory(case: str, process: Process, times: dict[str, list[float]]) -> Result:
    name = process.way.name
    try:
        memory = process.ask("peak")["life"]
    except SideError:
        memory = None
    return Result(case, name, "s", times[name], memory=memory)


if __name__ == "__main__":
    main(run)
