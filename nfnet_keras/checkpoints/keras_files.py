"""What Keras writes: `.weights.h5` files, and `.keras` archives with such a file in them."""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from typing import BinaryIO

import h5py
import numpy as np

from nfnet_keras.checkpoints import stored
from nfnet_keras.checkpoints.stored import Checkpoint, CheckpointError, StoredArray

_WEIGHTS = "model.weights.h5"
_CONFIG = "config.json"
# A network of 600 layers has a configuration of 2 megabytes; parsed, it takes many times its size.
_LONGEST_CONFIG = 4 * 2**20
_LONGEST_DIRECTORY = 2**20
_PIECE = 2**20
_LONGEST_HEAP = 2**20
_HEAP = b"GCOL\x01"
_LONGEST_NAME = 256
_MOST_GROUPS = 20_000
_DEEPEST = 16


def open_weights(path: str | os.PathLike[str]) -> Checkpoint:
    """Find the arrays in a file of `model.save_weights`; no data is read.

    Args:
        path: The file.

    Returns:
        A checkpoint of format "keras", with names such as "stem_conv0/0" or "stage1_block1_se/reduce/0": the layer's
        name, the parts of a layer that has parts, and the variable's number or name. The state of optimizers, metrics
        and random generators is left out.

    Raises:
        CheckpointError: If the file is damaged, or is an HDF5 file as Keras does not write them.
        OSError: If it cannot be read.

    Example:
        >>> from nfnet_keras.checkpoints.keras_files import open_weights
        >>> model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3, name="head")])
        >>> model.save_weights("example.weights.h5")
        >>> {name: array.shape for name, array in open_weights("example.weights.h5").arrays.items()}
        {'head/0': (2, 3), 'head/1': (3,)}
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        return Checkpoint(path, "keras", _arrays(path, file, 0, os.path.getsize(path)))


def open_keras(path: str | os.PathLike[str]) -> Checkpoint:
    """Find the arrays in a file of `model.save`; no layer is made from its configuration.

    The archive has a checksum of the weights, which is compared here: the file is read once for it.

    Args:
        path: The `.keras` file.

    Returns:
        As of `open_weights`, with the model's `metadata` where it has some.

    Raises:
        CheckpointError: If the file is damaged, or not as Keras writes it.
        OSError: If it cannot be read.

    Example:
        >>> from nfnet_keras.checkpoints.keras_files import open_keras
        >>> model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3, name="head")])
        >>> model.save("example.keras")
        >>> open_keras("example.keras").arrays["head/1"].read()
        array([0., 0., 0.], dtype=float32)
    """
    path = os.fspath(path)
    try:
        with open_archive(path) as archive:
            part = archive.getinfo(_WEIGHTS)
            if min(other.header_offset for other in archive.infolist()) < 0:
                raise _error(path, "the archive is damaged")
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1 or part.file_size != part.compress_size:
                raise _error(path, f"{_WEIGHTS} in it is compressed or encrypted, which Keras does not do")
            metadata = _metadata(archive)
        with open(path, "rb") as file:
            file.seek(part.header_offset)
            header = file.read(30)
            if not header.startswith(b"PK\x03\x04") or len(header) < 30:
                raise _error(path, "the archive is damaged")
            # The part's own header has a name and extra fields of its own lengths, which the directory does not tell.
            offset = file.tell() + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little")
            if offset + part.file_size > os.path.getsize(path):
                raise _error(path, "it is cut short")
            if _checksum(file, offset, part.file_size) != part.CRC:
                raise _error(path, f"the archive is damaged (the checksum of {_WEIGHTS} in it is another)")
            return Checkpoint(path, "keras", _arrays(path, file, offset, part.file_size), metadata)
    except (zipfile.BadZipFile, NotImplementedError, KeyError, RuntimeError) as error:
        raise _error(path, f"the archive is damaged ({error})") from None


def _checksum(file: BinaryIO, offset: int, size: int) -> int:
    """Computes a zip archive's checksum of a stretch of a file."""
    file.seek(offset)
    checksum = 0
    while size > 0:
        piece = file.read(min(size, _PIECE))
        if not piece:
            break
        checksum = zlib.crc32(piece, checksum)
        size -= len(piece)
    return checksum


def open_archive(path: str) -> zipfile.ZipFile:
    """Open a zip archive, unless its directory alone would fill the memory.

    Args:
        path: The file.

    Returns:
        The archive, to be closed by the caller.

    Raises:
        CheckpointError: If the archive has far more parts than any checkpoint.
        zipfile.BadZipFile: If it is none.

    Example:
        >>> import zipfile
        >>> from nfnet_keras.checkpoints.keras_files import open_archive
        >>> with zipfile.ZipFile("example.zip", "w") as archive:
        ...     archive.writestr("note", "hello")
        >>> with open_archive("example.zip") as archive:
        ...     archive.namelist()
        ['note']
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**16 - 100))
        tail = file.read()
    # The directory lies between its first entry and the end record; archives of more than 4 GB have a second one.
    for mark, place, width in ((b"PK\x05\x06", 12, 4), (b"PK\x06\x06", 40, 8)):
        start = tail.find(mark)
        while start >= 0:
            length = int.from_bytes(tail[start + place : start + place + width], "little")
            if _LONGEST_DIRECTORY < length <= size:
                raise _error(path, "it is an archive of far more parts than a checkpoint has")
            start = tail.find(mark, start + 1)
    try:
        return zipfile.ZipFile(path)
    except (ValueError, NotImplementedError, OverflowError) as error:
        raise zipfile.BadZipFile(str(error)) from None


def _error(path: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"cannot load {path!r}: {problem}; write it with `model.save_weights` or `model.save`, or fetch it again"
    )


def _metadata(archive: zipfile.ZipFile) -> dict:
    """Read what the configuration says besides the layers; it is of no use for the weights, so that errors are not."""
    try:
        part = archive.getinfo(_CONFIG)
        if part.file_size > _LONGEST_CONFIG or part.compress_type != zipfile.ZIP_STORED:
            return {}
        metadata = json.loads(archive.read(part).decode())["config"]["metadata"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


class _Part(io.RawIOBase):
    """A stretch of a file as a file of its own, for the HDF5 library; what it would hang on is not given to it."""

    def __init__(self, file: BinaryIO, offset: int, size: int):
        self._file, self._offset, self._size, self._position = file, offset, size, 0
        self._checked: set[int] = set()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        self._position = position + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:
        found = self._at(self._position, len(buffer))
        # The library may read the mark of a heap in two pieces.
        around = self._at(max(0, self._position - len(_HEAP)), len(buffer) + 2 * len(_HEAP))
        place = around.find(_HEAP)
        while place >= 0:
            self._check_heap(max(0, self._position - len(_HEAP)) + place)
            place = around.find(_HEAP, place + 1)
        memoryview(buffer).cast("B")[: len(found)] = found
        self._position += len(found)
        return len(found)

    def _at(self, position: int, count: int) -> bytes:
        self._file.seek(self._offset + position)
        return self._file.read(max(0, min(count, self._size - position)))

    def _check_heap(self, position: int) -> None:
        """Walk through a heap of texts as the library does, which goes on for ever over an object of no size."""
        if position in self._checked:
            return
        self._checked.add(position)
        heap = self._at(position, _LONGEST_HEAP)
        size = int.from_bytes(heap[8:16], "little")
        place = 16
        while place + 16 <= size:
            length = int.from_bytes(heap[place + 8 : place + 16], "little")
            # Object 0 is the space that is left, and alone counts its own header.
            step = 16 + -(-length // 8) * 8 if any(heap[place : place + 2]) else length
            if step < 16 or place + step > min(size, len(heap)):
                raise OSError("a heap of texts is damaged")
            place += step


def _arrays(path: str, file: BinaryIO, offset: int, size: int) -> dict[str, StoredArray]:
    file.seek(offset)
    head = file.read(16)
    # Sizes and places of eight bytes each; where they are told depends on the version of the first block.
    if (
        len(head) < 16
        or head[:8] != b"\x89HDF\r\n\x1a\n"
        or (head[13:15] if head[8] < 2 else head[9:11]) != b"\x08\x08"
    ):
        raise _error(path, "it is no HDF5 file as Keras writes them")
    try:
        with h5py.File(_Part(file, offset, size), "r") as opened:
            return _Walk(path, offset, size).arrays(opened)
    except CheckpointError:
        raise
    # What the HDF5 library finds wrong with a file comes as any of these.
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, MemoryError, SystemError) as error:
        raise _error(path, f"it is no whole HDF5 file ({str(error)[:200]})") from None


class _Walk:
    """Finds the arrays of an HDF5 file group by group, and refuses whatever could lead out of the file."""

    def __init__(self, path: str, offset: int, size: int):
        self.path, self.offset, self.size = path, offset, size
        self.found: dict[str, StoredArray] = {}
        self.seen: set[int] = set()

    def arrays(self, file: h5py.File) -> dict[str, StoredArray]:
        top = self.members(file)
        if not isinstance(top.get("layers"), h5py.Group):
            old = " It is a file of Keras 2 or of a whole model in HDF5." if "layer_names" in file.attrs else ""
            old = old or (" It is a whole model in HDF5." if "model_weights" in top else "")
            raise _error(self.path, f"it holds no layers.{old}")
        waiting = [(top["layers"], "", 0)]
        while waiting:
            group, prefix, depth = waiting.pop()
            waiting += reversed(self.children(group, prefix, depth))
        if not self.found:
            raise _error(self.path, "it holds no arrays")
        return self.found

    def children(self, group: h5py.Group, prefix: str, depth: int) -> list[tuple[h5py.Group, str, int]]:
        """Take the arrays of one group; returns the groups in it that are to be visited."""
        if depth > _DEEPEST:
            raise _error(self.path, "its groups are nested too deep")
        below = []
        for name, member in self.members(group).items():
            if name == "vars":
                self.variables(member, prefix)
            elif name.startswith("seed_generator"):
                continue
            elif isinstance(member, h5py.Group):
                # Keras calls the members of a list of layers after their classes.
                own = self.layer_name(member) if group.name.rpartition("/")[2] == "layers" else None
                below.append((member, f"{prefix}{own or name}/", depth + 1))
        return below

    def members(self, group: h5py.Group) -> dict[str, h5py.Group | h5py.Dataset]:
        address = h5py.h5o.get_info(group.id).addr
        if address in self.seen or len(self.seen) > _MOST_GROUPS or len(group) > _MOST_GROUPS:
            raise _error(self.path, "its groups go round in circles, or are far more than a model has")
        self.seen.add(address)
        members = {}
        for name in group:
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                raise _error(self.path, f"refused: {name!r} in it is a link, which may lead to another file")
            members[name] = group[name]
        return members

    def layer_name(self, group: h5py.Group) -> str | None:
        """Return the name that the layer's variables carry as an attribute."""
        link = group.get("vars", getlink=True)
        variables = group["vars"] if isinstance(link, h5py.HardLink) else None
        if variables is None or "name" not in variables.attrs:
            return None
        return self.text(variables, "name")

    def text(self, member: h5py.Group | h5py.Dataset, attribute: str) -> str:
        held = member.attrs.get_id(attribute)
        if held.shape != () or h5py.check_string_dtype(held.dtype) is None or held.dtype.itemsize > _LONGEST_NAME:
            raise _error(self.path, f"an attribute {attribute!r} in it is no text")
        text = member.attrs[attribute]
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        if not 0 < len(text) <= _LONGEST_NAME:
            raise _error(self.path, f"an attribute {attribute!r} in it is empty or endless")
        return text

    def variables(self, group: h5py.Group | h5py.Dataset, prefix: str) -> None:
        if not isinstance(group, h5py.Group):
            raise _error(self.path, f"{prefix + 'vars'!r} in it is no group")
        for name, dataset in self.members(group).items():
            key = prefix + name
            if not isinstance(dataset, h5py.Dataset):
                raise _error(self.path, f"{key!r} in it is no array")
            if key in self.found:
                raise _error(self.path, f"it holds {key!r} twice")
            self.found[key] = self.store(key, dataset)

    def store(self, key: str, dataset: h5py.Dataset) -> StoredArray:
        """Note where an array lies in the file; it is read without the HDF5 library."""
        dtype, shape, layout = dataset.dtype, dataset.shape, dataset.id.get_create_plist()
        if layout.get_external_count() or layout.get_layout() != h5py.h5d.CONTIGUOUS or layout.get_nfilters():
            raise _error(self.path, f"refused: {key!r} is compressed, in pieces or in another file")
        if dtype == np.dtype("V2") and "dtype" in dataset.attrs and self.text(dataset, "dtype") == "bfloat16":
            dtype = stored.BFLOAT16
        elif dtype.str[1:] not in stored.NUMBERS or h5py.h5t.py_create(dtype, logical=True) != dataset.id.get_type():
            raise _error(self.path, f"{key!r} is of type {dtype}, not of numbers that this package reads")
        if shape is None:
            raise _error(self.path, f"{key!r} is empty")
        try:
            count = stored.byte_count(shape, dtype)
        except ValueError as error:
            raise _error(self.path, f"{key!r} {error}") from None
        start = dataset.id.get_offset() if count else 0
        if start is None or start < 0 or start + count > self.size:
            raise _error(self.path, f"{key!r} is not whole: the file is cut short or damaged")
        return stored.in_file(self.path, self.offset + start, count, dtype, shape)
