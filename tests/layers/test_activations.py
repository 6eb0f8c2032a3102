"""Scaled activations: the authors' gains, gradients, errors."""

import keras
import numpy as np
import pytest
from keras import ops

from nfnet_keras.layers import ACTIVATION_GAINS, ScaledActivation


def compute(name, x, **options) -> np.ndarray:
    return ops.convert_to_numpy(ScaledActivation(name, **options)(x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("name", sorted(set(ACTIVATION_GAINS) - {"glu"}))
def test_golden(golden, name):
    numbers = golden("layers")
    reference = numbers[f"activations|{name}"]
    got = compute(name, numbers["activations|x"])
    assert np.max(np.abs(got - reference)) <= 1e-5 * max(1, np.max(np.abs(reference)))


def test_every_activation_of_the_golden_numbers_is_there(golden):
    names = {key.split("|")[1] for key in golden("layers") if key.startswith("activations|")} - {"x"}
    assert names | {"glu"} == set(ACTIVATION_GAINS)


def test_glu():
    x = np.random.default_rng(0).standard_normal((2, 3, 8)).astype("float32")
    expected = ACTIVATION_GAINS["glu"] * x[..., :4] / (1 + np.exp(-x[..., 4:]))
    np.testing.assert_allclose(compute("glu", x), expected, rtol=1e-5, atol=1e-6)
    assert ScaledActivation("glu").compute_output_shape((None, 5, 8)) == (None, 5, 4)


@pytest.mark.parametrize("name", sorted(ACTIVATION_GAINS))
def test_keeps_the_variance_of_a_standard_normal_input(name):
    z = np.random.default_rng(0).standard_normal((200, 4000)).astype("float32")
    y = compute(name, z)
    axis = -1 if name == "log_softmax" else None
    assert abs(np.mean(y.var(axis=axis)) - 1) < 0.02


def test_scale_multiplies_the_output():
    x = np.linspace(-3, 3, 20, dtype="float32")
    np.testing.assert_allclose(compute("relu", x, scale=0.25), 0.25 * compute("relu", x), rtol=1e-6)


def test_gelu_is_the_tanh_approximation(gradients):
    values = np.concatenate([np.linspace(-8, 8, 161), [-100.0, -30.0, 30.0, 100.0]]).astype("float32")
    x = keras.Variable(values)
    layer = ScaledActivation("gelu")
    gain = ACTIVATION_GAINS["gelu"]
    y = ops.convert_to_numpy(layer(values))
    np.testing.assert_allclose(y, gain * gelu(np.float64(values)), atol=1e-5)
    (got,) = gradients(lambda: ops.sum(layer(ops.convert_to_tensor(x))), [x])
    exact = np.float64(values)
    slope = gain * (gelu(exact + 1e-5) - gelu(exact - 1e-5)) / 2e-5
    np.testing.assert_allclose(got, slope, atol=2e-5)
    # Against the backend's own derivative, with a gradient that is not all ones.
    weights = ops.convert_to_tensor(np.random.default_rng(1).standard_normal(len(values)).astype("float32"))
    (a,) = gradients(lambda: ops.sum(ops.multiply(layer(ops.convert_to_tensor(x)), weights)), [x])
    (b,) = gradients(
        lambda: ops.sum(ops.multiply(ops.gelu(ops.convert_to_tensor(x), approximate=True), weights)) * gain, [x]
    )
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(gradients, dtype):
    values = np.linspace(-6, 6, 49, dtype="float32")
    x = keras.Variable(values)
    layer, exact = ScaledActivation("gelu", dtype=f"mixed_{dtype}"), ScaledActivation("gelu")
    y = layer(values)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    np.testing.assert_allclose(ops.convert_to_numpy(ops.cast(y, "float32")), compute("gelu", values), atol=0.05)
    a, b = (
        gradients(lambda layer=layer: ops.sum(ops.cast(layer(ops.convert_to_tensor(x)), "float32")), [x])[0]
        for layer in (layer, exact)
    )
    np.testing.assert_allclose(a, b, atol=0.05)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow's gradient is written out")
@pytest.mark.parametrize("jit", [False, True])
def test_gelu_gradient_when_compiled(jit):
    import tensorflow as tf

    x = tf.constant(np.linspace(-4, 4, 33, dtype="float32"))
    layer = ScaledActivation("gelu")

    @tf.function(jit_compile=jit)
    def slope(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(layer(x))
        return tape.gradient(y, x)

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.reduce_sum(ACTIVATION_GAINS["gelu"] * tf.nn.gelu(x, approximate=True))
    np.testing.assert_allclose(slope(x), tape.gradient(y, x), atol=1e-5)


def test_unknown_name_names_the_nearest():
    with pytest.raises(ValueError, match=r"'gelo'.*Did you mean 'gelu'"):
        ScaledActivation("gelo")
    with pytest.raises(ValueError, match="identity"):
        ScaledActivation(None)


def test_config_round_trip():
    layer = ScaledActivation("silu", scale=0.5, name="act")
    copy = ScaledActivation.from_config(layer.get_config())
    assert (copy.activation, copy.scale, copy.name) == ("silu", 0.5, "act")
