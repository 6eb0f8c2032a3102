"""A model of all layers, saved here and loaded by a process that knows the package alone."""

import keras
import numpy as np
from keras import ops

from nfnet_keras.layers import ResidualAdd, ScaledActivation, SkipGain, SqueezeExcite, StochasticDepth, WSConv2D


def build() -> keras.Model:
    inputs = keras.Input((8, 8, 4))
    x = WSConv2D(8, 3, padding="same", groups=2, epsilon=1e-3)(inputs)
    x = ScaledActivation("gelu", scale=0.5)(x)
    branch = SqueezeExcite(0.5)(WSConv2D(8, 1, use_bias=False)(x))
    branch = SkipGain(0.2)(StochasticDepth(0.5, seed=1)(branch))
    return keras.Model(inputs, ResidualAdd()([x, branch]))


def test_loads_in_a_new_process(tmp_path, new_process):
    model, rng = build(), np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.standard_normal(variable.shape))
    x = rng.standard_normal((2, 8, 8, 4)).astype("float32")
    expected = ops.convert_to_numpy(model(x))
    model.save(tmp_path / "layers.keras")
    np.save(tmp_path / "x.npy", x)
    code = """
import keras, nfnet_keras
model = keras.models.load_model("layers.keras")
report({"y": np.asarray(keras.ops.convert_to_numpy(model(np.load("x.npy")))).tolist(), "rate": model.layers[-3].rate})
"""
    got = new_process(code)
    np.testing.assert_allclose(got["y"], expected, rtol=1e-5, atol=1e-5)
    assert got["rate"] == 0.5


def test_clone_and_weights_file(tmp_path):
    model = build()
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(1).standard_normal(variable.shape))
    x = np.random.default_rng(2).standard_normal((1, 8, 8, 4)).astype("float32")
    model.save_weights(tmp_path / "w.weights.h5")
    clone = keras.models.clone_model(model)
    clone.load_weights(tmp_path / "w.weights.h5")
    np.testing.assert_allclose(ops.convert_to_numpy(clone(x)), ops.convert_to_numpy(model(x)), rtol=1e-5, atol=1e-5)
