"""Whole runs under every strategy that this machine can have, against a run on one device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

import nfnet_keras  # noqa: F401 (registers the classes of the saved models)
from tests import quick_jax

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]

# Without layers that draw: replicas draw the same masks, one device draws one for all images.
PROGRAM = """
import sys
out, strategy, devices, parts = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if strategy == "mirrored":
    import tensorflow as tf
    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * devices)
from nfnet_keras.training import run, settings
from tests.training import few_layers
few_layers.use(few_layers.digits(6))
config = settings(
    epochs=2, seed=3, batch_size=32, strategy=strategy,
    changes={"stochastic_depth_rate": 0.0, "dropout_rate": 0.0, "gradient_accumulation_steps": parts, "mixup": 0.0})
import os
try:
    run.train(config, out, resume=os.path.exists(out + "/config.json"), verbose=0)
except KeyboardInterrupt as stop:
    sys.exit(128 + stop.args[0])
"""


def start(out, strategy, devices=1, parts=1, **environment):
    command = [sys.executable, "-c", PROGRAM, str(out), strategy, str(devices), str(parts)]
    # From there it imports the tests.
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **environment})


def end(*processes):
    try:
        for process in processes:
            _, errors = process.communicate(timeout=900)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in processes:
            process.kill()


def weights(out):
    return keras.saving.load_model(out / "model_raw.keras", compile=False).get_weights()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    end(start(out, "one"))
    return out


def assert_same_run(one, other, share=1e-3):
    """Two epochs of small differences add up to more than those of the few steps that the same-step tests take."""
    start = keras.saving.load_model(min((one / "checkpoints").glob("*.keras")), compile=False).get_weights()
    total = moved = 0.0
    for a, b, c in zip(weights(one), weights(other), start, strict=True):
        total += float(np.sum((a - b) ** 2))
        moved += float(np.sum((a - c) ** 2))
    assert total**0.5 <= share * moved**0.5, (total**0.5, moved**0.5)
    results = [json.loads((out / "metrics.json").read_text()) for out in (one, other)]
    assert results[1]["test_loss"] == pytest.approx(results[0]["test_loss"], rel=1e-3)
    assert (other / "metrics.csv").read_text().count("\n") == 3


def test_mirrored(one, tmp_path):
    end(start(tmp_path, "mirrored", devices=2))
    assert_same_run(one, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text())["replicas"] == 2


def test_accumulation(one, tmp_path):
    # The images of an update come from another order of the set: only that it trains and ends is the same.
    end(start(tmp_path, "one", parts=4))
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == 2


def test_data_parallel(tmp_path):
    # One seed draws other weights on another backend.
    jax = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    four = f"{quick_jax.XLA_FLAGS} --xla_force_host_platform_device_count=4"
    end(start(tmp_path / "one", "one", **jax, XLA_FLAGS=quick_jax.XLA_FLAGS))
    end(start(tmp_path / "four", "data_parallel", **jax, XLA_FLAGS=four))
    assert_same_run(tmp_path / "one", tmp_path / "four")
    assert json.loads((tmp_path / "four" / "metrics.json").read_text())["replicas"] == 4


def start_workers(out):
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    tasks = [json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) for i in (0, 1)]
    return [start(out, "multi_worker", TF_CONFIG=task) for task in tasks]


def test_multi_worker(tmp_path):
    end(*start_workers(tmp_path / "whole"))
    result = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert (result["replicas"], result["epochs"]) == (2, 2)
    assert len(list((tmp_path / "whole" / "checkpoints").iterdir())) == 2

    # The machine that does not write is preempted, as soon as there is a checkpoint: both stop, and go on together.
    out = tmp_path / "stopped"
    workers = start_workers(out)
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    workers[1].send_signal(signal.SIGTERM)
    assert [worker.wait(timeout=120) for worker in workers] == [143, 143]
    assert not (out / "metrics.json").exists()
    end(*start_workers(out))
    for one, other in zip(weights(tmp_path / "whole"), weights(out), strict=True):
        np.testing.assert_array_equal(one, other)
