from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from nfnet_keras.data import (
    MEAN_RGB,
    STDDEV_RGB,
    Augment,
    DataError,
    Split,
    digits,
    evaluation_batches,
    image_folder,
    load_image,
    normalize,
    steps_per_epoch,
    training_batches,
)
from nfnet_keras.data.images import resize_arrays

PLAIN = Augment(flip=False, min_area=1.0)
EVERYTHING = Augment(flip=True, min_area=0.3, shift=0.2, mixup=0.2, cutmix=1.0)


def taken(dataset, count=None):
    return [(x.numpy(), y.numpy()) for x, y in islice(dataset, count)]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(x, u) and np.array_equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


def pixels(images):
    return images * np.array(STDDEV_RGB) + np.array(MEAN_RGB)


@pytest.fixture(params=["arrays", "files"])
def source(request, noise, tree):
    """A split of each kind with its number of classes: 12 images in memory, or 8 files."""
    return (noise, 3) if request.param == "arrays" else (image_folder(tree).train, 2)


def test_steps_per_epoch(numbered):
    assert [steps_per_epoch(numbered, b) for b in (1, 5, 23, 24, 1000)] == [23, 4, 1, 1, 1]


@pytest.mark.parametrize("augment", [PLAIN, EVERYTHING])
def test_a_resumed_run_is_the_uninterrupted_one(source, augment):
    split, classes = source
    steps = steps_per_epoch(split, 3)
    whole = taken(training_batches(split, classes, 8, 3, augment, seed=4, epochs=4))
    assert len(whole) == 4 * steps
    for k in (0, 1, 3):
        resumed = training_batches(split, classes, 8, 3, augment, 4, first_epoch=k, epochs=4 - k)
        assert same(taken(resumed), whole[k * steps :])


def test_an_endless_dataset_starts_like_a_counted_one(source):
    split, classes = source
    counted = training_batches(split, classes, 8, 3, EVERYTHING, 1, first_epoch=2, epochs=3)
    endless = training_batches(split, classes, 8, 3, EVERYTHING, 1, first_epoch=2)
    assert len(counted) == 3 * steps_per_epoch(split, 3)
    assert endless.cardinality() == tf.data.INFINITE_CARDINALITY
    assert same(taken(counted), taken(endless, len(counted)))


def test_parallelism_does_not_matter(source):
    split, classes = source
    dataset = training_batches(split, classes, 8, 3, EVERYTHING, 1, epochs=2)
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    assert same(taken(dataset), taken(dataset.with_options(options)))


def test_seeds_and_epochs_differ(source):
    split, classes = source
    steps = steps_per_epoch(split, 4)
    both = taken(training_batches(split, classes, 8, 4, EVERYTHING, seed=0, epochs=2))
    other = taken(training_batches(split, classes, 8, 4, EVERYTHING, seed=1, epochs=1))
    assert not same(both[:steps], both[steps:])
    assert not same(both[:steps], other)


def test_extreme_seeds(noise):
    for seed in (-1, 2**40, 2**63 - 1):
        assert len(taken(training_batches(noise, 3, 8, 4, EVERYTHING, seed, epochs=1))) == 3


def test_an_epoch_is_a_permutation_without_its_remainder(numbered):
    batches = taken(training_batches(numbered, 4, 6, 5, PLAIN, seed=0, epochs=40))
    assert len(batches) == 40 * 4
    seen = [np.rint(pixels(x)[:, 0, 0, 0] / 10).astype(int) for x, _ in batches]
    for x, (_, y) in zip(seen, batches, strict=True):
        assert np.array_equal(y, np.eye(4)[x % 4])
    epochs = [np.concatenate(seen[4 * e : 4 * e + 4]) for e in range(40)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert set(np.concatenate(epochs)) == set(range(23))  # no image is left out for ever
    assert len({tuple(epoch) for epoch in epochs}) == 40


def test_a_whole_epoch_covers_every_image(numbered):
    (images, _), *rest = taken(training_batches(numbered, 4, 6, 1000, PLAIN, seed=0, epochs=1))
    assert not rest
    values = np.rint(pixels(images)[:, 0, 0, 0] / 10).astype(int)
    assert sorted(values) == list(range(23))
    assert list(values) != list(range(23))


@pytest.mark.parametrize("augment", [PLAIN, EVERYTHING])
def test_shapes_are_static_and_labels_sum_to_one(source, augment):
    split, classes = source
    dataset = training_batches(split, classes, 10, 3, augment, seed=0, epochs=2)
    images, labels = dataset.element_spec
    assert (images.shape, images.dtype) == ((3, 10, 10, 3), tf.float32)
    assert (labels.shape, labels.dtype) == ((3, classes), tf.float32)
    for x, y in taken(dataset):
        assert np.isfinite(x).all()
        np.testing.assert_allclose(y.sum(axis=1), 1, atol=1e-6)


def test_augmented_pixels_stay_in_range(source):
    split, classes = source
    for x, _ in taken(training_batches(split, classes, 24, 4, EVERYTHING, seed=0, epochs=3)):
        assert pixels(x).min() > -0.01
        assert pixels(x).max() < 255.01


def test_without_augmentation_arrays_are_the_resized_images(noise):
    wanted = normalize(resize_arrays(noise.images, 16))
    (images, labels), *_ = taken(training_batches(noise, 3, 16, 12, PLAIN, seed=0, epochs=1))
    order = [int(np.argmin(np.abs(wanted - x).sum(axis=(1, 2, 3)))) for x in images]
    assert sorted(order) == list(range(12))
    assert np.array_equal(images, wanted[order])
    assert np.array_equal(labels, np.eye(3)[noise.labels[order]])


def test_without_augmentation_files_are_the_resized_images(tree):
    split = image_folder(tree).train
    wanted = []
    for path in split.paths:
        with Image.open(path) as image:
            resized = tf.image.resize(np.asarray(image), (16, 16), "bicubic", antialias=True)
        wanted.append(normalize(np.clip(resized.numpy(), 0, 255)))
    wanted = np.array(wanted)
    (images, labels), *_ = taken(training_batches(split, 2, 16, 100, PLAIN, seed=0, epochs=1))
    order = [int(np.argmin(np.abs(wanted - x).sum(axis=(1, 2, 3)))) for x in images]
    assert sorted(order) == list(range(len(split)))
    np.testing.assert_allclose(images, wanted[order], atol=1e-4)
    assert np.array_equal(labels, np.eye(2)[split.labels[order]])


@pytest.mark.parametrize(
    "augment",
    [
        Augment(flip=True, min_area=1.0),
        Augment(flip=False, min_area=0.3),
        Augment(flip=False, min_area=1.0, shift=0.3),
        Augment(flip=False, min_area=1.0, mixup=1.0),
        Augment(flip=False, min_area=1.0, cutmix=1.0),
    ],
)
def test_each_augmentation_is_applied(source, augment):
    split, classes = source
    plain = taken(training_batches(split, classes, 8, 8, PLAIN, seed=0, epochs=1))
    changed = taken(training_batches(split, classes, 8, 8, augment, seed=0, epochs=1))
    assert not np.allclose(plain[0][0], changed[0][0], atol=0.01)
    mixes = bool(augment.mixup or augment.cutmix)
    assert np.array_equal(plain[0][1], changed[0][1]) != mixes


def test_mixed_labels_are_the_colours_of_the_images():
    # Each class is one pure colour; crops, shifts and flips do not change it.
    images = np.zeros((30, 8, 8, 3), np.uint8)
    images[np.arange(30), :, :, np.arange(30) % 3] = 255
    split = Split(np.arange(30) % 3, images=images)
    for x, y in taken(training_batches(split, 3, 16, 10, EVERYTHING, seed=0, epochs=2)):
        np.testing.assert_allclose(pixels(x).mean(axis=(1, 2)) / 255, y, atol=1e-3)


def test_evaluation_gives_each_array_once_in_order(noise):
    batches = taken(evaluation_batches(noise, 3, 16, 5))
    assert [len(x) for x, _ in batches] == [5, 5, 2]
    images, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    assert np.array_equal(images, normalize(resize_arrays(noise.images, 16)))
    assert np.array_equal(labels, np.eye(3, dtype=np.float32)[noise.labels])
    assert images.dtype == labels.dtype == np.float32


def test_evaluation_gives_each_file_once_in_order_as_load_image(tree):
    split = image_folder(tree).train
    dataset = evaluation_batches(split, 2, 16, 3)
    assert len(dataset) == 3
    assert dataset.element_spec[0].shape[1:] == (16, 16, 3)
    images, labels = (np.concatenate(part) for part in zip(*taken(dataset), strict=True))
    assert np.array_equal(images, np.array([load_image(p, 16) for p in split.paths]))
    assert np.array_equal(labels, np.eye(2)[split.labels])


def test_digits_at_32_make_batches():
    data = digits()
    (x, y), *rest = taken(training_batches(data.train, 10, 32, 64, EVERYTHING, 0, epochs=1))
    assert x.shape == (64, 32, 32, 3)
    assert y.shape == (64, 10)
    assert len(rest) == 21
    assert sum(len(x) for x, _ in evaluation_batches(data.test, 10, 32, 64)) == 360


def test_bad_labels_and_empty_splits_are_refused(noise):
    with pytest.raises(DataError, match=r"label 2 at position 2 .* 0\.\.1"):
        training_batches(noise, 2, 8, 4, PLAIN, seed=0)
    with pytest.raises(DataError, match=r"label 2 at position 2 .* 0\.\.1"):
        evaluation_batches(noise, 2, 8, 4)
    empty = Split(np.zeros(0, np.int32), paths=())
    with pytest.raises(DataError, match="no images"):
        training_batches(empty, 2, 8, 4, PLAIN, seed=0)
    with pytest.raises(DataError, match="no images"):
        evaluation_batches(empty, 2, 8, 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("classes", 0),
        ("image_size", 0),
        ("batch_size", 0),
        ("first_epoch", -1),
        ("epochs", 0),
        ("seed", 2**63),
    ],
)
def test_ranges_are_checked(noise, name, value):
    arguments = {"classes": 3, "image_size": 8, "batch_size": 4, "seed": 0}
    with pytest.raises(ValueError, match=name):
        training_batches(noise, augment=PLAIN, **{**arguments, name: value})


def test_file_modes_and_names_train(tmp_path, picture, write, encoded):
    for folder in ("grün", "two words"):
        for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "PNG"), ("CMYK", "JPG")):
            kind = "PNG" if suffix.lower() == "png" else "JPEG"
            data = encoded(picture(1).convert(mode), kind)
            write(tmp_path / folder / f"{mode} é.{suffix}", data=data)
    found = image_folder(tmp_path)
    assert found.class_names == ("grün", "two words")
    assert all(Path(path).exists() for path in found.train.paths)
    batches = taken(training_batches(found.train, 2, 8, 2, EVERYTHING, seed=0, epochs=1))
    assert len(batches) == 3
