import numpy as np
import pytest
import tensorflow as tf

from nfnet_keras.data import Augment, mixing, randomness

COUNT, SIDE = 64, 16


@pytest.fixture
def batch():
    """Image i is a one in channel i % 3; so the mean colour tells the share of each class."""
    labels = np.eye(3, dtype=np.float32)[np.arange(COUNT) % 3]
    images = np.broadcast_to(labels[:, None, None], (COUNT, SIDE, SIDE, 3))
    return tf.constant(images), tf.constant(labels)


def mixed(batch, augment, step=0):
    images, labels = mixing.mix(*batch, augment, randomness.key(0, randomness.MIX, 0, step))
    return images.numpy(), labels.numpy()


@pytest.mark.parametrize(
    "augment",
    [Augment(mixup=0.2), Augment(mixup=1.0), Augment(cutmix=1.0), Augment(mixup=0.2, cutmix=1.0)],
)
def test_label_shares_are_the_pixel_shares(batch, augment):
    images, labels = mixed(batch, augment)
    np.testing.assert_allclose(images.mean(axis=(1, 2)), labels, atol=1e-5)
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, atol=1e-6)
    assert (np.sort(labels, axis=1)[:, 1] > 0.01).sum() > COUNT / 4  # something was mixed
    own = labels[np.arange(COUNT), np.arange(COUNT) % 3]
    partner = labels[np.arange(COUNT), (np.arange(COUNT) - 1) % 3]
    # the first sample's partner is the last, of its own class
    np.testing.assert_allclose((own + partner)[1:], 1.0, atol=1e-6)
    assert len(np.unique(own.round(4))) > COUNT / 4  # each sample its own share


def test_off_changes_nothing(batch):
    images, labels = mixed(batch, Augment())
    assert np.array_equal(images, batch[0].numpy())
    assert np.array_equal(labels, batch[1].numpy())


def test_mixup_is_even_over_the_image_and_cutmix_is_a_box(batch):
    up, _ = mixed(batch, Augment(mixup=1.0))
    assert np.abs(up - up[:, :1, :1]).max() < 1e-6
    cut, _ = mixed(batch, Augment(cutmix=1.0))
    assert set(np.unique(cut)) == {0.0, 1.0}
    for i in range(1, COUNT):
        pasted = cut[i, :, :, i % 3] == 0
        box = pasted.any(axis=1)[:, None] & pasted.any(axis=0)[None, :]
        assert np.array_equal(pasted, box)
        for edge in (pasted.any(axis=0), pasted.any(axis=1)):
            assert (np.diff(edge.astype(int)) == 1).sum() <= 1


def test_both_on_is_half_and_half(batch):
    images, _ = mixed(batch, Augment(mixup=1.0, cutmix=1.0))
    even = np.abs(images - images[:, :1, :1]).max(axis=(1, 2, 3)) < 1e-6
    blended = even & ((images[:, 0, 0] > 0) & (images[:, 0, 0] < 1)).any(axis=1)
    assert blended[1 : COUNT // 2].all()
    assert set(np.unique(images[COUNT // 2 :])) == {0.0, 1.0}


def test_mixup_shares_are_beta():
    labels = tf.constant(np.eye(2, dtype=np.float32)[np.arange(4000) % 2])
    images = tf.zeros((4000, 1, 1, 3))
    _, found = mixing.mix(images, labels, Augment(mixup=0.4), randomness.key(2, 4, 0))
    own = found.numpy()[np.arange(4000), np.arange(4000) % 2]
    assert abs(own.mean() - 0.5) < 0.02
    assert abs(own.var() - 1 / (4 * 1.8)) < 0.01


def test_cutmix_boxes_have_the_area_of_lambda_before_clipping():
    # With alpha huge, lambda is 1/2 and the box side is sqrt(1/2) of 64 = 45; a box whose
    # centre is far enough inside is whole, the others are smaller.
    labels = tf.constant(np.eye(2, dtype=np.float32)[np.arange(500) % 2])
    images = tf.zeros((500, 64, 64, 3))
    _, found = mixing.mix(images, labels, Augment(cutmix=1e6), randomness.key(2, 4, 0))
    pasted = 1 - found.numpy()[np.arange(500), np.arange(500) % 2]
    assert 0.47 < pasted.max() < 0.53
    assert pasted.min() > 0.11  # a quarter of the box at a corner
    assert pasted.min() < 0.2
    # the mean of the clipped side is side * (1 - side / 4 / 64) in shares
    side = np.sqrt(0.5)
    assert abs(pasted.mean() - (side * (1 - side / 4)) ** 2) < 0.015


@pytest.mark.parametrize("augment", [Augment(mixup=0.2, cutmix=1.0), Augment(cutmix=1.0)])
def test_a_batch_of_one_stays_as_it_is(augment):
    images, labels = tf.random.stateless_uniform((1, 4, 4, 3), (0, 0)), tf.constant([[0.0, 1.0]])
    found = mixed((images, labels), augment)
    assert np.array_equal(found[0], images.numpy())
    np.testing.assert_allclose(found[1], labels.numpy(), atol=1e-6)
