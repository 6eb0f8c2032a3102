"""What only TensorFlow has: traced functions, distribution strategies."""

import keras
import numpy as np
import pytest

import nfnet_keras as nfk

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow only")


class Counting(nfk.NormalizerFreeModel):
    calls = 0

    def train_step(self, *args):
        type(self).calls += 1
        return super().train_step(*args)


def make(cls):
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.GlobalAveragePooling2D()(nfk.layers.WSConv2D(4, 3)(inputs))
    return cls(inputs, keras.layers.Dense(3, "softmax", name="predictions")(x))


def data(count=8):
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, 6, 6, 3)).astype("float32"), np.eye(3, dtype="float32")[
        rng.integers(0, 3, count)
    ]


@pytest.mark.parametrize("way", ["fit", "train_on_batch"])
@pytest.mark.parametrize("optimizer", ["adam", nfk.optimizers.SGD_AGC], ids=["adam", "sgd_agc"])
def test_one_trace(way, optimizer):
    x, y = data()
    model = make(Counting)
    model.compile(
        optimizer if isinstance(optimizer, str) else optimizer(0.1), "categorical_crossentropy", metrics=["accuracy"]
    )
    Counting.calls = 0
    if way == "fit":
        model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    else:
        for _ in range(3):
            model.train_on_batch(x, y)
    assert Counting.calls == 1


def test_memory_goes_back_once_the_step_is_compiled(monkeypatch):
    given = []
    monkeypatch.setattr("nfnet_keras.tensorflow_step._give_back_memory", lambda: given.append(Counting.calls))
    x, y = data()
    model = make(Counting)
    model.compile("sgd", "categorical_crossentropy")
    Counting.calls = 0
    model.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert given == [1]


def test_the_optimizer_is_built_before_the_first_trace_and_metrics_count_from_zero():
    x, y = data()
    model = make(nfk.NormalizerFreeModel)
    model.compile("sgd", "categorical_crossentropy", metrics=["accuracy"])
    predicted = model.predict(x, verbose=0)
    history = model.fit(x, y, batch_size=8, verbose=0).history
    assert history["accuracy"][0] == pytest.approx(np.mean(predicted.argmax(1) == y.argmax(1)))
    assert history["loss"][0] == pytest.approx(-np.mean(np.sum(y * np.log(predicted), 1)), rel=1e-4)


def test_data_without_targets():
    """A model that adds its own loss is fitted on inputs alone."""
    x, _ = data()

    class Penalty(keras.layers.Layer):
        def call(self, inputs):
            self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
            return inputs

    inputs = keras.Input((6, 6, 3))
    model = nfk.NormalizerFreeModel(inputs, Penalty()(nfk.layers.WSConv2D(4, 3)(inputs)))
    model.compile("sgd")
    assert "agc_clipped" in model.fit(x, verbose=0).history


@pytest.mark.parametrize("nesterov", [True, False])
def test_apply_momentum(nesterov):
    import tensorflow as tf

    from nfnet_keras.tensorflow_step import apply_momentum

    w, m = tf.Variable([1.0, 2.0]), tf.Variable([0.5, -0.5])
    apply_momentum(w, m, tf.constant([1.0, 2.0]), tf.constant(0.1), 0.9, nesterov)
    velocity = 0.9 * np.array([0.5, -0.5]) + [1.0, 2.0]
    update = np.array([1.0, 2.0]) + 0.9 * velocity if nesterov else velocity
    np.testing.assert_allclose(m, velocity, rtol=1e-6)
    np.testing.assert_allclose(w, np.array([1.0, 2.0]) - 0.1 * update, rtol=1e-6)


DISTRIBUTED = """
import tensorflow as tf
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
import keras, nfnet_keras as nfk
from nfnet_keras.applications.nfnet import NFNet, NFNetVariant


def nfnet():
    row = NFNetVariant("small", (16, 32, 32, 32), (1, 1, 1, 1), 0.0, 32, 32, group_width=8)
    return NFNet(row, weights=None, classes=5, classifier_activation=None, stochastic_depth_rate=0.0)


def few_layers():
    inputs = keras.Input((32, 32, 3))
    h = nfk.layers.ScaledActivation("gelu")(nfk.layers.WSConv2D(8, 3, strides=4)(inputs))
    h = nfk.layers.SqueezeExcite()(nfk.layers.WSConv2D(8, 3, groups=2)(h))
    h = keras.layers.GlobalAveragePooling2D()(h)
    return nfk.NormalizerFreeModel(inputs, keras.layers.Dense(5, name="predictions")(h))


rng = np.random.default_rng(0)
x, y = rng.standard_normal((8, 32, 32, 3)).astype("float32"), np.eye(5, dtype="float32")[rng.integers(0, 5, 8)]
K = keras.optimizers
kinds = {
    "SGD_AGC": (nfnet, lambda: nfk.optimizers.SGD_AGC(0.1, clip_factor=0.05, weight_decay=0.01, use_ema=True), {}),
    "AGC": (few_layers, lambda: nfk.optimizers.AGC(K.SGD(0.1, momentum=0.9, weight_decay=0.01), clip_factor=0.05), {}),
    "compile": (few_layers, lambda: K.SGD(0.1), {"clip_factor": 0.05}),
}
# One of each: the collective operations of several strategies in one process get in each other's way.
strategies = [tf.distribute.MirroredStrategy(devices) for devices in (["CPU:0"], ["CPU:0", "CPU:1"])]
result = {}
for kind, (build, make, options) in kinds.items():
    outcomes, start = [], None
    for strategy in strategies:
        with strategy.scope():
            model = build()
            start = start or [w + 0.1 * rng.standard_normal(w.shape).astype("float32") for w in model.get_weights()]
            model.set_weights(start)
            model.compile(make(), keras.losses.CategoricalCrossentropy(from_logits=True), **options)
        nfk.optimizers.watch_clipping(model)
        batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8).repeat(3)
        history = model.fit(batches, steps_per_epoch=3, verbose=0).history
        watched = list(nfk.optimizers.clipping_report(model).values())
        watched = [float(value) for stage in watched for value in stage.values()]
        outcomes.append((model.get_weights(), history["agc_clipped"][0], history["loss"][0], watched))
        step = tf.function(lambda batch: strategy.run(model.train_step, (batch,))).get_concrete_function((x, y))
        types = [operation.type for operation in step.graph.get_operations()]
    (one, share, loss, watched), (two, share2, loss2, watched2) = outcomes
    result[kind] = {
        "difference": max(float(np.max(np.abs(a - b))) for a, b in zip(one, two)),
        "moved": max(float(np.max(np.abs(a - b))) for a, b in zip(one, start)),
        "shares": [float(share), float(share2)],
        "losses": [float(loss), float(loss2)],
        "watched": [watched, watched2],
        "sums": [sum("Collective" in each for each in types), types.count("AddN")],
    }
report(result)
"""


@pytest.mark.slow
def test_two_devices_are_one(new_process):
    """`MirroredStrategy` with a fixed global batch: gradients are clipped after they are summed."""
    for kind, got in new_process(DISTRIBUTED).items():
        assert got["difference"] <= 1e-5, (kind, got)
        assert got["moved"] > 1e-3, (kind, got)
        assert 0 < got["shares"][0] <= 1
        assert got["shares"][1] == pytest.approx(got["shares"][0], abs=1e-3), (kind, got)
        assert got["watched"][1] == pytest.approx(got["watched"][0], rel=1e-3, abs=1e-6), (kind, got)
        assert got["losses"][1] == pytest.approx(got["losses"][0], rel=1e-4), (kind, got)
        # Devices that share a processor share its memory: no gradient takes TensorFlow's way between machines.
        assert got["sums"][0] == 0 and got["sums"][1] >= 5, (kind, got)


def kernels_waited_for(layers: int) -> list[int]:
    """Returns for each kernel of a network how many kernels' gradients must be there before it is updated."""
    import tensorflow as tf

    inputs = x = keras.Input((6, 6, 3))
    for _ in range(layers):
        x = nfk.layers.WSConv2D(4, 3, padding="same")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = nfk.NormalizerFreeModel(inputs, keras.layers.Dense(3, "softmax", name="predictions")(x))
    model.compile(nfk.optimizers.SGD_AGC(0.1), "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    step = tf.function(lambda x, y: model.train_step((x, y))).get_concrete_function(*map(tf.constant, data()))
    found = []
    for update in step.graph.get_operations():
        if update.type != "ResourceApplyMomentum" or update.inputs[3].shape.rank != 4:
            continue
        waiting, before = [update], set()
        while waiting:
            operation = waiting.pop()
            if operation not in before:
                before.add(operation)
                waiting += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
        # The gradients of a layer's variables are from one call; the clipping, another one, also tells which units it
        # scaled down, and the layer itself gives what it makes of the images besides the kernel that it keeps.
        calls = [operation.outputs for operation in before if operation.type == "PartitionedCall"]
        calls = [results for results in calls if all(result.dtype == tf.float32 for result in results)]
        calls = [results for results in calls if not any(tuple(each.shape[1:3]) == (6, 6) for each in results)]
        found.append(sum(any(tuple(result.shape[:2]) == (3, 3) for result in results) for results in calls))
    return found


@pytest.mark.parametrize(("alone", "expected"), [(1, [1, 1, 1]), (10**6, [3, 3, 3])])
def test_a_large_kernel_is_updated_as_soon_as_its_gradient_is_there(alone, expected, monkeypatch):
    monkeypatch.setattr(nfk.optimizers.clipping, "MIN_SIZE_ALONE", alone)
    assert kernels_waited_for(3) == expected


def test_the_learning_rate_is_read_once():
    import tensorflow as tf

    model = nfk.NormalizerFreeModel(inputs := keras.Input((4,)), keras.layers.Dense(3, "softmax")(inputs))
    model.compile(nfk.optimizers.SGD_AGC(0.1), "categorical_crossentropy")
    model.optimizer.build(model.trainable_variables)
    step = tf.function(lambda x, y: model.train_step((x, y)), autograph=False)
    graph = step.get_concrete_function(tf.ones((2, 4)), tf.ones((2, 3))).graph
    handle = graph.capture(model.optimizer._learning_rate.value.handle)
    assert sum(op.type == "ReadVariableOp" and op.inputs[0] is handle for op in graph.get_operations()) == 1


def test_a_graph_has_each_constant_once(monkeypatch):
    import tensorflow as tf

    from nfnet_keras import tensorflow_step

    found = []

    @tf.function(autograph=False)
    def compute(x):
        with tf.control_dependencies([tf.debugging.check_numerics(x, "")]):
            found.append(tensorflow_step.shared_constant(2.0, tf.float32))
        found.extend(tensorflow_step.shared_constant(2.0, tf.float32) for _ in range(2))
        whole, pair = tensorflow_step.shared_constant(2), tensorflow_step.shared_constant((2, 3))
        assert whole.dtype == tf.int32 and pair.shape == (2,)

        @tf.function(autograph=False)
        def inner(x):
            return x * tensorflow_step.shared_constant(2.0, tf.float32)

        return inner(x) * found[0]

    assert float(compute(tf.constant(3.0))) == 12.0
    assert found[0] is found[1] is found[2]
    # Whoever asks next does not wait for what the first one waited for.
    assert not found[0].op.control_inputs
    monkeypatch.setattr(tensorflow_step, "has_one_replica", lambda: False)
    found.clear()
    assert float(tf.function(compute.python_function)(tf.constant(3.0))) == 12.0
    assert found[0] is not found[1]
