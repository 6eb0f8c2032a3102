"""What a measurement gives: values of one side of a case, and ratios that are held against a floor."""

import argparse
import collections
import dataclasses
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Sequence

ENVIRONMENTS = pathlib.Path.home() / ".cache/nfnet-keras/peers"
"""Where the environments of the peers are, unless the command line says otherwise."""


@dataclasses.dataclass
class Result:
    """What was measured of one side of one case.

    Args:
        case: What was done, such as `"nfnet_f0, 256 x 256, batch 1, float32"`.
        side: Who did it and how, such as `"timm, compiled, channels last"`.
        unit: Unit of the values: `"s"`, `"MiB"`, `"images/s/core"`.
        values: The measurements.
        flops: Floating-point operations of one measurement, where its share of the machine's rate is to be told.
        note: Anything that the reader of the table has to know.
        memory: Peak resident memory of the side's process while it ran, in MiB.
        rates: `matrix_rates` measured in the same rounds; without, those of the whole run count.

    A result without values is a remark: `case` says of what kind ("not run", "versions", "note").
    """

    case: str
    side: str
    unit: str
    values: list[float]
    flops: float | None = None
    note: str = ""
    memory: float | None = None
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether this package is the side."""
        return self.side.startswith(("ours", "nfnet_keras", "nfnet-keras"))

    @property
    def precision(self) -> str:
        """Whose matrix rate the result is held against."""
        return "bfloat16" if "bfloat16" in f"{self.case} {self.side}" else "float32"

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclasses.dataclass
class Requirement:
    """A figure that is held against a bound: a floor, or a ceiling with `at_most`."""

    name: str
    value: float
    bound: float
    at_most: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound


Part = tuple[list[Result], list[Requirement]]
"""What one case of a suite gave; a suite yields one after the other."""


def unless_quick(options: argparse.Namespace, requirements: list[Requirement]) -> list[Requirement]:
    """Returns requirements, or none with `--quick`: there nothing is large enough to be held against a bound."""
    return [] if options.quick else requirements


def matrix_rates(results: Iterable[Result]) -> dict[str, float]:
    """The best rate of matrix products that any library reached, for each precision, in operations a second.

    Args:
        results: Those whose case begins with "matrix product" count.

    Returns:
        {"float32": rate, ...}; a precision that was not measured is not there.
    """
    values = collections.defaultdict(lambda: collections.defaultdict(list))
    for each in results:
        if each.case.startswith("matrix product") and each.values:
            values[each.precision][each.case, each.side] += [each.flops / value for value in each.values]
    return {precision: max(map(statistics.median, sides.values())) for precision, sides in values.items()}


def merged(results: Iterable[Result]) -> list[Result]:
    """Puts the values of one side of one case together, in the order in which the cases came."""
    found: dict[tuple[str, str, str], Result] = {}
    for each in results:
        key = (each.case, each.side, each.unit)
        if key in found and each.values:
            found[key] = dataclasses.replace(found[key], values=[*found[key].values, *each.values])
        else:
            found.setdefault(key, each)
    return list(found.values())


def report(results: list[Result], requirements: list[Requirement]) -> str:
    """Returns a table for each case, one of the requirements, and the remarks, as Markdown."""
    results = merged(results)
    rates = matrix_rates(results)
    cases: dict[str, list[Result]] = {}
    for each in results:
        if each.values:
            cases.setdefault(each.case, []).append(each)
    lines = []
    for case, sides in cases.items():
        lines += [*_table(case, sides, rates), ""]
    if requirements:
        lines += ["### Requirements", "", "| requirement | measured | bound | holds |", "| --- | ---: | ---: | --- |"]
    for each in requirements:
        sign = "<=" if each.at_most else ">="
        lines.append(f"| {each.name} | {each.value:.3g} | {sign} {each.bound:g} | {'yes' if each.holds else 'NO'} |")
    remarks = [f"- {each.case}: {each.side}{': ' * bool(each.note)}{each.note}" for each in results if not each.values]
    return "\n".join([*lines, *([""] if requirements and remarks else []), *remarks]).rstrip()


def _table(case: str, sides: list[Result], rates: dict[str, float]) -> list[str]:
    """The lines of one case: only the columns that any of its sides has something for."""
    columns: dict[str, list[str]] = {"side": [each.side for each in sides]}
    for unit in dict.fromkeys(each.unit for each in sides):
        columns[f"median, {unit}"] = [f"{each.median:.4g}" if each.unit == unit else "" for each in sides]
    columns["range"] = [f"{min(each.values):.4g} to {max(each.values):.4g}" for each in sides]
    columns["times ours"] = times_ours(sides)
    columns["GFLOP/s"] = [f"{each.flops / each.median / 1e9:.0f}" if _timed(each) else "" for each in sides]
    columns["share of the matrix rate"] = [_share(each, {**rates, **each.rates}) for each in sides]
    columns["peak memory, MiB"] = [f"{each.memory:.0f}" if each.memory else "" for each in sides]
    columns["remark"] = [each.note for each in sides]
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    left = ("side", "remark")
    return [
        f"### {case}",
        "",
        "| " + " | ".join(columns) + " |",
        "| " + " | ".join("---" if name in left else "---:" for name in columns) + " |",
        *("| " + " | ".join(cells) + " |" for cells in zip(*columns.values(), strict=True)),
    ]


def _share(each: Result, rates: dict[str, float]) -> str:
    if not _timed(each) or each.precision not in rates:
        return ""
    return f"{each.flops / each.median / rates[each.precision]:.0%}"


def _timed(each: Result) -> bool:
    return bool(each.flops) and each.unit == "s"


def times_ours(sides: Sequence[Result]) -> list[str]:
    """How many times the best of ours each side takes; "" where there is none of its unit and precision.

    A step without AGC ("no AGC" in the side's name) is held against ours without, one that computes blocks again
    ("remat", "checkpointing") against ours that does, and one kind of memory (behind a colon) against the same.

    Args:
        sides: Those of one case.

    Returns:
        One text for each.
    """

    def kind(each: Result) -> tuple:
        again = "remat" in each.side or "checkpointing" in each.side
        return each.unit, each.precision, "no AGC" in each.side, again, each.side.partition(": ")[2]

    best: dict[tuple, float] = {}
    for each in sides:
        if each.ours:
            best[kind(each)] = min(best.get(kind(each), math.inf), each.median)
    return [f"{each.median / best[kind(each)]:.2f}" if best.get(kind(each)) else "" for each in sides]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that every suite knows to a parser."""
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and images (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="smallest settings: proves that the programs run")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--environments", type=pathlib.Path, default=ENVIRONMENTS, help="of the peers (default: %(default)s)"
    )
    parser.add_argument("--authors", type=pathlib.Path, help="checkout of google-deepmind/deepmind-research")


def main(run: Callable) -> None:
    """Runs one suite from the command line and prints its tables."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    results, requirements = [], []
    for part in run(parser.parse_args()):
        results += part[0]
        requirements += part[1]
    print(report(results, requirements))
