"""How long a user waits for the first training step, and for the next ones.

    python -m benchmarks.first_step [--model nfnet_f0] [--size 256] [--batch 1] [--runs 3]

Each run is a process of its own: import Keras and this package, build the model with random weights, compile it with
SGD_AGC and cross-entropy, then time `train_on_batch` on random images: the first call (tracing and all), and the median
of five further ones. Medians and ranges over the runs are printed, with versions and machine.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

STEPS = 5


def measure(model_name: str, size: int, batch: int, jit_compile: str) -> dict[str, float]:
    """Measures one run in this process, in seconds."""
    start = time.perf_counter()
    import keras
    import numpy as np

    keras_loaded = time.perf_counter()
    import nfnet_keras as nfk

    loaded = time.perf_counter()
    keras.utils.set_random_seed(0)
    model = nfk.create_model(model_name, weights=None, input_shape=(size, size, 3), classes=1000)
    built = time.perf_counter()
    jit = {"auto": "auto", "on": True, "off": False}[jit_compile]
    model.compile(nfk.optimizers.SGD_AGC(0.1), "categorical_crossentropy", jit_compile=jit)
    images = np.random.default_rng(0).standard_normal((batch, size, size, 3), dtype=np.float32)
    labels = np.eye(1000, dtype=np.float32)[np.arange(batch) % 1000]
    times = []
    for _ in range(1 + STEPS):
        began = time.perf_counter()
        model.train_on_batch(images, labels)
        times.append(time.perf_counter() - began)
    return {
        "import keras": keras_loaded - start,
        "import nfnet_keras after it": loaded - keras_loaded,
        "build the model": built - loaded,
        "first training step": times[0],
        "next steps, median": statistics.median(times[1:]),
    }


def main() -> None:
    """Runs the measurements and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nfnet_f0")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--jit-compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.model, options.size, options.batch, options.jit_compile)))
        return
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    runs = []
    for _ in range(options.runs):
        command = [sys.executable, "-m", "benchmarks.first_step", "--one", *sys.argv[1:]]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
    print(f"{options.model}, batch {options.batch}, {options.size} x {options.size}, jit_compile={options.jit_compile}")
    for name in runs[0]:
        values = sorted(run[name] for run in runs)
        print(f"{name:30} {statistics.median(values):8.2f} s   ({values[0]:.2f} to {values[-1]:.2f})")
    from nfnet_keras.training.run import versions

    print(f"{os.cpu_count()} cores, {platform.machine()}; {versions()}")


if __name__ == "__main__":
    main()
