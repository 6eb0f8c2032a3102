"""MixUp and CutMix: training images and labels made of two samples each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nfnet_keras.data._tensorflow import tensorflow
from nfnet_keras.data.augment import Augment
from nfnet_keras.data.randomness import beta, fold, uniform

if TYPE_CHECKING:
    import tensorflow as tf

    Pair = tuple[tf.Tensor, tf.Tensor]

_MIXUP, _CUTMIX = range(2)


def mix(images: tf.Tensor, labels: tf.Tensor, augment: Augment, key: tf.Tensor) -> Pair:
    """Mix each sample of a batch with the sample before it, as `augment` asks.

    The batch comes in random order, so the neighbour is a random partner. Where both mixtures
    are on, the first half of the batch (rounded down) gets MixUp and the rest CutMix.

    Args:
        images: float32 of shape (B, S, S, 3).
        labels: float32 of shape (B, classes), rows that sum to 1.
        augment: Its `mixup` and `cutmix` are used.
        key: An int64 key of shape (2,).

    Returns:
        Images and labels of the same shapes.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import Augment, mixing, randomness
        >>> images, labels = tf.zeros((4, 8, 8, 3)), tf.eye(4)
        >>> mixing.mix(images, labels, Augment(cutmix=1.0), randomness.key(0, 4, 0))[1].shape
        TensorShape([4, 4])
    """
    if not augment.mixup and not augment.cutmix:
        return images, labels
    tf = tensorflow()
    count = images.shape[0]
    half = count // 2 if augment.cutmix else count
    half = half if augment.mixup else 0
    own, other = (images, labels), (tf.roll(images, 1, axis=0), tf.roll(labels, 1, axis=0))
    parts = []
    if half:
        first = _rows(own, 0, half), _rows(other, 0, half)
        parts.append(mixup(*first, augment.mixup, fold(key, _MIXUP)))
    if half < count:
        rest = _rows(own, half, count), _rows(other, half, count)
        parts.append(cutmix(*rest, augment.cutmix, fold(key, _CUTMIX)))
    return tuple(tf.concat(tensors, axis=0) for tensors in zip(*parts, strict=True))


def mixup(own: Pair, other: Pair, alpha: float, key: tf.Tensor) -> Pair:
    """Blend samples with their partners, one share a sample (Zhang et al., 2018).

    Args:
        own: Images (B, S, S, 3) and labels (B, classes), float32.
        other: Their partners, of the same shapes.
        alpha: The share kept of a sample is drawn from Beta(alpha, alpha).
        key: An int64 key of shape (2,).

    Returns:
        Blended images and labels.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import mixing, randomness
        >>> own, other = (tf.zeros((2, 8, 8, 3)), tf.eye(2)), (tf.ones((2, 8, 8, 3)), tf.eye(2))
        >>> mixing.mixup(own, other, 0.2, randomness.key(0, 4, 0))[0].shape
        TensorShape([2, 8, 8, 3])
    """
    tf = tensorflow()
    share = beta(key, own[0].shape[0], alpha)[:, None]
    pixel_share = share[:, :, None, None]
    images = pixel_share * own[0] + (1.0 - pixel_share) * other[0]
    return tf.ensure_shape(images, own[0].shape), share * own[1] + (1.0 - share) * other[1]


def cutmix(own: Pair, other: Pair, alpha: float, key: tf.Tensor) -> Pair:
    """Paste a box of the partner into each sample (Yun et al., 2019).

    The box has the image's proportions and the share 1 - lambda of its area, with lambda from
    Beta(alpha, alpha); its centre is uniform over the image, and what lies outside is cut off.
    The labels are mixed by the pixels that were truly pasted.

    Args:
        own: Images (B, S, S, 3) and labels (B, classes), float32.
        other: Their partners, of the same shapes.
        alpha: The parameter of the Beta distribution.
        key: An int64 key of shape (2,).

    Returns:
        Images and labels of the same shapes.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import mixing, randomness
        >>> own, other = (tf.zeros((2, 8, 8, 3)), tf.eye(2)), (tf.ones((2, 8, 8, 3)), tf.eye(2))
        >>> mixing.cutmix(own, other, 1.0, randomness.key(0, 4, 0))[0].shape
        TensorShape([2, 8, 8, 3])
    """
    tf = tensorflow()
    count, side = own[0].shape[0], own[0].shape[1]
    cut = side * tf.sqrt(1.0 - beta(fold(key, 0), count, alpha))[:, None]
    centre = side * uniform(fold(key, 1), [count, 2])
    start = tf.clip_by_value(tf.round(centre - cut / 2.0), 0.0, float(side))
    stop = tf.clip_by_value(tf.round(centre + cut / 2.0), 0.0, float(side))
    places = tf.range(side, dtype=tf.float32)[None, :, None]
    inside = (places >= start[:, None, :]) & (places < stop[:, None, :])
    box = inside[:, :, None, 0, None] & inside[:, None, :, 1, None]
    share = tf.reduce_prod(stop - start, axis=1, keepdims=True) / float(side * side)
    images = tf.where(box, other[0], own[0])
    return images, (1.0 - share) * own[1] + share * other[1]


def _rows(pair: Pair, start: int, stop: int) -> Pair:
    return pair[0][start:stop], pair[1][start:stop]
