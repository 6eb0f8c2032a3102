"""A run killed again and again ends with the weights of a run never killed."""

import json
import multiprocessing
import os
import random
import time

import keras
import numpy as np
import pytest

from tests.training import short_run


@pytest.fixture(scope="module")
def start():
    """start(out): a process of the short run and where it says what it does.

    Every process is a fork of one that has imported what it needs: importing takes longer than most runs up to a kill.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([short_run.__name__])

    def start(out):
        says, said = context.Pipe(duplex=False)
        process = context.Process(target=short_run.train, args=(str(out), said), daemon=True)
        process.start()
        said.close()
        return process, says

    return start


def to_the_end(process, says):
    word = ""
    while word != "done" and not word.startswith("failed"):
        assert says.poll(600), word
        word = says.recv()
    process.join(60)
    assert (word, process.exitcode) == ("done", 0)


def weights(out):
    model = keras.saving.load_model(out / "model.keras")
    raw = keras.saving.load_model(out / "model_raw.keras")
    return [*model.get_weights(), *raw.get_weights()]


def kill_somewhere(process, says, rng) -> str:
    """Waits for a moment of a random kind, and a little, and kills; returns the kind, "done" if it was too late."""
    kind = rng.choice(("step", "step", "save", "evaluate", "table"))
    number, seen = rng.randrange(1, 12 if kind == "step" else 3), 0
    while seen < number:
        assert says.poll(600), kind
        word = says.recv()
        if word == "done":
            process.join()
            return word
        assert not word.startswith("failed"), word
        seen += word == kind
    time.sleep(rng.random() * (0.02 if kind in ("save", "table") else 0.3))
    process.kill()
    process.join()
    return kind


def run_killed(start, out, kills: int, seed: int) -> list[str]:
    rng, kinds = random.Random(seed), []
    while len(kinds) < kills:
        kind = kill_somewhere(*start(out), rng)
        if kind == "done":
            break
        kinds.append(kind)
    to_the_end(*start(out))
    return kinds


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_fifty_moments(start, tmp_path):
    to_the_end(*start(tmp_path / "whole"))
    expected = weights(tmp_path / "whole")
    table = (tmp_path / "whole" / "metrics.csv").read_text().splitlines()
    kills, seed, seen = 50, 100, []
    while len(seen) < kills:
        out = tmp_path / str(seed)
        seen += run_killed(start, out, kills - len(seen), seed)
        for one, other in zip(weights(out), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        assert len((out / "metrics.csv").read_text().splitlines()) == len(table)
        assert json.loads((out / "metrics.json").read_text())["epochs"] == short_run.EPOCHS
        assert not [name for name in os.listdir(out / "checkpoints") if name.startswith(".")]
        seed += 1
    assert {"step", "save", "evaluate"} <= set(seen)
