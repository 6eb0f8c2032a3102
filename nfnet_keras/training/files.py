"""Files that are whole or not there, whatever happens while they are written."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

# Of this package's names only: the folder may hold the user's own hidden files.
_ASIDE = re.compile(
    r"\.(config|metrics|model|model_raw|curves|report|confusion|step-\d{9,})\.\d+\.(json|csv|png|keras)"
)


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and puts the file in the place of `path` once it is whole and on the disk.

    Whatever goes wrong before leaves the file that was there as it was.

    Args:
        path: Where the file belongs.

    Yields:
        A path beside it, with the same suffix.

    Example:

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with written_aside(target) as aside:
    ...     _ = aside.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        # Without this a power cut may keep the new name and lose the bytes.
        to_disk(aside)
        os.replace(aside, path)
        to_disk(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left behind of files written aside.

    Args:
        folder: Where to look; folders inside it are left alone.

    Example:

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / ".step-000000001.4711.keras").write_text("half")
    >>> remove_leftovers(folder)
    >>> list(folder.iterdir())
    []
    """
    for file in folder.iterdir() if folder.is_dir() else ():
        if _ASIDE.fullmatch(file.name) and file.is_file():
            file.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Has a file or a folder's list of names written to the disk before it returns.

    Example:

    >>> import tempfile
    >>> to_disk(Path(tempfile.mkdtemp()))
    """
    if os.name == "nt" and path.is_dir():
        # Windows opens no folders.
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
