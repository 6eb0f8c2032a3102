"""What replicas that share a processor compute once for all of them: each one's own gradients, and the same sums."""

import keras
import pytest

pytest.importorskip("tensorflow")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")

REPLICAS = """
import tensorflow as tf
two = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
import keras, nfnet_keras as nfk
from nfnet_keras.tensorflow_convolution import uses_onednn
from nfnet_keras.tensorflow_sharing import on_the_sum

keras.utils.set_random_seed(0)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    inputs = keras.Input((6, 6, 4))
    twice = nfk.layers.WSConv2D(4, 3, padding="same", bias_initializer="ones", gain_initializer="random_uniform")
    frozen = nfk.layers.WSConv2D(4, 3, padding="same", trainable=False)
    x = nfk.layers.WSConv2D(8, 1, name="pixels")(frozen(twice(keras.ops.tanh(twice(inputs)))))
    model = keras.Model(inputs, nfk.layers.WSConv2D(6, 3, groups=2, name="groups")(x))
variables = model.trainable_variables
rng = np.random.default_rng(1)
halves = rng.standard_normal((2, 3, 6, 6, 4)).astype("float32")
weights = rng.standard_normal(model.output.shape[1:]).astype("float32")


def gradients(images):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(images, training=True) * weights)
    return tape.gradient(loss, variables)


def replica(images):
    own = gradients(images)
    return own, on_the_sum(own, list)


def sums(images):
    return on_the_sum(gradients(images), list)


def calls_behind(function, batch):
    '''Counts what the results of a function need: kernels standardised, and gradients through that.'''
    graph = tf.function(lambda: strategy.run(function, (batch,))).get_concrete_function().graph
    waiting, needed = [tensor.op for tensor in graph.outputs], set()
    while waiting:
        operation = waiting.pop()
        if operation not in needed:
            needed.add(operation)
            waiting += [tensor.op for tensor in operation.inputs] + list(operation.control_inputs)
    shapes = {tuple(v.shape) for v in variables if v.name == "kernel"}
    calls = [op for op in needed if op.type == "PartitionedCall" and tuple(op.inputs[0].shape) in shapes]
    return [sum(len(op.inputs) == 2 for op in calls), sum(len(op.inputs) > 2 for op in calls)]


batch = strategy.experimental_distribute_values_from_function(
    lambda context: tf.constant(halves[int(context.replica_id_in_sync_group)])
)
own, summed = tf.function(lambda: strategy.run(replica, (batch,)))()
locally = strategy.experimental_local_results
own = [[part.numpy() for part in locally(each)] for each in own]
summed = [locally(each)[0].numpy() for each in summed]
# One at a time, operation by operation.
wanted = [[each.numpy() for each in gradients(tf.constant(half))] for half in halves]


def off(found, wanted):
    return float(max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(found, wanted)))


report({
    "own": [off([each[at] for each in own], wanted[at]) for at in range(2)],
    "sums": off(summed, [a + b for a, b in zip(*wanted)]),
    "calls": calls_behind(sums, batch),
    "onednn": uses_onednn(),
})
"""


def test_kernels_are_standardised_once_for_all_replicas(new_process):
    got = new_process(REPLICAS)
    assert max(got["own"]) < 1e-5, got
    assert got["sums"] < 1e-5, got
    standardised, gradients = got["calls"]
    # One for each use of a kernel: that of the layer which is called twice has two.
    assert standardised == 4, got
    # Its gradient is a sum of two already; that of the others, kernel and gain, goes through one call.
    assert gradients == (6 if got["onednn"] else 8), got
