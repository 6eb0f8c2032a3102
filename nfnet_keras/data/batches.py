"""From a split to batches, for training and for evaluation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nfnet_keras.data import randomness
from nfnet_keras.data._tensorflow import tensorflow
from nfnet_keras.data.augment import Augment, crop_batch, flip_batch, shift_batch
from nfnet_keras.data.broken import BrokenImages
from nfnet_keras.data.cache import open_cache
from nfnet_keras.data.crops import crop_content, crop_pixels
from nfnet_keras.data.decoding import decode_crop, decoded_batches, on_host
from nfnet_keras.data.errors import DataError
from nfnet_keras.data.evaluation import Preprocessing
from nfnet_keras.data.images import MEAN_RGB, STDDEV_RGB, normalize, resize, resize_arrays
from nfnet_keras.data.mixing import mix
from nfnet_keras.data.pairs import by_image, by_neighbours, image_batches, neighbour_batches
from nfnet_keras.data.randaugment import AT_ONCE, randaugment
from nfnet_keras.data.records import Records
from nfnet_keras.data.splits import Split, check_labels
from nfnet_keras.data.streams import PathStream, Plan, RecordStream

if TYPE_CHECKING:
    import tensorflow as tf


def steps_per_epoch(split: Split | Records, batch_size: int) -> int:
    """Count the batches of one epoch of `training_batches`.

    Args:
        split: What is trained on.
        batch_size: Images a batch, of all hosts together.

    Returns:
        The number of full batches; 1 where the split is smaller than one.

    Raises:
        DataError: If the split is empty.
        ValueError: If `batch_size` is not positive.

    Example:
        >>> from nfnet_keras.data import digits, steps_per_epoch
        >>> steps_per_epoch(digits().train, 64)
        22
    """
    return len(split) // _batch(split, batch_size)


def training_batches(
    split: Split | Records,
    classes: int,
    image_size: int,
    batch_size: int,
    augment: Augment,
    seed: int,
    first_epoch: int = 0,
    epochs: int | None = None,
    *,
    first_step: int = 0,
    shard: int = 0,
    shards: int = 1,
    ledger: BrokenImages | None = None,
    cache: str | os.PathLike[str] | None = None,
    antialias: bool = True,
) -> tf.data.Dataset:
    """Give shuffled, augmented batches.

    The steps are those of Brock et al. (2021): decode and crop (of a JPEG only the box is decoded), resize
    (bicubic), flip, batch, MixUp and CutMix, RandAugment, normalise. Smoothing the labels is left to the
    loss.

    Every epoch is a new order of the split, without the remainder that fills no batch; where batches are
    mixed from twice their images, two orders. Every random decision follows from (seed, epoch, position in
    the epoch) alone: a dataset that starts at `first_epoch` and `first_step` gives, bit for bit, what one
    from the beginning gives from there on. Of the images before that place none is decoded.

    Images in memory are resized once, to `image_size` on both sides, and kept as uint8. Files and records
    are decoded, cropped and resized each time. One that cannot be decoded is replaced by the next good one
    of its batch; see `BrokenImages`.

    Several hosts see parts of the same steps: no image is on two of them in one pass. What is drawn for a
    batch as a whole (flip, shift, mixture, RandAugment) is another draw on each. `Records` are divided by
    files where that gives every host enough of them, otherwise every host reads all files and takes its
    share of the records.

    Args:
        split: What to train on.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        batch_size: Images a batch, of all hosts together; a smaller split makes one batch of all its
            images.
        augment: What is done at random.
        seed: The seed of the run, any integer of 64 bits with sign.
        first_epoch: The epoch to start with, from 0. Default 0.
        epochs: How many epochs to give, counted from `first_epoch`. Default None, endless.
        first_step: The step of `first_epoch` to start with, from 0. Default 0.
        shard: The number of this host, from 0. Default 0.
        shards: The number of hosts. Default 1.
        ledger: Where broken images are written down; whoever gives it asks it. Default None: the
            dataset ends with an error once more than 0.1 % are broken.
        cache: Where encoded images are kept after they were read first: "memory", or a folder on a
            fast disk. What comes out is the same. Default None, nowhere.
        antialias: Whether files are resized with antialiasing. False is the authors' resize, whose
            values may go beyond 0..255. Default True.

    Returns:
        A dataset of float32 images (B, image_size, image_size, 3), normalised, and float32
        labels (B, classes), with the static size B = batch_size / shards.

    Raises:
        DataError: If the split is empty or a label is out of range.
        ValueError: If a number is out of range, or the hosts do not divide the batch.

    Example:
        >>> from nfnet_keras.data import Augment, digits, training_batches
        >>> data = training_batches(digits().train, 10, 32, 64, Augment(flip=False), seed=0)
        >>> [tuple(t.shape) for t in data.element_spec]
        [(64, 32, 32, 3), (64, 10)]
    """
    tf = tensorflow()
    steps = steps_per_epoch(split, batch_size)
    _check(split, classes, image_size)
    _check_shards(batch_size, shard, shards)
    _at_least("first_epoch", first_epoch, 0)
    if not 0 <= first_step < steps:
        raise ValueError(f"first_step must be in 0..{steps - 1}, the steps of an epoch, got {first_step!r}")
    if epochs is not None:
        _at_least("epochs", epochs, 1)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits with sign, got {seed!r}")
    batch = _batch(split, batch_size) // shards * shards
    if not batch:
        raise DataError(f"{len(split)} images are too few for {shards} hosts; give at least one a host")
    passes = 2 if augment.mix_from_twice else 1
    plan = Plan(len(split), batch, steps, seed, passes, first_epoch, first_step, epochs, shard, shards)

    if isinstance(split, Split) and split.paths is None:
        dataset = _finished(_array_samples(split, plan, image_size, augment), plan, image_size, classes, augment)
    else:
        dataset = _encoded(split, plan, image_size, augment, classes, ledger, cache, antialias)
    count = tf.data.INFINITE_CARDINALITY if epochs is None else epochs * steps - first_step
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(count))
    return dataset.prefetch(tf.data.AUTOTUNE)


def evaluation_batches(
    split: Split | Records,
    classes: int,
    image_size: int,
    batch_size: int,
    *,
    crop: str | Preprocessing = "training",
    shard: int = 0,
    shards: int = 1,
    ledger: BrokenImages | None = None,
) -> tf.data.Dataset:
    """Give each image once, in order; the last batch may be short.

    With the crop "training", images in memory are resized to `image_size` on both sides; of files, the
    shorter side is resized to round(image_size * 8 / 7) pixels and the central square of image_size is
    kept. Both are bicubic and antialiased. Other crops are those of `evaluation_crop`.

    Several hosts see each image once together, in equal numbers of batches.

    Args:
        split: What to evaluate on.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        batch_size: Images a batch, of all hosts together.
        crop: Name of a rule of `evaluation_crop`, or a `Preprocessing`, whose interpolation and
            statistics then hold too. Default "training".
        shard: The number of this host, from 0. Default 0.
        shards: The number of hosts. Default 1.
        ledger: As for `training_batches`. Default None.

    Returns:
        A dataset of float32 images (B, image_size, image_size, 3), normalised, and float32
        one-hot labels (B, classes).

    Raises:
        DataError: If the split is empty or a label is out of range.
        ValueError: If a number is out of range, or there is no such crop.

    Example:
        >>> from nfnet_keras.data import digits, evaluation_batches
        >>> len(evaluation_batches(digits().test, 10, 32, 100))
        4
    """
    tf = tensorflow()
    batch = _batch(split, batch_size)
    _check(split, classes, image_size)
    _check_shards(batch_size, shard, shards)
    how = crop if isinstance(crop, Preprocessing) else Preprocessing(image_size, MEAN_RGB, STDDEV_RGB, crop)
    if how.image_size != image_size:
        raise ValueError(f"the crop is for images of {how.image_size} pixels, but image_size is {image_size}")
    own = max(1, batch // shards)

    if isinstance(split, Split) and split.paths is None:
        tokens = tf.data.Dataset.range(shard, len(split), shards)
        dataset = _in_batches(tokens, len(split), own, shard, shards).map(
            _array_crops(split, classes, how), num_parallel_calls=tf.data.AUTOTUNE
        )
    else:
        stream = _stream(split, None, ledger)
        tokens = stream.in_order(shard, shards)
        batches = _in_batches(tokens, len(split), own, shard, shards)
        zero = tf.constant(0, tf.int64)
        dataset = decoded_batches(
            batches.map(lambda *token: (zero, zero, token)),
            stream,
            lambda content, *_: crop_content(content, image_size, how.crop, how.interpolation),
            image_size,
            classes,
            ledger,
        ).map(
            lambda images, numbers, *_: (
                normalize(images, how.mean_rgb, how.stddev_rgb),
                tf.one_hot(numbers, classes, dtype=tf.float32),
            ),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    most = -(-len(split) // shards)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(-(-most // own)))
    return dataset.prefetch(tf.data.AUTOTUNE)


def _stream(
    split: Split | Records, cache: str | os.PathLike[str] | None, ledger: BrokenImages | None
) -> PathStream | RecordStream:
    kept = open_cache(cache, split)
    return RecordStream(split, kept, ledger) if isinstance(split, Records) else PathStream(split, kept)


def _array_samples(split: Split, plan: Plan, image_size: int, augment: Augment) -> tf.data.Dataset:
    tf = tensorflow()
    images = on_host(resize_arrays(split.images, image_size))
    labels = on_host(split.labels)

    def make(epoch: tf.Tensor, step: tf.Tensor, rows: tf.Tensor) -> tuple:
        chosen = tf.cast(tf.gather(images, rows), tf.float32)
        chosen = tf.ensure_shape(chosen, (plan.own, image_size, image_size, 3))
        if augment.min_area < 1.0:
            chosen = crop_batch(chosen, plan.key(randomness.CROP, epoch, step), augment.min_area)
        return chosen, tf.gather(labels, rows), epoch, step

    return plan.places().map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _encoded(
    split: Split | Records,
    plan: Plan,
    image_size: int,
    augment: Augment,
    classes: int,
    ledger: BrokenImages | None,
    cache: str | os.PathLike[str] | None,
    antialias: bool,
) -> tf.data.Dataset:
    def picture(content: tf.Tensor, epoch: tf.Tensor, step: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
        key = randomness.key(plan.seed, randomness.CROP, epoch, plan.position(step, number))
        return resize(decode_crop(content, key, augment.min_area, image_size), image_size, antialias)

    stream = _stream(split, cache, ledger)
    order = stream.shuffled(plan)
    if by_image(augment, image_size):
        return image_batches(order, stream, picture, plan, image_size, classes, augment, ledger)
    samples = decoded_batches(order, stream, picture, image_size, classes, ledger)
    if by_neighbours(augment, image_size):
        return neighbour_batches(samples, plan, image_size, classes, augment)
    return _finished(samples, plan, image_size, classes, augment)


def _finished(samples: tf.data.Dataset, plan: Plan, image_size: int, classes: int, augment: Augment) -> tf.data.Dataset:
    """Mix, distort and normalise batches of samples."""
    parallel = {"num_parallel_calls": tensorflow().data.AUTOTUNE, "deterministic": True}
    dataset = samples.map(_mixture(plan, image_size, classes, augment), **parallel)
    if augment.randaugment_layers:
        dataset = _distorted(dataset, plan, augment)
    return dataset.map(lambda images, labels, *_: (normalize(images), labels), **parallel)


def _mixture(plan: Plan, image_size: int, classes: int, augment: Augment):
    """Return the function that shifts, flips and mixes the images of a step."""
    tf = tensorflow()

    def finish(images: tf.Tensor, numbers: tf.Tensor, epoch: tf.Tensor, step: tf.Tensor) -> tuple:
        images = tf.ensure_shape(images, (plan.own, image_size, image_size, 3))
        if int(augment.shift * image_size):
            images = shift_batch(images, plan.key(randomness.SHIFT, epoch, step), augment.shift)
        if augment.flip:
            images = flip_batch(images, plan.key(randomness.FLIP, epoch, step))
        labels = tf.one_hot(tf.ensure_shape(numbers, (plan.own,)), classes, dtype=tf.float32)
        return *mix(images, labels, augment, plan.key(randomness.MIX, epoch, step)), epoch, step

    return finish


def _distorted(dataset: tf.data.Dataset, plan: Plan, augment: Augment) -> tf.data.Dataset:
    """Do RandAugment to a few images at a time, on as many threads as there are."""
    tf = tensorflow()
    size = plan.batch // plan.shards

    def one(images: tf.Tensor, labels: tf.Tensor, epoch: tf.Tensor, step: tf.Tensor) -> tf.data.Dataset:
        key = plan.key(randomness.RANDAUGMENT, epoch, step)

        def distort(number: tf.Tensor, few: tf.Tensor) -> tf.Tensor:
            own = randomness.fold(key, number)
            return randaugment(few, own, augment.randaugment_layers, augment.randaugment_magnitude)

        parts = tf.data.Dataset.from_tensor_slices(images).batch(AT_ONCE).enumerate()
        parts = parts.map(distort, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        whole = parts.unbatch().batch(size, drop_remainder=True)
        return whole.map(lambda images: (images, labels))

    return dataset.interleave(one, cycle_length=2, block_length=1, num_parallel_calls=2, deterministic=True)


def _array_crops(split: Split, classes: int, how: Preprocessing):
    """Return the function that makes a batch of evaluation out of rows of arrays."""
    tf = tensorflow()
    labels = on_host(split.labels)
    plain = how.crop == "training"
    images = on_host(resize_arrays(split.images, how.image_size) if plain else split.images)

    def make(rows: tf.Tensor) -> tuple:
        chosen = tf.gather(images, rows)
        if not plain:
            spec = tf.TensorSpec((how.image_size, how.image_size, 3), tf.float32)
            chosen = tf.map_fn(
                lambda image: crop_pixels(image, how.image_size, how.crop, how.interpolation),
                chosen,
                fn_output_signature=spec,
            )
        chosen = normalize(chosen, how.mean_rgb, how.stddev_rgb)
        return chosen, tf.one_hot(tf.gather(labels, rows), classes, dtype=tf.float32)

    return make


def _in_batches(tokens: tf.data.Dataset, size: int, own: int, shard: int, shards: int) -> tf.data.Dataset:
    """Batch the tokens of one host, in as many batches as every other host has."""
    tf = tensorflow()
    count, most = len(range(shard, size, shards)), -(-size // shards)
    batches = tokens.batch(own)
    missing = -(-most // own) - -(-count // own)
    if not missing:
        return batches
    if own < 2 or not count:
        raise ValueError(
            f"{size} images cannot be divided among {shards} hosts in batches of {own} each, so that all hosts have "
            f"equally many batches; give a batch_size of at least {2 * shards}, and at least one image a host"
        )
    # This host's last batch is full where others have one more, of one image: it gives one of its own to another batch.
    last = -(-count // own) - 1

    def divide(number: tf.Tensor, token: tuple | tf.Tensor) -> tf.data.Dataset:
        size = tf.cast(tf.where(number == last, own - 1, own), tf.int64)
        return tf.data.Dataset.from_tensor_slices(token).batch(size)

    return batches.enumerate().flat_map(divide)


def _batch(split: Split | Records, batch_size: int) -> int:
    _at_least("batch_size", batch_size, 1)
    if not len(split):
        raise DataError("the split has no images; give at least one")
    return min(batch_size, len(split))


def _check(split: Split | Records, classes: int, image_size: int) -> None:
    _at_least("classes", classes, 1)
    _at_least("image_size", image_size, 1)
    if isinstance(split, Split):
        check_labels(split.labels, classes)


def _check_shards(batch_size: int, shard: int, shards: int) -> None:
    _at_least("shards", shards, 1)
    if not 0 <= shard < shards:
        raise ValueError(f"shard must be in 0..{shards - 1}, the numbers of {shards} hosts, got {shard!r}")
    if batch_size % shards:
        raise ValueError(f"batch_size must be a multiple of the {shards} hosts, got {batch_size!r}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
