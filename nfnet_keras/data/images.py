"""Single images: decoding, resizing and normalising."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nfnet_keras.data._tensorflow import tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

MEAN_RGB = (0.485 * 255, 0.456 * 255, 0.406 * 255)
"""Mean of ImageNet's red, green and blue on the scale 0..255."""

STDDEV_RGB = (0.229 * 255, 0.224 * 255, 0.225 * 255)
"""Standard deviation of ImageNet's red, green and blue on the scale 0..255."""

_CHUNK = 1024


def normalize(images: Any, mean_rgb: Sequence[float] = MEAN_RGB, stddev_rgb: Sequence[float] = STDDEV_RGB) -> Any:
    """Bring pixels to zero mean and unit deviation.

    Args:
        images: Pixels 0..255 of shape (..., 3), any number type; a NumPy array (or nested
            list), or a TensorFlow tensor.
        mean_rgb: Mean of red, green and blue on that scale. Default: ImageNet's.
        stddev_rgb: Standard deviation of the three on that scale. Default: ImageNet's.

    Returns:
        (images - mean_rgb) / stddev_rgb in float32, a NumPy array or a tensor as was given.

    Example:
        >>> import numpy as np
        >>> from nfnet_keras.data import normalize
        >>> normalize(np.zeros((1, 1, 3), np.uint8)).round(2).tolist()
        [[[-2.119999885559082, -2.0399999618530273, -1.7999999523162842]]]
    """
    mean = np.array(mean_rgb, np.float32)
    # TensorFlow's graph optimiser turns a division by a constant into this product; written
    # out, so that graph, eager and NumPy results are the same to the bit.
    scale = np.float32(1.0) / np.array(stddev_rgb, np.float32)
    if isinstance(images, np.ndarray | list | tuple):
        return (np.asarray(images, np.float32) - mean) * scale
    tf = tensorflow()
    return (tf.cast(images, tf.float32) - mean) * scale


def decode(path: tf.Tensor | bytes) -> tf.Tensor:
    """Read and decode one image file; an alpha channel is dropped, EXIF rotation ignored.

    Args:
        path: Path of the file, a scalar string.

    Returns:
        A uint8 tensor of shape (height, width, 3); 16-bit files lose their low byte.

    Raises:
        tf.errors.OpError: If the file cannot be read or is no whole image.

    Example:
        >>> import tempfile
        >>> import tensorflow as tf
        >>> from nfnet_keras.data.images import decode
        >>> png = tf.io.encode_png(tf.zeros((2, 3, 1), tf.uint8))
        >>> path = tempfile.mkdtemp() + "/example.png"
        >>> tf.io.write_file(path, png)
        >>> decode(path).shape
        TensorShape([2, 3, 3])
    """
    return decode_bytes(tensorflow().io.read_file(path))


def decode_bytes(content: tf.Tensor | bytes) -> tf.Tensor:
    """Decode an image file's bytes; an alpha channel is dropped, EXIF rotation ignored.

    Args:
        content: The bytes, a scalar string.

    Returns:
        A uint8 tensor of shape (height, width, 3); 16-bit files lose their low byte.

    Raises:
        tf.errors.OpError: If the bytes are no whole image.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data.images import decode_bytes
        >>> decode_bytes(tf.io.encode_png(tf.zeros((2, 3, 1), tf.uint8))).shape
        TensorShape([2, 3, 3])
    """
    tf = tensorflow()
    image = tf.io.decode_image(content, channels=3, expand_animations=False)
    return tf.ensure_shape(image, (None, None, 3))


def resize(images: tf.Tensor, size: int, antialias: bool = True) -> tf.Tensor:
    """Resize to a square, bicubic.

    Args:
        images: Pixels 0..255 of shape (..., H, W, 3) with 3 or 4 axes.
        size: Side of the result in pixels.
        antialias: Default True. False gives the authors' resize, which is not clipped either.

    Returns:
        A float32 tensor of shape (..., size, size, 3), clipped to 0..255 where antialiased: a
        bicubic filter overshoots at edges.

    Example:
        >>> import numpy as np
        >>> from nfnet_keras.data.images import resize
        >>> resize(np.zeros((8, 6, 3), np.uint8), 4).shape
        TensorShape([4, 4, 3])
    """
    tf = tensorflow()
    resized = tf.image.resize(images, (size, size), method="bicubic", antialias=antialias)
    return tf.clip_by_value(resized, 0.0, 255.0) if antialias else resized


def resize_arrays(images: np.ndarray, size: int) -> np.ndarray:
    """Resize an array of images once, for keeping.

    Args:
        images: uint8 of shape (N, H, W, 3).
        size: Side of the results in pixels; other shapes than squares are stretched.

    Returns:
        uint8 of shape (N, size, size, 3): `resize` rounded, for a quarter of the memory; the
        array itself where it has that size already.

    Example:
        >>> import numpy as np
        >>> from nfnet_keras.data.images import resize_arrays
        >>> resize_arrays(np.zeros((5, 8, 8, 3), np.uint8), 32).shape
        (5, 32, 32, 3)
    """
    if images.shape[1:3] == (size, size):
        return images
    tf = tensorflow()
    result = np.empty((len(images), size, size, 3), np.uint8)
    with tf.device("CPU:0"):
        for start in range(0, len(images), _CHUNK):
            chunk = resize(images[start : start + _CHUNK], size)
            result[start : start + _CHUNK] = np.rint(chunk.numpy())
    return result


def reason(error: Exception) -> str:
    """Shorten a TensorFlow error to the line that helps a user.

    Args:
        error: What `decode` raised.

    Returns:
        One line, without the names of operations and devices.

    Example:
        >>> from nfnet_keras.data.images import reason
        >>> reason(ValueError("{{node X}} Input is empty. [Op:DecodeImage]"))
        'Input is empty'
    """
    text = " ".join(str(error).split())
    if text.startswith("{{"):
        text = text.partition("}}")[2]
    return text.partition("[Op:")[0].strip().rstrip(".")
