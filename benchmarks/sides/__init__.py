"""Programs that run one side of a comparison, each in an environment of its own; see `serving.py`."""

import dataclasses
import importlib
import importlib.machinery
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run one case: a program, and what it is told.

    Args:
        name: What the table calls it. Ways of this package begin with "ours".
        program: Module of the side's program in `benchmarks.sides`.
        environment: Name of the environment that it runs in: a key of `benchmarks.environments.PEERS`, or "ours".
        options: What the program is told beside the case: values that JSON has.
        variables: Environment variables of its process.
        precision: "float32" or "bfloat16".
        arithmetic: "timm" or "authors": whose of the two close but different functions is computed. Outputs are
            compared among ways of one arithmetic.
    """

    name: str
    program: str
    environment: str
    options: Mapping = dataclasses.field(default_factory=dict)
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    precision: str = "float32"
    arithmetic: str = "timm"

    @property
    def ours(self) -> bool:
        return self.environment == "ours"


def need_device(device: str, library: str) -> None:
    """Makes sure that a library runs where it is to be measured: without a GPU most go on, on the processor.

    Args:
        device: "cpu" or "gpu".
        library: "tensorflow", "jax" or "torch".

    Raises:
        RuntimeError: If a GPU is asked for and the library finds none.

    Example:

    >>> need_device("cpu", "jax")
    """
    if device != "gpu":
        return
    module = importlib.import_module(library)
    found = {
        "tensorflow": lambda: bool(module.config.list_physical_devices("GPU")),
        "jax": lambda: module.default_backend() == "gpu",
        "torch": lambda: module.cuda.is_available(),
    }[library]()
    if not found:
        raise RuntimeError(f"{library} finds no GPU here: its package for GPUs is not installed, or does not fit CUDA")


class _Installed(importlib.machinery.PathFinder):
    """Finds what the path has, but for what a plain installation of this package does not bring."""

    hidden: frozenset[str] = frozenset()

    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname in cls.hidden else super().find_spec(fullname, path, target)


def as_installed(*extras: str) -> None:
    """Hides from Keras and its backend what a plain installation of this package does not have.

    This program's own environment has all backends and the tests' libraries. TensorFlow and Keras import what they
    find of these, which takes up to 160 MiB; the peers' environments hold what the peers need. To be called before
    Keras is imported. For a GPU (NFNET_BENCHMARK_DEVICE) nothing is hidden: JAX needs plugins and CUDA's libraries
    there that it names nowhere.

    Args:
        *extras: Of this package, that the installation has besides; that of the backend in KERAS_BACKEND it has anyway.
    """
    if os.environ.get("NFNET_BENCHMARK_DEVICE") == "gpu":
        return
    # JAX and PyTorch are extras of their own names, and bring more modules than the one of that name.
    _Installed.hidden = not_installed("nfnet-keras", *extras, os.environ.get("KERAS_BACKEND", "tensorflow"))
    place = sys.meta_path.index(importlib.machinery.PathFinder)
    sys.meta_path[place] = _Installed


def not_installed(name: str, *extras: str) -> frozenset[str]:
    """Returns the modules of this environment that a distribution does not bring when it is installed.

    Args:
        name: Of the distribution.
        *extras: Those of its extras that are installed with it.

    Example:

    >>> "pytest" in not_installed("nfnet-keras"), "keras" in not_installed("nfnet-keras")
    (True, False)
    """
    needed, waiting = {_plain(name)}, _requirements(_plain(name), extras)
    while waiting:
        found = _plain(waiting.pop())
        if found not in needed:
            needed.add(found)
            waiting += _requirements(found)
    owners = importlib.metadata.packages_distributions()
    return frozenset(module for module, names in owners.items() if needed.isdisjoint(map(_plain, names)))


def _requirements(distribution: str, extras: tuple[str, ...] = ()) -> list[str]:
    try:
        lines = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        # One that this platform does not need.
        return []
    # With an extra, a line ends in: ; extra == "name".
    asked = [(line, re.search(r"""extra == ["']([^"']+)""", line)) for line in lines]
    return [re.match(r"[\w.-]+", line)[0] for line, extra in asked if extra is None or extra[1] in extras]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
