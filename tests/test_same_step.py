"""The same steps give the same weights on one device and on many, in parts, and on to another kind of devices."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests import quick_jax

pytest.importorskip("tensorflow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow", reason="the programs choose their backends themselves: once is enough"
    ),
]

PROGRAM = Path(__file__).with_name("same_step.py")
# Share of the distance moved from start to end that two ways of making the same steps may differ by.
CLOSE = 1e-4
PLAIN = {"plain": {"evaluate": True}}
BOTH = {"sam": {"sam": True}, **PLAIN}


def begin(settings: dict, out: Path, **environment) -> subprocess.Popen:
    paths = [str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")]
    base = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "KERAS_BACKEND": "tensorflow"}
    with open(out.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            [sys.executable, str(PROGRAM), json.dumps(settings), str(out)],
            env={**base, **environment},
            cwd=out.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(processes: list, outs: list[Path], seconds: float = 900) -> list[dict]:
    try:
        for process, out in zip(processes, outs, strict=True):
            assert process.wait(seconds) == 0, out.with_suffix(".log").read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [read(out) for out in outs]


def read(out: Path) -> dict:
    """What the program wrote, by case: its plain values, and its arrays as lists."""
    with np.load(out) as file:
        results = json.loads(str(file["plain"]))
        for name in file.files:
            if name != "plain":
                label, case, key, _ = name.split("/")
                results.setdefault(f"{label}/{case}", {}).setdefault(key, []).append(file[name])
    return results


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run(settings: dict, out: Path, **environment) -> dict:
    return finish([begin(settings, out, **environment)], [out])[0]


def run_workers(settings: dict, folder: Path) -> list[dict]:
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    configs = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) for i in range(2)]
    outs = [folder / f"worker{i}.npz" for i in range(2)]
    return finish([begin(settings, out, TF_CONFIG=c) for out, c in zip(outs, configs, strict=True)], outs)


JAX = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}


def eight_devices() -> dict:
    return {**JAX, "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {quick_jax.XLA_FLAGS}"}


def setting(label: str, cases: dict, after=(), **entry) -> dict:
    return {"label": label, "cases": cases, "and": list(after), **entry}


def moved(a: list, b: list) -> float:
    """Distance between two sets of weights."""
    return float(np.sqrt(sum(np.sum(np.square(x.astype("float64") - y)) for x, y in zip(a, b, strict=True))))


def check_same(one: dict, other: dict, close: float = CLOSE) -> float:
    assert all(np.array_equal(a, b) for a, b in zip(one["before"], other["before"], strict=True))
    distance = moved(one["before"], one["after"])
    assert distance > 0.1
    share = moved(one["after"], other["after"]) / distance
    assert share <= close, share
    assert all(np.array_equal(a, b) for a, b in zip(one["before"], other["before"], strict=True))
    return share


def check_logs(one: dict, other: dict) -> None:
    """History and evaluation: plain numbers, those of one device."""
    assert one["history"].keys() == other["history"].keys() >= {"loss", "accuracy", "top2", "agc_clipped"}
    for name, values in one["history"].items():
        assert other["history"][name] == pytest.approx(values, rel=1e-5), name
    assert other["evaluate"] == pytest.approx(one["evaluate"], rel=1e-5)


@pytest.fixture(scope="module")
def on_tensorflow(tmp_path_factory) -> dict:
    """One device and two, and the model that two devices saved."""
    settings = {
        "virtual": 4,
        "distributions": [
            setting("one", BOTH, ["overflow"], name="one", replicas=1),
            setting("mirrored2", BOTH, ["overflow", "save_it"], name="mirrored", devices=2, replicas=2),
        ],
    }
    out = tmp_path_factory.mktemp("tensorflow") / "out.npz"
    return {**run(settings, out), "folder": out.parent}


@pytest.fixture(scope="module")
def on_workers(tmp_path_factory) -> list[dict]:
    settings = {"distributions": [setting("workers", BOTH, ["several_workers"], name="multi_worker", replicas=2)]}
    return run_workers(settings, tmp_path_factory.mktemp("workers"))


@pytest.fixture(scope="module")
def on_jax(on_tensorflow) -> dict:
    """Eight devices of JAX, which also load what two devices of TensorFlow saved."""
    settings = {"distributions": [setting("jax8", PLAIN, ["load_it"], name="data_parallel", replicas=8)]}
    return run(settings, on_tensorflow["folder"] / "jax.npz", **eight_devices())


@pytest.mark.parametrize("case", ["plain", "sam"])
def test_mirrored(on_tensorflow, case):
    check_same(on_tensorflow[f"one/{case}"], on_tensorflow[f"mirrored2/{case}"])


def test_mirrored_logs(on_tensorflow):
    check_logs(on_tensorflow["one/plain"], on_tensorflow["mirrored2/plain"])


@pytest.mark.parametrize("host", [0, 1])
def test_workers(on_tensorflow, on_workers, host):
    for case in BOTH:
        check_same(on_tensorflow[f"one/{case}"], on_workers[host][f"workers/{case}"])
    check_logs(on_tensorflow["one/plain"], on_workers[host]["workers/plain"])
    assert on_workers[host]["workers/plain"]["host"] == host


@pytest.mark.parametrize("host", [0, 1])
def test_workers_evaluate_and_predict(on_tensorflow, on_workers, host):
    """Arrays, data of unknown length, a last batch that only one worker has."""
    found = on_workers[host]["workers/several_workers"]
    expected = on_tensorflow["one/plain"]["evaluate"]
    for kind in ("arrays", "unknown"):
        assert found[kind] == pytest.approx(expected, rel=1e-5), kind
    assert np.shape(found["predicted"]) == (17, 5)
    np.testing.assert_allclose(found["predicted"], found["called"], rtol=1e-4, atol=1e-5)
    assert found["fitted"].keys() == on_tensorflow["one/plain"]["history"].keys()
    assert all(isinstance(v, float) for values in found["fitted"].values() for v in values)


@pytest.mark.parametrize("host", [0, 1])
def test_only_the_chief_writes_and_all_load(on_workers, host):
    found = on_workers[host]["workers/several_workers"]
    assert found["loaded"] is True
    assert found["goes_on"] == on_workers[0]["workers/several_workers"]["goes_on"]


def test_data_parallel(on_tensorflow, on_jax):
    check_same(on_tensorflow["one/plain"], on_jax["jax8/plain"])
    check_logs(on_tensorflow["one/plain"], on_jax["jax8/plain"])


@pytest.mark.parametrize("devices", ["one", "mirrored2", "worker0", "worker1"])
def test_an_overflow_skips_the_step_everywhere(on_tensorflow, request, devices):
    """The overflow is in one replica's gradient only; weights, momentum and step stay, the loss scale halves."""
    if devices.startswith("worker"):
        found = request.getfixturevalue("on_workers")[int(devices[-1])]["workers/overflow"]
    else:
        found = on_tensorflow[f"{devices}/overflow"]
    skipped, taken = found["skipped"], found["taken"]
    assert skipped == {"same": True, "changed": ["dynamic_scale"], "scale": 2.0**14, "iterations": 0, "finite": True}
    assert not taken["same"] and taken["finite"]
    assert (taken["scale"], taken["iterations"]) == (2.0**14, 1)


def test_from_two_devices_to_eight_of_another_backend(on_tensorflow, on_jax):
    """`model.save` under one distribution, `load_model` under another: weights, momentum, average, step."""
    saved, loaded = on_tensorflow["mirrored2/plain"], on_jax["jax8/loaded"]
    assert all(np.array_equal(a, b) for a, b in zip(saved["after"], loaded["before"], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(saved["state"], loaded["state"], strict=True))


def test_training_goes_on_elsewhere(on_tensorflow, on_jax):
    """The steps after loading are those of one device that loaded the same file."""
    loaded = on_jax["jax8/loaded"]
    settings = {"distributions": [setting("one", {}, ["load_it"], name="one", replicas=1)]}
    alone = run(settings, on_tensorflow["folder"] / "alone.npz")["one/loaded"]
    assert all(np.array_equal(a, b) for a, b in zip(alone["state"], loaded["state"], strict=True))
    check_same(alone, loaded)


def test_more_ways_on_tensorflow(on_tensorflow, tmp_path):
    """Four devices; a batch in two and in four parts; lower precision."""
    parts = {"two_parts": {"accumulate": 2}, "four_parts": {"accumulate": 4}}
    low = {"bfloat16": {"policy": "mixed_bfloat16"}, "float16": {"policy": "mixed_float16"}}
    settings = {
        "virtual": 4,
        "distributions": [
            setting("one", {**parts, **low}, name="one", replicas=1),
            setting("mirrored4", {**BOTH, **low}, name="mirrored", replicas=4),
        ],
    }
    found = run(settings, tmp_path / "more.npz")
    for case in BOTH:
        check_same(on_tensorflow[f"one/{case}"], found[f"mirrored4/{case}"])
    check_logs(on_tensorflow["one/plain"], found["mirrored4/plain"])
    for case in parts:
        check_same(on_tensorflow["one/plain"], found[f"one/{case}"])
    for case, close in (("bfloat16", 0.05), ("float16", 0.01)):
        for devices in ("one", "mirrored4"):
            check_same(on_tensorflow["one/plain"], found[f"{devices}/{case}"], close)


def test_more_ways_on_jax(on_tensorflow, tmp_path):
    """SAM on eight devices, and lower precision."""
    cases = {"sam": {"sam": True}, "bfloat16": {"policy": "mixed_bfloat16"}}
    settings = {"distributions": [setting("jax8", cases, name="data_parallel", replicas=8)]}
    found = run(settings, tmp_path / "more.npz", **eight_devices())
    check_same(on_tensorflow["one/sam"], found["jax8/sam"])
    check_same(on_tensorflow["one/plain"], found["jax8/bfloat16"], 0.05)
