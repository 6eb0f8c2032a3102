"""Functions that are traced once: their numbers, gradients of any order, and what is not computed."""

import keras
import numpy as np
import pytest

import nfnet_keras as nfk

tf = pytest.importorskip("tensorflow")
calls = pytest.importorskip("nfnet_keras.tensorflow_calls")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")


def scaled_product(jit_compile: bool = False):
    """Returns `(x @ w) * factor` and the sum of `x`, and what was traced. The gradient by `w` is twice the real one."""
    traced = []

    def forward(x, w, factor):
        traced.append("forward")
        return [(x @ w) * factor, tf.reduce_sum(x)], [tf.transpose(w)]

    def backward(arguments, kept, upstream, skipped):
        traced.append("backward")
        x, _, factor = arguments
        of_x = upstream[0] @ kept[0] * factor + upstream[1] * tf.ones_like(x)
        return [of_x, 2 * factor * tf.matmul(x, upstream[0], transpose_a=True)]

    return calls.TracedOnce(forward, backward, jit_compile=jit_compile), traced


def expected(x, w, factor):
    with tf.GradientTape() as tape:
        tape.watch((x, w))
        loss = tf.reduce_sum(tf.sin((x @ w) * factor)) + 3 * tf.reduce_sum(x)
    of_x, of_w = tape.gradient(loss, (x, w))
    return [loss, of_x, 2 * of_w]


def arguments(rows: int = 3) -> tuple:
    return tf.random.stateless_normal((rows, 4), (1, 2)), tf.random.stateless_normal((4, 5), (3, 4)), tf.constant(0.7)


def loss_of(function, x, w, factor):
    product, total = function(x, w, factor)
    return tf.reduce_sum(tf.sin(product)) + 3 * total


def assert_close(found, wanted, tolerance=1e-5):
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradient_by_a_tape_inside_of_the_graph(jit_compile):
    function, _ = scaled_product(jit_compile)

    @tf.function
    def compute(x, w, factor):
        with tf.GradientTape() as tape:
            tape.watch((x, w, factor))
            loss = loss_of(function, x, w, factor)
        return loss, *tape.gradient(loss, (x, w, factor))

    *found, of_factor = compute(*arguments())
    assert_close(found, expected(*arguments()))
    # The last argument is a constant.
    assert of_factor is None


@pytest.mark.parametrize("nested", [False, True])
def test_gradient_by_a_tape_around_the_graph(nested):
    function, _ = scaled_product()
    compute = tf.function(lambda *x: loss_of(function, *x))
    outer = tf.function(lambda *x: compute(*x)) if nested else compute
    x, w, factor = arguments()
    with tf.GradientTape() as tape:
        tape.watch((x, w))
        loss = outer(x, w, factor)
    assert_close([loss, *tape.gradient(loss, (x, w))], expected(x, w, factor))


def test_gradient_through_a_branch_and_a_loop():
    function, _ = scaled_product()

    @tf.function
    def compute(x, w, factor):
        with tf.GradientTape() as tape:
            tape.watch((x, w))
            loss = tf.cond(factor > 0, lambda: loss_of(function, x, w, factor), lambda: 0.0)
            for _ in tf.range(2):
                loss += loss_of(function, x, w, factor)
        return [loss, *tape.gradient(loss, (x, w))]

    assert_close(compute(*arguments()), [3 * each for each in expected(*arguments())])


def test_a_tape_that_is_used_twice():
    function, _ = scaled_product()

    @tf.function
    def compute(x, w, factor):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch((x, w))
            loss = loss_of(function, x, w, factor)
        return [loss, tape.gradient(loss, x), tape.gradient(loss, w)]

    assert_close(compute(*arguments()), expected(*arguments()))


def test_traced_once_for_each_shape():
    function, traced = scaled_product()

    @tf.function
    def compute(x, w, factor):
        with tf.GradientTape() as tape:
            tape.watch((x, w))
            loss = sum(loss_of(function, x * step, w, factor) for step in (1.0, 2.0, 3.0))
        return tape.gradient(loss, (x, w))

    graph = compute.get_concrete_function(*arguments()).graph
    assert traced == ["forward", "backward"]
    assert sum(op.type == "PartitionedCall" for op in graph.get_operations()) == 6
    # Nothing was made for what is kept.
    assert not any(op.type in ("ZerosLike", "Fill", "IdentityN") for op in graph.get_operations())
    compute(*arguments(7))
    assert traced == ["forward", "backward"] * 2


def test_a_batch_of_unknown_size():
    function, traced = scaled_product()

    @tf.function(input_signature=[tf.TensorSpec((None, 4)), tf.TensorSpec((4, 5)), tf.TensorSpec(())])
    def compute(x, w, factor):
        with tf.GradientTape() as tape:
            tape.watch((x, w))
            product, total = function(x, w, factor)
            assert product.shape.as_list() == [None, 5] and total.shape == ()
            loss = tf.reduce_sum(tf.sin(product)) + 3 * total
        return [loss, *tape.gradient(loss, (x, w))]

    for rows in (2, 5):
        assert_close(compute(*arguments(rows)), expected(*arguments(rows)))
    assert traced == ["forward", "backward"]


def test_gradients_that_nothing_asks_for_are_not_computed():
    function, _ = scaled_product()
    x, w, factor = arguments()
    found = {}
    for name, wanted in (("x", x), ("w", w)):

        @tf.function
        def compute(x, w, factor, name=name):
            wanted = x if name == "x" else w
            with tf.GradientTape() as tape:
                tape.watch(wanted)
                loss = loss_of(function, x, w, factor)
            return tape.gradient(loss, wanted)

        assert_close([compute(x, w, factor)], [expected(x, w, factor)[1 if wanted is x else 2]])
        graph = compute.get_concrete_function(x, w, factor).graph
        backward = [op for op in graph.get_operations() if op.type == "PartitionedCall"][-1]
        found[name] = [output.shape.as_list() for output in backward.outputs]
    assert found == {"x": [[3, 4]], "w": [[4, 5]]}


@pytest.mark.parametrize("plain", [None, lambda x, y: [tf.exp(x * y)]])
def test_second_and_third_derivatives(plain):
    def forward(x, y):
        product = tf.exp(x * y)
        return [product], [product]

    def backward(arguments, kept, upstream, skipped):
        x, y = arguments
        return [upstream[0] * kept[0] * y, upstream[0] * kept[0] * x]

    function = calls.TracedOnce(forward, backward, plain)

    def derivatives(function, x, y):
        found = []
        with tf.GradientTape() as third:
            third.watch((x, y))
            with tf.GradientTape() as second:
                second.watch((x, y))
                with tf.GradientTape() as first:
                    first.watch((x, y))
                    value = tf.reduce_sum(tf.sin(function(x, y)[0]))
                found += first.gradient(value, (x, y))
                value = tf.reduce_sum(found[0] ** 2) + tf.reduce_sum(found[1])
            found += second.gradient(value, (x, y))
            value = tf.reduce_sum(found[2] * found[3])
        return [*found, *third.gradient(value, (x, y))]

    x, y = tf.constant([0.3, -0.8]), tf.constant([1.2, 0.4])
    found = tf.function(lambda x, y: derivatives(function, x, y))(x, y)
    assert_close(found, derivatives(lambda x, y: [tf.exp(x * y)], x, y))


def test_calls_without_a_gradient():
    traced = []

    def double(x):
        traced.append(x.shape.as_list())
        return [2 * x, tf.reduce_sum(x)]

    compute = tf.function(lambda x, y: [*calls.call_once(double, x), *calls.call_once(double, y)])
    results = compute(tf.ones(3), tf.fill((3,), 2.0))
    assert [result.numpy().tolist() for result in results] == [[2.0] * 3, 3.0, [4.0] * 3, 6.0]
    assert traced == [[3]]
    assert float(calls.call_once(double, tf.constant(4.0))[0]) == 8.0
    assert traced[1:] == [[]]


def test_gradient_of_a_function():
    gradient = calls.gradient_of(lambda x, y, z: x * y * z, 2)
    assert [float(each) for each in gradient(*map(tf.constant, (1.0, 2.0, 3.0, 5.0)))] == [15.0, 10.0]


def test_a_network_saved_in_training(tmp_path):
    layers = [nfk.layers.WSConv2D(8, 3), nfk.layers.ScaledActivation("gelu"), nfk.layers.WSConv2D(4, 1)]
    model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
    spec = tf.TensorSpec((2, 8, 8, 3), tf.float32)
    images = tf.random.stateless_normal(spec.shape, (5, 6))

    class Saved(tf.Module):
        def __init__(self):
            super().__init__()
            self.held = [variable.value for variable in model.variables]

        @tf.function(input_signature=[spec])
        def outputs(self, x):
            return model(x, training=True)

        @tf.function(input_signature=[spec])
        def slopes(self, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(tf.sin(model(x, training=True)))
            return tape.gradient(loss, x)

    saved = Saved()
    tf.saved_model.save(saved, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    with tf.GradientTape() as tape:
        tape.watch(images)
        outputs = loaded.outputs(images)
        loss = tf.reduce_sum(tf.sin(outputs))
    wanted = saved.slopes(images).numpy()
    np.testing.assert_allclose(outputs, saved.outputs(images), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(loaded.slopes(images), wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(tape.gradient(loss, images), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
