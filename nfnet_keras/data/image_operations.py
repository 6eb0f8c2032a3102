"""The sixteen image operations of RandAugment, each a function of image, magnitude and sign alone.

They are those of the authors' input pipeline (`nfnets/autoaugment.py` of Brock et al., 2021, there
after Cubuk et al., "RandAugment: Practical Automated Data Augmentation with a Reduced Search Space",
2020), with what that pipeline truly computes where it differs from PIL's operations of these names:

- `contrast` blends with a constant image of the grey level (number of pixels) / 256, at most 255, and
  not with the mean level of the image: the program adds up a histogram's counts, not its levels.
- `solarize` has its threshold in eight bits: magnitude 10 is threshold 256, taken as 0, so every
  pixel is inverted; magnitude 15 is 384, taken as 128.
- Posterize keeps one bit at least (and eight at most), so weak magnitudes change the image most.
- A magnitude counts pixels in translations and Cutout, whatever the size of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from nfnet_keras.data._tensorflow import tensorflow

if TYPE_CHECKING:
    import tensorflow as tf

# The order of the authors' table.
OPERATIONS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Rotate",
    "Posterize",
    "Solarize",
    "Color",
    "Contrast",
    "Brightness",
    "Sharpness",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Cutout",
    "SolarizeAdd",
)

_FULL = 10.0  # the magnitude of which the others are fractions
_GREY = 128
_FULL_TRANSLATION = 100.0
# Within so much of half a pixel, single precision decides which pixel is nearest.
_NEAR_A_TIE = 0.01
_BELOW_HALF = 0.49999997


def operate(
    name: str, image: tf.Tensor, magnitude: float, sign: tf.Tensor | float = 1.0, centre: tf.Tensor | None = None
) -> tf.Tensor:
    """Do one operation to one image.

    Args:
        name: One of `OPERATIONS`.
        image: uint8 of shape (H, W, 3).
        magnitude: Its strength, 0 to 30. 10 stands for a rotation by 30 degrees, a shear of 0.3, a
            translation of 100 pixels, a Cutout square of 80 pixels, 4 bits kept by Posterize,
            110 added by SolarizeAdd, and a blend of 1.9 in Color, Contrast, Brightness and
            Sharpness (1, at magnitude 5, is the image itself). AutoContrast, Equalize and Invert
            do not use it.
        sign: Scalar float32, 1 or -1: the direction of Rotate, Shear and Translate. The others do not
            use it. Default 1.
        centre: int32 (row, column) of Cutout's centre, which only Cutout needs.

    Returns:
        uint8 of the same shape. Pixels that come from outside the image, and those cut out, are 128.

    Raises:
        ValueError: If there is no operation of that name, or Cutout has no centre.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data.image_operations import operate
        >>> int(operate("Invert", tf.fill((2, 2, 3), tf.constant(5, tf.uint8)), 10.0)[0, 0, 0])
        250
    """
    if name not in OPERATIONS:
        raise ValueError(f"name must be one of {', '.join(OPERATIONS)}, got {name!r}")
    share = magnitude / _FULL
    blend = share * 1.8 + 0.1
    if name == "AutoContrast":
        return _autocontrast(image)
    if name == "Equalize":
        return _equalize(image)
    if name == "Invert":
        return 255 - image
    if name == "Posterize":
        return _posterize(image, int(share * 4))
    if name == "Solarize":
        return _solarize(image, int(share * 256))
    if name == "SolarizeAdd":
        return _solarize_add(image, int(share * 110))
    if name == "Color":
        return _color(image, blend)
    if name == "Contrast":
        return _contrast(image, blend)
    if name == "Brightness":
        return _blend(0.0, image, blend)
    if name == "Sharpness":
        return _sharpness(image, blend)
    if name == "Cutout":
        if centre is None:
            raise ValueError("Cutout needs the centre of its square; give centre=(row, column)")
        return _cutout(image, int(share * 40), centre)
    if name == "Rotate":
        return _rotate(image, share * sign)
    return _move(name, image, share, sign)


def _blend(start: tf.Tensor | float, image: tf.Tensor, factor: float) -> tf.Tensor:
    """Go from `start` towards the image, or past it; fractions of a level are cut off."""
    tf = tensorflow()
    if factor == 1.0:
        return image
    mixed = start + factor * (tf.cast(image, tf.float32) - start)
    return tf.cast(tf.clip_by_value(mixed, 0.0, 255.0), tf.uint8)


def _color(image: tf.Tensor, factor: float) -> tf.Tensor:
    tf = tensorflow()
    return _blend(tf.cast(tf.image.rgb_to_grayscale(image), tf.float32), image, factor)


def _contrast(image: tf.Tensor, factor: float) -> tf.Tensor:
    tf = tensorflow()
    pixels = tf.cast(tf.reduce_prod(tf.shape(image)[:2]), tf.float32)
    return _blend(tf.floor(tf.minimum(pixels / 256.0, 255.0)), image, factor)


def _sharpness(image: tf.Tensor, factor: float) -> tf.Tensor:
    """Blend with the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, whose border is not smoothed."""
    tf = tensorflow()
    if factor == 1.0:
        return image
    kernel = tf.constant([[1, 1, 1], [1, 5, 1], [1, 1, 1]], tf.float32)[:, :, None, None] / 13.0
    real = tf.cast(image, tf.float32)[None]
    # Sums in integers would be exact, but then the truncation falls elsewhere than the authors'.
    smooth = tf.nn.depthwise_conv2d(real, tf.tile(kernel, [1, 1, 3, 1]), [1, 1, 1, 1], "SAME")[0]
    sharp = _blend(tf.floor(smooth), image, factor)
    middle = tf.concat([image[1:-1, :1], sharp[1:-1, 1:-1], image[1:-1, 1:][:, -1:]], axis=1)
    return tf.ensure_shape(tf.concat([image[:1], middle, image[1:][-1:]], axis=0), image.shape)


def _posterize(image: tf.Tensor, bits: int) -> tf.Tensor:
    tf = tensorflow()
    bits = min(max(bits, 1), 8)
    return tf.bitwise.bitwise_and(image, tf.constant(256 - 2 ** (8 - bits), tf.uint8))


def _solarize(image: tf.Tensor, threshold: int) -> tf.Tensor:
    tf = tensorflow()
    threshold %= 256
    if threshold == 0:
        return 255 - image
    if threshold == 128:
        return tf.minimum(image, 255 - image)
    # A byte of ones inverts, and costs a tenth of tf.where on bytes.
    return tf.bitwise.bitwise_xor(image, 255 * tf.cast(image >= tf.constant(threshold, tf.uint8), tf.uint8))


def _solarize_add(image: tf.Tensor, addition: int) -> tf.Tensor:
    tf = tensorflow()
    most = 255 - min(addition, 255)
    dark = tf.cast(image < 128, tf.uint8)
    # What is added, up to 255 in all; the levels below 128 all have room for up to 127.
    added = min(addition, 255) if most >= 127 else 255 - tf.maximum(image, tf.constant(most, tf.uint8))
    return image + dark * added


def _autocontrast(image: tf.Tensor) -> tf.Tensor:
    """Stretch each channel to 0..255; a channel of one level stays."""
    tf = tensorflow()
    lines = _lines(image)
    low, high = (tf.cast(_of_channels(image, over), tf.float32) for over in (tf.reduce_min, tf.reduce_max))
    flat = high <= low
    scale = tf.where(flat, 1.0, 255.0 / tf.where(flat, 1.0, high - low))
    offset = tf.where(flat, 0.0, -low * scale)
    columns = tf.shape(image)[1:2]
    stretched = tf.cast(lines, tf.float32) * tf.tile(scale, columns) + tf.tile(offset, columns)
    return tf.reshape(tf.cast(tf.clip_by_value(stretched, 0.0, 255.0), tf.uint8), tf.shape(image))


def _equalize(image: tf.Tensor) -> tf.Tensor:
    """Spread the levels of each channel evenly, by a table made from its histogram."""
    tf = tensorflow()
    places = tf.cast(_lines(image), tf.int32) + tf.tile(tf.constant([0, 256, 512]), tf.shape(image)[1:2])
    counts = tf.raw_ops.Bincount(arr=tf.reshape(places, [-1]), size=768, weights=tf.zeros([0], tf.int32))
    counts = tf.reshape(counts, [3, 256])
    highest = tf.cast(_of_channels(image, tf.reduce_max), tf.int32)
    step = (tf.reduce_sum(counts, axis=1) - tf.gather(counts, highest, batch_dims=1))[:, None] // 255
    table = (tf.cumsum(counts, axis=1, exclusive=True) + step // 2) // tf.maximum(step, 1)
    # The lowest entry is 0 even where half a step would round up.
    table = tf.concat([tf.zeros([3, 1], tf.int32), tf.clip_by_value(table[:, 1:], 0, 255)], axis=1)
    table = tf.where(step == 0, tf.range(256)[None], table)
    equal = tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), places)
    return tf.reshape(equal, tf.shape(image))


def _cutout(image: tf.Tensor, reach: int, centre: tf.Tensor) -> tf.Tensor:
    """Fill the square of 2 * reach pixels around the centre; what is outside the image is lost."""
    tf = tensorflow()
    size = tf.shape(image)[:2]
    start, stop = tf.clip_by_value(centre - reach, 0, size), tf.clip_by_value(centre + reach, 0, size)
    band = image[start[0] : stop[0]]
    square = _grey(tf.concat([stop - start, [3]], axis=0))
    band = tf.concat([band[:, : start[1]], square, band[:, stop[1] :]], axis=1)
    return tf.ensure_shape(tf.concat([image[: start[0]], band, image[stop[0] :]], axis=0), image.shape)


def _lines(image: tf.Tensor) -> tf.Tensor:
    """Make (H, 3 W) of (H, W, 3): what is done with a row of 3 W values is much faster than with one of 3."""
    tf = tensorflow()
    return tf.reshape(image, [tf.shape(image)[0], -1])


def _of_channels(image: tf.Tensor, over: Callable[..., tf.Tensor]) -> tf.Tensor:
    """Reduce to one value a channel, by columns first."""
    return over(tensorflow().reshape(over(_lines(image), axis=0), [-1, 3]), axis=0)


def _grey(shape: tf.Tensor) -> tf.Tensor:
    tf = tensorflow()
    return tf.fill(shape, tf.constant(_GREY, tf.uint8))


def _translate(image: tf.Tensor, axis: int, pixels: int, sign: tf.Tensor | float) -> tf.Tensor:
    """Move by whole pixels: a cut and a strip of grey."""
    tf = tensorflow()
    shape = tf.unstack(tf.shape(image))
    whole, rest = tf.minimum(pixels, shape[axis]), shape[axis] - tf.minimum(pixels, shape[axis])
    shape[axis] = whole
    strip = _grey(tf.stack(shape))
    moved = tf.cond(
        tf.convert_to_tensor(sign, tf.float32) > 0.0,
        lambda: tf.concat([tf.split(image, [whole, rest], axis)[1], strip], axis),
        lambda: tf.concat([strip, tf.split(image, [rest, whole], axis)[0]], axis),
    )
    return tf.ensure_shape(moved, image.shape)


def _move(name: str, image: tf.Tensor, magnitude: float, sign: tf.Tensor | float) -> tf.Tensor:
    """Shear or translate; the value is that of the nearest pixel."""
    tf = tensorflow()
    pixels = magnitude * _FULL_TRANSLATION
    if name.startswith("Translate") and abs(pixels % 1.0 - 0.5) > _NEAR_A_TIE:
        return _translate(image, 1 if name == "TranslateX" else 0, round(pixels), sign)
    size = tf.shape(image)
    y = tf.cast(tf.range(size[0]), tf.float32)[:, None]
    x = tf.cast(tf.range(size[1]), tf.float32)[None, :]
    share = tf.convert_to_tensor(magnitude * sign, tf.float32)
    if name == "ShearX":
        x = x + share * 0.3 * y
    elif name == "ShearY":
        y = share * 0.3 * x + y
    elif name == "TranslateX":
        x = x + share * _FULL_TRANSLATION
    else:
        y = y + share * _FULL_TRANSLATION
    return _taken(image, y, x)


def _rotate(image: tf.Tensor, share: tf.Tensor | float) -> tf.Tensor:
    """Rotate about the centre; the value is that of the nearest pixel."""
    tf = tensorflow()
    zero = tf.constant(0.0)
    angle = tf.convert_to_tensor(share, tf.float32) * 30.0 * (math.pi / 180.0)
    cos, sin = tf.cos(angle), tf.sin(angle)
    last = tf.cast(tf.shape(image)[:2], tf.float32) - 1.0
    right = (last[1] - (cos * last[1] - sin * last[0])) / 2.0
    down = (last[0] - (sin * last[1] + cos * last[0])) / 2.0
    moved = tf.raw_ops.ImageProjectiveTransformV3(
        images=image[None],
        transforms=tf.stack([cos, -sin, right, sin, cos, down, zero, zero])[None],
        output_shape=tf.shape(image)[:2],
        fill_value=float(_GREY),
        interpolation="NEAREST",
        fill_mode="CONSTANT",
    )[0]
    return tf.ensure_shape(moved, image.shape)


def _taken(image: tf.Tensor, y: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
    """Take the nearest pixels to places of shapes that broadcast to (H, W); outside is a frame of grey."""
    tf = tensorflow()
    size = tf.shape(image)
    sides = _grey(tf.stack([size[0], 1, 3]))
    ends = _grey(tf.stack([1, size[1] + 2, 3]))
    framed = tf.concat([ends, tf.concat([sides, image, sides], axis=1), ends], axis=0)

    def number(places: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        inside = tf.clip_by_value(places, -1.0, tf.cast(count, tf.float32))
        # Halves go up, and the number next to one half does not.
        return tf.cast(tf.floor(inside + _BELOW_HALF), tf.int32) + 1

    places = number(y, size[0]) * (size[1] + 2) + number(x, size[1])
    return tf.ensure_shape(tf.gather(tf.reshape(framed, [-1, 3]), places), image.shape)
