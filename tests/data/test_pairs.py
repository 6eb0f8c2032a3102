"""Images made one by one are those that are made a batch at a time."""

import numpy as np
import pytest
import tensorflow as tf

from nfnet_keras.data import Augment, BrokenImages, Split, mixing, open_images, randomness, training_batches
from nfnet_keras.data import batches as batches_module

TWICE = {"mixup": 0.2, "cutmix": 1.0, "mix_from_twice": True}
PAPER = Augment(min_area=0.08, **TWICE, randaugment_layers=2, randaugment_magnitude=5.0)
JPEG = b"\xff\xd8\xff broken"


@pytest.fixture
def files(tmp_path, picture, encoded):
    """Write 24 JPEG files of pictures that differ, some of them broken, as a split."""

    def made(bad=()):
        paths = []
        for number in range(24):
            paths.append(tmp_path / f"{number}.jpg")
            paths[-1].write_bytes(JPEG if number in bad else encoded(picture(number, 40, 52), "JPEG"))
        return Split(np.arange(24) % 3, paths=tuple(map(str, paths)))

    return made


def both_ways(monkeypatch, split, batch, augment, **more):
    """Give the batches of the two ways, and what each wrote down."""
    found = []
    for single in (True, False):
        ledger = BrokenImages(10**6)
        if not single:
            for name in ("by_image", "by_neighbours"):
                monkeypatch.setattr(batches_module, name, lambda augment, image_size: False)
        batches = training_batches(split, 3, 16, batch, augment, 3, epochs=1, ledger=ledger, **more)
        found.append(([(x.numpy(), y.numpy()) for x, y in batches], set(ledger.names)))
    return found


def assert_same(found):
    (first, names), (second, other_names) = found
    assert names == other_names
    assert len(first) == len(second) > 0
    for (x, y), (u, v) in zip(first, second, strict=True):
        assert np.array_equal(x, u)
        assert np.array_equal(y, v)


@pytest.mark.parametrize("bad", [(), (0, 5, 6, 7, 23)])
@pytest.mark.parametrize(
    "augment",
    [
        PAPER,
        pytest.param(Augment(min_area=0.3, **TWICE), marks=pytest.mark.slow),
        pytest.param(Augment(mixup=0.2, mix_from_twice=True, flip=False), marks=pytest.mark.slow),
        pytest.param(Augment(cutmix=1.0, mix_from_twice=True), marks=pytest.mark.slow),
        Augment(min_area=0.08),
        Augment(mixup=0.2, cutmix=1.0, randaugment_layers=2, randaugment_magnitude=5.0),
        pytest.param(Augment(mixup=0.2, flip=False), marks=pytest.mark.slow),
        pytest.param(Augment(cutmix=1.0), marks=pytest.mark.slow),
        pytest.param(Augment(randaugment_layers=3, randaugment_magnitude=10.0), marks=pytest.mark.slow),
    ],
)
def test_the_two_ways_are_bit_identical(monkeypatch, files, augment, bad):
    assert_same(both_ways(monkeypatch, files(bad), 11, augment, antialias=False))


@pytest.mark.slow
def test_the_two_ways_are_bit_identical_on_hosts_and_from_records(monkeypatch, tmp_path, write_records):
    records = open_images(f"tfrecord:{write_records(tmp_path, bad={3: JPEG, 17: b''})}").train
    for shard in range(2):
        assert_same(both_ways(monkeypatch, records, 12, PAPER, shard=shard, shards=2))


@pytest.mark.parametrize("twice", [True, False])
def test_draws_are_those_of_the_whole_batch(twice):
    augment, key = Augment(**{**TWICE, "mix_from_twice": twice}), randomness.key(0, randomness.MIX, 0)
    count = 18 if twice else 9
    images, labels = tf.random.stateless_uniform((count, 8, 8, 3), (1, 2)), tf.eye(count)
    wanted = mixing.mix(images, labels, augment, key)
    pairs = mixing.pairs_of_twice if twice else mixing.pairs_of_neighbours
    places, kept, boxes = pairs(key, 9, 8, augment)
    for number, (first, partner) in enumerate(places.numpy()):
        pair = images[first], images[partner]
        made = mixing.blend(*pair, kept[number]) if number < 4 else mixing.paste(*pair, boxes[number - 4])
        assert np.array_equal(made, wanted[0][number])
        label = mixing.blend(labels[first], labels[partner], kept[number])
        assert np.array_equal(label, wanted[1][number])
