"""StochasticDepth and SkipGain."""

import keras
import numpy as np
import pytest
from keras import ops

from nfnet_keras.layers import Dropout, ResidualAdd, SkipGain, StochasticDepth


def run(layer, x, **options) -> np.ndarray:
    return ops.convert_to_numpy(layer(x, **options))


def test_inference_is_the_identity():
    x = np.random.default_rng(0).standard_normal((16, 3, 3, 2)).astype("float32")
    layer = StochasticDepth(0.9, seed=0)
    np.testing.assert_array_equal(run(layer, x), x)
    np.testing.assert_array_equal(run(layer, x, training=False), x)


def test_rate_zero_is_the_identity_and_draws_nothing():
    x = np.ones((4, 2), "float32")
    layer = StochasticDepth(0.0)
    np.testing.assert_array_equal(run(layer, x, training=True), x)
    assert not layer.variables


@pytest.mark.parametrize("shape", [(400, 3, 3, 2), (400, 5), (400,)])
def test_training_drops_whole_images_without_rescaling(shape):
    x = 1 + np.random.default_rng(0).random(shape).astype("float32")
    y = run(StochasticDepth(0.25, seed=3), x, training=True).reshape(400, -1)
    kept = np.all(y == x.reshape(400, -1), axis=1)
    dropped = np.all(y == 0, axis=1)
    assert np.all(kept | dropped)
    # Four deviations of the binomial distribution.
    assert abs(dropped.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 400)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_rate_over_many_images(rate, dtype):
    y = run(StochasticDepth(rate, seed=1, dtype=dtype), np.ones((20000, 1), "float32"), training=True)
    assert abs((y == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / 20000)


def test_seed_repeats_the_draws_and_calls_differ():
    x = np.ones((200, 1), "float32")
    a, b, other = StochasticDepth(0.5, seed=7), StochasticDepth(0.5, seed=7), StochasticDepth(0.5, seed=8)
    first, second = run(a, x, training=True), run(a, x, training=True)
    np.testing.assert_array_equal(run(b, x, training=True), first)
    np.testing.assert_array_equal(run(b, x, training=True), second)
    assert np.any(first != second)
    assert np.any(first != run(other, x, training=True))


def test_set_random_seed_repeats_the_draws():
    results = []
    for _ in range(2):
        keras.utils.set_random_seed(5)
        results.append(run(StochasticDepth(0.5), np.ones((100, 1), "float32"), training=True))
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2])
def test_rate_out_of_range(rate):
    with pytest.raises(ValueError, match=f"rate={rate}"):
        StochasticDepth(rate)


def test_skip_gain(gradients):
    x = np.random.default_rng(0).standard_normal((2, 3)).astype("float32")
    layer = SkipGain(alpha=0.2)
    np.testing.assert_array_equal(run(layer, x), np.zeros((2, 3)))
    assert tuple(layer.skip_gain.shape) == ()
    (gradient,) = gradients(lambda: ops.sum(layer(x)), [layer.skip_gain])
    assert gradient == pytest.approx(0.2 * x.sum(), rel=1e-5)
    layer.skip_gain.assign(0.5)
    np.testing.assert_allclose(run(layer, x), 0.1 * x, rtol=1e-6)
    np.testing.assert_allclose(run(SkipGain(0.2, initializer="ones"), x), 0.2 * x, rtol=1e-6)


def test_config_round_trip():
    layer = StochasticDepth(0.3, seed=4, name="sd")
    copy = StochasticDepth.from_config(layer.get_config())
    assert (copy.rate, copy.seed, copy.name) == (0.3, 4, "sd")
    layer = SkipGain(0.3, initializer=keras.initializers.Constant(2.0), name="gain")
    copy = SkipGain.from_config(layer.get_config())
    assert (copy.alpha, copy.name) == (0.3, "gain")
    np.testing.assert_allclose(run(copy, np.ones(2, "float32")), [0.6, 0.6], rtol=1e-6)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="a strategy of TensorFlow")
def test_replicas_draw_for_themselves(new_process):
    code = """
import keras
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import nfnet_keras as nfk
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
found = {}
for name, make in {"depth": nfk.layers.StochasticDepth, "dropout": nfk.layers.Dropout}.items():
    with strategy.scope():
        layer = make(0.5, seed=3)
    alone = make(0.5, seed=3)
    run = tf.function(lambda: strategy.run(lambda: layer(tf.ones((64, 1)), training=True)))
    found[name] = []
    for _ in range(3):
        parts = strategy.experimental_local_results(run())
        parts = *parts, alone(tf.ones((64, 1)), training=True)
        found[name].append([(part.numpy() > 0).ravel().tolist() for part in parts])
report(found)
"""
    for name, draws in new_process(code).items():
        first = [one for one, _, _ in draws]
        second = [two for _, two, _ in draws]
        assert first == [alone for _, _, alone in draws], name
        every = first + second
        assert all(every[i] != every[j] for i in range(6) for j in range(i)), name
        assert all(10 < sum(draw) < 54 for draw in every), name


def test_dropout_in_training_on_every_backend():
    x = np.ones((200, 50), "float32")
    y = run(Dropout(0.25, seed=1), x, training=True)
    assert abs((y == 0).mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / x.size)
    np.testing.assert_allclose(y[y != 0], 1 / 0.75, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_residual_add_is_keras_own(count, gradients):
    values = [np.random.default_rng(i).standard_normal((2, 4, 3, 5)).astype("float32") for i in range(count)]
    variables = [keras.Variable(value) for value in values]
    np.testing.assert_allclose(run(ResidualAdd(), values), sum(values), rtol=1e-6, atol=1e-6)
    found = gradients(lambda: ops.sum(ops.square(ResidualAdd()([v.value for v in variables]))), variables)
    for gradient in found:
        np.testing.assert_allclose(gradient, 2 * sum(values), rtol=1e-5, atol=1e-5)
    inputs = [keras.Input((4, 3, 5)) for _ in values]
    model = keras.Model(inputs, ResidualAdd(name="sum")(inputs))
    assert model.output_shape == (None, 4, 3, 5)
    copy = keras.Model.from_config(model.get_config())
    np.testing.assert_array_equal(run(copy, values), run(model, values))
