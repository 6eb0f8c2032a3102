"""Functions that XLA compiles while a graph is traced: compiled before it runs, once, and with the same numbers."""

import keras
import pytest

tf = pytest.importorskip("tensorflow")
ahead = pytest.importorskip("nfnet_keras.tensorflow_ahead")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")


@pytest.fixture
def asked(monkeypatch):
    """Returns a list of the shapes that were asked for, in place of compiling for them."""
    found = []
    monkeypatch.setattr(ahead, "_run_pending", lambda: found.append([s.shape for s in ahead._pending.popleft()[1]]))
    return found


def wait():
    """Returns once the other thread has done what it was given before."""
    ahead._worker().submit(lambda: None).result()


def trace(function, *shapes):
    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    traced = tf.function(lambda *x: function(*x), autograph=False).get_concrete_function(*specs)
    wait()
    return traced


def test_each_shape_is_asked_for_once(asked):
    function = ahead.compiled(tf.multiply)
    for _ in range(2):
        trace(lambda x, y: function(function(x, y), y), (2, 3), (3,))
        trace(function, (4, 3), (3,))
    assert asked == [[(2, 3), (3,)], [(4, 3), (3,)]]


def test_what_cannot_be_ahead(asked, monkeypatch):
    function = ahead.compiled(tf.negative)
    trace(function, (None, 3))
    assert float(function(tf.ones(()))) == -1.0
    monkeypatch.setattr(ahead, "has_one_replica", lambda: False)
    trace(function, (2, 3))
    monkeypatch.undo()
    monkeypatch.setattr(ahead, "MAX_SIZE", 5)
    trace(function, (2, 3))
    wait()
    assert asked == []


def test_numbers_are_those_of_the_function():
    function = ahead.compiled(lambda x, y: [x * y, x + y])
    traced = trace(function, (2, 3), (3,))
    product, total = traced(tf.fill((2, 3), 2.0), tf.fill((3,), 5.0))
    assert product.numpy().tolist() == [[10.0] * 3] * 2
    assert total.numpy().tolist() == [[7.0] * 3] * 2


def test_a_failure_ahead_is_the_graphs_to_report():
    def fail(x):
        return tf.raw_ops.MatMul(a=x, b=tf.transpose(x)) if x.shape[0] == 2 else tf.strings.as_string(x)

    function = ahead.compiled(fail)
    # XLA knows no strings.
    traced = trace(function, (3, 3))
    with pytest.raises(tf.errors.OpError):
        traced(tf.ones((3, 3)))
    # The thread goes on.
    assert float(trace(function, (2, 2))(tf.ones((2, 2)))[0, 0]) == 2.0


TRAIN = """
import os, pathlib, re
import nfnet_keras as nfk, tensorflow as tf
from nfnet_keras import tensorflow_ahead, tensorflow_fusion

def write_errors_to(name):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), 2)

def compiled_in(name):
    return re.findall(r"Compiled (\\S+) 1 times", pathlib.Path(name).read_text())

tensorflow_fusion.MIN_KERNEL_SIZE = 1
model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10)
model.compile(nfk.optimizers.SGD_AGC(0.1, weight_decay=1e-3), "categorical_crossentropy", jit_compile=False)
model.optimizer.build(model.trainable_variables)
images, labels = tf.ones((4, 32, 32, 3)), tf.one_hot(tf.range(4), 10)

@tf.function
def step(images, labels):
    return model.train_step((images, labels))

write_errors_to("tracing")
traced = step.get_concrete_function(images, labels)
tensorflow_ahead._worker().submit(lambda: None).result()
write_errors_to("running")
traced(images, labels)
write_errors_to("after")
report([compiled_in("tracing"), compiled_in("running"), pathlib.Path("tracing").read_text()])
"""


def test_a_step_finds_everything_compiled(new_process):
    # TensorFlow says on the standard error what it compiles.
    verbose = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "device_compilation_profiler=1"}
    tracing, running, said = new_process(TRAIN, env=verbose)
    assert len(tracing) > 20
    assert len(set(tracing)) == len(tracing)
    assert running == []
    # TensorFlow warns of functions that are traced again and again.
    assert "WARNING:tensorflow" not in said
