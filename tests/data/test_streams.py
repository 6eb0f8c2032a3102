"""Batches from files and records: hosts, starts in mid-epoch, caches, two passes an epoch."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from nfnet_keras.data import (
    Augment,
    BrokenImages,
    DataError,
    Records,
    Split,
    evaluation_batches,
    image_folder,
    open_images,
    steps_per_epoch,
    training_batches,
)
from nfnet_keras.data import batches as batches_module
from nfnet_keras.data import cache as caches

PLAIN = Augment(flip=False, min_area=1.0)
EVERYTHING = Augment(min_area=0.3, shift=0.2, mixup=0.2, cutmix=1.0, mix_from_twice=True)
FLIPPED = Augment(min_area=0.5)
RANDAUGMENTED = Augment(randaugment_layers=2, randaugment_magnitude=5.0)


def taken(dataset):
    return [(x.numpy(), y.numpy()) for x, y in dataset]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(x, u) and np.array_equal(y, v) for (x, y), (u, v) in zip(first, second, strict=True)
    )


@pytest.fixture
def records(tmp_path, write_records):
    """24 records in three files; record i has the grey value 9 * i and the class i % 3."""
    return open_images(f"tfrecord:{write_records(tmp_path / 'records')}").train


@pytest.fixture(params=["arrays", "files", "records"])
def split(request, tmp_path, write_records, encoded):
    """24 images of the grey values 9 * i, i % 3 being the class, as each kind of split."""
    if request.param == "records":
        return open_images(f"tfrecord:{write_records(tmp_path / 'records')}").train
    images = np.broadcast_to((9 * np.arange(24, dtype=np.uint8))[:, None, None, None], (24, 8, 8, 3)).copy()
    if request.param == "arrays":
        return Split(np.arange(24) % 3, images=images)
    paths = []
    for number, image in enumerate(images):
        paths.append(str(tmp_path / f"{number}.png"))
        tf.io.write_file(paths[-1], tf.io.encode_png(image))
    return Split(np.arange(24) % 3, paths=tuple(paths))


def test_an_epoch_is_an_order_of_the_split(split, values):
    batches = taken(training_batches(split, 3, 8, 5, PLAIN, seed=0, epochs=3))
    assert len(batches) == 3 * 4
    seen = values(batches)
    assert np.array_equal(np.concatenate([y for _, y in batches]), np.eye(3)[np.array(seen) % 3])
    epochs = [seen[20 * e : 20 * e + 20] for e in range(3)]
    assert all(len(set(epoch)) == 20 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    ((whole, _),) = taken(training_batches(split, 3, 8, 100, PLAIN, seed=0, epochs=1))
    assert sorted(values([(whole, None)])) == list(range(24))


@pytest.mark.parametrize("augment", [EVERYTHING, pytest.param(RANDAUGMENTED, marks=pytest.mark.slow)])
def test_starts_in_mid_epoch_are_bit_identical(split, augment):
    whole = taken(training_batches(split, 3, 8, 5, augment, 3, epochs=2))
    assert len(whole) == 8
    for epoch, step in ((0, 2), (1, 3)):
        resumed = training_batches(split, 3, 8, 5, augment, 3, epoch, 2 - epoch, first_step=step)
        assert len(resumed) == 8 - 4 * epoch - step
        assert same(taken(resumed), whole[4 * epoch + step :])


def test_nothing_is_decoded_before_the_start(tmp_path, write_records):
    bad = dict.fromkeys(range(0, 24, 2), b"broken")
    broken = open_images(f"tfrecord:{write_records(tmp_path, bad=bad)}").train
    whole, rest = BrokenImages(24), BrokenImages(24)
    taken(training_batches(broken, 3, 8, 8, PLAIN, 0, epochs=1, ledger=whole))
    taken(training_batches(broken, 3, 8, 8, PLAIN, 0, epochs=1, ledger=rest, first_step=2))
    assert whole.count == 12
    assert 0 < rest.count <= 8


def test_the_order_depends_on_no_global_seed_and_no_thread(split):
    found = []
    for seed in (1, 2):
        tf.random.set_seed(seed)
        found.append(taken(training_batches(split, 3, 8, 6, FLIPPED, 3, epochs=1)))
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False
    found.append(taken(training_batches(split, 3, 8, 6, FLIPPED, 3, epochs=1).with_options(options)))
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert not same(found[0], taken(training_batches(split, 3, 8, 6, FLIPPED, 4, epochs=1)))


@pytest.mark.parametrize("shards", [2, 3])
def test_hosts_share_each_epoch(split, values, shards):
    hosts = [
        values(taken(training_batches(split, 3, 8, 12, PLAIN, 0, epochs=2, shard=shard, shards=shards)))
        for shard in range(shards)
    ]
    for epoch in range(2):
        own = 24 // shards
        shares = [host[own * epoch : own * epoch + own] for host in hosts]
        # 24 images in steps of 12: every image once, on one host. Three hosts have a file each, others read all three.
        assert sorted(number for share in shares for number in share) == list(range(24))


def test_hosts_of_arrays_and_files_have_the_steps_of_one(split, values):
    if isinstance(split, Records):
        pytest.skip("records are divided by files")
    one = values(taken(training_batches(split, 3, 8, 10, PLAIN, 0, epochs=2)))
    halves = [values(taken(training_batches(split, 3, 8, 10, PLAIN, 0, epochs=2, shard=i, shards=2))) for i in (0, 1)]
    parts = [np.reshape(half, (4, 5)) for half in halves]
    assert np.array_equal(np.reshape(one, (4, 10)), np.concatenate(parts, axis=1))


def test_hosts_draw_their_own(noise):
    augment = Augment(min_area=1.0, flip=False, mixup=1.0)
    parts = [
        taken(training_batches(noise, 3, 8, 12, augment, 0, epochs=1, shard=i, shards=2))[0][1].max(axis=1)
        for i in (0, 1)
    ]
    assert not np.allclose(np.sort(parts[0]), np.sort(parts[1]))


def test_a_host_with_files_of_its_own_keeps_them(records, values):
    for seed in (0, 1):
        share = taken(training_batches(records, 3, 8, 12, PLAIN, seed, epochs=3, shard=1, shards=3))
        assert set(values(share)) == set(range(8, 16))


def test_mixing_from_twice_reads_every_image_twice(split, values, monkeypatch):
    # Without the mixture, all images that go into it can be seen.
    monkeypatch.setattr(batches_module, "mix", lambda images, labels, augment, key: (images, labels))
    monkeypatch.setattr(batches_module, "by_image", lambda augment, image_size: False)
    augment = Augment(flip=False, min_area=1.0, mixup=0.2, cutmix=1.0, mix_from_twice=True)
    batches = taken(training_batches(split, 3, 8, 8, augment, 0, epochs=1))
    assert [len(images) for images, _ in batches] == [16] * 3
    everything = values(batches)
    assert np.bincount(everything).tolist() == [2] * 24
    assert sorted(everything[:24]) == list(range(24))
    assert everything[:24] != everything[24:]


@pytest.mark.parametrize("cache", ["memory", "folder"])
def test_a_cache_changes_nothing_and_spares_the_originals(tmp_path, write_records, tree, cache):
    records = open_images(f"tfrecord:{write_records(tmp_path / 'records')}").train
    files = image_folder(tree).train
    where = cache if cache == "memory" else tmp_path / "kept"
    for split, classes in ((records, 3), (files, 2)):
        plain = taken(training_batches(split, classes, 8, 4, FLIPPED, 0, epochs=2))
        kept = training_batches(split, classes, 8, 4, FLIPPED, 0, epochs=2, cache=where)
        assert same(taken(kept), plain)
        if cache == "memory":
            for path in split.paths if split is files else [shard.path for shard in split.shards]:
                with open(path, "wb"):
                    pass
        else:
            copies = sorted(path.read_bytes() for path in where.iterdir())
            originals = split.paths if split is files else [shard.path for shard in split.shards]
            assert all(Path(path).read_bytes() in copies for path in originals)
            for path in where.iterdir():
                path.write_bytes(b"" if split is files else path.read_bytes())
            continue
        again = training_batches(split, classes, 8, 4, FLIPPED, 0, epochs=2, cache=where)
        assert same(taken(again), plain)


def test_a_folder_takes_no_part_of_a_file_and_no_old_one(tmp_path, monkeypatch):
    original = tmp_path / "image"
    original.write_bytes(b"first")
    folder = caches.Folder(tmp_path / "kept")
    real = tf.io.gfile.copy

    def cut_off(source, target, overwrite):
        with open(target, "wb") as file:
            file.write(b"fir")
        raise KeyboardInterrupt

    monkeypatch.setattr(tf.io.gfile, "copy", cut_off)
    with pytest.raises(KeyboardInterrupt):
        folder._copy(bytes(original))
    monkeypatch.setattr(tf.io.gfile, "copy", real)
    assert Path(os.fsdecode(folder._copy(bytes(original)))).read_bytes() == b"first"
    original.write_bytes(b"second")
    assert Path(os.fsdecode(folder._copy(bytes(original)))).read_bytes() == b"second"

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.io.gfile, "copy", full)
    original.write_bytes(b"third one")
    assert folder._copy(bytes(original)) == bytes(original)


@pytest.mark.parametrize("shards", [1, 5])
def test_evaluation_gives_every_image_once(split, values, shards):
    hosts = [taken(evaluation_batches(split, 3, 8, 10, shard=i, shards=shards)) for i in range(shards)]
    assert len({len(host) for host in hosts}) == 1
    seen = [values(host) for host in hosts]
    assert sorted(number for numbers in seen for number in numbers) == list(range(24))
    for host, numbers in zip(hosts, seen, strict=True):
        labels = np.concatenate([y for _, y in host])
        assert np.array_equal(labels, np.eye(3)[np.array(numbers) % 3])
        assert all(len(x) for x, _ in host)


def test_hosts_have_equally_many_batches_of_evaluation(tmp_path, write_records):
    # 9 images on two hosts in batches of 2 each: five images make three batches, and the four others must too.
    split = open_images(f"tfrecord:{write_records(tmp_path, train=(9,))}").train
    hosts = [evaluation_batches(split, 3, 8, 4, shard=i, shards=2) for i in (0, 1)]
    assert [len(host) for host in hosts] == [3, 3]
    assert [[len(x) for x, _ in taken(host)] for host in hosts] == [[2, 2, 1], [2, 1, 1]]
    with pytest.raises(ValueError, match="equally many batches"):
        evaluation_batches(split, 3, 8, 2, shard=1, shards=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_step": 4}, r"first_step must be in 0\.\.3"),
        ({"first_step": -1}, "first_step"),
        ({"shards": 0}, "shards"),
        ({"shard": 2, "shards": 2}, r"shard must be in 0\.\.1"),
        ({"shards": 4}, "multiple of the 4 hosts"),
    ],
)
def test_ranges_are_checked(noise, options, message):
    with pytest.raises(ValueError, match=message):
        training_batches(noise, 3, 8, 3, PLAIN, 0, **options)


def test_labels_out_of_range_are_named(tmp_path, write_records):
    split = open_images(f"tfrecord:{write_records(tmp_path)}").train
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"label 2 of .* record \d+, n\d+.JPEG is out of range"):
        taken(training_batches(split, 2, 8, 24, PLAIN, 0, epochs=1))


def test_steps_follow_from_the_length(records):
    assert [steps_per_epoch(records, batch) for batch in (1, 5, 24, 100)] == [24, 4, 1, 1]


def test_too_few_images_for_the_hosts(tmp_path, write_records):
    split = open_images(f"tfrecord:{write_records(tmp_path, train=(2,))}").train
    with pytest.raises(DataError, match="2 images are too few for 3 hosts"):
        training_batches(split, 3, 8, 3, PLAIN, 0, shards=3)
