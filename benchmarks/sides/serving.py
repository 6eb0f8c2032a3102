"""The loop of a side's program: requests and answers as lines of JSON on standard input and output.

| request | answer |
| --- | --- |
| `prepare`: case and options | versions of what runs |
| `feed`: path of an .npz: `images` (N, H, W, C), `labels` | seconds of the first run, compiling included |
| `outputs`: path of an .npz to read (optional), of one to write | |
| `time`: repeats, warm-up runs | seconds of each run |
| `peak` | peak resident memory in MiB since the last `reset`, and of the whole life |
| `quit` | |

Only NumPy is needed here: the program runs in every environment.
"""

import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np


class Side:
    """What a side's program makes of a case. `run` returns when the work is done, not when it is under way."""

    versions: dict[str, str]

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        """Takes the inputs of the runs to come."""
        raise NotImplementedError

    def run(self) -> None:
        """Does what is measured, once."""
        raise NotImplementedError

    def outputs(self) -> np.ndarray:
        """What is compared among sides: logits (N, classes), or the losses of the steps so far."""
        raise NotImplementedError


def peak_memory() -> float:
    """Peak resident memory of this process, in MiB."""
    try:
        with open("/proc/self/status") as file:
            return int(re.search(r"VmHWM:\s*(\d+) kB", file.read())[1]) / 1024
    except (OSError, TypeError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 1024)


def reset_peak() -> None:
    """Makes `peak_memory` count from now, where the system can."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


class _Server:
    def __init__(self, prepare: Callable[[dict], Side]):
        self.make = prepare
        self.side: Side | None = None
        self.life_peak = 0.0

    def prepare(self, request: dict) -> dict:
        self.side = self.make(request)
        return {"versions": self.side.versions}

    def feed(self, request: dict) -> dict:
        with np.load(request["path"]) as arrays:
            self.side.feed(arrays["images"], arrays["labels"])
        began = time.perf_counter()
        self.side.run()
        return {"first": time.perf_counter() - began}

    def outputs(self, request: dict) -> dict:
        if "inputs" in request:
            with np.load(request["inputs"]) as arrays:
                images, labels = arrays["images"], arrays["labels"]
            parts, batch = [], request["batch"]
            for start in range(0, len(images), batch):
                self.side.feed(images[start : start + batch], labels[start : start + batch])
                parts.append(np.asarray(self.side.outputs(), np.float32))
            np.savez(request["path"], outputs=np.concatenate(parts))
        else:
            np.savez(request["path"], outputs=np.asarray(self.side.outputs(), np.float32))
        return {}

    def time(self, request: dict) -> dict:
        for _ in range(request.get("warmup", 0)):
            self.side.run()
        seconds = []
        for _ in range(request["repeats"]):
            began = time.perf_counter()
            self.side.run()
            seconds.append(time.perf_counter() - began)
        return {"seconds": seconds}

    def reset(self, request: dict) -> dict:
        self.life_peak = max(self.life_peak, peak_memory())
        reset_peak()
        return {}

    def peak(self, request: dict) -> dict:
        now = peak_memory()
        return {"running": now, "life": max(now, self.life_peak)}


def serve(prepare: Callable[[dict], Side]) -> None:
    """Answers requests until `quit` or the end of the input.

    Args:
        prepare: Takes the `prepare` request and returns the side that runs it.
    """
    # What libraries print goes to the log: standard output is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = _Server(prepare)
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        if command == "quit":
            break
        try:
            answer = {"ok": True, **getattr(server, command)(request)}
        except Exception as error:
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(error).__name__}: {str(error).strip()[:600]}"}
        print(json.dumps(answer), file=answers, flush=True)
    answers.flush()
    # Some runtimes hang or crash when their threads are taken down.
    os._exit(0)


class MatrixProduct(Side):
    """The product of two square matrices: what the machine can do at most.

    Args:
        run: Multiplies once and waits for the result.
        versions: Versions of the library.
    """

    def __init__(self, run: Callable[[], object], versions: dict[str, str]):
        self.versions = versions
        self.run = run

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        return

    def outputs(self) -> np.ndarray:
        return np.zeros((1, 1), np.float32)
