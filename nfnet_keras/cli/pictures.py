"""Pictures that commands write: where they may go, and that they are whole or not there."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


def picture_path(name: str, flag: str, inputs: Sequence[str] = ()) -> Path:
    """Returns the path of a picture to write, seen to be one before anything is computed for it.

    Args:
        name: What stands on the command line.
        flag: The flag that it stands behind, for the messages.
        inputs: Files that the command reads, which are not to be overwritten.

    Raises:
        ValueError: If it is no picture's name, its folder is not there, or it is one of `inputs`.

    Example:

    >>> picture_path("picture.txt", "--picture")
    Traceback (most recent call last):
    ...
    ValueError: --picture must be a file that ends in .png, .jpg, .jpeg, .pdf, .svg, not 'picture.txt'
    """
    path = Path(name)
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise ValueError(f"{flag} must be a file that ends in {', '.join(SUFFIXES)}, not {name!r}")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of {flag}={name!r} does not exist")
    for file in inputs:
        if os.path.exists(file) and path.exists() and os.path.samefile(path, file):
            raise ValueError(f"{flag}={name!r} is one of the images; give another name, it would be overwritten")
    return path


def write_picture(figure, path: Path) -> None:
    """Writes a figure of matplotlib; what goes wrong leaves a file that was there as it was.

    Example:

    >>> import tempfile
    >>> from matplotlib.figure import Figure
    >>> path = Path(tempfile.mkdtemp()) / "empty.png"
    >>> write_picture(Figure(), path)
    >>> path.read_bytes()[1:4]
    b'PNG'
    """
    from nfnet_keras.training.files import written_aside

    with written_aside(path) as aside, warnings.catch_warnings():
        # Of letters that matplotlib's fonts lack, which it draws as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(aside, dpi=100)
