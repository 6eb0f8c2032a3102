"""Weights that come with the package: where the file is in this installation, and whether it is whole."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

from nfnet_keras.checkpoints.download import digest
from nfnet_keras.checkpoints.manifest import ShippedWeights
from nfnet_keras.checkpoints.stored import CheckpointError

_DISTRIBUTION = "nfnet-keras"
# Where setup.cfg puts the file, seen from the folder of the installation's data.
_SHARED = "share/nfnet_keras/weights"


def shipped_path(weights: ShippedWeights) -> str:
    """Finds a file of weights that comes with this package, and checks it.

    In a clone, also one installed with `pip install -e`, it is in the folder `weights` beside the package. Where a
    wheel put it is in the record that the installer keeps of the distribution's files.

    Args:
        weights: What the manifest says of it.

    Returns:
        Its path.

    Raises:
        CheckpointError: If it is not there, or its checksum is another; a `ValueError`.
        OSError: If it cannot be read.

    Example:

    >>> from pathlib import Path
    >>> from nfnet_keras.checkpoints.manifest import shipped
    >>> Path(shipped_path(shipped("nfnet_tiny", "digits"))).name
    'nfnet_tiny-digits.safetensors'
    """
    for path in _candidates(weights.file):
        if path.is_file():
            found = digest(path, weights.checksum.algorithm)
            if found != weights.checksum.value:
                raise CheckpointError(
                    f"the file of weights {str(path)!r} is damaged, or of another version of this package: its "
                    f"{weights.checksum.algorithm.upper()} is {found} and should be {weights.checksum.value}. "
                    f"{_remedy(weights)}"
                )
            return str(path)
    raise CheckpointError(
        f"the weights '{weights.weights}' of '{weights.model}' come with this package, but their file {weights.file} "
        f"is neither in the folder 'weights' beside {str(_package())!r} nor where an installation of {_DISTRIBUTION} "
        f"says. "
        f"{_remedy(weights)}"
    )


def _remedy(weights: ShippedWeights) -> str:
    return (
        f"Install the package again (`pip install --force-reinstall --no-deps {_DISTRIBUTION}`; in a clone "
        f"`git checkout weights/{weights.file}`), or pass the path of that file, taken from its source, as `weights`."
    )


def _package() -> Path:
    import nfnet_keras

    return Path(nfnet_keras.__file__).resolve().parent


def _candidates(name: str) -> Iterator[Path]:
    """Yields the places where the file may be, the nearest first."""
    beside = _package().parent
    yield beside / "weights" / name
    try:
        recorded = importlib.metadata.files(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        recorded = []
    for file in recorded:
        if file.name == name:
            yield Path(file.locate())
    # `pip install --target` moves what it has recorded elsewhere.
    yield beside / _SHARED / name
