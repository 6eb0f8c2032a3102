import numpy as np
import pytest
import tensorflow as tf

from nfnet_keras.data import Augment, augment, randomness


@pytest.mark.parametrize(
    "values",
    [
        {"min_area": 0.0},
        {"min_area": 1.1},
        {"shift": -0.1},
        {"shift": 1.0},
        {"mixup": -1.0},
        {"cutmix": float("inf")},
        {"cutmix": float("nan")},
        {"shift": "0.1"},
        {"mixup": True},
        {"flip": 1},
    ],
)
def test_ranges_are_checked(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} must be"):
        Augment(**values)


def test_limits_are_allowed():
    Augment(min_area=1.0, shift=0.0, mixup=0, cutmix=0)
    Augment(min_area=0.01, shift=0.99, mixup=5, cutmix=0.1)


def boxes_of(height, width, min_area, count=4000):
    sides = tf.fill([count], float(height)), tf.fill([count], float(width))
    return augment.random_boxes(randomness.key(0, 1, 0), *sides, min_area).numpy()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (30, 50), (64, 40)])
def test_boxes_lie_inside_and_keep_area_and_ratio(height, width):
    top, left, tall, wide = boxes_of(height, width, 0.25).T
    share, ratio = tall * wide / (height * width), wide / tall
    assert min(top.min(), left.min()) >= 0
    assert (top + tall).max() <= height + 1e-3
    assert (left + wide).max() <= width + 1e-3
    assert 0.25 - 1e-4 <= share.min() < 0.27
    assert min(1, 4 / 3 * min(height / width, width / height)) - 0.02 < share.max() <= 1 + 1e-4
    assert 3 / 4 - 1e-4 <= ratio.min() < 0.78
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-4
    # every place occurs
    assert (top / np.maximum(height - tall, 1e-3)).std() > 0.2


def test_square_areas_are_uniform():
    _, _, tall, wide = boxes_of(32, 32, 0.5).T
    share = np.sort(tall * wide / 32**2)
    assert np.abs(share - np.linspace(0.5, 1.0, len(share))).max() < 0.03


def test_a_very_long_image_gets_its_largest_box():
    _, _, tall, wide = boxes_of(10, 1000, 0.25, count=50).T
    np.testing.assert_allclose(tall, 10, rtol=1e-4)
    np.testing.assert_allclose(wide, 40 / 3, rtol=1e-4)


def test_crop_one_is_a_window_of_the_image():
    rows, columns = np.mgrid[0:20, 0:30]
    image = np.stack([rows, columns, rows], -1).astype(np.uint8)
    sizes = set()
    for i in range(20):
        part = augment.crop_one(tf.constant(image), randomness.key(0, 1, i), 0.25).numpy()
        top, left = part[0, 0, 0], part[0, 0, 1]
        assert np.array_equal(part, image[top : top + part.shape[0], left : left + part.shape[1]])
        sizes.add(part.shape)
    assert len(sizes) > 10


def test_crop_one_takes_one_pixel():
    part = augment.crop_one(tf.ones((1, 1, 3), tf.uint8), randomness.key(0, 1, 0), 0.25)
    assert part.shape == (1, 1, 3)


def test_crop_batch_samples_its_boxes():
    # On an image whose values are the coordinates, a crop shows the coordinates of its box.
    rows, columns = np.mgrid[0:16, 0:16].astype(np.float32)
    images = tf.constant(np.broadcast_to(np.stack([rows, columns, rows], -1), (9, 16, 16, 3)))
    key = randomness.key(0, 1, 0)
    sides = tf.fill([9], 16.0)
    boxes = augment.random_boxes(key, sides, sides, 0.25).numpy()
    found = augment.crop_batch(images, key, 0.25).numpy()
    centres = (np.arange(16) + 0.5) / 16
    for image, (top, left, tall, wide) in zip(found, boxes, strict=True):
        wanted = (
            np.clip(top + centres * tall - 0.5, 0, 15),
            np.clip(left + centres * wide - 0.5, 0, 15),
        )
        np.testing.assert_allclose(image[:, 3, 0], wanted[0], atol=1e-2)
        np.testing.assert_allclose(image[3, :, 1], wanted[1], atol=1e-2)


def test_shift_moves_by_whole_pixels_and_reflects():
    image = np.random.default_rng(0).random((10, 10, 3)).astype(np.float32)
    images = tf.constant(np.broadcast_to(image, (400, 10, 10, 3)))
    found = augment.shift_batch(images, randomness.key(0, 2, 0), 0.25).numpy()
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), mode="symmetric")
    windows = {(y, x): padded[y : y + 10, x : x + 10] for y in range(5) for x in range(5)}
    seen = [next(place for place, window in windows.items() if np.array_equal(window, one)) for one in found]
    assert set(seen) == set(windows)


def test_flip_mirrors_about_half():
    images = tf.constant(np.random.default_rng(0).random((400, 4, 4, 3)).astype(np.float32))
    found = augment.flip_batch(images, randomness.key(0, 3, 0)).numpy()
    same = (found == images.numpy()).all(axis=(1, 2, 3))
    mirrored = (found == images.numpy()[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 160 < mirrored.sum() < 240
