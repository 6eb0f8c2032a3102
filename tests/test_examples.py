"""The examples run."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_own_head_learns():
    spec = importlib.util.spec_from_file_location("own_head", EXAMPLES / "own_head.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main(epochs=3) > 0.5
