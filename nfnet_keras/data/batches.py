"""From a split to batches, for training and for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from nfnet_keras.data import randomness
from nfnet_keras.data._tensorflow import tensorflow
from nfnet_keras.data.augment import Augment, crop_batch, crop_one, flip_batch, shift_batch
from nfnet_keras.data.errors import DataError
from nfnet_keras.data.images import decode, evaluation_image, normalize, resize, resize_arrays
from nfnet_keras.data.mixing import mix
from nfnet_keras.data.splits import Split, check_labels

if TYPE_CHECKING:
    import tensorflow as tf


def steps_per_epoch(split: Split, batch_size: int) -> int:
    """Count the batches of one epoch of `training_batches`.

    Args:
        split: What is trained on.
        batch_size: Images a batch.

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
    split: Split,
    classes: int,
    image_size: int,
    batch_size: int,
    augment: Augment,
    seed: int,
    first_epoch: int = 0,
    epochs: int | None = None,
) -> tf.data.Dataset:
    """Give shuffled, augmented batches.

    Every epoch is a new permutation of the split, without the remainder that fills no batch.
    Every random decision follows from (seed, epoch, position in the epoch) alone: a dataset
    that starts at `first_epoch` = k gives, bit for bit, what one from 0 gives from epoch k on.

    Images in memory are resized once, to `image_size` on both sides, and kept as uint8. Files
    are read, decoded, cropped and resized (bicubic, antialiased) each time.

    Args:
        split: What to train on.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        batch_size: Images a batch; a smaller split makes one batch of all its images.
        augment: What is done at random.
        seed: The seed of the run, any integer of 64 bits with sign.
        first_epoch: The epoch to start with, from 0. Default 0.
        epochs: How many epochs to give, counted from `first_epoch`. Default None, endless.

    Returns:
        A dataset of float32 images (B, image_size, image_size, 3), normalised, and float32
        labels (B, classes), with the static batch size B.

    Raises:
        DataError: If the split is empty or a label is out of range.
        ValueError: If a number is out of range.

    Example:
        >>> from nfnet_keras.data import Augment, digits, training_batches
        >>> data = training_batches(digits().train, 10, 32, 64, Augment(flip=False), seed=0)
        >>> [tuple(t.shape) for t in data.element_spec]
        [(64, 32, 32, 3), (64, 10)]
    """
    tf = tensorflow()
    batch, steps = _batch(split, batch_size), steps_per_epoch(split, batch_size)
    _check(split, classes, image_size)
    _at_least("first_epoch", first_epoch, 0)
    if epochs is not None:
        _at_least("epochs", epochs, 1)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must be an integer of 64 bits with sign, got {seed!r}")

    def finish(images: tf.Tensor, numbers: tf.Tensor, epoch: tf.Tensor, step: tf.Tensor) -> tuple:
        if int(augment.shift * image_size):
            images = shift_batch(images, randomness.key(seed, randomness.SHIFT, epoch, step), augment.shift)
        if augment.flip:
            images = flip_batch(images, randomness.key(seed, randomness.FLIP, epoch, step))
        labels = tf.one_hot(numbers, classes, dtype=tf.float32)
        mix_key = randomness.key(seed, randomness.MIX, epoch, step)
        return mix(normalize(images), labels, augment, mix_key)

    source = _array_batches if split.paths is None else _file_batches
    places = _places(len(split), batch, steps, seed, first_epoch, epochs)
    dataset = source(split, places, image_size, batch, augment, seed, finish)
    count = tf.data.INFINITE_CARDINALITY if epochs is None else epochs * steps
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(count))
    return dataset.prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split: Split, classes: int, image_size: int, batch_size: int) -> tf.data.Dataset:
    """Give each image once, in order; the last batch may be short.

    Images in memory are resized to `image_size` on both sides. Of files, the shorter side is
    resized to round(image_size * 8 / 7) pixels and the central square of image_size is kept.
    Both are bicubic and antialiased.

    Args:
        split: What to evaluate on.
        classes: Number of classes.
        image_size: Side of the images in pixels.
        batch_size: Images a batch.

    Returns:
        A dataset of float32 images (B, image_size, image_size, 3), normalised, and float32
        one-hot labels (B, classes).

    Raises:
        DataError: If the split is empty or a label is out of range.
        ValueError: If a number is out of range.

    Example:
        >>> from nfnet_keras.data import digits, evaluation_batches
        >>> len(evaluation_batches(digits().test, 10, 32, 100))
        4
    """
    tf = tensorflow()
    batch = _batch(split, batch_size)
    _check(split, classes, image_size)
    labels = _on_host(split.labels)
    indices = tf.data.Dataset.range(len(split))

    if split.paths is None:
        images = _on_host(resize_arrays(split.images, image_size))
        dataset = indices.batch(batch).map(
            lambda rows: (normalize(tf.gather(images, rows)), _one_hot(labels, rows, classes)),
            num_parallel_calls=tf.data.AUTOTUNE,
        )
    else:
        paths = _on_host([os.fsencode(path) for path in split.paths])
        dataset = indices.map(
            lambda row: (evaluation_image(paths[row], image_size), _one_hot(labels, row, classes)),
            num_parallel_calls=tf.data.AUTOTUNE,
        ).batch(batch)
    return dataset.prefetch(tf.data.AUTOTUNE)


def _array_batches(
    split: Split,
    places: tf.data.Dataset,
    image_size: int,
    batch: int,
    augment: Augment,
    seed: int,
    finish: Callable,
) -> tf.data.Dataset:
    tf = tensorflow()
    images = _on_host(resize_arrays(split.images, image_size))
    labels = _on_host(split.labels)

    def make(epoch: tf.Tensor, step: tf.Tensor, rows: tf.Tensor) -> tuple:
        chosen = tf.cast(tf.gather(images, rows), tf.float32)
        if augment.min_area < 1.0:
            key = randomness.key(seed, randomness.CROP, epoch, step)
            chosen = crop_batch(chosen, key, augment.min_area)
        return finish(chosen, tf.gather(labels, rows), epoch, step)

    return places.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def _file_batches(
    split: Split,
    places: tf.data.Dataset,
    image_size: int,
    batch: int,
    augment: Augment,
    seed: int,
    finish: Callable,
) -> tf.data.Dataset:
    tf = tensorflow()
    paths = _on_host([os.fsencode(path) for path in split.paths])
    labels = _on_host(split.labels)

    def spread(epoch: tf.Tensor, step: tf.Tensor, rows: tf.Tensor) -> tf.data.Dataset:
        positions = step * batch + tf.range(batch, dtype=tf.int64)
        columns = tf.fill([batch], epoch), tf.fill([batch], step), positions, rows
        return tf.data.Dataset.from_tensor_slices(columns)

    def load(epoch: tf.Tensor, step: tf.Tensor, position: tf.Tensor, row: tf.Tensor) -> tuple:
        image = decode(paths[row])
        if augment.min_area < 1.0:
            key = randomness.key(seed, randomness.CROP, epoch, position)
            image = crop_one(image, key, augment.min_area)
        return resize(image, image_size), labels[row], epoch, step

    def join(images: tf.Tensor, numbers: tf.Tensor, epoch: tf.Tensor, step: tf.Tensor) -> tuple:
        return finish(images, numbers, epoch[0], step[0])

    parallel = {"num_parallel_calls": tf.data.AUTOTUNE, "deterministic": True}
    samples = places.flat_map(spread).map(load, **parallel)
    return samples.batch(batch, drop_remainder=True).map(join, **parallel)


def _places(size: int, batch: int, steps: int, seed: int, first_epoch: int, epochs: int | None) -> tf.data.Dataset:
    """Give (epoch, step, rows of the batch) for every batch, in order."""
    tf = tensorflow()

    def one_epoch(epoch: tf.Tensor) -> tf.data.Dataset:
        order = randomness.permutation(randomness.key(seed, randomness.ORDER, epoch), size)
        rows = tf.reshape(order[: steps * batch], [steps, batch])
        columns = tf.fill([steps], epoch), tf.range(steps, dtype=tf.int64), rows
        return tf.data.Dataset.from_tensor_slices(columns)

    last = tf.int64.max if epochs is None else first_epoch + epochs
    return tf.data.Dataset.range(first_epoch, last).flat_map(one_epoch)


def _on_host(values: object) -> tf.Tensor:
    """Make a tensor in main memory: tf.data would copy it back from a GPU at every step."""
    tf = tensorflow()
    with tf.device("CPU:0"):
        return tf.convert_to_tensor(values)


def _one_hot(labels: tf.Tensor, rows: tf.Tensor, classes: int) -> tf.Tensor:
    tf = tensorflow()
    return tf.one_hot(tf.gather(labels, rows), classes, dtype=tf.float32)


def _batch(split: Split, batch_size: int) -> int:
    _at_least("batch_size", batch_size, 1)
    if not len(split):
        raise DataError("the split has no images; give at least one")
    return min(batch_size, len(split))


def _check(split: Split, classes: int, image_size: int) -> None:
    _at_least("classes", classes, 1)
    _at_least("image_size", image_size, 1)
    check_labels(split.labels, classes)


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
