"""What `compile` makes of the optimizer, and what a user of it notices."""

import keras
import numpy as np
import pytest

import nfnet_keras as nfk


def test_a_model_without_inputs_and_outputs_is_refused():
    class Mine(nfk.NormalizerFreeModel):
        def call(self, x):
            return x

    for make in (Mine, nfk.NormalizerFreeModel):
        with pytest.raises(TypeError, match=r"inputs and outputs.*AGC\(optimizer\)"):
            make()


def compiled_again(model, optimizer, x, y, between, **kwargs):
    model.compile(optimizer, "categorical_crossentropy")
    if between:
        model.fit(x, y, verbose=0)
    model.compile(optimizer, "categorical_crossentropy", metrics=["accuracy"], **kwargs)
    return model.fit(x, y, verbose=0).history


@pytest.mark.parametrize("between", [False, True])
def test_one_optimizer_compiled_twice_clips_as_said_last(between):
    x, y = np.random.default_rng(0).standard_normal((4, 6)).astype("float32"), np.eye(4, dtype="float32")
    inputs = keras.Input((6,))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(4, activation="softmax", name="head")(inputs))
    history = compiled_again(model, keras.optimizers.SGD(0.1), x, y, between, clip_factor=1e-6)
    assert history["agc_clipped"] == [1.0]
    assert model.optimizer.clipper.clip_factor == 1e-6
    history = compiled_again(model, keras.optimizers.SGD(0.1), x, y, between, clip_factor=None)
    assert "agc_clipped" not in history
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    # Nothing is clipped any more: the step is the plain one.
    plain = keras.models.clone_model(model)
    plain.set_weights(model.get_weights())
    plain.compile(keras.optimizers.SGD(0.1), "categorical_crossentropy", clip_factor=None)
    for each in (model, plain):
        each.train_on_batch(x, y)
    for a, b in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_train_on_batch_returns_what_a_keras_model_returns():
    x, y = np.ones((2, 3), "float32"), np.eye(2, dtype="float32")
    inputs = keras.Input((3,))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(2, activation="softmax")(inputs))
    model.compile("sgd", "categorical_crossentropy", metrics=["accuracy"])
    assert len(model.train_on_batch(x, y)) == 2
    assert set(model.train_on_batch(x, y, return_dict=True)) == {"loss", "accuracy", "agc_clipped"}


def test_the_optimizer_is_saved_once(tmp_path):
    inputs = keras.Input((200,))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(200)(inputs))
    sizes = []
    for clip_factor in (None, 0.01):
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", clip_factor=clip_factor)
        model.optimizer.build(model.trainable_variables)
        model.save(tmp_path / "model.keras")
        sizes.append((tmp_path / "model.keras").stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize("clip_factor", [0, -1, True, "0.1"])
def test_a_clip_factor_that_is_no_positive_number_is_refused(clip_factor):
    inputs = keras.Input((3,))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(2)(inputs))
    with pytest.raises(ValueError, match="clip_factor"):
        model.compile("sgd", "mse", clip_factor=clip_factor)


def test_training_goes_on_after_a_fit_with_a_moving_average():
    x, y = np.ones((4, 3), "float32"), np.eye(4, dtype="float32")
    inputs = keras.Input((3,))
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(4, activation="softmax")(inputs))
    model.compile(nfk.optimizers.SGD_AGC(0.1, use_ema=True), "categorical_crossentropy")
    model.fit(x, y, verbose=0)
    averaged = model.get_weights()
    model.train_on_batch(x, y)
    model.fit(x, y, verbose=0)
    assert any(np.abs(a - b).max() > 0 for a, b in zip(averaged, model.get_weights(), strict=True))
