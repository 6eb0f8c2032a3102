"""A virtual environment for each peer, made by pip from the packages as they are published."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable

_STAMP = "complete.json"


@dataclasses.dataclass(frozen=True)
class Peer:
    """What a peer's environment holds.

    Args:
        name: Name of the peer, and of the environment's folder.
        packages: What pip installs, with all that it needs.
        alone: What pip installs afterwards without what it says it needs.
        note: What the reader of the table has to know of this environment.
    """

    name: str
    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    note: str = ""


# timm asks for torchvision, whose wheels on PyPI ask for a PyTorch with CUDA; its Python code does without.
PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            "timm",
            ("torch==2.13.0", "numpy", "safetensors", "huggingface_hub", "pyyaml", "pillow"),
            ("timm==1.0.31", "torchvision==0.29.*"),
            "where torchvision's compiled operations do not fit PyTorch, the two that its import asks for are declared "
            "and not loaded; nothing here uses them",
        ),
        Peer(
            "kecam",
            ("kecam==1.4.3", "tensorflow==2.21.0", "tf-keras==2.21.0", "safetensors"),
            note="kecam runs on Keras 2 (tf-keras), as its page asks for with TensorFlow 2.16 and later",
        ),
        Peer(
            "authors",
            ("jax==0.10.2", "dm-haiku==0.0.17", "optax", "dill", "dm-tree", "safetensors"),
            note="the authors' program runs with today's JAX and Haiku",
        ),
    )
}
_ON_GPU = {"jax==0.10.2": "jax[cuda12]==0.10.2", "tensorflow==2.21.0": "tensorflow[and-cuda]==2.21.0"}


def environment_for(
    name: str, folder: pathlib.Path, device: str = "cpu", say: Callable[[str], None] = print
) -> pathlib.Path:
    """Makes the environment of a peer, or finds the one that is there.

    One that is not whole (its last installation broke off, or other packages are asked for now) is made anew. What pip
    reads of its own (`PIP_EXTRA_INDEX_URL`, `pip.conf`) counts, for PyTorch's smaller CPU builds say.

    Args:
        name: A key of `PEERS`.
        folder: Where the environments are.
        device: "cpu" or "gpu": on a GPU, packages that bring the CUDA libraries.
        say: Is told when an environment is made.

    Returns:
        Path of the environment's Python.

    Raises:
        RuntimeError: If it cannot be made; the message has the last lines of what pip said.
    """
    peer = PEERS[name]
    packages = [_ON_GPU.get(package, package) if device == "gpu" else package for package in peer.packages]
    root = folder.expanduser() / (name if device == "cpu" else f"{name}-{device}")
    python = root / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = {"packages": packages, "alone": list(peer.alone), "python": list(sys.version_info[:2])}
    if _is_complete(root, python, wanted):
        return python.absolute()
    say(f"Making the environment of {name} in {root} (once; some minutes).")
    shutil.rmtree(root, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(root)], name)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*pip, *packages], name)
    if peer.alone:
        _run([*pip, "--no-deps", *peer.alone], name)
    (root / _STAMP).write_text(json.dumps(wanted))
    return python.absolute()


def _is_complete(root: pathlib.Path, python: pathlib.Path, wanted: dict) -> bool:
    try:
        if json.loads((root / _STAMP).read_text()) != wanted:
            return False
        # An environment whose interpreter was removed or updated away still has its stamp.
        return subprocess.run([python, "-c", "import numpy"], capture_output=True, timeout=60).returncode == 0
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def _run(command: list[str], name: str) -> None:
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"The environment of {name} cannot be made: {error}") from error
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-4:])
        raise RuntimeError(f"The environment of {name} cannot be made: {' '.join(command[-4:])}: {last}")
