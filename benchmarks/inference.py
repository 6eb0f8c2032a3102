"""How long a network takes to run: this package beside timm, kecam and the authors' program.

    python -m benchmarks.inference --rounds 5

All sides have the same parameters and the same images, and their outputs are compared before anything is timed. Of each
peer's ways (eager or compiled, either memory layout, graph or XLA) every one is timed twice, and those near its best go
on to the rounds in which all sides take turns.
"""

import collections
import dataclasses
import statistics
from collections.abc import Iterator

import numpy as np

from benchmarks import parameters
from benchmarks.machine import has_bfloat16
from benchmarks.protocol import Process, SideError, Sides, in_turn
from benchmarks.results import Part, Requirement, Result, main, matrix_rates, unless_quick
from benchmarks.sides import Way, authors_side, kecam_side, ours, timm_side

CASES = (("timm_dm_nfnet_f0", 256), ("timm_dm_nfnet_f1", 256), ("timm_eca_nfnet_l0", 224))
QUICK = (("timm_test_nfnet", 64),)
BATCHES = (8, 1)
# Differences of outputs as shares of the spread between images.
AGREEMENT = {"float32": 2e-4, "bfloat16": 2e-2}
# A way that is this much slower than the fastest of its side is left out of the rounds.
NEAR = 1.15
FLOORS = {("timm", 1): 1.4, ("timm", 8): 1.15, ("kecam", 1): 1.5, ("kecam", 8): 1.5}


@dataclasses.dataclass
class _Measured:
    """What is known of one way at one batch size."""

    way: Way
    seconds: list[float]
    memory: float | None = None
    note: str = ""


def all_ways(options, model: str) -> list[list[Way]]:
    """Returns the ways of each side that can run a network, one list a side and precision."""
    ways = [*timm_side.inference_ways(), *kecam_side.inference_ways(model), *ours.inference_ways(options.device)]
    if getattr(options, "authors", None):
        ways += authors_side.inference_ways(model)
        if authors_side.inference_ways(model):
            ways += ours.inference_ways(options.device, "authors")
    if options.quick:
        ways = [way for way in ways if not way.options.get("compiled")]
    if options.device == "cpu" and model != CASES[0][0]:
        # The other backends on the first network alone: on a CPU they are told for information.
        ways = [way for way in ways if way.variables.get("KERAS_BACKEND", "tensorflow") == "tensorflow"]
    if not has_bfloat16(options.device):
        ways = [way for way in ways if way.precision != "bfloat16"]
    groups = collections.defaultdict(list)
    for way in ways:
        groups[way.environment, way.precision, way.arithmetic].append(way)
    return list(groups.values())


def run(options) -> Iterator[Part]:
    """Measures all cases."""
    with Sides(options) as sides:
        matrices = sides.start_matrices()
        for model, size in QUICK if options.quick else CASES:
            case = _Case(options, sides, model, size)
            if not case.draw():
                continue
            try:
                case.qualify()
                for batch in BATCHES:
                    results, requirements = case.measure(batch, matrices)
                    yield results, unless_quick(options, requirements)
                if model == CASES[0][0] or options.quick:
                    yield [], unless_quick(options, case.top1(16 if options.quick else 200))
            finally:
                case.close()
        yield sides.remarks(), []


class _Case:
    """One network at one size: its processes, from their start to their figures."""

    def __init__(self, options, sides: Sides, model: str, size: int):
        self.options, self.sides, self.model, self.size = options, sides, model, size
        self.processes: list[Process] = []
        self.dropped: dict[int, list[_Measured]] = {batch: [] for batch in BATCHES}
        self.notes: dict[tuple[str, int], str] = {}
        self.weights = sides.folder / f"{model}.safetensors"
        self.inputs = {
            batch: parameters.write_inputs(
                sides.folder / f"{model}-{size}-{batch}.npz", batch, size, 1000, options.seed
            )
            for batch in BATCHES
        }
        self.references: dict[str, np.ndarray] = {}
        # Names of ways and batch sizes at which a way gives what the others give.
        self.agreeing: set[tuple[str, int]] = set()

    @property
    def given(self) -> dict:
        return {"model": self.model, "size": self.size, "classes": 1000, "weights": str(self.weights)}

    def draw(self) -> bool:
        """Writes the parameters, and finds out what the network costs."""
        multiply_adds = self.sides.draw(self.model, self.size, 1000, self.weights)
        self.flops = 2 * (multiply_adds or 0)
        return multiply_adds is not None

    def qualify(self) -> None:
        """Starts every side's ways, compares their outputs, times each twice, and keeps those near the best."""
        for group in all_ways(self.options, self.model):
            processes = [
                process for way in group if (process := self.sides.start(way, "inference", **self.given)) is not None
            ]
            self.processes += processes
            kept = {}
            for batch in BATCHES:
                able = [
                    process for process in self.sides.feed(processes, self.inputs[batch]) if self.agrees(process, batch)
                ]
                times = in_turn(able, 1, repeats=2, sides=self.sides)
                best = min((statistics.median(values) for values in times.values()), default=0)
                for process in able:
                    name = process.way.name
                    if name not in times:
                        continue
                    self.agreeing.add((name, batch))
                    if times[name][0] <= NEAR * best:
                        kept[id(process)] = process
                    self.dropped[batch].append(_Measured(process.way, times[name], None, "two runs, not in the rounds"))
            gone = [process for process in processes if id(process) not in kept]
            self.sides.stop(gone)
            self.processes = [process for process in self.processes if process not in gone]

    def agrees(self, process: Process, batch: int) -> bool:
        """Compares a side's outputs with those of the first side of its arithmetic."""
        way = process.way
        path = self.sides.folder / "outputs.npz"
        try:
            process.ask("outputs", path=str(path))
        except SideError as error:
            self.sides.fail(f"{way.name} ({self.model})", error)
            return False
        with np.load(path) as arrays:
            outputs = arrays["outputs"]
        reference = self.references.get(way.arithmetic)
        if reference is None:
            # BATCHES begins with the large one: the spread between images needs several.
            self.references[way.arithmetic] = outputs
            return True
        expected = reference
        if batch != len(reference):
            expected = self.references.setdefault(f"{way.arithmetic}, batch {batch}", outputs)
        error = float(np.max(np.abs(outputs - expected)) / parameters.spread(reference))
        if not error < (bound := AGREEMENT[way.precision]):
            self.sides.fail(
                f"{way.name} ({self.model}, batch {batch})",
                f"its outputs differ by {error:.2g} of the spread between images, more than {bound:g}",
            )
            return False
        self.notes[way.name, batch] = f"outputs within {error:.0e}"
        return True

    def title(self, batch: int) -> str:
        return f"inference, {self.model}, {self.size} x {self.size}, batch {batch}"

    def measure(self, batch: int, matrices: list[Process]) -> Part:
        """Times all sides in turn at one batch size."""
        agreeing = [process for process in self.processes if (process.way.name, batch) in self.agreeing]
        able = self.sides.feed(agreeing, self.inputs[batch])
        for process in able:
            process.ask("reset")
        rounds = 2 if self.options.quick else self.options.rounds
        times = in_turn([*able, *matrices], rounds, repeats=3 if batch == 1 else 1, sides=self.sides)
        measured = []
        for process in able:
            if process.way.name in times:
                memory = process.ask("peak")["running"]
                measured.append(
                    _Measured(
                        process.way, times[process.way.name], memory, self.notes.get((process.way.name, batch), "")
                    )
                )
        done = {each.way.name for each in measured}
        dropped = [each for each in self.dropped[batch] if each.way.name not in done]
        title, products = self.title(batch), self.sides.products(matrices, times)
        rates = matrix_rates(products)
        results = [
            Result(title, each.way.name, "s", each.seconds, self.flops * batch, each.note, each.memory, rates)
            for each in [*measured, *dropped]
        ]
        return [*results, *products], self._requirements(title, batch, measured, rates)

    def _requirements(self, title: str, batch: int, measured: list[_Measured], rates: dict[str, float]) -> list:
        def best(environment: str, precision: str = "float32") -> float | None:
            found = [
                statistics.median(each.seconds)
                for each in measured
                if (each.way.environment, each.way.precision, each.way.arithmetic) == (environment, precision, "timm")
            ]
            return min(found, default=None)

        mine, half = best("ours"), best("ours", "bfloat16")
        if mine is None or self.options.device == "gpu":
            return []
        found = [
            Requirement(f"{title}: times as fast as {peer}'s best", best(peer) / mine, FLOORS[peer, batch])
            for peer in ("timm", "kecam")
            if best(peer)
        ]
        if half and best("timm"):
            found.append(Requirement(f"{title}: bfloat16, times as fast as timm's float32", best("timm") / half, 2.0))
        if batch == 8 and "float32" in rates:
            share = self.flops * batch / mine / rates["float32"]
            found.append(Requirement(f"{title}: share of the float32 matrix rate", share, 0.75))
        return found

    def top1(self, count: int) -> list[Requirement]:
        """How often bfloat16 has the class of float32, on random images."""
        inputs = parameters.write_inputs(self.sides.folder / "many.npz", count, self.size, 1000, self.options.seed + 1)
        classes = {}
        for precision in ("float32", "bfloat16"):
            sides = [
                each
                for each in self.processes
                if each.way.ours and (each.way.precision, each.way.arithmetic) == (precision, "timm")
            ]
            if not sides:
                return []
            path = self.sides.folder / f"many-{precision}.npz"
            try:
                sides[0].ask("outputs", inputs=str(inputs), path=str(path), batch=8)
            except SideError as error:
                self.sides.fail(f"{sides[0].way.name}, {count} images", error)
                return []
            with np.load(path) as arrays:
                classes[precision] = arrays["outputs"].argmax(-1)
        agreement = float(np.mean(classes["float32"] == classes["bfloat16"]))
        name = f"{self.model}: top-1 of bfloat16 as float32, {count} random images"
        return [Requirement(name, agreement, 0.99)]

    def close(self) -> None:
        """Ends the processes of this case."""
        self.sides.stop(self.processes)


if __name__ == "__main__":
    main(run)
