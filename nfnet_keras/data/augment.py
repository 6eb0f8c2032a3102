"""Random crops, shifts and flips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nfnet_keras.data._tensorflow import tensorflow
from nfnet_keras.data.randomness import uniform

if TYPE_CHECKING:
    import tensorflow as tf

_MAX_RATIO = 4.0 / 3.0


@dataclass(frozen=True)
class Augment:
    """What is done to training images at random: crop, shift, flip, then MixUp and CutMix.

    MixUp and CutMix follow Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018) and
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features" (2019). Where both are on, half of each batch gets the one and half the other, as
    in Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization"
    (2021).

    Args:
        flip: Mirror every second image, on average, left to right. Default True.
        min_area: Share of the image's area that the smallest random crop keeps, above 0;
            1.0 turns crops off. Crops have an aspect ratio of 3/4..4/3. Default 0.25.
        shift: Largest random translation as a share of the side, at least 0 and below 1; in
            whole pixels, after the crop, with the border reflected. Default 0.0, none.
        mixup: The alpha of MixUp's Beta(alpha, alpha). Default 0.0, off.
        cutmix: The alpha of CutMix's Beta(alpha, alpha). Default 0.0, off.

    Raises:
        ValueError: If a value is out of its range.

    Example:
        >>> from nfnet_keras.data import Augment
        >>> Augment(mixup=0.2, cutmix=1.0).min_area
        0.25
    """

    flip: bool = True
    min_area: float = 0.25
    shift: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not isinstance(self.flip, bool):
            raise ValueError(f"flip must be True or False, got {self.flip!r}")
        for name, good, wanted in (
            ("min_area", lambda v: 0.0 < v <= 1.0, "above 0 and at most 1"),
            ("shift", lambda v: 0.0 <= v < 1.0, "at least 0 and below 1"),
            ("mixup", lambda v: 0.0 <= v < math.inf, "0 (off) or a positive number"),
            ("cutmix", lambda v: 0.0 <= v < math.inf, "0 (off) or a positive number"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")


def random_boxes(key: tf.Tensor, heights: tf.Tensor, widths: tf.Tensor, min_area: float) -> tf.Tensor:
    """Draw one crop box an image.

    The area is uniform between `min_area` and the largest that a box of allowed aspect ratio
    can have in the image; the logarithm of the ratio is uniform over what fits then. So no draw
    is ever rejected. An image too long for both limits gets its largest box.

    Args:
        key: An int64 key of shape (2,).
        heights: float32 of shape (B,), in pixels.
        widths: float32 of shape (B,), in pixels.
        min_area: Smallest share of the image's area.

    Returns:
        float32 of shape (B, 4): top, left, height and width in pixels.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import augment, randomness
        >>> side = tf.fill([6], 32.0)
        >>> augment.random_boxes(randomness.key(0, 1, 0), side, side, 0.25).shape
        TensorShape([6, 4])
    """
    tf = tensorflow()
    draws = tf.unstack(uniform(key, [heights.shape[0], 4]), axis=1)
    shape = widths / heights
    largest = tf.minimum(1.0, _MAX_RATIO * tf.minimum(shape, 1.0 / shape))
    smallest = tf.minimum(min_area, largest)
    area = smallest + draws[0] * (largest - smallest)
    low = tf.math.log(tf.maximum(1.0 / _MAX_RATIO, area * shape))
    high = tf.math.log(tf.minimum(_MAX_RATIO, shape / area))
    ratio = tf.exp(low + draws[1] * tf.maximum(high - low, 0.0))
    pixels = area * heights * widths
    height = tf.minimum(heights, tf.sqrt(pixels / ratio))
    width = tf.minimum(widths, tf.sqrt(pixels * ratio))
    top, left = draws[2] * (heights - height), draws[3] * (widths - width)
    return tf.stack([top, left, height, width], axis=1)


def crop_one(image: tf.Tensor, key: tf.Tensor, min_area: float) -> tf.Tensor:
    """Cut a random box out of one image, in whole pixels.

    Args:
        image: Shape (height, width, 3).
        key: An int64 key of shape (2,).
        min_area: Smallest share of the image's area.

    Returns:
        The box, a tensor of the image's type and shape (h, w, 3).

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import augment, randomness
        >>> image = tf.zeros((20, 30, 3), tf.uint8)
        >>> augment.crop_one(image, randomness.key(0, 1, 0), 0.25).shape[-1]
        3
    """
    tf = tensorflow()
    sides = tf.shape(image)[:2]
    real = tf.cast(sides, tf.float32)
    box = random_boxes(key, real[:1], real[1:], min_area)[0]
    size = tf.clip_by_value(tf.cast(tf.round(box[2:]), tf.int32), 1, sides)
    start = tf.minimum(tf.cast(tf.round(box[:2]), tf.int32), sides - size)
    return image[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]


def crop_batch(images: tf.Tensor, key: tf.Tensor, min_area: float) -> tf.Tensor:
    """Cut a random box out of each image and bring it back to full size, bilinearly.

    Args:
        images: float32 of shape (B, S, S, 3).
        key: An int64 key of shape (2,).
        min_area: Smallest share of the image's area.

    Returns:
        float32 of shape (B, S, S, 3).

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import augment, randomness
        >>> images = tf.zeros((2, 8, 8, 3))
        >>> augment.crop_batch(images, randomness.key(0, 1, 0), 0.25).shape
        TensorShape([2, 8, 8, 3])
    """
    tf = tensorflow()
    count, side = images.shape[0], images.shape[1]
    sides = tf.fill([count], float(side))
    boxes = random_boxes(key, sides, sides, min_area)
    scale = boxes[:, 2:] / side
    return _warp(images, scale, boxes[:, :2] + 0.5 * scale - 0.5)


def shift_batch(images: tf.Tensor, key: tf.Tensor, shift: float) -> tf.Tensor:
    """Move each image by a random number of whole pixels, with its border reflected.

    Args:
        images: float32 of shape (B, S, S, 3).
        key: An int64 key of shape (2,).
        shift: Largest translation as a share of the side.

    Returns:
        float32 of shape (B, S, S, 3).

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import augment, randomness
        >>> images = tf.zeros((2, 8, 8, 3))
        >>> augment.shift_batch(images, randomness.key(0, 2, 0), 0.25).shape
        TensorShape([2, 8, 8, 3])
    """
    tf = tensorflow()
    count, side = images.shape[0], images.shape[1]
    most = int(shift * side)
    # floor of a uniform over 2 * most + 1 gives the outermost steps the weight of the others
    steps = tf.floor(uniform(key, [count, 2]) * (2 * most + 1)) - most
    return _warp(images, tf.ones([count, 2]), steps)


def flip_batch(images: tf.Tensor, key: tf.Tensor) -> tf.Tensor:
    """Mirror each image left to right with probability one half.

    Args:
        images: float32 of shape (B, S, S, 3).
        key: An int64 key of shape (2,).

    Returns:
        float32 of shape (B, S, S, 3).

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import augment, randomness
        >>> augment.flip_batch(tf.zeros((2, 8, 8, 3)), randomness.key(0, 3, 0)).shape
        TensorShape([2, 8, 8, 3])
    """
    tf = tensorflow()
    chosen = uniform(key, [images.shape[0], 1, 1, 1]) < 0.5
    return tf.where(chosen, tf.reverse(images, [2]), images)


def _warp(images: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """Sample images at scale * (y, x) + offset; scale and offset have shape (B, 2)."""
    tf = tensorflow()
    none = tf.zeros([images.shape[0]])
    rows = [scale[:, 1], none, offset[:, 1], none, scale[:, 0], offset[:, 0], none, none]
    warped = tf.raw_ops.ImageProjectiveTransformV3(
        images=images,
        transforms=tf.stack(rows, axis=1),
        output_shape=images.shape[1:3],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="REFLECT",
    )
    return tf.ensure_shape(warped, images.shape)
