"""The examples run."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
DOCS = Path(__file__).parents[1] / "docs"


def load(name: str):
    """Imports an example as the module that it is."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def test_own_head_learns():
    assert load("own_head").main(epochs=3) > 0.5


@pytest.mark.slow
def test_clipping_grid_is_run_resumed_and_drawn(tmp_path):
    example = load("adaptive_gradient_clipping")
    grid = example.Grid(batch_sizes=(512,), learning_rates=(1e4, 0.05), seeds=(0,), epochs=2)
    example.main(tmp_path, grid)
    file, picture = (tmp_path / f"{example.NAME}{suffix}" for suffix in (".json", ".png"))
    stored = json.loads(file.read_text())
    assert [(row["network"], row["learning_rate"]) for row in stored["runs"]] == [
        (network, rate) for network in example.NETWORKS for rate in (1e4, 0.05)
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    ends = {(row["network"], row["learning_rate"]): row for row in stored["runs"]}
    assert ends[example.PLAIN, 1e4]["diverged"] and ends[example.PLAIN, 1e4]["accuracy"] == example.CHANCE
    assert not any(ends[network, 0.05]["diverged"] for network in example.NETWORKS)

    # Killed before the last run: only that is run again, and nothing of the rate before it had been left in the model.
    last = stored["runs"].pop()
    file.write_text(json.dumps(stored))
    resumed = example.main(tmp_path, grid)
    assert resumed[:-1] == stored["runs"]
    assert {**resumed[-1], "seconds": 0} == {**last, "seconds": 0}

    with pytest.raises(ValueError, match="other settings"):
        example.main(tmp_path, dataclasses.replace(grid, epochs=3))


def test_clipping_picture_is_of_the_whole_grid():
    example = load("adaptive_gradient_clipping")
    stored = json.loads((DOCS / f"{example.NAME}.json").read_text())
    assert stored["settings"] == example.FULL.settings()
    ran = [(row["seed"], row["batch_size"], row["network"], row["learning_rate"]) for row in stored["runs"]]
    assert len(ran) == len(set(ran))
    assert set(ran) == {(*group, rate) for group in example.FULL.groups() for rate in example.FULL.learning_rates}


@pytest.mark.slow
def test_clipping_trains_at_a_rate_that_is_too_large_without_it(tmp_path):
    example = load("adaptive_gradient_clipping")
    rows = example.main(tmp_path, example.QUICK)
    rate = max(example.QUICK.learning_rates)
    ends = {row["network"]: row["accuracy"] for row in rows if row["learning_rate"] == rate}
    assert ends[example.PLAIN] < 0.3 < 0.7 < ends[example.CLIPPED]


def test_signals_are_measured_and_drawn(tmp_path):
    example = load("signal_propagation")
    depths = (2, 2, 4, 1)
    reports = example.main(tmp_path / "signals.png", depths)
    assert (tmp_path / "signals.png").read_bytes().startswith(b"\x89PNG")
    free, plain, normalised = ([row.variance for row in reports[name].rows[1:]] for name in reports)
    np.testing.assert_allclose(free, example.expected_variances(depths, example.ALPHA), rtol=0.15)
    assert plain[-1] > 50 * plain[0]
    assert max(normalised) < 10
    ends = [row.branch_variance for row in reports[example.BATCH_NORM].rows[1:]]
    assert max(ends) < 2 * min(ends)


def test_the_picture_of_signals_is_small():
    assert (DOCS / "signal_propagation.png").stat().st_size < 150_000
