"""What is measured of a network's signals, against NumPy and against the places where it must be measured."""

import json
import weakref

import judge
import keras
import kinds
import numpy as np
import numpy_networks
import pytest
import seeded
import small_networks
from keras import layers, ops

import nfnet_keras as nfk
from nfnet_keras.applications.nf_resnet import NFResNet, NFResNetVariant
from nfnet_keras.checkpoints import assign_haiku
from nfnet_keras.diagnostics.graph import Graph
from nfnet_keras.diagnostics.passes import forward


def small(name: str, small_nfnet, **options):
    """One of the small networks of the golden numbers, its parameters' tree and the images."""
    numbers = judge.numbers("models", name)
    tree = seeded.fill(json.loads(str(numbers["tree"])), int(numbers["seed"]))
    model = small_networks.small(name, small_nfnet, **options)
    assign_haiku(model, tree)
    return model, tree, numbers


def assert_same(got: dict, wanted: dict, rtol=1e-4):
    assert got.keys() == wanted.keys()
    for key in wanted:
        # A squared mean of channels that are nearly centred is a difference of large numbers.
        np.testing.assert_allclose(got[key], wanted[key], rtol=rtol, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("name", numpy_networks.NETWORKS)
def test_the_authors_metrics(name, small_nfnet):
    # With stochastic depth, too: what it drops in training is measured in front of it.
    model, tree, numbers = small(name, small_nfnet, stochastic_depth_rate=0.5)
    wanted = numpy_networks.run(name, tree, numbers["x"])
    logits = wanted.pop("logits")
    assert judge.error(logits, numbers["logits"]) < 1e-5
    report = nfk.signal_propagation(model, numbers["x"])
    assert_same(report.metrics(), wanted)
    depths = numpy_networks.NETWORKS[name].depths
    places = [(f"stage{s}", b) for s, depth in enumerate(depths, start=1) for b in range(1, depth + 1)]
    assert [(row.stage, row.block) for row in report.rows] == [(None, None), *places]


def test_skip_gains_taken_for_another_number(small_nfnet):
    model, tree, numbers = small("nfnet", small_nfnet)
    before = model.get_weights()
    report = nfk.signal_propagation(model, numbers["x"], skip_gain=2.0)
    for module in tree.values():
        if "skip_gain" in module:
            module["skip_gain"] = np.float32(2)
    wanted = numpy_networks.run("nfnet", tree, numbers["x"])
    del wanted["logits"]
    assert_same(report.metrics(), wanted)
    assert "skip gains taken for 2" in str(report)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_batches_give_the_numbers_of_the_whole(small_nfnet):
    model, _, numbers = small("nf_resnet", small_nfnet)
    whole = nfk.signal_propagation(model, numbers["x"]).metrics()
    assert_same(nfk.signal_propagation(model, numbers["x"], batch_size=3).metrics(), whole, rtol=1e-5)


def test_the_saw_tooth():
    """At initialisation the variance grows by alpha^2 a block and starts anew in each stage."""
    row = NFResNetVariant("s", (3, 3, 3, 3), 0.0, 64, 64, width=1)
    model = NFResNet(row, weights=None, include_top=False, input_shape=(64, 64, 3))
    images = np.random.default_rng(0).standard_normal((16, 64, 64, 3), dtype="float32")
    # The last stage has four positions an image: too few to say.
    open_gains = [row.variance for row in nfk.signal_propagation(model, images, skip_gain=1.0).rows[1:10]]
    np.testing.assert_allclose(open_gains, 3 * [1.04, 1.08, 1.12], rtol=0.12)
    np.testing.assert_allclose(np.diff(np.reshape(open_gains, (3, 3))), 0.04, rtol=0.5)
    # As it is: every block is its shortcut.
    closed = np.reshape([row.variance for row in nfk.signal_propagation(model, images).rows[1:]], (4, 3))
    np.testing.assert_allclose(closed, np.repeat(closed[:, :1], 3, axis=1), rtol=1e-5)


@pytest.mark.parametrize(
    "kind",
    [*(name if name == "nf_regnet_b0" else pytest.param(name, marks=pytest.mark.slow) for name in kinds.kinds())],
)
def test_every_family(kind):
    model = kinds.make(kind, classes=3)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), dtype="float32")
    report = nfk.signal_propagation(model, images, skip_gain=1.0)
    # One, two, one and one block: those of `kinds.small`.
    assert [row.block for row in report.rows] == [None, 1, 1, 2, 1, 1]
    assert [row.name.rpartition("_")[2] for row in report.rows[1:]] == ["add"] * 5
    assert report.rows[0].name in ("stem_conv3", "stem_conv0", "stem_pool")
    assert all(row.branch_variance > 0 for row in report.rows[1:])
    assert report.rows[0].branch_variance is None


def test_gains_that_are_in_the_last_convolution_of_timms_branches():
    model = kinds.make("timm_nf_resnet26", classes=3)
    images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), dtype="float32")
    closed, open_ = (nfk.signal_propagation(model, images, skip_gain=gain).rows[1:] for gain in (None, 1.0))
    assert all(row.branch_variance == 0 for row in closed)
    assert all(row.branch_variance > 0.1 for row in open_)


def measured(model, layer: str, x) -> float:
    """The variance of a layer's output, by another model up to it."""
    inner = keras.Model(model.inputs[0], model.get_layer(layer).output)
    return float(np.mean(ops.convert_to_numpy(inner(x, training=False)).astype("float64").var((0, 1, 2))))


def hand_written(swap: bool, operator: bool):
    """A ResNet of another make: a projection and an identity, added in either order, by a layer or by `+`."""

    def add(a, b):
        a, b = (b, a) if swap else (a, b)
        return a + b if operator else layers.Add()([a, b])

    def conv(x, filters, size, name):
        return layers.Conv2D(filters, size, padding="same", kernel_initializer="he_normal", name=name)(x)

    inputs = keras.Input((16, 16, 3))
    x = conv(inputs, 4, 3, "stem")
    out = layers.ReLU()(layers.BatchNormalization(name="front")(x))
    branch = conv(layers.ReLU()(conv(out, 4, 3, "a")), 8, 3, "first_end")
    x = add(conv(out, 8, 1, "projection"), branch)
    branch = layers.Rescaling(0.1)(layers.Dropout(0.5)(conv(layers.ReLU()(x), 8, 3, "second_end")))
    x = add(x, branch)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.ReLU()(x))))


@pytest.mark.parametrize(("swap", "operator"), [(False, False), (True, True)])
def test_the_branches_of_other_networks(swap, operator):
    model = hand_written(swap, operator)
    x = np.random.default_rng(0).standard_normal((4, 16, 16, 3), dtype="float32")
    report = nfk.signal_propagation(model, x)
    assert report.rows[0].name == "stem"
    assert report.rows[0].variance == pytest.approx(measured(model, "stem", x), rel=1e-4)
    ends = [measured(model, name, x) for name in ("first_end", "second_end")]
    np.testing.assert_allclose([row.branch_variance for row in report.rows[1:]], ends, rtol=1e-4)
    assert [(row.stage, row.block) for row in report.rows[1:]] == [("stage1", 1), ("stage1", 2)]


def test_the_input_of_a_first_block_whose_shortcut_is_the_identity():
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU(name="relu")(layers.Conv2D(3, 3, padding="same")(inputs))
    model = keras.Model(inputs, layers.Add()([x, layers.Conv2D(3, 3, padding="same")(x)]))
    assert nfk.signal_propagation(model, np.ones((1, 8, 8, 3))).rows[0].name == "relu"


def test_a_sum_of_which_no_part_is_a_branch():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(3, 3, padding="same")(inputs)
    x = layers.Add(name="residual")([inputs, x])
    both = [layers.Conv2D(3, 3, padding="same")(x) for _ in range(2)]
    report = nfk.signal_propagation(keras.Model(inputs, layers.Add(name="sum")(both)), np.ones((1, 8, 8, 3)))
    assert [(row.name, row.branch_variance is None) for row in report.rows[1:]] == [("residual", False), ("sum", True)]
    assert list(report.metrics())[-2:] == ["avg_sq_mean_2", "avg_var_2"]


def test_networks_without_sums_are_measured_layer_by_layer():
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, name="conv"),
            layers.MaxPooling2D(name="pool"),
            layers.Flatten(),
            layers.Dense(2),
        ]
    )
    x = np.random.default_rng(0).standard_normal((4, 8, 8, 3), dtype="float32")
    report = nfk.signal_propagation(model, x)
    assert [(row.name, row.shape) for row in report.rows] == [("conv", (6, 6, 4)), ("pool", (3, 3, 4))]
    assert report.rows[0].variance == pytest.approx(measured(model, "conv", x), rel=1e-4)
    flat = keras.Sequential([keras.Input((5,)), layers.Dense(4, name="a"), layers.ReLU(name="b")])
    assert [row.name for row in nfk.signal_propagation(flat, np.ones((3, 5))).rows] == ["a", "b"]


def test_models_inside_of_models(small_nfnet):
    backbone, _, numbers = small("nfnet", small_nfnet, include_top=False, pooling="avg")
    inputs = keras.Input((32, 32, 3))
    outer = keras.Sequential([inputs, keras.Sequential([inputs, backbone], name="middle"), layers.Dense(3)])
    inner, whole = (nfk.signal_propagation(model, numbers["x"]) for model in (backbone, outer))
    assert_same(whole.metrics(), inner.metrics(), rtol=1e-5)
    assert [row.name.partition(f"{backbone.name}/")[2] for row in whole.rows] == [row.name for row in inner.rows]
    assert whole.rows[1].stage == "stage1"
    inner, whole = (nfk.signal_propagation(model, numbers["x"], skip_gain=1.0) for model in (backbone, outer))
    assert_same(whole.metrics(), inner.metrics(), rtol=1e-5)


def test_training_mode_takes_the_batch_and_updates_nothing():
    model = hand_written(False, False)
    inputs, x = model.input, np.random.default_rng(0).standard_normal((4, 16, 16, 3), dtype="float32")
    front = keras.Sequential([keras.Input((16, 16, 3)), model.get_layer("stem"), model.get_layer("front")])
    before = [ops.convert_to_numpy(v) for v in front.variables]
    still, batch = (nfk.signal_propagation(front, 100 * x, training=mode).rows[-1].variance for mode in (False, True))
    assert still > 100 and batch == pytest.approx(1, rel=1e-2)
    for a, v in zip(before, front.variables, strict=True):
        np.testing.assert_array_equal(a, ops.convert_to_numpy(v))
    seeds = [ops.convert_to_numpy(v) for v in model.non_trainable_variables]
    report = nfk.signal_propagation(model, x, training=True)
    assert "in training mode" in report.note and inputs is model.input
    for a, v in zip(seeds, model.non_trainable_variables, strict=True):
        np.testing.assert_array_equal(a, ops.convert_to_numpy(v))


@pytest.mark.slow
def test_a_folded_network_has_its_factors_in_the_branch(small_nfnet):
    model, tree, numbers = small("nf_resnet", small_nfnet)
    own = nfk.signal_propagation(model, numbers["x"])
    folded = nfk.signal_propagation(nfk.fold_weight_standardization(model), numbers["x"])
    gains = [tree[f"NF_ResNet/~/nf_res_block{end}"]["skip_gain"] for end in ("", "_1", "_2", "_3", "_4")]
    for a, b in zip(own.rows, folded.rows, strict=True):
        assert (a.name, a.stage, a.block) == (b.name, b.stage, b.block)
        np.testing.assert_allclose([b.squared_mean, b.variance], [a.squared_mean, a.variance], rtol=1e-4, atol=1e-6)
    for a, b, gain in zip(own.rows[1:], folded.rows[1:], gains, strict=True):
        assert b.branch_variance == pytest.approx(a.branch_variance * (0.2 * gain) ** 2, rel=1e-4)
    with pytest.raises(ValueError, match="folded"):
        nfk.signal_propagation(nfk.fold_weight_standardization(model), numbers["x"], skip_gain=1.0)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX compiles the whole and frees by itself")
def test_values_are_let_go(small_nfnet):
    model, _, numbers = small("nfnet", small_nfnet)
    graph, alive, most = Graph(model, "test"), [], []

    def visit(number, value):
        alive.append(weakref.ref(value))
        most.append(sum(reference() is not None for reference in alive))
        return value

    forward(lambda *tensors: graph.run(tensors, visit), model.variables)(*graph.tensors(numbers["x"]))
    assert len(graph.steps) > 80
    # The block's input, its shortcut, what a layer takes and what it gives, and what stands in for it in its call.
    assert max(most) < 12


def test_table_and_picture(small_nfnet, tmp_path):
    model, _, numbers = small("nfnet", small_nfnet)
    report = nfk.signal_propagation(model, numbers["x"])
    lines = str(report).splitlines()
    assert lines[0].split()[:5] == ["depth", "at", "stage", "block", "output"]
    assert lines[2].split() == [
        *("1", "stage1_block1_add", "stage1", "1", "8", "x", "8", "x", "16"),
        *(f"{x:.4g}" for x in (report.rows[1].squared_mean, report.rows[1].variance, report.rows[1].branch_variance)),
    ]
    assert len(lines) == 8
    figure = report.plot(tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    (line,) = [line for line in figure.axes[1].get_lines() if len(line.get_xdata()) == 7]
    np.testing.assert_array_equal(line.get_ydata(), [row.variance for row in report.rows])
    both = nfk.plot_signals({"a": report, "b": report})
    assert [text.get_text() for text in both.axes[1].get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="at least one"):
        nfk.plot_signals({})


class WithACall(keras.Model):
    """A functional model that computes something else than its layers say."""

    def call(self, x):
        return super().call(x) * 2


def test_what_cannot_be_measured(small_nfnet):
    x = np.ones((1, 8, 8, 3), "float32")
    inputs = keras.Input((8, 8, 3))
    outputs = layers.Conv2D(3, 3)(inputs)
    with pytest.raises(ValueError, match="WithACall, which computes in a `call` of its own"):
        nfk.signal_propagation(WithACall(inputs, outputs), x)
    with pytest.raises(ValueError, match="not built yet"):
        nfk.signal_propagation(keras.Sequential([layers.Dense(3)]), x)
    model = keras.Model(inputs, outputs)
    for wrong in (x[..., :2], x[0], x[:0]):
        with pytest.raises(ValueError, match="takes at least one image of shape"):
            nfk.signal_propagation(model, wrong)
    with pytest.raises(ValueError, match="skip_gain"):
        nfk.signal_propagation(model, x, skip_gain=1.0)
    with pytest.raises(ValueError, match="batch_size=0"):
        nfk.signal_propagation(model, x, batch_size=0)


def test_channels_first(monkeypatch):
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    inputs = keras.Input((3, 8, 6))
    model = keras.Model(inputs, layers.Rescaling(2.0, name="double")(inputs))
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 6), dtype="float32")
    (row,) = nfk.signal_propagation(model, x).rows
    assert row.variance == pytest.approx(4 * np.mean(x.var((0, 2, 3))), rel=1e-4)


@pytest.mark.slow
def test_mixed_precision_is_measured_in_float32(small_nfnet):
    model, _, numbers = small("nf_resnet", small_nfnet)
    exact = nfk.signal_propagation(model, numbers["x"]).metrics()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        rough, _, _ = small("nf_resnet", small_nfnet)
    finally:
        keras.config.set_dtype_policy("float32")
    found = nfk.signal_propagation(rough, numbers["x"]).metrics()
    assert_same(found, exact, rtol=0.05)
    assert found["avg_var_3"] != exact["avg_var_3"]
