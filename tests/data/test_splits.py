import numpy as np
import pytest

from nfnet_keras.data import DataError, Split, check_labels
from nfnet_keras.data.splits import held_out

IMAGES = np.zeros((2, 4, 4, 3), np.uint8)


def test_split_keeps_int32_labels_and_its_length():
    split = Split(np.array([1, 0], np.int64), images=IMAGES)
    assert split.labels.dtype == np.int32
    assert len(split) == 2
    assert len(Split(np.array([0, 1, 0]), paths=("a", "b", "c"))) == 3


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"labels": [0, 1]}, "exactly one"),
        ({"labels": [0, 1], "images": IMAGES, "paths": ("a", "b")}, "exactly one"),
        ({"labels": [0], "images": IMAGES}, "2 images but 1 labels"),
        ({"labels": [0.0, 1.0], "images": IMAGES}, "float64"),
        ({"labels": [[1, 0], [0, 1]], "images": IMAGES}, "shape (2, 2)"),
        ({"labels": [0, 1], "images": IMAGES.astype(np.float32)}, "float32"),
        ({"labels": [0, 1], "images": IMAGES[..., :1]}, "(2, 4, 4, 1)"),
        ({"labels": [0, 1], "images": IMAGES[..., 0]}, "(2, 4, 4)"),
        ({"labels": [0, 2**40], "images": IMAGES}, "int32"),
    ],
)
def test_split_refuses(arguments, word):
    with pytest.raises(DataError) as caught:
        Split(**arguments)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_good_labels_pass():
    check_labels([0, 1, 2], 3)
    check_labels(np.array([2, 2], np.uint8), 3)
    check_labels([], 3)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 3, 7], ("label 3", "position 2", "0..2")),
        ([0, -1], ("label -1", "position 1", "0..2")),
        ([0.0, 1.5], ("1.5", "position 1", "not an integer", "0..2")),
        ([0.0, 1.0], ("0.0", "position 0", "not an integer", "float64")),
        ([1.0, float("nan")], ("nan", "position 1")),
        (["cat"], ("'cat'", "position 0", "not an integer")),
        ([0, None], ("None", "position 1", "not an integer")),
        ([True, False], ("True", "not an integer", "bool")),
        ([[0, 1]], ("shape (1, 2)", "argmax")),
        ([[0, 1], [0]], ("unequal",)),
    ],
)
def test_bad_labels_are_named(labels, words):
    with pytest.raises(DataError) as caught:
        check_labels(labels, 3)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_held_out_follows_names_not_places():
    keys = [f"{i}.png" for i in range(50)]
    chosen = {k for k, held in zip(keys, held_out(keys, 10, seed=1), strict=True) if held}
    back = keys[::-1]
    again = {k for k, held in zip(back, held_out(back, 10, seed=1), strict=True) if held}
    assert len(chosen) == 10
    assert chosen == again
    assert not np.array_equal(held_out(keys, 10, seed=1), held_out(keys, 10, seed=2))
