"""The table of a run that is not started: what its values come to, and where its counts are from."""

import dataclasses
import json
import re

import keras
import numpy as np
import pytest
from PIL import Image

from nfnet_keras import distribution
from nfnet_keras.data import Augment
from nfnet_keras.training import DIGITS, Recipe, Settings, recipe, settings
from nfnet_keras.training.counting import count
from nfnet_keras.training.dry_run import augment_words, dry_run


@pytest.fixture(autouse=True)
def no_data_sets_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))


def line(table, name):
    """The line of a value, its continuation with it, spaces made one."""
    found = re.search(rf"^[* ] {name} .*(?:\n    .*)*", table, re.MULTILINE)
    assert found, f"{name} is not in\n{table}"
    return " ".join(found[0].split())


def test_the_papers_run_on_imagenet():
    table = dry_run(settings(recipe="nfnet_f0", data="tfds:imagenet2012"))
    assert table.startswith("Dry run of nfnet_f0 with the recipe nfnet_f0 (the paper)\n")
    assert "71,489,284 parameters" in line(table, "model")
    assert "training images: 1,281,167, test images: 50,000, classes: 1,000" in line(table, "data")
    assert "known numbers; the set is not on this disk" in line(table, "data")
    # 1,281,167 // 4096 = 312; 312 * 360 = 112,320; 112,320 * 4096 = 460,062,720; 1,281,167 - 312 * 4096 = 3,215
    epochs = line(table, "epochs")
    assert "360 312 steps each, 112,320 in all, 460,062,720 images seen" in epochs
    assert "920,125,440 are read" in epochs
    assert "3,215 of each epoch are left over" in epochs
    assert line(table, "learning_rate") == "learning_rate 0.1 peak 1.6 (times 4096 / 256)"
    assert line(table, "warmup_epochs") == "warmup_epochs 5 1,560 steps"
    assert line(table, "final_learning_rate").startswith("final_learning_rate 0 ")
    assert "RandAugment (4 operations of magnitude 5)" in line(table, "augment")
    assert "*" not in table
    assert max(map(len, table.splitlines())) <= 120


def test_every_value_stands_in_it():
    table = dry_run(settings(data="tfds:imagenet2012", recipe="nf_regnet_b0", strategy="tpu", tpu="local"))
    values = {field.name for cls in (Recipe, Augment, Settings) for field in dataclasses.fields(cls)}
    for name in values - {"name", "about", "recipe"}:
        assert line(table, name)
    assert line(table, "learning_rate") == "learning_rate 0.4 peak 0.4, for any batch"
    assert "TPU answers" in line(table, "strategy")


def test_what_differs_from_the_recipe_is_marked():
    table = dry_run(settings(learning_rate=0.1, changes={"mixup": 0.0}))
    marked = {found.split()[1] for found in table.splitlines() if found.startswith("* ")}
    assert marked == {"learning_rate", "mixup", "not"}
    assert "* not the value of the recipe digits" in table


def test_accumulation_and_a_head_first_are_spelt_out():
    changes = {"gradient_accumulation_steps": 4, "head_epochs": 3}
    config = settings(epochs=30, weights="imagenet", recipe="digits", changes=changes)
    table = dry_run(config)
    assert line(table, "batch_size") == "batch_size 64 4 parts of 16 images"
    assert "22 steps each, 660 in all, 42,240 images seen; 29 of each epoch" in line(table, "epochs")
    assert "66 steps for the new classifier alone" in line(table, "head_epochs")
    assert "6 steps and 59 steps (head, all)" in line(table, "warmup_epochs")


def test_fewer_images_than_a_batch():
    table = dry_run(settings(batch_size=2048))
    assert "1437, as there are no more images" in line(table, "batch_size")
    assert "1 step each" in line(table, "epochs")
    assert "(times 1437 / 256)" in line(table, "learning_rate")
    assert "peak 0.1 (" in line(dry_run(settings(learning_rate=0.1)), "learning_rate")


def test_a_folder_is_counted(tmp_path):
    for name in ("cat", "dog", "owl"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name / f"{i}.png")
    found = count(settings(data=tmp_path))
    assert (found.train, found.test, found.classes) == (12, 3, 3)
    assert "classes: 3" in line(dry_run(settings(data=tmp_path, model="nfnet_tiny")), "data")


def test_records_are_counted(tmp_path):
    import tensorflow as tf

    png = tf.io.encode_png(np.zeros((4, 4, 3), np.uint8)).numpy()

    def record(label):
        image = tf.train.Feature(bytes_list=tf.train.BytesList(value=[png]))
        number = tf.train.Feature(int64_list=tf.train.Int64List(value=[label]))
        features = tf.train.Features(feature={"image": image, "label": number})
        return tf.train.Example(features=features).SerializeToString()

    for split, labels in (("train", [0, 1, 2, 0]), ("validation", [1, 2])):
        with tf.io.TFRecordWriter(str(tmp_path / f"{split}-00000-of-00001")) as file:
            for label in labels:
                file.write(record(label))
    found = count(settings("nfnet_tiny", f"tfrecord:{tmp_path}"))
    assert (found.train, found.test, found.classes) == (4, 2, 3)


def data_set(folder, splits, classes):
    """What TensorFlow Datasets writes of a set that it has prepared."""
    folder.mkdir(parents=True)
    info = {"name": "x", "splits": [{"name": name, "shardLengths": lengths} for name, lengths in splits.items()]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "label.labels.txt").write_text("\n".join(classes))


def test_a_data_set_on_disk_is_counted(tmp_path):
    data_set(tmp_path / "beans" / "0.9.0", {"train": ["1"]}, "ab")
    data_set(tmp_path / "beans" / "0.10.0", {"train": ["500", "534"], "test": ["128"], "validation": ["133"]}, "abc")
    data_set(tmp_path / "imagenet2012" / "5.1.0", {"train": ["20"], "test": ["9"], "validation": ["4"]}, "ab")
    data_set(tmp_path / "two" / "small" / "1.0.0", {"train": ["7"]}, "ab")

    def counts(name):
        found = count(settings("nfnet_tiny", f"tfds:{name}", data_dir=tmp_path))
        return found.train, found.test, found.classes

    assert counts("beans") == (1034, 133, 3)
    assert counts("beans:0.9.0") == (1, 0, 2)
    assert counts("beans:*.*.*") == (1034, 133, 3)
    assert counts("imagenet2012") == (20, 4, 2)
    assert counts("two") == counts("two/small") == (6, 1, 2)
    assert counts("three") == (None, None, None)


def test_a_damaged_data_set_is_not_counted(tmp_path):
    data_set(tmp_path / "beans" / "1.0.0", {"train": ["many"]}, "ab")
    assert "cannot be read" in count(settings("nfnet_tiny", "tfds:beans", data_dir=tmp_path)).note


@pytest.mark.parametrize("data", ["tfds:no_such_set", "tfrecord:a/train-*"])
def test_what_is_not_known_is_said(data):
    table = dry_run(settings("nfnet_tiny", data, recipe="nfnet_f0"))
    assert "training images: not known" in line(table, "data")
    assert ("not on this disk" if data.startswith("tfds") else "a/train-*") in line(table, "data")
    assert "not known before the images are counted" in line(table, "epochs")
    assert "peak 1.6" in line(table, "learning_rate")
    assert "parameters with 1,000 classes" in line(table, "model")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="mirroring is TensorFlow's")
def test_replicas_share_a_batch(monkeypatch):
    devices = distribution.Distribution("mirrored", replicas=4)
    monkeypatch.setattr(distribution, "make", lambda name: devices)
    table = dry_run(settings(strategy="mirrored"))
    assert "replicas: 4" in line(table, "strategy")
    assert line(table, "batch_size") == "batch_size 64 16 for each of 4 replicas"
    with pytest.raises(ValueError, match="30 images cannot be shared evenly between 4"):
        dry_run(settings(strategy="mirrored", batch_size=30))


@pytest.mark.parametrize("strategy", ["mirrored", "multi_worker", "tpu"])
def test_parts_of_a_batch_are_refused_where_they_cannot_be(strategy):
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2"):
        dry_run(settings(strategy=strategy, changes={"gradient_accumulation_steps": 2}))


def test_machines_of_a_cluster_are_counted_without_waiting_for_them(monkeypatch):
    cluster = {"cluster": {"worker": ["a:1", "b:1", "c:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(cluster))
    assert "3 machines" in line(dry_run(settings(strategy="multi_worker")), "strategy")
    monkeypatch.setenv("TF_CONFIG", "{")
    assert "TF_CONFIG does not list" in line(dry_run(settings(strategy="multi_worker")), "strategy")


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (DIGITS.augment, "shifted by up to 10 % of the side, MixUp (alpha 0.2)"),
        (Augment(flip=False, min_area=1.0), "as they are"),
        (
            recipe("nfnet_f2").augment,
            "random crops of at least 8 % of the area, every second one mirrored, half MixUp (alpha 0.2) and half "
            "CutMix (alpha 1) of pairs from twice the batch, RandAugment (4 operations of magnitude 10)",
        ),
    ],
)
def test_augmentation_in_words(augment, words):
    assert augment_words(augment) == words
