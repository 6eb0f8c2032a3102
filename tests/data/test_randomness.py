import numpy as np
import pytest

from nfnet_keras.data import randomness

KEY = (5, randomness.MIX, 2, 3)


def test_every_part_of_a_key_matters():
    base = randomness.uniform(randomness.key(*KEY), (8,)).numpy()
    assert np.array_equal(base, randomness.uniform(randomness.key(*KEY), (8,)).numpy())
    for place in range(4):
        changed = list(KEY)
        changed[place] += 1
        assert not np.array_equal(base, randomness.uniform(randomness.key(*changed), (8,)).numpy())


def test_permutation():
    orders = [randomness.permutation(randomness.key(0, 0, e), 100).numpy() for e in range(2)]
    assert all(np.array_equal(np.sort(order), np.arange(100)) for order in orders)
    assert (orders[0] == orders[1]).sum() < 10
    assert (orders[0] == np.arange(100)).sum() < 10


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_beta_has_the_mean_and_variance_of_beta(alpha):
    draws = randomness.beta(randomness.key(1, 4, 0), 20000, alpha).numpy()
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(draws.var() - 1 / (4 * (2 * alpha + 1))) < 0.004


def test_beta_of_one_is_uniform():
    draws = np.sort(randomness.beta(randomness.key(1, 4, 1), 20000, 1.0).numpy())
    assert np.abs(draws - np.linspace(0, 1, 20000)).max() < 0.015


def test_beta_of_a_tiny_alpha_is_finite():
    draws = randomness.beta(randomness.key(1, 4, 0), 1000, 1e-3).numpy()
    assert np.isfinite(draws).all()
    assert 400 < (draws > 0.5).sum() < 600
