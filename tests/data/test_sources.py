"""The door to all sources, and TFRecord files."""

import os
import shutil
import socket

import numpy as np
import pytest
import tensorflow as tf

from nfnet_keras.data import DataError, Records, Split, open_images
from nfnet_keras.data import folder as folder_module
from nfnet_keras.data.records import Shard, count_records

TFDS_KEYS = ("image", "label", "file_name")


def refusal(*arguments, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_images(*arguments, **options)
    return str(caught.value)


def test_none_is_the_digits_and_a_folder_a_folder(tree):
    assert open_images(None, classes=10).name == "digits"
    assert open_images(tree).class_names == ("cat", "dog")
    assert isinstance(open_images(str(tree)).train, Split)
    assert "2 classes, not 3" in refusal(tree, classes=3)


def test_large_folders_are_not_decoded_first(tree, write, monkeypatch):
    write(tree / "cat" / "broken.png", data=b"no image")
    assert "broken.png" in refusal(tree)
    monkeypatch.setattr(folder_module, "_CHECKED", 10)
    found = open_images(tree)
    assert len(found.train) + len(found.test) == 11


def test_tfrecords_as_imagenets(tmp_path, write_records, monkeypatch):
    write_records(tmp_path / "flowers")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was used"))
    found = open_images(f"tfrecord:{tmp_path}/flowers")
    assert (found.name, len(found.train), len(found.test)) == ("flowers", 24, 7)
    assert found.class_names == ("1", "2", "3")
    assert found.train.first_label == found.test.first_label == 1
    assert [shard.count for shard in found.train.shards] == [8, 8, 8]
    first = next(tf.data.TFRecordDataset(found.train.shards[0].path).as_numpy_iterator())
    content, label = found.train.parse(first)
    assert label == 0
    assert content.numpy().startswith(b"\xff\xd8")
    assert found.train.name(1, 4, first).endswith("train-00001-of-00003 record 4, n0.JPEG")
    assert found.train.name(1, 4, b"\x01broken").endswith("record 4")


def test_tfrecords_with_tfds_keys_count_from_nought(tmp_path, write_records):
    write_records(tmp_path, keys=TFDS_KEYS, first=0)
    found = open_images(f"tfrecord:{tmp_path}/*-of-*")
    assert found.class_names == ("0", "1", "2")
    assert (found.train.image_key, found.train.name_key, found.train.first_label) == ("image", "file_name", 0)
    assert open_images(f"tfrecord:{tmp_path}", classes=5).class_names == ("0", "1", "2", "3", "4")
    assert "the label 2 counts from 0, but there are to be 2 classes" in refusal(f"tfrecord:{tmp_path}", classes=2)


@pytest.mark.parametrize("lines", ["a\nb\nc\n", "background\na\nb\nc", "0:a\n1:b\n2:c\n"])
def test_labels_are_named_by_the_file_beside_them(tmp_path, write_records, lines):
    write_records(tmp_path)
    (tmp_path / "labels.txt").write_text(lines)
    assert open_images(f"tfrecord:{tmp_path}", classes=3).class_names == ("a", "b", "c")


def test_files_with_a_sets_name(tmp_path, write_records):
    write_records(tmp_path)
    for path in tmp_path.glob("train-*"):
        path.rename(tmp_path / f"my-train.tfrecord{path.name.removeprefix('train')}")
    for path in tmp_path.glob("validation-*"):
        path.rename(tmp_path / "my-test.tfrecord")
    (tmp_path / "training-notes.txt").write_text("not a record")
    found = open_images(f"tfrecord:{tmp_path}")
    assert (len(found.train), len(found.test)) == (24, 7)


def test_wrong_tfrecords_are_refused(tmp_path, write_records):
    assert "no such folder" in refusal(f"tfrecord:{tmp_path}/nowhere*")
    assert "train-*" in refusal(f"tfrecord:{tmp_path}")
    write_records(tmp_path, keys=("picture", "label", "name"))
    assert "have the features label, name, picture" in refusal(f"tfrecord:{tmp_path}")
    write_records(tmp_path)
    path = tmp_path / "train-00001-of-00003"
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    message = refusal(f"tfrecord:{tmp_path}")
    assert repr(str(path)) in message
    assert "would end after the file" in message
    path.write_bytes(whole + b"\x01")
    assert repr(str(path)) in refusal(f"tfrecord:{tmp_path}")
    (tmp_path / "train-00000-of-00003").write_bytes(b"no records at all, but long enough to have a header")
    assert "train-00000" in refusal(f"tfrecord:{tmp_path}")


def test_records_are_counted_by_their_headers(tmp_path):
    path = str(tmp_path / "a")
    with tf.io.TFRecordWriter(path) as file:
        for length in (0, 1, 1000):
            file.write(b"x" * length)
    assert count_records(path) == (3, 3 * 16 + 1001)
    (tmp_path / "empty").write_bytes(b"")
    assert count_records(str(tmp_path / "empty")) == (0, 0)
    with pytest.raises(DataError, match="missing"):
        count_records(str(tmp_path / "missing"))
    with pytest.raises(DataError, match="no records"):
        Records((Shard("a", 0),), classes=2)


def test_digests_tell_splits_apart(tmp_path, write_records, tree, noise):
    write_records(tmp_path / "one")
    write_records(tmp_path / "two", train=(8, 8, 9))
    one, two = (open_images(f"tfrecord:{tmp_path}/{name}").train for name in ("one", "two"))
    folder = open_images(tree)
    splits = (one, two, folder.train, folder.test, noise, Split(noise.labels, images=255 - noise.images))
    assert len({split.digest() for split in splits}) == 6
    assert open_images(f"tfrecord:{tmp_path}/one").train.digest() == one.digest()
    assert Split(np.array(noise.labels), images=noise.images.copy()).digest() == noise.digest()


def test_digests_do_not_depend_on_where_a_folder_lies(tmp_path, tree):
    here = open_images(tree)
    shutil.copytree(tree, tmp_path / "deeper" / "there")
    there = open_images(tmp_path / "deeper" / "there")
    assert (there.train.digest(), there.test.digest()) == (here.train.digest(), here.test.digest())
    (first, *others) = here.train.paths
    renamed = Split(here.train.labels, paths=[os.path.join(os.path.dirname(first), "other.png"), *others])
    assert renamed.digest() != here.train.digest()


def test_digest_of_a_folder_of_one_class_or_of_one_image():
    one, other = (Split(np.array([3]), paths=[path]) for path in ("/here/a/1.png", "/there/a/1.png"))
    assert one.digest() == other.digest() != Split(np.array([3]), paths=["/here/a/2.png"]).digest()
    assert Split(np.array([], int), paths=[]).digest() != one.digest()
