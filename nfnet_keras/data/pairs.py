"""Training batches out of encoded images, made image by image: no batch of decoded images is ever kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nfnet_keras.data import randomness
from nfnet_keras.data._tensorflow import python_call, tensorflow
from nfnet_keras.data.augment import Augment, flips
from nfnet_keras.data.broken import BrokenImages
from nfnet_keras.data.decoding import Repair
from nfnet_keras.data.images import normalize
from nfnet_keras.data.mixing import blend, pairs_of_neighbours, pairs_of_twice, paste
from nfnet_keras.data.randaugment import distort, key_in_batch

if TYPE_CHECKING:
    import tensorflow as tf

    from nfnet_keras.data.streams import PathStream, Plan, RecordStream


def by_image(augment: Augment, image_size: int) -> bool:
    """Tell whether each image of a batch can be made by itself.

    It can where it is made of samples that no other image needs, and nothing is drawn that is done to a whole batch.

    Example:
        >>> from nfnet_keras.data import Augment
        >>> from nfnet_keras.data.pairs import by_image
        >>> by_image(Augment(mixup=0.2), 192), by_image(Augment(mixup=0.2, mix_from_twice=True), 192)
        (False, True)
    """
    mixed = bool(augment.mixup or augment.cutmix)
    return (augment.mix_from_twice or not mixed) and not int(augment.shift * image_size)


def by_neighbours(augment: Augment, image_size: int) -> bool:
    """Tell whether each image of a batch can be made of two that are decoded, by itself.

    Example:
        >>> from nfnet_keras.data import Augment
        >>> from nfnet_keras.data.pairs import by_neighbours
        >>> by_neighbours(Augment(mixup=0.2), 192), by_neighbours(Augment(mixup=0.2, mix_from_twice=True), 192)
        (True, False)
    """
    return not by_image(augment, image_size) and not int(augment.shift * image_size)


def image_batches(
    batches: tf.data.Dataset,
    stream: PathStream | RecordStream,
    picture: Callable[..., tf.Tensor],
    plan: Plan,
    image_size: int,
    classes: int,
    augment: Augment,
    ledger: BrokenImages | None,
) -> tf.data.Dataset:
    """Make batches, each image from its bytes to what the network gets, in one go.

    What comes out is, bit for bit, what decoding a batch, flipping, mixing, distorting and normalising it one
    after the other gives; but of a batch only the result is in memory, and an image stays in the processor's
    cache on its way. An image that is to be made of a broken one is left out at first, and made of the next
    good one of the batch when all others are there; see `decoding.decoded_batches`.

    Args:
        batches: Of (epoch, step, tokens): two scalars, and what `stream` finds the samples by.
        stream: Where the samples are.
        picture: Makes a sample of shape (image_size, image_size, 3), float32, of (content, epoch, step,
            number in the batch).
        plan: Which samples the steps take.
        image_size: Side of the images in pixels.
        classes: Number of classes.
        augment: What is done at random, such that `by_image` holds.
        ledger: Where broken images are written down; see `decoding.decoded_batches`.

    Returns:
        A data set of normalised images (B, image_size, image_size, 3) and labels (B, classes), float32.
    """
    tf = tensorflow()
    count, per = plan.batch // plan.shards, plan.passes
    shape = (image_size, image_size, 3)
    repair = Repair(stream, classes, ledger)
    empty = (tf.zeros([0, *shape]), tf.zeros([0, per], tf.int64), tf.zeros([0], tf.int64))

    def one(epoch: tf.Tensor, step: tf.Tensor, tokens: Any) -> tf.data.Dataset:
        draws = _drawn(plan, augment, image_size, epoch, step)
        flat = tf.nest.flatten(tokens)

        def sample(place: tf.Tensor, number: tf.Tensor) -> tuple:
            content, label = stream.load(tf.nest.map_structure(lambda column: column[number], tokens))
            image = tf.ensure_shape(picture(content, epoch, step, number), shape)
            return draws.flipped(image, place), tf.cast(label, tf.int64)

        def make(number: tf.Tensor, rows: tf.Tensor | None = None) -> tuple:
            places = draws.places[number]
            samples = [sample(place, place if rows is None else rows[place]) for place in tf.unstack(places, per)]
            images, labels = zip(*samples, strict=True)
            image = draws.finished(draws.mixed(images, number), number)
            return tf.ensure_shape(image, shape), tf.stack(labels), number

        def whole(images: tf.Tensor, labels: tf.Tensor, numbers: tf.Tensor) -> tuple:
            def mend() -> tuple:
                arguments = [numbers, labels, draws.places, epoch, step, *flat]
                rows = python_call(lambda *given: repair.samples(picture, *given), arguments, tf.int64, (None,))
                made = tf.scatter_nd(numbers[:, None], tf.ones_like(numbers), [count])
                missing = tf.where(made == 0)[:, 0]
                spec = tuple(tf.TensorSpec(value.shape[1:], value.dtype) for value in empty)
                late = tf.map_fn(lambda number: make(number, rows), missing, fn_output_signature=spec)
                order = tf.argsort(tf.concat([numbers, missing], axis=0))
                return tuple(
                    tf.gather(tf.concat(both, axis=0), order) for both in ((images, late[0]), (labels, late[1]))
                )

            good = tf.reduce_all((labels >= 0) & (labels < classes)) & (tf.size(numbers) == count)
            images, labels = tf.cond(good, lambda: (images, labels), mend)
            labels = tf.one_hot(tf.ensure_shape(labels, (count, per)), classes, dtype=tf.float32)
            return tf.ensure_shape(images, (count, *shape)), draws.mixed_labels(labels)

        # Without a good image there would be no batch at all: an empty one takes its place.
        made = tf.data.Dataset.range(count).map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        found = made.ignore_errors().batch(count).concatenate(tf.data.Dataset.from_tensors(empty))
        return found.take(1).map(whole)

    # Two at a time: while the last images of one batch are made, the next has begun.
    return batches.interleave(one, cycle_length=2, block_length=1, num_parallel_calls=2, deterministic=True)


def neighbour_batches(
    samples: tf.data.Dataset, plan: Plan, image_size: int, classes: int, augment: Augment
) -> tf.data.Dataset:
    """Flip, mix, distort and normalise batches in which each image is mixed with the one before it.

    What comes out is, bit for bit, what doing so a batch at a time gives; but an image stays in the processor's cache
    on its way, where a batch goes through memory a dozen times.

    Args:
        samples: Of images (B, image_size, image_size, 3), float32, class numbers (B,), epoch and step.
        plan: Which samples the steps take.
        image_size: Side of the images in pixels.
        classes: Number of classes.
        augment: What is done at random: a mixture, and not from twice the images.

    Returns:
        A data set of normalised images (B, image_size, image_size, 3) and labels (B, classes), float32.
    """
    tf = tensorflow()
    shape = (image_size, image_size, 3)

    def one(images: tf.Tensor, numbers: tf.Tensor, epoch: tf.Tensor, step: tf.Tensor) -> tf.data.Dataset:
        draws = _drawn(plan, augment, image_size, epoch, step)
        images = tf.ensure_shape(images, (plan.own, *shape))
        numbers = tf.ensure_shape(numbers, (plan.own,))
        labels = draws.mixed_labels(tf.one_hot(tf.gather(numbers, draws.places), classes, dtype=tf.float32))

        def make(number: tf.Tensor) -> tf.Tensor:
            pair = tuple(draws.flipped(images[place], place) for place in tf.unstack(draws.places[number]))
            return tf.ensure_shape(draws.finished(draws.mixed(pair, number), number), shape)

        made = tf.data.Dataset.range(plan.own).map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return made.batch(plan.own, drop_remainder=True).map(lambda images: (images, labels))

    return samples.interleave(one, cycle_length=2, block_length=1, num_parallel_calls=2, deterministic=True)


@dataclass
class _Draws:
    """What was drawn for a step.

    Args:
        augment: What is done.
        places: For each image the places of the samples that it is made of, int64 (B, 1 or 2).
        flips: For each sample, whether it is mirrored; `None`: no.
        kept: For each image the share of its first sample, or `None` where there is one only.
        boxes: For the images of CutMix int32 (start, stop) of (row, column), (C, 2, 2), or `None`.
        key: The key of RandAugment.
    """

    augment: Augment
    places: tf.Tensor
    flips: tf.Tensor | None
    kept: tf.Tensor | None
    boxes: tf.Tensor | None
    key: tf.Tensor

    def flipped(self, image: tf.Tensor, place: tf.Tensor) -> tf.Tensor:
        if self.flips is None:
            return image
        tf = tensorflow()
        return tf.cond(self.flips[place], lambda: tf.reverse(image, [1]), lambda: image)

    def mixed(self, images: tuple, number: tf.Tensor) -> tf.Tensor:
        if self.kept is None:
            return images[0]
        blended = self.places.shape[0] - (0 if self.boxes is None else self.boxes.shape[0])

        def up() -> tf.Tensor:
            return blend(*images, self.kept[number])

        def cut() -> tf.Tensor:
            return paste(*images, self.boxes[number - blended])

        if 0 < blended < self.places.shape[0]:
            return tensorflow().cond(number < blended, up, cut)
        return up() if blended else cut()

    def mixed_labels(self, labels: tf.Tensor) -> tf.Tensor:
        """Make (B, classes) of (B, 1 or 2, classes)."""
        return labels[:, 0] if self.kept is None else blend(labels[:, 0], labels[:, 1], self.kept[:, None])

    def finished(self, image: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        tf = tensorflow()
        if self.augment.randaugment_layers:
            image = tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)
            key = key_in_batch(self.key, number)
            image = distort(image, key, self.augment.randaugment_layers, self.augment.randaugment_magnitude)
        return normalize(image)


def _drawn(plan: Plan, augment: Augment, image_size: int, epoch: tf.Tensor, step: tf.Tensor) -> _Draws:
    tf = tensorflow()
    count = plan.batch // plan.shards
    mirrored = flips(plan.key(randomness.FLIP, epoch, step), plan.own) if augment.flip else None
    key = plan.key(randomness.RANDAUGMENT, epoch, step)
    if not augment.mixup and not augment.cutmix:
        return _Draws(augment, tf.range(count, dtype=tf.int64)[:, None], mirrored, None, None, key)
    pairs = pairs_of_twice if augment.mix_from_twice else pairs_of_neighbours
    places, kept, boxes = pairs(plan.key(randomness.MIX, epoch, step), count, image_size, augment)
    return _Draws(augment, places, mirrored, kept, boxes, key)
