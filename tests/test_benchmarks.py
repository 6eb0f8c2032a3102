"""The programs that measure: their arithmetic, their protocol with sides of nothing, and how they fail."""

import argparse
import ast
import contextlib
import importlib
import json
import pathlib
import re
import sys
import types

import numpy as np
import pytest

from benchmarks import __main__ as program
from benchmarks import environments, inference, parameters, training
from benchmarks.protocol import SideError, Sides, in_turn
from benchmarks.results import Requirement, Result
from benchmarks.sides import Way, kecam_side, ours, timm_side
from benchmarks.training import all_ways

BENCHMARKS = pathlib.Path(program.__file__).parent


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        rounds=2, seed=0, quick=True, device="cpu", environments=tmp_path / "peers", authors=None, out=tmp_path / "out"
    )


def toy(name, **given):
    return Way(name, "tests.toy_side", "ours", given)


def start(sides, *ways, size=8, batch=4):
    processes = [sides.start(way, "inference", model="toy") for way in ways]
    inputs = parameters.write_inputs(sides.folder / "in.npz", batch, size, 10, 0)
    return sides.feed([process for process in processes if process is not None], inputs)


def test_sides_take_turns_and_every_other_round_goes_backwards(options, tmp_path):
    order = tmp_path / "order"
    with Sides(options) as sides:
        processes = start(sides, *(toy(letter, letter=letter, order=str(order)) for letter in "abc"))
        order.write_text("")
        times = in_turn(processes, 3, repeats=2, warmup=1)
    assert order.read_text() == "aaabbbccc" + "cccbbbaaa" + "aaabbbccc"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_every_turn_of_every_side_is_warmed_up(options, tmp_path):
    # A side that is warmed up and one that is not are no fair comparison, however long they take.
    order = tmp_path / "order"
    with Sides(options) as sides:
        processes = start(sides, toy("a", letter="a", order=str(order)))
        order.write_text("")
        processes[0].ask = _slowly(processes[0].ask)
        in_turn(processes, 3, warmup=2)
    assert order.read_text() == "a" * 9


def _slowly(ask):
    def answer(command, **request):
        return ask(command, **request) | ({"seconds": [5.0]} if command == "time" else {})

    return answer


def test_times_are_those_of_the_work(options):
    with Sides(options) as sides:
        times = in_turn(start(sides, toy("a", seconds=0.03), toy("b")), 2)
    assert min(times["a"]) >= 0.03 and max(times["b"]) < 0.03


def test_a_side_that_refuses_or_dies_is_named_and_the_others_go_on(options, capsys):
    with Sides(options) as sides:
        processes = start(sides, toy("well"), toy("refuses", refuses=True), toy("dies", dies_at=3))
        times = in_turn(processes, 2, sides=sides)
        remarks = {each.side: each.note for each in sides.remarks() if each.case == "not run"}
    assert list(times) == ["well"] and len(times["well"]) == 2
    assert remarks["refuses (toy)"] == "ImportError: no such library"
    assert "status 7: out of memory" in remarks["dies"]
    assert "not run: dies: its process ended" in capsys.readouterr().err


def test_a_side_that_hangs_is_ended(options):
    with Sides(options) as sides:
        (process,) = start(sides, toy("slow", seconds=0.2))
        process.timeout = 0.05
        with pytest.raises(SideError, match="no answer to 'time'"):
            in_turn([process], 1)


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="peaks cannot be reset on this system")
def test_peak_memory_is_that_of_the_runs(options):
    with Sides(options) as sides:
        small, large = start(sides, toy("small"), toy("large", megabytes=200))
        for process in (small, large):
            process.ask("reset")
            process.ask("time", repeats=1)
        peaks = [process.ask("peak")["running"] for process in (small, large)]
    assert 190 < peaks[1] - peaks[0] < 260


def test_a_side_whose_outputs_differ_is_not_timed(options):
    with Sides(options) as sides:
        case = inference._Case(options, sides, "toy", 8)
        processes = [
            sides.start(way, "inference", model="toy")
            for way in (
                toy("first"),
                toy("near", error=1e-6),
                toy("far", error=1e-2),
                toy("nowhere", error=float("nan")),
            )
        ]
        agreeing = []
        for batch in inference.BATCHES:
            for process in sides.feed(processes, case.inputs[batch]):
                agreeing.append((process.way.name, batch, case.agrees(process, batch)))
        failures = sides.failures
    assert [name for name, _, agrees in agreeing if agrees] == ["first", "near"] * 2
    assert "its outputs differ by" in failures["far (toy, batch 8)"] and "nowhere (toy, batch 1)" in failures


def test_a_side_is_timed_only_at_the_batch_sizes_at_which_it_agrees(options):
    with Sides(options) as sides:
        case = inference._Case(options, sides, "toy", 8)
        ways = [toy("first"), toy("one", error=1e-2, error_at=1)]
        case.processes = [sides.start(way, "inference", model="toy") for way in ways]
        case.flops = 1.0
        for batch in inference.BATCHES:
            for process in sides.feed(case.processes, case.inputs[batch]):
                if case.agrees(process, batch):
                    case.agreeing.add((process.way.name, batch))
        timed = {batch: {each.side for each in case.measure(batch, [])[0]} for batch in inference.BATCHES}
    assert timed == {8: {"first", "one"}, 1: {"first"}}


@pytest.mark.parametrize("error", [0.1, float("nan")])
def test_bfloat16_is_compared_too(options, error):
    with Sides(options) as sides:
        case = inference._Case(options, sides, "toy", 8)
        way = Way("half", "tests.toy_side", "ours", {"error": error}, precision="bfloat16")
        for each, agrees in ((toy("first"), True), (way, False)):
            (process,) = sides.feed([sides.start(each, "inference", model="toy")], case.inputs[8])
            assert case.agrees(process, 8) == agrees


def test_ways_near_the_best_of_a_side_go_on_to_the_rounds(options, monkeypatch):
    seconds = {"slow": 3.0, "good": 1.05, "third": 1.08, "best": 1.0, "fails": None}
    with Sides(options) as sides:
        given = {"model": "toy", "size": 8, "classes": 10}
        batch = training._Batch(options, sides, given, 2, 1.0)

        def begun(way):
            if seconds[way.name] is None:
                return None
            process = sides.start(way, "training", model="toy")
            return training._Started(process, 1.0, seconds[way.name], np.ones(3))

        monkeypatch.setattr(batch, "_start", begun)
        kept = batch._near_best([toy(name) for name in seconds])
        assert [each.way.name for each in kept] == ["good", "best"]
        assert [each.side for each in batch.results] == ["slow", "third"]


def test_images_and_parameters_come_from_the_seed():
    assert np.array_equal(parameters.images(2, 10, 5), parameters.images(2, 10, 5))
    assert not np.array_equal(parameters.images(2, 10, 5), parameters.images(2, 10, 6))
    rng = np.random.default_rng(0)
    assert parameters.draw(rng, "a/kernel", (3, 3, 64, 64)).std() == pytest.approx(0.5, rel=0.02)
    assert parameters.draw(rng, "predictions/kernel", (400, 100)).std() == pytest.approx(0.05, rel=0.05)
    assert parameters.draw(rng, "a/skip_gain", ()) >= 0.5
    assert parameters.spread(np.array([[0.0, 0], [6, 8]])) == 5


def test_ways_have_names_of_their_own(options):
    options.authors = pathlib.Path("somewhere")
    options.quick = False
    for groups in (inference.all_ways(options, "timm_dm_nfnet_f0"), all_ways(options, "timm_dm_nfnet_f0")):
        names = [way.name for group in groups for way in group]
        assert len(set(names)) == len(names)
        assert {way.environment for group in groups for way in group} == {"ours", "timm", "kecam", "authors"}
    assert all(way.ours == way.name.startswith("ours") for group in groups for way in group)
    assert not kecam_side.inference_ways("timm_test_nfnet")
    gpu = {way.variables["KERAS_BACKEND"] for way in ours.inference_ways("gpu")}
    assert gpu == {"jax", "torch"} and timm_side.inference_ways()


def made(monkeypatch, folder):
    """Counts the commands that make an environment, and makes a Python that does nothing well."""
    commands = []

    def run(command, name):
        commands.append(command)
        if "venv" in command:
            binary = pathlib.Path(command[-1]) / "bin"
            binary.mkdir(parents=True)
            (binary / "python").write_text("#!/bin/sh\nexit 0\n")
            (binary / "python").chmod(0o755)

    monkeypatch.setattr(environments, "_run", run)
    environments.environment_for("timm", folder, say=lambda text: None)
    return len(commands)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for Python is a shell script")
def test_environments_are_made_once_and_a_broken_one_anew(monkeypatch, tmp_path):
    assert made(monkeypatch, tmp_path) == 3
    assert made(monkeypatch, tmp_path) == 0
    (tmp_path / "timm" / "complete.json").unlink()
    assert made(monkeypatch, tmp_path) == 3, "an installation that broke off"
    (tmp_path / "timm" / "bin" / "python").write_text("#!/bin/sh\nexit 1\n")
    assert made(monkeypatch, tmp_path) == 3, "its interpreter is gone"
    peer = environments.PEERS["timm"]
    newer = environments.Peer("timm", (*peer.packages, "another"), peer.alone)
    monkeypatch.setitem(environments.PEERS, "timm", newer)
    assert made(monkeypatch, tmp_path) == 3, "other packages"


def test_a_peer_that_cannot_be_installed_says_so(monkeypatch, tmp_path, options):
    def run(command, **given):
        return types.SimpleNamespace(returncode=1, stdout="a\nb\nc\nd\nERROR: No matching distribution")

    monkeypatch.setattr(environments.subprocess, "run", run)
    with Sides(options) as sides:
        assert sides.start(timm_side.inference_ways()[0], "inference", model="m") is None
        (reason,) = sides.failures.values()
    assert re.search(r"environment of timm cannot be made: .*No matching distribution", reason, re.DOTALL)


def test_a_suite_that_fails_is_one_line_and_the_rest_goes_on(monkeypatch, tmp_path, capsys):
    def broken(options):
        raise RuntimeError("no such thing\nand more of it")

    def works(options):
        yield [Result("case", "ours", "s", [1.0]), Result("case", "peer", "s", [2.0, 3.0])], []

    monkeypatch.setitem(sys.modules, "benchmarks.inference", types.SimpleNamespace(run=broken))
    monkeypatch.setitem(sys.modules, "benchmarks.training", types.SimpleNamespace(run=works))
    out = tmp_path / "out"
    assert program.main(["inference", "training", "--out", str(out)]) == 1
    table = (out / "table.md").read_text()
    assert "- not run: inference: RuntimeError: no such thing\n" in table and "| peer | 2.5 |" in table
    assert table.strip() in capsys.readouterr().out
    assert program.main(["training", "--out", str(out)]) == 0
    values = json.loads((out / "values.json").read_text())
    assert [each["values"] for each in values["results"]] == [[1.0], [2.0, 3.0]]
    assert {"processor", "cores", "memory"} <= set(values["machine"])


def test_a_side_that_did_not_run_makes_the_exit_status_one(monkeypatch, tmp_path):
    found = [Result("case", "ours", "s", [1.0]), Result("not run", "peer", "", [], note="why")]
    monkeypatch.setitem(sys.modules, "benchmarks.training", types.SimpleNamespace(run=lambda options: [(found, [])]))
    assert program.main(["training", "--out", str(tmp_path)]) == 1


def test_a_name_that_is_no_suite_is_refused(capsys):
    with pytest.raises(SystemExit):
        program.main(["inferences"])
    assert "no such suite: inferences; there are inference, training" in capsys.readouterr().err


def test_the_picture_has_a_panel_for_each_comparison(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import picture

    found = [
        Result("both", "ours", "s", [1.0, 2.0]),
        Result("both", "peer", "s", [3.0]),
        Result("alone", "ours", "s", [1.0]),
        Result("others", "peer", "MiB", [1.0]),
    ]
    assert list(picture.panels(found)) == [("both", "s")]
    assert picture.draw(found, tmp_path / "a.png", "a machine")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not picture.draw(found[2:], tmp_path / "b.png", "a machine") and not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=str(path.relative_to(BENCHMARKS))) for path in sorted(BENCHMARKS.rglob("*.py"))]
)
def test_modules_have_what_others_take_from_them(path):
    # Most sides run in a peer's environment only, where no test runs them.
    tree = ast.parse(path.read_text())
    own = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("benchmarks")]
    taken = {}
    for node in own:
        module = importlib.import_module(node.module)
        for alias in node.names:
            taken[alias.asname or alias.name] = getattr(module, alias.name, None) or importlib.import_module(
                f"{node.module}.{alias.name}"
            )
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
    for use in uses:
        module = taken.get(use.value.id)
        if isinstance(module, types.ModuleType):
            assert hasattr(module, use.attr), f"{path.name}:{use.lineno}: {use.value.id}.{use.attr}"


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_what_was_measured_is_written_before_a_suite_ends(monkeypatch, options, end):
    def run(options):
        yield [Result("first", "ours", "s", [1.0])], [Requirement("first: fast", 2.0, 1.0)]
        raise end("in the second case")

    monkeypatch.setitem(sys.modules, "benchmarks.toy", types.SimpleNamespace(run=run))
    with contextlib.suppress(KeyboardInterrupt):
        program.run_suites(["toy"], options)
    values = json.loads((options.out / "values.json").read_text())
    assert [each["case"] for each in values["results"]] == ["first"]
    assert [each["holds"] for each in values["requirements"]] == [True]
    assert len(values["failures"]) == (end is RuntimeError)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("suite", program.SUITES)
def test_each_suite_runs_without_peers(suite, monkeypatch, options):
    def none(name, *_):
        raise RuntimeError(f"{name} is not installed for tests")

    monkeypatch.setattr("benchmarks.protocol.environment_for", none)
    monkeypatch.setattr("benchmarks.input.environment_for", none)
    outcome = program.run_suites([suite], options)
    assert not outcome.failures
    assert any(each.values for each in outcome.results)
    for each in outcome.results:
        if each.case == "not run":
            assert "is not installed for tests" in each.note or "--authors" in each.note, each
