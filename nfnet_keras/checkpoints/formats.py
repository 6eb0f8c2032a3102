"""Opening any checkpoint: its content tells what it is, whatever its name ends in."""

from __future__ import annotations

import errno
import os
import re
import zipfile

from nfnet_keras.checkpoints import keras_files
from nfnet_keras.checkpoints.pickles import open_pickle
from nfnet_keras.checkpoints.stored import Checkpoint, CheckpointError
from nfnet_keras.checkpoints.tensors import open_tensors

_HEAD = 512
_KNOWN = (
    "a checkpoint is one of the authors' .npz files (a pickle of arrays), a .safetensors file, a Keras .weights.h5 or "
    "a Keras .keras file"
)
_SAFETENSORS = "load it with timm or PyTorch and save its state dict with safetensors.torch.save_file"
# The first operations of a pickle of protocol 0 or 1, which has no mark of its own.
_OLD_PICKLE = re.compile(rb"\(?[ci][\w.]+\r?\n[\w.]+\r?\n|\([dlt]p?\d*\n|[}\]]q.")
_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint and find its arrays; their data stays in the file until it is asked for.

    Nothing in the file is run, whatever it says.

    Args:
        path: One of the authors' files (a pickle of {module: {parameter: array}}), a safetensors file, or what Keras
            writes as `.weights.h5` or `.keras`.

    Returns:
        The arrays by name.

    Raises:
        CheckpointError: If the file is none of these, damaged, or dangerous; the message says what it is and what to
            do.
        OSError: If it cannot be read.

    Example:
        >>> import pickle
        >>> import numpy as np
        >>> from nfnet_keras.checkpoints.formats import open_checkpoint
        >>> with open("example.npz", "wb") as file:
        ...     pickle.dump({"NFNet/~/linear": {"b": np.zeros(3, np.float32)}}, file)
        >>> checkpoint = open_checkpoint("example.npz")
        >>> checkpoint.format, list(checkpoint.arrays)
        ('haiku', ['NFNet/~/linear/b'])
    """
    path = os.fsdecode(path)
    head, tail = _ends(path)
    if not head:
        raise CheckpointError(f"cannot load {path!r}: the file is empty; fetch it again")
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return keras_files.open_weights(path)
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return _open_zip(path)
    # The length of a safetensors header may look like a pickle's first bytes; the brace after it does not.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return open_tensors(path)
    if head.startswith(_OLD_TORCH):
        raise _foreign(path, "an old PyTorch file", _SAFETENSORS)
    if head[0] == 0x80 or (tail.endswith(b".") and _OLD_PICKLE.match(head)):
        return open_pickle(path)
    raise _foreign(path, *_unknown(head))


def _ends(path: str) -> tuple[bytes, bytes]:
    """Read the first and the last bytes of a file."""
    if os.path.isdir(path):
        of_run = os.path.isfile(os.path.join(path, "model.keras"))
        advice = "model.keras in it" if of_run else "the file in it"
        raise IsADirectoryError(errno.EISDIR, f"a checkpoint is one file, and this is a folder; give {advice}", path)
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
            file.seek(-min(len(head), 16), os.SEEK_END)
            return head, file.read()
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, "there is no such checkpoint file; check the path", path) from None
    except PermissionError:
        raise PermissionError(errno.EACCES, "this user may not read the checkpoint file", path) from None


def _foreign(path: str, what: str, advice: str = _KNOWN) -> CheckpointError:
    return CheckpointError(f"cannot load {path!r}: it is {what}; {advice}")


def _unknown(head: bytes) -> tuple[str, ...]:
    """Say what a file is by its first bytes, and what to do."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return "a web page, not a checkpoint: the download went wrong", "fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the checkpoint itself", "run `git lfs pull`, or fetch the file from its page"
    if head.startswith(b"\x1f\x8b"):
        return "a gzip archive", "unpack it and give the file in it"
    if head.startswith(b"\x93NUMPY"):
        return ("a single NumPy array",)
    if text.startswith(b"{"):
        return "a JSON file, perhaps the index of a checkpoint in several files", "give a checkpoint in one file"
    return ("no checkpoint that this package knows, or a damaged one",)


def _open_zip(path: str) -> Checkpoint:
    try:
        with keras_files.open_archive(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise _foreign(path, f"a damaged or cut short zip archive ({error})", "fetch it again") from None
    if "model.weights.h5" in names:
        return keras_files.open_keras(path)
    if "model.weights.json" in names:
        raise _foreign(
            path, "a Keras model whose weights are in several files", "save it with `model.save_weights(one file)`"
        )
    if any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise _foreign(path, "a PyTorch file, which is a pickle and may run code when loaded", _SAFETENSORS)
    if names and all(name.endswith(".npy") for name in names):
        raise _foreign(path, "a NumPy .npz archive; the authors' files have the same ending, but are pickles")
    raise _foreign(path, "a zip archive without a model's weights")
