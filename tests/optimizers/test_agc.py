"""AGC round other optimizers: clip in NumPy, then the plain Keras optimizer."""

import copy
import json

import keras
import numpy as np
import pytest
from keras import ops

from nfnet_keras.optimizers import AGC, SGD_AGC, clips_adaptively, warmup_cosine

K = keras.optimizers
OPTIMIZERS = {
    "sgd": lambda **kw: K.SGD(0.1, **kw),
    "sgd momentum and decay": lambda **kw: K.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.5, **kw),
    "adam": lambda **kw: K.Adam(0.01, **kw),
    "adamw": lambda **kw: K.AdamW(0.1, weight_decay=1.0, **kw),
    "rmsprop": lambda **kw: K.RMSprop(0.01, weight_decay=0.5, **kw),
    "adagrad": lambda **kw: K.Adagrad(0.01, **kw),
    "adadelta": lambda **kw: K.Adadelta(0.1, **kw),
    "adamax": lambda **kw: K.Adamax(0.01, **kw),
    "nadam": lambda **kw: K.Nadam(0.01, **kw),
    "lion": lambda **kw: K.Lion(0.01, weight_decay=0.5, **kw),
    "lamb": lambda **kw: K.Lamb(0.01, **kw),
    "ftrl": lambda **kw: K.Ftrl(0.01, **kw),
    "adafactor": lambda **kw: K.Adafactor(0.01, **kw),
    "muon": lambda **kw: K.Muon(0.1, weight_decay=1.0, adam_weight_decay=3.0, **kw),
    "muon adam decay": lambda **kw: K.Muon(0.1, weight_decay=None, adam_weight_decay=3.0, **kw),
    "schedule": lambda **kw: K.AdamW(warmup_cosine(0.2, 10, 2), weight_decay=1.0, **kw),
    "clipvalue": lambda **kw: K.SGD(0.1, clipvalue=0.05, **kw),
}
if hasattr(K, "ScheduleFreeAdamW"):
    OPTIMIZERS["schedule free"] = lambda **kw: K.ScheduleFreeAdamW(0.01, **kw)
# JAX compiles every operation of an eager step for every shape, which takes seconds an optimizer.
FEW = ["sgd momentum and decay", "adamw", "muon", "schedule"]
NAMES = FEW if keras.backend.backend() == "jax" else list(OPTIMIZERS)


def clipped(arrays, variables, values, numpy_clip, clip_factor=0.05):
    return [
        g if v.path.endswith("predictions/kernel") else numpy_clip(g, p, clip_factor).astype("float32")
        for g, v, p in zip(arrays, variables, values(variables), strict=True)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_equals_clipping_in_numpy_and_the_plain_optimizer(
    name, make_variables, make_gradients, apply, values, same, numpy_clip
):
    ours, theirs = make_variables(), make_variables()
    optimizer, plain = AGC(OPTIMIZERS[name](), clip_factor=0.05), OPTIMIZERS[name]()
    for step in range(2):
        arrays = make_gradients(step)
        apply(optimizer, arrays, ours)
        if plain.clipvalue:
            arrays = [np.clip(g, -plain.clipvalue, plain.clipvalue) for g in arrays]
        apply(plain, clipped(arrays, theirs, values, numpy_clip), theirs)
    same(ours, theirs, 2e-6)
    assert int(optimizer.iterations) == 2
    assert 0 < float(ops.convert_to_numpy(optimizer.clipped_share)) <= 1


def test_clips_at_all(make_variables, make_gradients, apply, values):
    ours, theirs = make_variables(), make_variables()
    apply(AGC(K.SGD(0.1), clip_factor=0.05), make_gradients(0), ours)
    apply(K.SGD(0.1), make_gradients(0), theirs)
    moved = [not np.allclose(a, b) for a, b in zip(values(ours), values(theirs), strict=True)]
    paths = [v.path for v in ours]
    assert not moved[paths.index("predictions/kernel")]
    assert moved[paths.index("conv/kernel")] and moved[paths.index("dense/kernel")]


@pytest.mark.parametrize("decay", [False, True])
def test_gradient_accumulation_clips_the_mean(decay, make_variables, make_gradients, apply, values, same, numpy_clip):
    ours, theirs = make_variables(), make_variables()
    options = {"momentum": 0.9, "weight_decay": 1.0 if decay else None}
    optimizer = AGC(K.SGD(0.1, gradient_accumulation_steps=2, **options), clip_factor=0.05)
    plain = K.SGD(0.1, **options)
    for step in range(2):
        a, b = make_gradients(2 * step), make_gradients(2 * step + 1)
        before = values(ours)
        apply(optimizer, a, ours)
        same(ours, before)
        apply(optimizer, b, ours)
        mean = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        apply(plain, clipped(mean, theirs, values, numpy_clip), theirs)
        same(ours, theirs)
    assert int(optimizer.iterations) == 2


def test_use_ema(make_variables, make_gradients, apply, values, same, numpy_clip):
    ours, theirs = make_variables(), make_variables()
    options = {"use_ema": True, "ema_momentum": 0.7}
    optimizer, plain = AGC(K.SGD(0.1, **options), clip_factor=0.05), K.SGD(0.1, **options)
    for step in range(2):
        apply(optimizer, make_gradients(step), ours)
        apply(plain, clipped(make_gradients(step), theirs, values, numpy_clip), theirs)
    same(optimizer._model_variables_moving_average, plain._model_variables_moving_average)
    optimizer.finalize_variable_values(ours)
    plain.finalize_variable_values(theirs)
    same(ours, theirs)


def test_loss_scale_factor(make_variables, make_gradients, apply, values, same, numpy_clip):
    ours, theirs = make_variables(), make_variables()
    optimizer = AGC(K.SGD(0.1, loss_scale_factor=8.0), clip_factor=0.05)
    assert float(ops.convert_to_numpy(optimizer.scale_loss(ops.convert_to_tensor(2.0)))) == 16
    apply(optimizer, [8 * g for g in make_gradients(0)], ours)
    apply(K.SGD(0.1), clipped(make_gradients(0), theirs, values, numpy_clip), theirs)
    same(ours, theirs)


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="Keras's LossScaleOptimizer.apply leaks a tracer on JAX outside of a trainer",
)
@pytest.mark.parametrize("inside", [True, False])
def test_loss_scale_optimizer(inside, make_variables, make_gradients, apply, values, same, numpy_clip):
    ours, theirs = make_variables(), make_variables()
    if inside:
        optimizer = AGC(K.LossScaleOptimizer(K.SGD(0.1, weight_decay=0.5), initial_scale=64.0), clip_factor=0.05)
    else:
        optimizer = K.LossScaleOptimizer(AGC(K.SGD(0.1, weight_decay=0.5), clip_factor=0.05), initial_scale=64.0)
    assert clips_adaptively(optimizer)
    apply(optimizer, [64 * g for g in make_gradients(0)], ours)
    assert float(ops.convert_to_numpy(optimizer.scale_loss(ops.convert_to_tensor(2.0)))) == 128
    plain = K.SGD(0.1, weight_decay=0.5)
    apply(plain, clipped(make_gradients(0), theirs, values, numpy_clip), theirs)
    same(ours, theirs)
    overflow = [np.full(v.shape, np.inf, "float32") for v in ours]
    apply(optimizer, overflow, ours)
    same(ours, theirs)
    apply(optimizer, [32 * g for g in make_gradients(1)], ours)
    apply(plain, clipped(make_gradients(1), theirs, values, numpy_clip), theirs)
    same(ours, theirs)


@pytest.mark.parametrize("kind", ["map", "callable"])
def test_multi_optimizer(kind, make_variables, make_gradients, apply, values, same, numpy_clip):
    def make():
        sgd, adam = K.SGD(0.1, weight_decay=0.5), K.Adam(0.01)
        if kind == "map":
            return K.MultiOptimizer(K.OptimizerMap(sgd, {"dense/.*": adam}))
        return K.MultiOptimizer(lambda variable: adam if variable.path.startswith("dense") else sgd)

    ours, theirs = make_variables(), make_variables()
    optimizer, plain = AGC(make(), clip_factor=0.05), make()
    for step in range(2):
        apply(optimizer, make_gradients(step), ours)
        apply(plain, clipped(make_gradients(step), theirs, values, numpy_clip), theirs)
    same(ours, theirs)
    assert 0 < float(ops.convert_to_numpy(optimizer.clipped_share)) < 1


def test_exclude_from_weight_decay(make_variables, make_gradients, apply, values, same, numpy_clip):
    ours, theirs = make_variables(), make_variables()
    optimizer, plain = AGC(K.AdamW(0.1, weight_decay=1.0), clip_factor=0.05), K.AdamW(0.1, weight_decay=1.0)
    for each in (optimizer, plain):
        each.exclude_from_weight_decay(var_names=["bias", "gain"])
    apply(optimizer, make_gradients(0), ours)
    apply(plain, clipped(make_gradients(0), theirs, values, numpy_clip), theirs)
    same(ours, theirs)


def test_attributes_are_those_of_the_wrapped_optimizer(make_variables, make_gradients, apply):
    inner = K.SGD(0.1, momentum=0.9, weight_decay=0.01)
    optimizer = AGC(inner)
    assert float(optimizer.learning_rate) == pytest.approx(0.1)
    assert (optimizer.momentum, optimizer.weight_decay, optimizer.use_ema) == (0.9, 0.01, False)
    optimizer.learning_rate = 0.05
    assert float(inner.learning_rate) == pytest.approx(0.05)
    optimizer.weight_decay = 0.02
    assert inner.weight_decay == 0.02
    apply(optimizer, make_gradients(0), make_variables())
    assert int(optimizer.iterations) == int(inner.iterations) == 1
    assert optimizer.momentums is inner.momentums
    assert optimizer.variables == inner.variables
    with pytest.raises(AttributeError):
        _ = optimizer.no_such_setting


def test_a_schedule_cannot_be_overwritten_but_is_read():
    optimizer = AGC(K.SGD(warmup_cosine(1.0, 100)))
    assert float(optimizer.learning_rate) == pytest.approx(1.0)
    with pytest.raises(TypeError):
        optimizer.learning_rate = "fast"


def test_set_weights(make_variables, make_gradients, apply, values, same):
    a, b = AGC(K.Adam(0.01)), AGC(K.Adam(0.01))
    va, vb = make_variables(), make_variables()
    apply(a, make_gradients(0), va)
    apply(b, make_gradients(1), vb)
    for target, source in zip(vb, values(va), strict=True):
        target.assign(source)
    b.set_weights(values(a.variables))
    for optimizer, variables in ((a, va), (b, vb)):
        apply(optimizer, make_gradients(2), variables)
    same(va, vb)
    # Its part, the wrapped optimizer, saves what there is; the wrapper saving it too would double the file.
    own, inner = {}, {}
    a.save_own_variables(own)
    a.inner_optimizer.save_own_variables(inner)
    assert not own
    assert len(inner) == len(a.variables)


@pytest.mark.parametrize("given", ["sgd", K.SGD, None, keras.layers.Dense(1)], ids=["name", "class", "none", "layer"])
def test_only_optimizers_can_be_wrapped(given):
    with pytest.raises(TypeError, match="wraps an instance"):
        AGC(given)


@pytest.mark.parametrize(
    "make", [lambda: AGC(K.SGD(0.1)), lambda: SGD_AGC(0.1), lambda: K.LossScaleOptimizer(AGC(K.SGD(0.1)))]
)
def test_what_clips_already_cannot_be_wrapped(make):
    with pytest.raises(ValueError, match="already"):
        AGC(make())


def test_an_unclipped_sgd_agc_can_be_wrapped(make_variables, make_gradients, apply, same):
    ours, theirs = make_variables(), make_variables()
    apply(AGC(SGD_AGC(0.5, weight_decay=0.1, clip_factor=None), clip_factor=0.05), make_gradients(0), ours)
    apply(SGD_AGC(0.5, weight_decay=0.1, clip_factor=0.05), make_gradients(0), theirs)
    same(ours, theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AGC(
            K.AdamW(1e-3, weight_decay=0.1), clip_factor=0.02, eps=1e-2, exclude_from_clipping=["a.*b"], name="x"
        ),
        lambda: AGC(K.SGD(warmup_cosine(0.1, 10, 2), use_ema=True)),
        lambda: AGC(K.LossScaleOptimizer(K.SGD(0.1))),
        lambda: K.LossScaleOptimizer(AGC(K.SGD(0.1))),
        lambda: AGC(K.MultiOptimizer(K.OptimizerMap(K.SGD(0.1), {"dense/.*": K.Adam(0.01)}))),
    ],
)
def test_config_round_trip(make):
    optimizer = make()
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(optimizer)))
    loaded = keras.saving.deserialize_keras_object(config)
    assert type(loaded) is type(optimizer)
    assert json.dumps(loaded.get_config(), sort_keys=True) == json.dumps(optimizer.get_config(), sort_keys=True)
    assert clips_adaptively(loaded)


def test_deepcopy(make_variables, make_gradients, apply, same):
    a, b = make_variables(), make_variables()
    original = AGC(K.SGD(0.1, momentum=0.9), clip_factor=0.05)
    twin = copy.deepcopy(original)
    apply(twin, make_gradients(0), a)
    assert not original.inner_optimizer.built
    apply(original, make_gradients(0), b)
    same(a, b)


def test_clipped_path_of_the_wrapped_optimizer_alone(make_variables, make_gradients, apply, same):
    inner = K.SGD(0.1)
    wrapper = AGC(inner, clip_factor=0.05)
    a, b = make_variables(), make_variables()
    wrapper.build(a)
    apply(inner, make_gradients(0), a)
    apply(AGC(K.SGD(0.1), clip_factor=0.05), make_gradients(0), b)
    same(a, b)


def test_embeddings_with_sparse_gradients(numpy_clip):
    """TensorFlow gives `IndexedSlices` for an embedding that is looked up."""
    ids, targets = np.array([[1, 2, 2], [5, 1, 0]]), np.array([[1.0], [-2.0]], "float32")
    results = {}
    for name, optimizer in {
        "AGC": AGC(K.SGD(0.5), clip_factor=0.05),
        "SGD_AGC": SGD_AGC(0.5, momentum=0.0, weight_decay=None, clip_factor=0.05),
        "plain": K.SGD(0.5),
    }.items():
        keras.utils.set_random_seed(1)
        model = keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                keras.layers.Embedding(7, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )
        before = ops.convert_to_numpy(model.layers[0].embeddings).copy()
        model.compile(optimizer, "mse")
        model.train_on_batch(ids, targets)
        results[name] = ops.convert_to_numpy(model.layers[0].embeddings) - before
    expected = -0.5 * numpy_clip(results["plain"] / -0.5, before, 0.05)
    assert np.max(np.abs(expected - results["plain"])) > 1e-3
    np.testing.assert_allclose(results["AGC"], expected, atol=1e-6)
    np.testing.assert_allclose(results["SGD_AGC"], expected, atol=1e-6)


TRAINED_ELSEWHERE = """
import keras, nfnet_keras
x, y = np.load("x.npy"), np.load("y.npy")
result = {}
for name in names:
    model = keras.models.load_model(f"{name}.keras")
    losses = [float(model.train_on_batch(x, y)) for _ in range(2)]
    optimizer = model.optimizer
    result[name] = {"losses": losses, "type": type(optimizer).__name__, "iterations": int(optimizer.iterations)}
report(result)
"""


def test_training_goes_on_in_a_new_process(tmp_path, new_process):
    """A plain `keras.Model` with our optimizers, saved in the middle of training."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((8, 6)).astype("float32"), rng.standard_normal((8, 2)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", y)
    made = {
        "sgd_agc": SGD_AGC(warmup_cosine(0.5, 20, 1), clip_factor=0.02, use_ema=True, ema_momentum=0.9),
        "agc": AGC(K.AdamW(0.05, weight_decay=0.1), clip_factor=0.02, exclude_from_clipping=[]),
        "scaled": K.LossScaleOptimizer(AGC(K.SGD(0.1, momentum=0.9), clip_factor=0.02)),
        "multi": AGC(K.MultiOptimizer(K.OptimizerMap(K.SGD(0.1, momentum=0.9), {".*first.*": K.Adam(0.01)}))),
    }
    expected = {}
    for name, optimizer in made.items():
        model = keras.Sequential(
            [keras.Input((6,)), keras.layers.Dense(5, "relu", name="first"), keras.layers.Dense(2, name="predictions")]
        )
        model.compile(optimizer, "mse")
        for _ in range(2):
            model.train_on_batch(x, y)
        model.save(tmp_path / f"{name}.keras")
        expected[name] = [float(model.train_on_batch(x, y)) for _ in range(2)]
    got = new_process(TRAINED_ELSEWHERE, names=list(made))
    for name, optimizer in made.items():
        np.testing.assert_allclose(got[name]["losses"], expected[name], rtol=1e-5, err_msg=name)
        assert (got[name]["type"], got[name]["iterations"]) == (type(optimizer).__name__, 4)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's strategies")
@pytest.mark.parametrize("devices", [1, 2])
def test_accumulation_inside_of_a_strategy_is_refused(new_process, devices):
    # Keras's optimizers end in an error of TensorFlow's that names neither.
    code = """
import keras, tensorflow as tf
import nfnet_keras as nfk

processor = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
with tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(devices)]).scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    optimizer = nfk.optimizers.AGC(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    model.compile(optimizer, "mse")
try:
    model.fit(np.ones((8, 4), "float32"), np.ones((8, 2), "float32"), batch_size=4, verbose=0)
except ValueError as error:
    report(str(error))
"""
    said = new_process(code, devices=devices)
    assert "cannot accumulate gradients inside of a tf.distribute strategy" in said
    assert "gradient_accumulation_steps=2" in said
