"""Image sets, their splits, and the checks on labels."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nfnet_keras.data.errors import DataError

if TYPE_CHECKING:
    from nfnet_keras.data.records import Records


@dataclass(frozen=True, eq=False)
class Split:
    """Images of one purpose (training or test) with their labels.

    Args:
        labels: Class numbers from 0, integers of shape (N,); kept as int32.
        images: uint8 of shape (N, H, W, 3), or None.
        paths: N paths of image files, or None. Exactly one of `images` and `paths` is given.

    Raises:
        DataError: If neither or both are given, or a shape, type or length is wrong.

    Example:
        >>> import numpy as np
        >>> from nfnet_keras.data import Split
        >>> len(Split(np.array([0, 1]), images=np.zeros((2, 8, 8, 3), np.uint8)))
        2
    """

    labels: np.ndarray
    images: np.ndarray | None = None
    paths: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the fields and bring the labels to int32."""
        if (self.images is None) == (self.paths is None):
            raise DataError("a split needs exactly one of images and paths; give one of them")
        labels = np.asarray(self.labels)
        if labels.ndim != 1 or (labels.size and labels.dtype.kind not in "iu"):
            raise DataError(
                f"labels have shape {labels.shape} and type {labels.dtype}; give one integer an image, shape (N,)"
            )
        if self.images is not None:
            _check_images(self.images)
        count = len(self.paths) if self.images is None else len(self.images)
        if count != len(labels):
            raise DataError(f"{count} images but {len(labels)} labels; give one label an image")
        if labels.size and not -(2**31) <= labels.min() <= labels.max() < 2**31:
            raise DataError(f"label {labels.max()} does not fit in int32; number classes from 0")
        object.__setattr__(self, "labels", labels.astype(np.int32))

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def digest(self) -> str:
        """Tell this split from another, by its labels and its images or their paths, wherever their folder lies.

        Returns:
            A SHA-256 in hexadecimal.

        Example:
            >>> from nfnet_keras.data import digits
            >>> digits().train.digest() == digits().test.digest()
            False
        """
        if self.paths is None:
            content = self.images.tobytes()
        else:
            # All paths lie between the first and the last: what these two share, all share.
            ends = [min(self.paths), max(self.paths)] if self.paths else [""]
            shared = os.path.commonprefix(ends).rfind(os.sep) + 1  # noqa: RUF071 - cut at a separator
            content = "\0".join(path[shared:] for path in self.paths).encode(errors="surrogateescape")
        return hashlib.sha256(self.labels.tobytes() + content).hexdigest()


def _check_images(images: Any) -> None:
    if getattr(images, "dtype", None) != np.uint8:
        raise DataError(
            f"images have type {getattr(images, 'dtype', type(images).__name__)}; give a uint8 array with values 0..255"
        )
    if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape[1:]:
        raise DataError(f"images have shape {images.shape}; give (N, height, width, 3)")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A named set of labelled images, split for training and test.

    Args:
        name: Short name of the set.
        class_names: Name of each class; the place in the tuple is the label.
        train: The images to train on, a `Split` or `Records`.
        test: The images held out, of the same kind.

    Example:
        >>> from nfnet_keras.data import digits
        >>> len(digits().test)
        360
    """

    name: str
    class_names: tuple[str, ...]
    train: "Split | Records"
    test: "Split | Records"


def check_labels(labels: Any, classes: int) -> None:
    """Check that labels are class numbers.

    Args:
        labels: Labels of shape (N,), an array or a list.
        classes: Number of classes; labels run from 0 to classes - 1.

    Raises:
        DataError: If a label is not an integer or is out of range; it names the first such
            label, its position and the range.

    Example:
        >>> from nfnet_keras.data import check_labels
        >>> check_labels([0, 1, 2], classes=3)
    """
    try:
        array = np.asarray(labels)
    except ValueError:
        raise DataError("labels are rows of unequal length; give one integer an image") from None
    if array.ndim != 1:
        raise DataError(
            f"labels have shape {array.shape}; give one integer an image, shape (N,), for one-hot labels their argmax"
        )
    wanted = f"labels must be integers in 0..{classes - 1}"
    if array.size and array.dtype.kind not in "iu":
        position = _first_non_integer(array)
        raise DataError(
            f"label {array[position].item()!r} at position {position} is not an integer (type {array.dtype}); {wanted}"
            if array.dtype != object
            else f"label {array[position]!r} at position {position} is not an integer; {wanted}"
        )
    bad = np.flatnonzero((array < 0) | (array >= classes))
    if bad.size:
        position = int(bad[0])
        raise DataError(f"label {int(array[position])} at position {position} is out of range; {wanted}")


def _first_non_integer(array: np.ndarray) -> int:
    """Return the position of the first odd value, 0 where only the type is wrong."""
    if array.dtype.kind == "f":
        odd = array != np.floor(array)
    elif array.dtype.kind == "O":
        odd = np.array([not isinstance(v, int | np.integer) for v in array])
    else:
        return 0
    return int(np.argmax(odd))


def held_out(keys: Sequence[str], count: int, seed: int) -> np.ndarray:
    """Choose some of the items of one class to hold out.

    The choice goes by a hash of each item's name, so that it is the same on every machine and
    with every version of NumPy.

    Args:
        keys: A name for each item.
        count: How many to hold out.
        seed: Another seed makes another choice.

    Returns:
        A bool array of shape (len(keys),), True for the items held out.

    Example:
        >>> from nfnet_keras.data.splits import held_out
        >>> int(held_out(["a", "b", "c"], 1, seed=0).sum())
        1
    """
    hashes = [hashlib.sha256(f"{seed}/{k}".encode(errors="surrogateescape")).digest() for k in keys]
    mask = np.zeros(len(keys), bool)
    mask[sorted(range(len(keys)), key=hashes.__getitem__)[:count]] = True
    return mask
