"""Measures this package beside its peers, and writes one table and one picture.

    python -m benchmarks [SUITE ...] [--rounds 5] [--quick] [--device cpu|gpu] [--environments DIR] [--out DIR]
                         [--authors DIR]

Suites: inference, training, memory, startup, scaling, input, headline, export; all of them unless some are named. Peers
are installed from PyPI into environments of their own, once. The authors' program is on no registry: `--authors` names
a checkout of <https://github.com/google-deepmind/deepmind-research>, and without it that side is left out.

Nothing else should run on the machine meanwhile. Exit status 1 says that a suite or a side could not be run.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import pathlib
import sys
import time
import traceback

from benchmarks import machine
from benchmarks.results import Requirement, Result, add_options, matrix_rates, merged, report

SUITES = ("inference", "training", "memory", "startup", "scaling", "input", "headline", "export")


@dataclasses.dataclass
class Outcome:
    """What a run of the suites gave.

    Args:
        machine: Of `machine.describe()`.
        results: Of all suites.
        requirements: Of all suites.
        failures: One line for each suite that could not be run.
    """

    machine: dict[str, str]
    results: list[Result] = dataclasses.field(default_factory=list)
    requirements: list[Requirement] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was run."""
        return not self.failures and not any(each.case == "not run" for each in self.results)

    def table(self) -> str:
        """Returns the table as Markdown."""
        lines = ["# Benchmarks", "", *(f"- {name}: {value}" for name, value in self.machine.items())]
        for precision, rate in matrix_rates(self.results).items():
            lines.append(f"- matrix products, {precision}: {rate / 1e9:.0f} GFLOP/s (the best library's median)")
        lines += [f"- not run: {failure}" for failure in self.failures]
        return "\n".join([*lines, "", report(self.results, self.requirements)])

    def values(self) -> dict:
        """Returns everything as values that JSON has."""
        return {
            "machine": self.machine,
            "matrix_rates": matrix_rates(self.results),
            "results": [dataclasses.asdict(each) for each in merged(self.results)],
            "requirements": [{**dataclasses.asdict(each), "holds": each.holds} for each in self.requirements],
            "failures": self.failures,
        }


def run_suites(names: list[str], options: argparse.Namespace) -> Outcome:
    """Runs suites one after the other; what is known is written as each goes on: a run that is killed loses one case.

    Args:
        names: Modules of `benchmarks`.
        options: Of the command line.

    Returns:
        What they gave. A suite that fails is in `failures`.
    """
    outcome = Outcome({"date": datetime.date.today().isoformat(), **machine.describe()})
    for name in names:
        began = time.perf_counter()
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            for results, requirements in importlib.import_module(f"benchmarks.{name}").run(options):
                outcome.results += results
                outcome.requirements += requirements
                write(outcome, options.out)
        except Exception as error:
            traceback.print_exc()
            outcome.failures.append(f"{name}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            write(outcome, options.out)
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return outcome


def write(outcome: Outcome, folder: pathlib.Path) -> None:
    """Writes `table.md`, `values.json` and `picture.png` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(outcome.table() + "\n")
    (folder / "values.json").write_text(json.dumps(outcome.values(), indent=1) + "\n")
    try:
        from benchmarks.picture import draw
    except ImportError as error:
        failure = f"picture: {error} (pip install matplotlib)"
        if failure not in outcome.failures:
            outcome.failures.append(failure)
        return
    draw(outcome.results, folder / "picture.png", outcome.machine.get("GPU") or outcome.machine["processor"])


def main(arguments: list[str] | None = None) -> int:
    """Runs the program and returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    add_options(parser)
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("build/benchmarks"), help="default: %(default)s"
    )
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.suites if name not in SUITES]:
        parser.error(f"no such suite: {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    outcome = run_suites(options.suites or list(SUITES), options)
    print(outcome.table())
    print(f"\nWritten to {options.out}: table.md, values.json, picture.png", file=sys.stderr)
    return 0 if outcome.complete else 1


if __name__ == "__main__":
    sys.exit(main())
