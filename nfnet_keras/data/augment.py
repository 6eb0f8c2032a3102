"""What is done to training images at random; of it, crops, shifts and flips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nfnet_keras.data._tensorflow import tensorflow
from nfnet_keras.data.randomness import fold, uniform

if TYPE_CHECKING:
    import tensorflow as tf

_RATIOS = (3.0 / 4.0, 4.0 / 3.0)
_LEAST_OF_ALL = 0.1
_ATTEMPTS = 10
_MARGIN = 32
_TOP_MAGNITUDE = 30.0


@dataclass(frozen=True)
class Augment:
    """What is done to training images at random: crop, shift, flip, MixUp and CutMix, RandAugment.

    MixUp and CutMix follow Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018) and
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable
    Features" (2019). Where both are on, half of each batch gets the one and half the other, as
    in Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization"
    (2021). RandAugment is that of Cubuk et al. (2020) as that paper's program has it; the recipe of
    NFNet-F0 is `Augment(min_area=0.08, mixup=0.2, cutmix=1.0, mix_from_twice=True,
    randaugment_layers=4, randaugment_magnitude=5)`.

    Args:
        flip: Mirror every second image, on average, left to right. Default True.
        min_area: Share of the image's area that the smallest random crop keeps, above 0;
            1.0 turns crops off. Crops have an aspect ratio of 3/4..4/3. No crop keeps less than
            a tenth, as in the paper, whose value is 0.08; see `distorted_box`. Default 0.25.
        shift: Largest random translation as a share of the side, at least 0 and below 1; in
            whole pixels, after the crop, with the border reflected. Default 0.0, none.
        mixup: The alpha of MixUp's Beta(alpha, alpha). Default 0.0, off.
        cutmix: The alpha of CutMix's Beta(alpha, alpha). Default 0.0, off.
        randaugment_layers: RandAugment's operations an image. Default 0, off.
        randaugment_magnitude: RandAugment's strength, 0 to 30; see `image_operations.operate`. Not
            used without layers. Default 0.0, which is not mild: some operations are strongest there.
        mix_from_twice: Mix pairs of 2 B samples into a batch of B, as the paper does. Default False:
            the B samples are their own partners.

    Raises:
        ValueError: If a value is out of its range, or pairs are asked for and nothing mixes them.

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
    randaugment_layers: int = 0
    randaugment_magnitude: float = 0.0
    mix_from_twice: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("flip", "mix_from_twice"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        layers = self.randaugment_layers
        if isinstance(layers, bool) or not isinstance(layers, int) or layers < 0:
            raise ValueError(f"randaugment_layers must be a whole number, 0 (off) or more, got {layers!r}")
        magnitudes = f"at least 0 and at most {_TOP_MAGNITUDE:g}"
        for name, good, wanted in (
            ("min_area", lambda v: 0.0 < v <= 1.0, "above 0 and at most 1"),
            ("shift", lambda v: 0.0 <= v < 1.0, "at least 0 and below 1"),
            ("mixup", lambda v: 0.0 <= v < math.inf, "0 (off) or a positive number"),
            ("cutmix", lambda v: 0.0 <= v < math.inf, "0 (off) or a positive number"),
            ("randaugment_magnitude", lambda v: 0.0 <= v <= _TOP_MAGNITUDE, magnitudes),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not good(value):
                raise ValueError(f"{name} must be {wanted}, got {value!r}")
        if self.mix_from_twice and not (self.mixup or self.cutmix):
            raise ValueError(
                "mix_from_twice must be False where mixup and cutmix are both 0: twice the images would be read "
                "and nothing mixed; set mixup or cutmix above 0, or mix_from_twice=False"
            )


def distorted_box(
    key: tf.Tensor, height: tf.Tensor | int, width: tf.Tensor | int, min_area: float, image_size: int = 224
) -> tf.Tensor:
    """Draw the box of a random crop, as Brock et al. (2021) do, after Szegedy et al. (2015).

    The box is a distorted bounding box: its aspect ratio is uniform in 3/4..4/3, its height is
    uniform among those that keep at least `min_area` of the image, and its place is uniform. Ten
    attempts are made to find one that lies in the image and keeps at least a tenth of it. Where
    all fail, as they do in an image longer than any allowed ratio and area, and where the box is
    the whole image, the box is the central square that evaluation sees: image_size of
    image_size + 32 parts of the shorter side.

    Args:
        key: An int64 key of shape (2,).
        height: Scalar int32, height of the image in pixels.
        width: Scalar int32, its width.
        min_area: Smallest share of the image's area, above 0; 1.0 asks for the whole image, which
            is given then, whatever its shape.
        image_size: Side in pixels of what the crop is resized to; of use in the last resort only.
            Default 224.

    Returns:
        int32 of shape (4,): top, left, height and width in pixels; at least one pixel.

    Example:
        >>> from nfnet_keras.data import augment, randomness
        >>> augment.distorted_box(randomness.key(0, 1, 0), 1, 500, 0.08).numpy().tolist()
        [0, 250, 1, 1]
    """
    tf = tensorflow()
    size = tf.stack([height, width])
    if min_area >= 1.0:
        return tf.concat([tf.zeros_like(size), size], axis=0)
    start, extent, _ = tf.image.stateless_sample_distorted_bounding_box(
        tf.concat([size, [3]], axis=0),
        tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
        seed=key,
        min_object_covered=_LEAST_OF_ALL,
        aspect_ratio_range=_RATIOS,
        area_range=(min_area, 1.0),
        max_attempts=_ATTEMPTS,
        use_image_if_no_bounding_boxes=True,
    )
    shorter = tf.cast(tf.reduce_min(size), tf.float32)
    side = tf.maximum(tf.cast(shorter / (image_size + _MARGIN) * image_size, tf.int32), 1)
    centre = tf.concat([(size - side + 1) // 2, [side, side]], axis=0)
    drawn = tf.concat([start[:2], extent[:2]], axis=0)
    return tf.where(tf.reduce_all(extent[:2] == size), centre, drawn)


def crop_batch(images: tf.Tensor, key: tf.Tensor, min_area: float) -> tf.Tensor:
    """Cut a random box out of each image and bring it back to full size, bilinearly.

    This is for images in memory, which are small: all boxes are sampled in one operation, which
    has no bicubic kernel. Files are cropped one by one and resized bicubically.

    Args:
        images: float32 of shape (B, S, S, 3).
        key: An int64 key of shape (2,).
        min_area: Smallest share of the image's area; see `distorted_box`.

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
    boxes = tf.map_fn(
        lambda number: distorted_box(fold(key, number), side, side, min_area),
        tf.range(count),
        fn_output_signature=tf.TensorSpec([4], tf.int32),
    )
    boxes = tf.cast(boxes, tf.float32)
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
    chosen = flips(key, images.shape[0])[:, None, None, None]
    return tf.where(chosen, tf.reverse(images, [2]), images)


def flips(key: tf.Tensor, count: int) -> tf.Tensor:
    """Draw which images `flip_batch` mirrors.

    Args:
        key: An int64 key of shape (2,).
        count: How many images.

    Returns:
        Booleans of shape (count,).

    Example:
        >>> from nfnet_keras.data import augment, randomness
        >>> augment.flips(randomness.key(0, 3, 0), 4).shape
        TensorShape([4])
    """
    return uniform(key, [count]) < 0.5


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
