"""What a residual branch is multiplied by: one product, and the numbers of one layer after the other."""

import keras
import numpy as np
import pytest

from nfnet_keras.layers import EfficientChannelAttention, ResidualAdd, SkipGain, SqueezeExcite, StochasticDepth

tf = pytest.importorskip("tensorflow")
branch = pytest.importorskip("nfnet_keras.tensorflow_branch")
fusion = pytest.importorskip("nfnet_keras.tensorflow_fusion")
COMPILES = getattr(fusion, "compiles", None)
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's")


MAKERS = {
    "squeeze": SqueezeExcite,
    "channels": EfficientChannelAttention,
    "gain": lambda **options: SkipGain(0.2, initializer=keras.initializers.Constant(0.6), **options),
    "depth": lambda **options: StochasticDepth(0.4, seed=5, **options),
}


def both_ways(layers, x, monkeypatch, *shortcut) -> tuple[list, list]:
    """Returns outputs and gradients with products put together and without, and the products of whole images.

    With a shortcut, the products are those of outputs and gradients.
    """
    results, products = [], []
    for compiles in (COMPILES, lambda tensor: False):
        monkeypatch.setattr(fusion, "compiles", compiles)
        keras.utils.set_random_seed(5)
        for layer in layers:
            if isinstance(layer, StochasticDepth):
                layer.seed_generator.state.assign([5, 0])

        @tf.function(autograph=False)
        def compute(x, *shortcut):
            with tf.GradientTape() as tape:
                tape.watch((x, *shortcut))
                y = x
                for layer in layers:
                    training = {"training": True} if layer._call_has_training_arg else {}
                    y = layer(y, **training)
                y = ResidualAdd(dtype=x.dtype.name)([*shortcut, y]) if shortcut else y
                loss = tf.reduce_sum(tf.sin(tf.cast(y, tf.float32)))
            weights = [v.value for layer in layers for v in layer.trainable_variables]
            return [y, *tape.gradient(loss, [x, *shortcut, *weights])]

        results.append([np.asarray(each, "float32") for each in compute(x, *shortcut)])
        function = compute.get_concrete_function(x, *shortcut)
        wanted = [output.op.name for output in (function.outputs if shortcut else function.outputs[:1])]
        pruned = tf.compat.v1.graph_util.extract_sub_graph(function.graph.as_graph_def(), wanted)
        names = {node.name for node in pruned.node if node.op == "Mul"}
        operations = function.graph.get_operations()
        products.append(sum(op.name in names and op.outputs[0].shape == x.shape for op in operations))
    return results, products


def layers_for(names, x) -> list:
    layers = [MAKERS[name](dtype="float32" if x.dtype == tf.float32 else "mixed_bfloat16") for name in names]
    for layer in layers:
        layer(x)
    return layers


@pytest.mark.parametrize("attention", ["squeeze", "channels"])
@pytest.mark.parametrize("behind", [[], ["gain"], ["depth", "gain"], ["depth"]], ids=str)
def test_attention_and_what_follows_it(attention, behind, monkeypatch):
    x = tf.random.stateless_normal((6, 5, 4, 16), (1, 2))
    (together, apart), products = both_ways(layers_for([attention, *behind], x), x, monkeypatch)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * max(np.abs(b).max(), 1))
    assert products == [1, 1 + len(behind)]


@pytest.mark.parametrize("smallest", [1, 2**20])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("names", [["gain"], ["squeeze", "gain"], ["channels", "depth", "gain"], ["squeeze"]], ids=str)
def test_a_branch_and_its_shortcut(names, dtype, smallest, monkeypatch):
    monkeypatch.setattr(branch, "MIN_SIZE", smallest)
    x, shortcut = (tf.random.stateless_normal((6, 5, 4, 16), (1, seed), dtype=dtype) for seed in (2, 3))
    (together, apart), products = both_ways(layers_for(names, x), x, monkeypatch, shortcut)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, atol=(2e-6 if dtype == "float32" else 2e-2) * max(np.abs(b).max(), 1))
    # That in the sine's gradient, and that which is summed for the gradient of the factor. Without means, the gradient
    # of the images is a product of its own.
    assert products[0] == (4 if smallest > 1 else 3 if names == ["gain"] else 2)
    assert products[1] >= 2 + 2 * len(names)


def test_a_shortcut_that_is_one_number_a_channel(monkeypatch):
    monkeypatch.setattr(branch, "MIN_SIZE", 1)
    x, shortcut = (tf.random.stateless_normal(shape, (1, 2)) for shape in ((6, 5, 4, 16), (6, 1, 1, 16)))
    (together, apart), _ = both_ways(layers_for(["squeeze", "gain"], x), x, monkeypatch, shortcut)
    for a, b in zip(together, apart, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=2e-6 * max(np.abs(b).max(), 1))


@pytest.mark.parametrize("shape", [(4, 16), (4, 7, 16), (4, 5, 4, 16)], ids=str)
def test_a_gain_on_any_tensor(shape, monkeypatch):
    layer = SkipGain(0.2, initializer=keras.initializers.Constant(0.6))
    x = tf.random.stateless_normal(shape, (1, 2))
    layer(x)
    (together, apart), _ = both_ways([layer], x, monkeypatch)
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_an_output_that_is_used_twice(monkeypatch):
    attention, gain = SqueezeExcite(), SkipGain(0.2, initializer=keras.initializers.Constant(0.6))
    x = tf.random.stateless_normal((6, 5, 4, 16), (1, 2))
    gain(attention(x))
    found = []
    for compiles in (COMPILES, lambda tensor: False):
        monkeypatch.setattr(fusion, "compiles", compiles)

        @tf.function(autograph=False)
        def compute(x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = attention(x, training=True)
                loss = tf.reduce_sum(tf.sin(y)) + tf.reduce_sum(tf.cos(gain(y, training=True)))
            return tape.gradient(loss, x)

        found.append(compute(x))
    np.testing.assert_allclose(*found, atol=1e-5)


def test_gradients_of_factors_are_not_summed_in_half_precision():
    @tf.function(autograph=False)
    def compute(x, factor):
        with tf.GradientTape() as tape:
            tape.watch(factor)
            y = branch.times(x, factor)
        return tape.gradient(y, factor, tf.ones_like(y))

    # In bfloat16, 256 + 1 is 256.
    x = tf.ones((2, 40, 40, 3), tf.bfloat16)
    assert compute(x, tf.ones((2, 1, 1, 3), tf.bfloat16)).numpy().ravel().tolist() == [1600] * 6
    assert compute(x, tf.ones((1, 1, 1, 1), tf.bfloat16)).numpy().ravel().tolist() == [9600]


def test_in_inference_nothing_is_put_together():
    layer = SqueezeExcite()
    x = tf.ones((2, 4, 4, 8))
    layer(x)
    graph = tf.function(lambda x: layer(x, training=False)).get_concrete_function(x).graph
    assert not any(op.type == "IdentityN" for op in graph.get_operations())
