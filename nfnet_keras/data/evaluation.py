"""How a network's test images are cut and scaled: the authors' rules, timm's, and that of this package's training."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from nfnet_keras.data._tensorflow import tensorflow
from nfnet_keras.data.crops import KERNELS, crop_content, crop_pixels, parse_rule
from nfnet_keras.data.errors import DataError
from nfnet_keras.data.images import decode, normalize, reason

_JPEG = b"\xff\xd8\xff"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What is done to an image file before a network sees it.

    Args:
        image_size: Side of the network's images in pixels.
        mean_rgb: Mean of red, green and blue on the scale 0..255.
        stddev_rgb: Standard deviation of the three on that scale.
        crop: Rule of `evaluation_crop`. Default "resize_crop_32", the authors' for NFNets.
        interpolation: "bicubic" (the default) or "bilinear".

    Raises:
        ValueError: If a value is of the wrong type or out of range.

    Example:
        >>> from nfnet_keras.data.evaluation import Preprocessing
        >>> Preprocessing(256, (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)).crop
        'resize_crop_32'
    """

    image_size: int
    mean_rgb: tuple[float, float, float]
    stddev_rgb: tuple[float, float, float]
    crop: str = "resize_crop_32"
    interpolation: str = "bicubic"

    def __post_init__(self):
        _check(self.image_size, self.crop, self.interpolation)
        for name in ("mean_rgb", "stddev_rgb"):
            try:
                values = tuple(float(value) for value in getattr(self, name))
            except (TypeError, ValueError):
                values = ()
            if len(values) != 3 or not np.isfinite(values).all():
                raise ValueError(f"`{name}` must be three numbers. Received: {name}={getattr(self, name)!r}")
            object.__setattr__(self, name, values)
        if min(self.stddev_rgb) <= 0:
            raise ValueError(f"`stddev_rgb` must be positive. Received: stddev_rgb={self.stddev_rgb}")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Preprocessing:
        """Read the preprocessing that travels with a model.

        Args:
            metadata: `model.metadata`; `image_size`, `mean_rgb` and `stddev_rgb` must be in it.
                Without `crop` it is "training", because `nfnet train` trained the model.

        Returns:
            The preprocessing.

        Raises:
            ValueError: If something is missing or wrong.

        Example:
            >>> from nfnet_keras.data.evaluation import Preprocessing
            >>> half = [127.5, 127.5, 127.5]
            >>> Preprocessing.from_metadata({"image_size": 32, "mean_rgb": half, "stddev_rgb": half}).crop
            'training'
        """
        missing = [name for name in ("image_size", "mean_rgb", "stddev_rgb") if name not in metadata]
        if missing:
            raise ValueError(f"the metadata of the model lacks {', '.join(missing)}")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{"crop": "training", **{name: metadata[name] for name in names if name in metadata}})

    def to_metadata(self) -> dict[str, Any]:
        """Give the preprocessing as JSON holds it; `from_metadata` reads it back.

        Example:
            >>> from nfnet_keras.data.evaluation import Preprocessing
            >>> Preprocessing(32, (0, 0, 0), (1, 1, 1)).to_metadata()["mean_rgb"]
            [0.0, 0.0, 0.0]
        """
        return {**dataclasses.asdict(self), "mean_rgb": list(self.mean_rgb), "stddev_rgb": list(self.stddev_rgb)}

    def normalize(self, images: np.ndarray) -> np.ndarray:
        """Bring pixels 0..255 to zero mean and unit deviation by this network's statistics, in float32.

        Example:
            >>> import numpy as np
            >>> from nfnet_keras.data.evaluation import Preprocessing
            >>> Preprocessing(32, (10, 10, 10), (2, 2, 2)).normalize(np.full((1, 3), 14)).tolist()
            [[2.0, 2.0, 2.0]]
        """
        return normalize(np.asarray(images), self.mean_rgb, self.stddev_rgb)


def evaluation_crop(
    image: np.ndarray | bytes, image_size: int, rule: str, interpolation: str = "bicubic"
) -> np.ndarray:
    """Cut and scale one image as a published evaluation does.

    - "crop_resize" (authors): the central square whose side is size / (size + 32) of the shorter
      side is cut out and resized.
    - "resize_crop_32" (authors): the whole image is resized to a square of size + 32, whatever its
      shape was, and the centre is cut out; so with any number above 1. "resize_crop_0.9": the
      square has the side size / 0.9; so with any number up to 1.
    - "center_0.9" (timm): the shorter side is resized to size / 0.9, and the centre is cut out.
    - "squash_0.9" (timm): as "resize_crop_0.9", but antialiased. The number may be left out: 1.
    - "training": the rule of `load_image` in this package.

    The authors' rules neither antialias nor clip: their results go beyond 0..255. Those of timm
    are rounded to whole numbers, as Pillow's are.

    Source: google-deepmind/deepmind-research, nfnets/dataset.py; timm, data/transforms_factory.py.

    Args:
        image: uint8 of shape (height, width, 3), or the bytes of an image file, whose EXIF
            orientation is then ignored, as the authors do. Bytes of a JPEG and "crop_resize" give
            the authors' pixels exactly, an array nearly: at the border of the cut they differ.
        image_size: Side of the result in pixels.
        rule: Name of the rule.
        interpolation: "bicubic" (the default) or "bilinear".

    Returns:
        float32 of shape (image_size, image_size, 3), pixels on the scale 0..255.

    Raises:
        DataError: If the bytes are no whole image.
        ValueError: If the rule, the size, the interpolation or the array's shape is wrong.

    Example:
        >>> import numpy as np
        >>> from nfnet_keras.data.evaluation import evaluation_crop
        >>> evaluation_crop(np.zeros((60, 80, 3), np.uint8), 32, "resize_crop_0.9").shape
        (32, 32, 3)
    """
    _check(image_size, rule, interpolation)
    whole = isinstance(image, bytes)
    pixels = _decode_bytes(image) if whole else np.asarray(image)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"`image` must have the shape (height, width, 3). Received: image.shape={pixels.shape}")
    with tensorflow().device("CPU:0"):
        if whole and rule == "crop_resize" and image.startswith(_JPEG):
            # Decoding no more than the window gives other colours along its border than cutting out afterwards.
            return crop_content(image, image_size, rule, interpolation).numpy()
        return crop_pixels(pixels, image_size, rule, interpolation).numpy()


def load_image(path: str | os.PathLike[str], image_size: int) -> np.ndarray:
    """Load one file as evaluation sees it.

    The shorter side is resized to round(image_size * 8 / 7) pixels (bicubic, antialiased), the
    central square of image_size is kept and normalised.

    Args:
        path: Path of a JPEG or PNG file.
        image_size: Side of the result in pixels.

    Returns:
        float32 of shape (image_size, image_size, 3).

    Raises:
        DataError: If the file is missing, unreadable, or no whole image.

    Example:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import load_image
        >>> png = tf.io.encode_png(tf.zeros((20, 30, 3), tf.uint8))
        >>> path = tempfile.mkdtemp() + "/example.png"
        >>> tf.io.write_file(path, png)
        >>> load_image(path, 16).shape
        (16, 16, 3)
    """
    if not os.path.exists(path):
        raise DataError(f"image file does not exist: {os.fspath(path)!r}; check the path")
    if os.path.isdir(path):
        raise DataError(f"{os.fspath(path)!r} is a folder; give the path of one image file")
    tf = tensorflow()
    try:
        with tf.device("CPU:0"):
            return normalize(crop_pixels(decode(os.fsencode(path)), image_size, "training")).numpy()
    except tf.errors.OpError as error:
        raise DataError(
            f"cannot read image {os.fspath(path)!r} ({reason(error)}); give a whole, readable JPEG or PNG file"
        ) from None


def load_for(path: str | os.PathLike[str], preprocessing: Preprocessing) -> np.ndarray:
    """Load one image file as a network is to see it.

    JPEG, PNG, BMP, WebP (where TensorFlow reads it) and the first frame of a GIF; grey, with alpha
    (dropped) or 16 bits a channel (the low byte is dropped). A JPEG's EXIF orientation is applied.

    Args:
        path: Path of the file.
        preprocessing: What the network needs.

    Returns:
        float32 of shape (image_size, image_size, 3), normalised.

    Raises:
        DataError: If the file is missing, unreadable, or no whole image.

    Example:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> from nfnet_keras.data.evaluation import Preprocessing, load_for
        >>> path = tempfile.mkdtemp() + "/example.png"
        >>> tf.io.write_file(path, tf.io.encode_png(tf.zeros((20, 30, 3), tf.uint8)))
        >>> load_for(path, Preprocessing(16, (0, 0, 0), (255, 255, 255))).shape
        (16, 16, 3)
    """
    name = os.fspath(path)
    if os.path.isdir(path):
        raise DataError(f"{name!r} is a folder; give the path of one image file")
    try:
        with open(path, "rb") as file:
            content = file.read()
    except FileNotFoundError:
        raise DataError(f"image file does not exist: {name!r}; check the path") from None
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read image {name!r} ({getattr(error, 'strerror', None) or error})") from None
    orientation = _exif_orientation(content)
    try:
        image = content if orientation == 1 else _upright(_decode_bytes(content), orientation)
        pixels = evaluation_crop(
            image, preprocessing.image_size, preprocessing.crop, interpolation=preprocessing.interpolation
        )
    except DataError as error:
        raise DataError(f"cannot read image {name!r} ({error}); give a whole, readable image file") from None
    return preprocessing.normalize(pixels)


def _decode_bytes(content: bytes) -> np.ndarray:
    """Decode an image file's bytes to uint8 of shape (height, width, 3); alpha is dropped, EXIF orientation ignored."""
    tf = tensorflow()
    try:
        with tf.device("CPU:0"):
            if content.startswith(b"BM") and content[28:30] == b"\x08\x00":
                return _colours(content)[tf.io.decode_bmp(content).numpy()[..., 0]]
            image = tf.io.decode_image(content, channels=3, expand_animations=False).numpy()
    except tf.errors.OpError as error:
        raise DataError(reason(error) or type(error).__name__) from None
    if image.ndim != 3 or 0 in image.shape:
        raise DataError("the image is empty")
    return image


def _exif_orientation(content: bytes) -> int:
    """Find how the camera was held, 1 to 8 as EXIF defines it; 1, upright, where the bytes do not say."""
    position = 2 if content.startswith(_JPEG) else len(content)
    while position + 4 <= len(content) and content[position] == 0xFF:
        marker = content[position + 1]
        if marker in (0xD9, 0xDA):  # the end, or the pixels: no EXIF comes after them
            break
        if marker == 0xFF:
            position += 1
            continue
        length = int.from_bytes(content[position + 2 : position + 4], "big")
        if marker == 0xE1 and content[position + 4 : position + 10] == b"Exif\0\0":
            return _orientation_tag(content[position + 10 : position + 2 + length])
        position += 2 + max(length, 2)
    return 1


def _orientation_tag(tiff: bytes) -> int:
    if tiff[:4] not in (b"II*\0", b"MM\0*"):
        return 1
    order = "little" if tiff.startswith(b"II") else "big"
    start = int.from_bytes(tiff[4:8], order)
    entries = int.from_bytes(tiff[start : start + 2], order)
    for position in range(start + 2, min(start + 2 + 12 * entries, len(tiff) - 11), 12):
        tag, kind = (int.from_bytes(tiff[position + i : position + i + 2], order) for i in (0, 2))
        if tag == 0x0112:
            value = int.from_bytes(tiff[position + 8 : position + 10], order)
            return value if kind == 3 and 1 <= value <= 8 else 1
    return 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror an image as its EXIF orientation asks."""
    if orientation >= 5:
        pixels, orientation = pixels.swapaxes(0, 1), {5: 1, 6: 2, 7: 3, 8: 4}[orientation]
    rows = -1 if orientation in (3, 4) else 1
    columns = -1 if orientation in (2, 3) else 1
    return np.ascontiguousarray(pixels[::rows, ::columns])


def _colours(bmp: bytes) -> np.ndarray:
    """Read the palette of a BMP of 8 bits a pixel, which TensorFlow takes for grey levels."""
    used = int.from_bytes(bmp[46:50], "little") or 256
    start = 14 + int.from_bytes(bmp[14:18], "little")
    entries = np.frombuffer(bmp[start : start + 4 * min(used, 256)], np.uint8)
    table = np.zeros((256, 3), np.uint8)
    table[: len(entries) // 4] = entries[: len(entries) // 4 * 4].reshape(-1, 4)[:, 2::-1]
    return table


def _check(image_size: int, rule: str, interpolation: str) -> None:
    if isinstance(image_size, bool) or not isinstance(image_size, int | np.integer) or image_size < 1:
        raise ValueError(f"`image_size` must be a positive whole number. Received: image_size={image_size!r}")
    if interpolation not in KERNELS:
        raise ValueError(f"`interpolation` must be one of {', '.join(KERNELS)}. Received: {interpolation!r}")
    parse_rule(rule)
