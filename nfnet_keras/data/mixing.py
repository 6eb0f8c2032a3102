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
    """Mix pairs of samples, as `augment` asks.

    Where both mixtures are on, the first half of the result (rounded down) gets MixUp and the rest
    CutMix. With `mix_from_twice` a batch is made of twice its samples, as Brock et al. (2021) do
    it: no sample is used twice, and of a CutMix pair the first is what stays inside the box (see
    `cutmix_masks`). Without, each sample is mixed with the sample before it; the batch comes in
    random order, so the neighbour is a random partner.

    Args:
        images: float32 of shape (B, S, S, 3), with `mix_from_twice` (2 B, S, S, 3).
        labels: float32 of shape (B, classes) or (2 B, classes), rows that sum to 1.
        augment: Its `mixup`, `cutmix` and `mix_from_twice` are used.
        key: An int64 key of shape (2,).

    Returns:
        Images (B, S, S, 3) and labels (B, classes).

    Raises:
        ValueError: If pairs are to be made of an odd number of samples.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import Augment, mixing, randomness
        >>> images, labels = tf.zeros((4, 8, 8, 3)), tf.eye(4)
        >>> mixing.mix(images, labels, Augment(cutmix=1.0), randomness.key(0, 4, 0))[1].shape
        TensorShape([4, 4])
        >>> halved = Augment(cutmix=1.0, mix_from_twice=True)
        >>> mixing.mix(images, labels, halved, randomness.key(0, 4, 0))[1].shape
        TensorShape([2, 4])
    """
    if not augment.mixup and not augment.cutmix:
        return images, labels
    tf = tensorflow()
    count = images.shape[0]
    if augment.mix_from_twice:
        if count % 2:
            raise ValueError(
                f"mix_from_twice makes pairs of twice the batch: give an even number of samples, got {count}"
            )
        shares, boxes = _drawn(key, count // 2, images.shape[1], augment)
        return mix_pairs(images, labels, shares, _masks(boxes, images.shape[1]))
    half = _half(augment, count)
    own, other = (images, labels), (tf.roll(images, 1, axis=0), tf.roll(labels, 1, axis=0))
    parts = []
    if half:
        first = _rows(own, 0, half), _rows(other, 0, half)
        parts.append(mixup(*first, augment.mixup, fold(key, _MIXUP)))
    if half < count:
        rest = _rows(own, half, count), _rows(other, half, count)
        parts.append(cutmix(*rest, augment.cutmix, fold(key, _CUTMIX)))
    return tuple(tf.concat(tensors, axis=0) for tensors in zip(*parts, strict=True))


def mix_pairs(images: tf.Tensor, labels: tf.Tensor, shares: tf.Tensor, masks: tf.Tensor) -> Pair:
    """Make a batch of twice its samples, with given shares and masks.

    The samples lie in four runs: M samples for MixUp, their M partners, C samples for CutMix, their C
    partners. Labels are mixed by what is kept of the first sample: its share, or the mean of its
    mask.

    Args:
        images: float32 of shape (2 M + 2 C, S, S, 3).
        labels: float32 of shape (2 M + 2 C, classes).
        shares: float32 of shape (M,): what MixUp keeps of the first sample of a pair, 0..1.
        masks: float32 of shape (C, S, S, 1): 1 where CutMix keeps the first, 0 where the partner is.

    Returns:
        Images (M + C, S, S, 3) and labels (M + C, classes), those of MixUp first.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import mixing
        >>> images = tf.reshape(tf.range(4.0), (4, 1, 1, 1)) * tf.ones((4, 2, 2, 3))
        >>> masks = tf.reshape([1.0, 0.0, 0.0, 0.0], (1, 2, 2, 1))
        >>> mixing.mix_pairs(images, tf.eye(4), tf.constant([0.75]), masks)[1].numpy().tolist()
        [[0.75, 0.25, 0.0, 0.0], [0.0, 0.0, 0.25, 0.75]]
    """
    tf = tensorflow()
    runs = [shares.shape[0]] * 2 + [masks.shape[0]] * 2
    blended, partners, inner, outer = tf.split(images, runs)
    up = blend(blended, partners, shares[:, None, None, None])
    cut = blend(inner, outer, masks)
    kept = tf.concat([shares, tf.reduce_mean(masks, axis=[1, 2, 3])], axis=0)[:, None]
    blended, partners, inner, outer = tf.split(labels, runs)
    own, other = tf.concat([blended, inner], axis=0), tf.concat([partners, outer], axis=0)
    return tf.concat([up, cut], axis=0), blend(own, other, kept)


def cutmix_masks(key: tf.Tensor, count: int, side: int, alpha: float) -> tf.Tensor:
    """Draw the boxes of CutMix as Brock et al. (2021) do.

    A box has the side int(side * sqrt(1 - lambda)), made even by cutting, with lambda from
    Beta(alpha, alpha); its centre is a pixel, uniform over the image; what lies outside is cut off.
    The first sample of a pair is inside, so its mean share is below one half; that of the second is
    above, and pairs have no order.

    Args:
        key: An int64 key of shape (2,).
        count: How many masks.
        side: Side of the images in pixels.
        alpha: The parameter of the Beta distribution, above 0; 1, the uniform one, is the paper's.

    Returns:
        float32 of shape (count, side, side, 1): 1 inside the box, 0 outside.

    Example:
        >>> from nfnet_keras.data import mixing, randomness
        >>> mixing.cutmix_masks(randomness.key(0, 4, 0), 3, 8, 1.0).shape
        TensorShape([3, 8, 8, 1])
    """
    return _masks(_boxes(key, count, side, alpha), side)


def pairs_of_twice(key: tf.Tensor, count: int, side: int, augment: Augment) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Draw what `mix` draws with `mix_from_twice`, for images that are made one by one.

    Args:
        key: An int64 key of shape (2,).
        count: Images that come out, B.
        side: Side of the images in pixels.
        augment: Its `mixup` and `cutmix` are used.

    Returns:
        For each image the places of its two samples, int64 (B, 2); the share of the first, float32 (B,); for
        the last C of them, those of CutMix, the boxes int32 (C, 2, 2): start and stop of rows and columns.

    Example:
        >>> from nfnet_keras.data import Augment, mixing, randomness
        >>> augment = Augment(mixup=0.2, cutmix=1.0, mix_from_twice=True)
        >>> mixing.pairs_of_twice(randomness.key(0, 4, 0), 4, 8, augment)[0].numpy().tolist()
        [[0, 2], [1, 3], [4, 6], [5, 7]]
    """
    tf = tensorflow()
    shares, boxes = _drawn(key, count, side, augment)
    blended, cut = shares.shape[0], boxes.shape[0]
    first = tf.concat([tf.range(blended), 2 * blended + tf.range(cut)], axis=0)
    partner = first + tf.concat([tf.fill([blended], blended), tf.fill([cut], cut)], axis=0)
    boxes = tf.clip_by_value(boxes, 0.0, float(side))
    kept = tf.concat([shares, _areas(boxes, side)], axis=0)
    return tf.cast(tf.stack([first, partner], axis=1), tf.int64), kept, tf.cast(boxes, tf.int32)


def pairs_of_neighbours(
    key: tf.Tensor, count: int, side: int, augment: Augment
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Draw what `mix` draws without `mix_from_twice`, for images that are made one by one.

    Args:
        key: An int64 key of shape (2,).
        count: Images that go in and come out, B.
        side: Side of the images in pixels.
        augment: Its `mixup` and `cutmix` are used.

    Returns:
        As of `pairs_of_twice`. Of a CutMix pair the first sample, which is inside the box, is the neighbour.

    Example:
        >>> from nfnet_keras.data import Augment, mixing, randomness
        >>> augment = Augment(mixup=0.2, cutmix=1.0)
        >>> mixing.pairs_of_neighbours(randomness.key(0, 4, 0), 4, 8, augment)[0].numpy().tolist()
        [[0, 3], [1, 0], [1, 2], [2, 3]]
    """
    tf = tensorflow()
    half = _half(augment, count)
    shares = beta(fold(key, _MIXUP), half, augment.mixup) if half else tf.zeros([0])
    boxes = tf.zeros([0, 2, 2])
    if half < count:
        boxes = _cut_boxes(fold(key, _CUTMIX), count - half, side, augment.cutmix)
    own = tf.range(count, dtype=tf.int64)
    neighbour = (own - 1) % count
    blended = tf.stack([own, neighbour], axis=1)[:half]
    places = tf.concat([blended, tf.stack([neighbour, own], axis=1)[half:]], axis=0)
    return places, tf.concat([shares, _areas(boxes, side)], axis=0), tf.cast(boxes, tf.int32)


def blend(own: tf.Tensor, other: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """Go from `other` to `own` by `share`, which is broadcast.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import mixing
        >>> float(mixing.blend(tf.constant(4.0), tf.constant(8.0), tf.constant(0.25)))
        7.0
    """
    return share * own + (1.0 - share) * other


def paste(own: tf.Tensor, other: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """Lay a box of `own` over `other`, by copying.

    Args:
        own: Of shape (S, S, 3).
        other: Of the same shape.
        box: int32 of shape (2, 2): start and stop of rows and columns.

    Returns:
        A tensor of the same shape.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import mixing
        >>> box = tf.constant([[0, 0], [1, 2]])
        >>> mixing.paste(tf.ones((2, 2, 3)), tf.zeros((2, 2, 3)), box)[..., 0].numpy().tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    tf = tensorflow()
    (top, left), (bottom, right) = (tf.unstack(corner) for corner in tf.unstack(box))
    band = [other[top:bottom, :left], own[top:bottom, left:right], other[top:bottom, right:]]
    pasted = tf.concat([other[:top], tf.concat(band, axis=1), other[bottom:]], axis=0)
    return tf.ensure_shape(pasted, own.shape)


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
    images = blend(own[0], other[0], share[:, :, None, None])
    return tf.ensure_shape(images, own[0].shape), blend(own[1], other[1], share)


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
    boxes = _cut_boxes(key, count, side, alpha)
    images = tf.where(_inside(boxes[:, 0], boxes[:, 1], side), other[0], own[0])
    return images, blend(other[1], own[1], _areas(boxes, side)[:, None])


def _cut_boxes(key: tf.Tensor, count: int, side: int, alpha: float) -> tf.Tensor:
    """Draw the boxes of `cutmix`, cut off at the border: (count, 2, 2), start and stop of rows and columns."""
    tf = tensorflow()
    cut = side * tf.sqrt(1.0 - beta(fold(key, 0), count, alpha))[:, None]
    centre = side * uniform(fold(key, 1), [count, 2])
    corners = tf.stack([centre - cut / 2.0, centre + cut / 2.0], axis=1)
    return tf.clip_by_value(tf.round(corners), 0.0, float(side))


def _areas(boxes: tf.Tensor, side: int) -> tf.Tensor:
    """Tell the shares of an image that boxes take, which lie inside of it."""
    return tensorflow().reduce_prod(boxes[:, 1] - boxes[:, 0], axis=1) / float(side * side)


def _half(augment: Augment, count: int) -> int:
    """How many of `count` samples get MixUp; the others get CutMix."""
    if not augment.mixup:
        return 0
    return count // 2 if augment.cutmix else count


def _drawn(key: tf.Tensor, count: int, side: int, augment: Augment) -> Pair:
    """Draw the shares of MixUp and the boxes of CutMix for `count` images of twice the samples."""
    tf = tensorflow()
    half = _half(augment, count)
    shares = beta(fold(key, _MIXUP), half, augment.mixup) if half else tf.zeros([0])
    boxes = tf.zeros([0, 2, 2])
    if half < count:
        boxes = _boxes(fold(key, _CUTMIX), count - half, side, augment.cutmix)
    return shares, boxes


def _boxes(key: tf.Tensor, count: int, side: int, alpha: float) -> tf.Tensor:
    """Draw boxes, not cut off at the border: (count, 2, 2), start and stop of rows and columns."""
    tf = tensorflow()
    reach = tf.floor(side * tf.sqrt(1.0 - beta(fold(key, 0), count, alpha))) // 2.0
    centre = tf.floor(side * uniform(fold(key, 1), [count, 2]))
    return tf.stack([centre - reach[:, None], centre + reach[:, None]], axis=1)


def _masks(boxes: tf.Tensor, side: int) -> tf.Tensor:
    return tensorflow().cast(_inside(boxes[:, 0], boxes[:, 1], side), tensorflow().float32)


def _inside(start: tf.Tensor, stop: tf.Tensor, side: int) -> tf.Tensor:
    """Tell the pixels of boxes: start and stop (B, 2) are rows and columns, the result (B, side, side, 1)."""
    tf = tensorflow()
    places = tf.range(side, dtype=tf.float32)[None, :, None]
    inside = (places >= start[:, None, :]) & (places < stop[:, None, :])
    return inside[:, :, None, 0, None] & inside[:, None, :, 1, None]


def _rows(pair: Pair, start: int, stop: int) -> Pair:
    return pair[0][start:stop], pair[1][start:stop]
