"""A training step and the memory that it takes, of this package or of timm: their sides, with a look at the memory."""

import importlib
import math
import os
import re

import numpy as np

from benchmarks.sides import Way, as_installed, ours, timm_side
from benchmarks.sides.serving import Side, serve
from benchmarks.sides.torchvision_code import load_torchvision


def ways() -> tuple[list[Way], list[Way]]:
    """Our ways to take a training step with AGC, without and with `remat`, and those of timm."""
    variables = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    own = [
        Way(name, __name__, "ours", {"side": "ours", "agc": True, "remat": remat}, variables)
        for name, remat in (("ours", False), ("ours, remat", True))
    ]
    peers = [way for way in timm_side.training_ways() if not way.options["compiled"]]
    kinds = [(way, False) for way in peers] + [(peers[1], True)]
    timm = [
        Way(
            f"{way.name}, checkpointing" if again else way.name,
            __name__,
            "timm",
            {**way.options, "side": "timm", "remat": again},
        )
        for way, again in kinds
    ]
    return own, timm


def resident() -> float:
    """Resident memory of this process, in MiB."""
    with open("/proc/self/status") as file:
        return int(re.search(r"VmRSS:\s*(\d+) kB", file.read())[1]) / 1024


class Step(Side):
    """One training step. `outputs` gives MiB of the parameters, of the libraries, and of tensors at the peak."""

    def __init__(self, request: dict):
        self.tensorflow = None
        if request["side"] == "ours":
            as_installed()
            importlib.import_module("nfnet_keras")
            self.tensorflow = importlib.import_module("tensorflow")
            self.libraries = resident()
            self.inner = ours.Training(request)
            self.inner.model.remat = request["remat"]
            count = self.inner.model.count_params()
        else:
            self.torchvision = load_torchvision()
            importlib.import_module("timm")
            self.libraries = resident()
            self.inner = timm_side.Training(request)
            self.inner.model.set_grad_checkpointing(request["remat"])
            count = sum(parameter.numel() for parameter in self.inner.model.parameters())
        self.versions = self.inner.versions
        self.parameters = 4 * count / 2**20
        self.tensors = math.nan

    def feed(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.inner.feed(images, labels)

    def run(self) -> None:
        if self.tensorflow is None:
            self.inner.run()
            return
        # Its allocator keeps what it was given: what is resident says what was ever needed, and the gaps between.
        counts = self.tensorflow.config.experimental
        counts.reset_memory_stats("CPU:0")
        self.inner.run()
        self.tensors = counts.get_memory_info("CPU:0")["peak"] / 2**20

    def outputs(self) -> np.ndarray:
        return np.array([self.parameters, self.libraries, self.tensors])


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    serve(Step)
