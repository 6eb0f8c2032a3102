"""How long a training step takes: this package beside timm, kecam and the authors' program.

    python -m benchmarks.training --rounds 5

A step is cross-entropy, gradients, adaptive gradient clipping (AGC) and SGD with Nesterov momentum, without dropout and
stochastic depth. All sides start from the same parameters with the same images and labels. Before anything is timed,
the losses of the first three steps are compared. Without AGC all sides compute the same. With it the first losses must
be the same; the later ones are only told, since timm clips gains element by element. Every way of a side takes some
steps, and its best two, if they are near each other, go on to the rounds in which all sides take turns.
"""

import dataclasses
import statistics
from collections.abc import Iterator

import numpy as np

from benchmarks import parameters
from benchmarks.protocol import Process, SideError, Sides, in_turn
from benchmarks.results import Part, Requirement, Result, main, matrix_rates, unless_quick
from benchmarks.sides import Way, authors_side, kecam_side, ours, timm_side

MODEL, SIZE = "timm_dm_nfnet_f0", 192
BATCHES = (8, 1)
LEARNING_RATE = 0.005
# Differences as shares of the first loss: in the first loss; in the third, when the rounding of two updates has gone
# through, and in the first of the authors' program, whose GELU is an approximation.
AGREEMENT = (1e-4, 1e-2)
# A way that is this much slower than the fastest of its side is left out of the rounds.
NEAR = 1.1
# Ways of a side that hold memory through the rounds, at most: four of timm's, two of kecam's and ours take 24 GiB.
MOST = 2


@dataclasses.dataclass
class _Started:
    """A side that has taken its first three steps."""

    process: Process
    first: float
    seconds: float
    losses: np.ndarray

    @property
    def way(self) -> Way:
        return self.process.way


def run(options) -> Iterator[Part]:
    """Measures steps at both batch sizes, and what AGC costs."""
    model, size = ("timm_test_nfnet", 64) if options.quick else (MODEL, SIZE)
    with Sides(options) as sides:
        weights = sides.folder / "weights.safetensors"
        multiply_adds = sides.draw(model, size, 1000, weights)
        if multiply_adds is None:
            yield sides.remarks(), []
            return
        given = {"model": model, "size": size, "classes": 1000, "weights": str(weights)}
        given["learning_rate"] = LEARNING_RATE
        seconds = None
        batches = BATCHES[:1] if options.quick else BATCHES
        for batch in batches:
            case = _Batch(options, sides, given, batch, 6 * multiply_adds * batch)
            results = case.measure()
            yield results, unless_quick(options, case.requirements())
            # The smallest batch comes last: there AGC is most of a step, so its seconds are known best.
            seconds = case.cost()
        batch = 16 if options.quick else 32
        if options.device == "cpu" and seconds is not None:
            large = _Batch(options, sides, given, batch, 6 * multiply_adds * batch)
            results = large.measure_ours()
            yield results, unless_quick(options, large.share_of_cost(seconds, batches[-1]))
        yield sides.remarks(), []


def all_ways(options, model: str) -> list[list[Way]]:
    """Returns the ways of each side to take a step, with and without AGC apart."""
    ways = [*timm_side.training_ways(), *kecam_side.training_ways(model), *ours.training_ways(options.device)]
    if getattr(options, "authors", None):
        ways += authors_side.training_ways(model)
    if options.quick:
        ways = [way for way in ways if not way.options.get("compiled")]
    groups: dict[tuple, list[Way]] = {}
    for way in ways:
        groups.setdefault((way.environment, bool(way.options.get("agc"))), []).append(way)
    return list(groups.values())


class _Batch:
    """The steps of all sides at one batch size."""

    def __init__(self, options, sides: Sides, given: dict, batch: int, flops: float):
        self.options, self.sides, self.given, self.batch, self.flops = options, sides, given, batch, flops
        self.title = f"training step, {given['model']}, {given['size']} x {given['size']}, batch {batch}"
        path = sides.folder / f"training-{batch}.npz"
        self.inputs = parameters.write_inputs(path, batch, given["size"], given["classes"], options.seed)
        self.losses: dict[tuple[str, bool], np.ndarray] = {}
        self.results: list[Result] = []
        self.products: list[Result] = []

    def measure(self) -> list[Result]:
        """Finds each side's fastest ways, and times these in turn."""
        kept: list[_Started] = []
        for group in all_ways(self.options, self.given["model"]):
            kept += self._near_best(group)
        self._time(kept, 2 if self.options.quick else self.options.rounds)
        return [*self.results, *self.products]

    def measure_ours(self) -> list[Result]:
        """Times our step with AGC alone."""
        ways = [way for way in ours.training_ways(self.options.device) if way.options["agc"]]
        self._time(self._near_best(ways), 2)
        return self.results

    def _near_best(self, group: list[Way]) -> list[_Started]:
        """Starts one way after the other, and keeps the two fastest, if they are near: few hold memory at a time."""
        kept: list[_Started] = []
        for way in group:
            started = self._start(way)
            if started is None:
                continue
            kept.append(started)
            fastest = sorted(kept, key=lambda each: each.seconds)[:MOST]
            near = [each for each in fastest if each.seconds <= NEAR * fastest[0].seconds]
            for slower in [each for each in kept if each not in near]:
                kept.remove(slower)
                self.sides.stop([slower.process])
                note = f"some steps, not in the rounds; {self._note(slower)}"
                self.results.append(Result(self.title, slower.way.name, "s", [slower.seconds], self.flops, note))
        return kept

    def _start(self, way: Way) -> _Started | None:
        """Takes the first three steps and compares their losses."""
        process = self.sides.start(way, "training", **self.given)
        if process is None:
            return None
        path = self.sides.folder / "losses.npz"
        try:
            first = process.ask("feed", path=str(self.inputs))["first"]
            # A step of one image has not found its pace after two.
            seconds = min(process.ask("time", repeats=2 if self.batch > 1 else 8)["seconds"])
            process.ask("outputs", path=str(path))
        except SideError as error:
            self.sides.fail(f"{way.name} ({self.title})", error)
            self.sides.stop([process])
            return None
        with np.load(path) as arrays:
            started = _Started(process, first, seconds, arrays["outputs"])
        if not self._agrees(started):
            self.sides.stop([process])
            return None
        return started

    def _agrees(self, started: _Started) -> bool:
        arithmetic, clips = started.way.arithmetic, bool(started.way.options.get("agc"))
        self.losses.setdefault((arithmetic, clips), started.losses)
        for (other, clipped), losses in self.losses.items():
            # A batch of one is learnt in three steps: its last loss is nothing to divide by.
            errors = np.abs(started.losses - losses) / losses[0]
            bound = AGREEMENT[0] if other == arithmetic else AGREEMENT[1]
            same = (other, clipped) == (arithmetic, clips) and not clips
            if not errors[0] < bound or (same and not errors[2] < AGREEMENT[1]):
                texts = [", ".join(f"{loss:.5f}" for loss in each) for each in (started.losses, losses)]
                reason = f"its first losses are {texts[0]}; another side's are {texts[1]}"
                self.sides.fail(f"{started.way.name} ({self.title})", reason)
                return False
        return True

    def _note(self, started: _Started) -> str:
        losses = ", ".join(f"{loss:.4f}" for loss in started.losses)
        return f"losses {losses}; first step {started.first:.1f} s"

    def _time(self, kept: list[_Started], rounds: int) -> None:
        matrices = self.sides.start_matrices(["float32"])
        processes = [started.process for started in kept]
        for process in processes:
            process.ask("reset")
        repeats = 3 if self.batch == 1 else 1
        times = in_turn([*processes, *matrices], rounds, repeats, warmup=int(self.batch <= 8), sides=self.sides)
        self.products = self.sides.products(matrices, times)
        rates = matrix_rates(self.products)
        for started in kept:
            name = started.way.name
            if name in times:
                memory, note = started.process.ask("peak")["running"], self._note(started)
                self.results.append(Result(self.title, name, "s", times[name], self.flops, note, memory, rates))
        self.sides.stop([*processes, *matrices])

    def _of(self, side: str, agc: bool | None = None) -> Result | None:
        """The fastest result of a side's that was in the rounds."""
        found = [each for each in self.results if each.side.startswith(side) and each.memory is not None]
        if agc is not None:
            found = [each for each in found if each.side.endswith(", AGC") == agc]
        return min(found, key=lambda each: each.median, default=None)

    def cost(self) -> float | None:
        """Seconds of AGC and its metric: the median of the differences within each round."""
        clipped, plain = self._of("ours", True), self._of("ours", False)
        if clipped is None or plain is None:
            return None
        return statistics.median(a - b for a, b in zip(clipped.values, plain.values, strict=True))

    def requirements(self) -> list[Requirement]:
        """The bounds for this batch size."""
        mine = self._of("ours", True)
        if mine is None or self.options.device == "gpu":
            return []
        found = []
        if (timm := self._of("timm", True)) is not None:
            floor = 1.3 if self.batch == 8 else 1.0
            ratio = timm.median / mine.median
            found.append(Requirement(f"{self.title}: times as fast as timm with its AGC", ratio, floor))
        if self.batch == 8:
            if (kecam := self._of("kecam")) is not None:
                ratio = kecam.median / mine.median
                found.append(Requirement(f"{self.title}: times as fast as kecam's best, without AGC", ratio, 3.0))
            if "float32" in (rates := matrix_rates(self.products)):
                share = self.flops / mine.median / rates["float32"]
                found.append(Requirement(f"{self.title}: share of the float32 matrix rate", share, 0.55))
            if (seconds := self.cost()) is not None:
                name = f"{self.title}: AGC and its metric as a share of the step"
                found.append(Requirement(name, seconds / mine.median, 0.05, at_most=True))
        return found

    def share_of_cost(self, seconds: float, batch: int) -> list[Requirement]:
        """What AGC is of this step. Its work is of the parameters alone, so its seconds are those of any batch."""
        mine = self._of("ours", True)
        if mine is None:
            return []
        name = f"{self.title}: AGC and its metric (its {seconds:.3f} s at batch {batch}) as a share of the step"
        return [Requirement(name, seconds / mine.median, 0.02, at_most=True)]


if __name__ == "__main__":
    main(run)
