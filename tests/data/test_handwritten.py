import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from nfnet_keras.data import digits


@pytest.fixture(scope="module")
def data():
    return digits()


def test_sizes_types_and_names(data):
    assert data.name == "digits"
    assert data.class_names == tuple("0123456789")
    assert data.train.images.shape == (1437, 8, 8, 3)
    assert data.test.images.shape == (360, 8, 8, 3)
    assert data.train.images.dtype == np.uint8
    assert data.train.images.max() == 255
    assert data.train.images.min() == 0


def test_the_splits_are_the_whole_set_once(data):
    both = np.concatenate([data.train.images, data.test.images])
    labels = np.concatenate([data.train.labels, data.test.labels])
    assert np.array_equal(both[..., 0], both[..., 1])
    assert np.array_equal(both[..., 0], both[..., 2])
    bunch = load_digits()
    grey = np.rint(bunch.images * 255 / 16).astype(np.uint8)
    found = sorted((x.tobytes(), int(y)) for x, y in zip(both[..., 0], labels, strict=True))
    wanted = sorted((x.tobytes(), int(y)) for x, y in zip(grey, bunch.target, strict=True))
    assert found == wanted


def test_stratified(data):
    everywhere = np.bincount(load_digits().target)
    held = np.bincount(data.test.labels)
    assert np.abs(held - everywhere * 360 / 1797).max() < 1


def test_the_split_is_the_published_one(data):
    # A changed digest means that accuracies reported before are not comparable any more.
    again = digits()
    assert np.array_equal(data.test.images, again.test.images)
    digest = hashlib.sha256(data.test.images.tobytes() + data.test.labels.tobytes()).hexdigest()
    assert digest[:16] == "a0a6dbff627951e3"
