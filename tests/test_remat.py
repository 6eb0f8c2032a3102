"""Rematerialization: the same numbers from less memory, on every backend."""

import keras
import numpy as np
import pytest
from keras import ops

import nfnet_keras as nfk
from nfnet_keras.applications.nfnet import NFNet, NFNetVariant
from nfnet_keras.remat import Segment, plan

BACKEND = keras.backend.backend()
ROW = NFNetVariant("small", (16, 32, 32, 32), (1, 1, 2, 1), 0.0, 32, 32, group_width=8)
# Most of what it keeps is in the blocks of its first stage.
DEEP = NFNetVariant("deep", (64, 64, 64, 64), (6, 1, 1, 1), 0.0, 32, 32, group_width=32, stem_widths=(8, 8, 8))
# Few layers are traced and compiled in less time.
PLAIN = {"se_ratio": None, "use_two_convs": False}


def make(remat, size=32, row=ROW, **options):
    """A small network with random branches: as built, skip gains are zero and most gradients are too."""
    keras.utils.set_random_seed(1)
    model = NFNet(
        row, weights=None, classes=5, input_shape=(size, size, 3), stochastic_depth_rate=0.5, remat=remat, **options
    )
    rng = np.random.default_rng(2)
    for variable in model.trainable_variables:
        variable.assign(variable + 0.1 * rng.standard_normal(variable.shape).astype("float32"))
    return model


def data(count=6, size=32):
    rng = np.random.default_rng(0)
    images = rng.standard_normal((count, size, size, 3)).astype("float32")
    return images, np.eye(5, dtype="float32")[rng.integers(0, 5, count)]


def loss_of(model, x, y):
    return lambda: ops.mean(keras.losses.categorical_crossentropy(y, ops.cast(model(x, training=True), "float32")))


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def check_close(got, expected, tolerance):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, np.max(np.abs(b), initial=0)))


@pytest.mark.parametrize("frozen", [(), ("stage1", "stage3_block1")], ids=["all", "frozen"])
def test_gradients(gradients, frozen):
    """The masks of stochastic depth are among what has to be the same."""
    x, y = data()
    found = []
    for remat in (False, True):
        model = make(remat)
        for layer in model.layers:
            layer.trainable = not layer.name.startswith(frozen) if frozen else True
        found.append(gradients(loss_of(model, x, y), model.trainable_variables))
    check_close(found[1], found[0], 1e-5)
    assert np.mean([np.max(np.abs(g)) > 1e-5 for g in found[0]]) > 0.9


@pytest.mark.skipif(BACKEND == "jax", reason="without a step around it JAX compiles every operation by itself")
def test_masks_change_from_call_to_call_as_without():
    x, _ = data()
    outputs = []
    for remat in (False, True):
        model = make(remat)
        outputs.append([ops.convert_to_numpy(model(x, training=True)) for _ in range(3)])
    check_close(outputs[1], outputs[0], 1e-5)
    assert np.max(np.abs(outputs[1][0] - outputs[1][1])) > 1e-4


def test_training_steps_and_random_state(tmp_path):
    x, y = data()
    after = []
    for remat in (False, True):
        model = make(remat, **PLAIN)
        model.compile(nfk.optimizers.SGD_AGC(0.05, momentum=0.9, clip_factor=0.05), "categorical_crossentropy")
        start = values(model.variables)
        losses = [float(model.train_on_batch(x, y, return_dict=True)["loss"]) for _ in range(3)]
        after.append([np.array(losses), *values(model.variables)])
    check_close(after[1], after[0], 1e-4)
    assert max(np.max(np.abs(a - b)) for a, b in zip(start, after[1][1:], strict=True)) > 1e-2
    states = [i for i, w in enumerate(start) if not np.issubdtype(w.dtype, np.floating)]
    assert states
    for i in states:
        np.testing.assert_array_equal(after[1][1 + i], after[0][1 + i])
    model.save(tmp_path / "model.keras")
    assert keras.models.load_model(tmp_path / "model.keras").remat


def test_mixed_precision(gradients):
    x, y = data()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        found = []
        for remat in (False, True):
            model = make(remat)
            found.append(gradients(loss_of(model, x, y), model.trainable_variables))
    finally:
        keras.config.set_dtype_policy(before)
    for got, expected in zip(found[1], found[0], strict=True):
        got, expected = np.float32(got), np.float32(expected)
        assert np.linalg.norm(got - expected) <= 0.02 * np.linalg.norm(expected) + 1e-4


def kept_bytes(model, x, y) -> int:
    """Bytes that the forward pass keeps for the backward pass, parameters included."""
    loss = loss_of(model, x, y)
    if BACKEND == "torch":
        import torch

        kept = {}

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss()
        return sum(kept.values())
    import jax

    variables = model.trainable_variables

    def of(weights):
        with keras.StatelessScope(state_mapping=list(zip(variables, weights, strict=True))):
            return loss()

    _, backward = jax.vjp(of, [v.value for v in variables])
    return sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(backward))


def peak_bytes(model, x, y) -> int:
    """What a training step of TensorFlow needs at most above what is there between steps."""
    import tensorflow as tf

    model.compile("sgd", "categorical_crossentropy", jit_compile=False)
    for _ in range(2):
        model.train_on_batch(x, y)
    try:
        before = tf.config.experimental.get_memory_info("CPU:0")["current"]
        tf.config.experimental.reset_memory_stats("CPU:0")
        model.train_on_batch(x, y)
        return tf.config.experimental.get_memory_info("CPU:0")["peak"] - before
    except (ValueError, tf.errors.OpError) as error:
        pytest.skip(f"this build of TensorFlow does not count memory: {error}")


@pytest.mark.slow
def test_less_memory():
    """The optimiser of TensorFlow's graphs sees two computations of the same thing and must not make one of them."""
    x, y = data(32, 64)
    count = peak_bytes if BACKEND == "tensorflow" else kept_bytes
    without, with_it = (count(make(remat, 64, DEEP, **PLAIN), x, y) for remat in (False, True))
    assert with_it < 0.6 * without, (with_it, without)


def test_the_plan_has_every_node_once_in_an_order_that_works():
    model = make(True, include_top=False, features=True)
    steps = plan(model)
    segments = [step for step in steps if isinstance(step, Segment)]
    names = [segment.nodes[-1].operation.name for segment in segments]
    # All but the last block, which would be computed again the moment it was done.
    assert names == ["stem_conv3", "stage1_block1_add", "stage2_block1_add", "stage3_block1_add", "stage3_block2_add"]
    assert all(len(segment.inputs) == len(segment.outputs) == 1 for segment in segments)
    nodes = [node for step in steps for node in (step.nodes if isinstance(step, Segment) else (step,))]
    assert len(set(map(id, nodes))) == len(nodes) == len(model.layers) - 1
    seen = {id(tensor) for tensor in model.inputs}
    for node in nodes:
        assert all(id(tensor) in seen for tensor in node.input_tensors)
        seen |= {id(tensor) for tensor in node.outputs}


def test_heads_and_features(gradients):
    """Stage outputs that others use too, a layer between the blocks' own, and a backbone as a layer."""
    x, y = data()
    found = []
    for remat in (False, True):
        backbone = make(remat, include_top=False, features=True)
        pooled = [keras.layers.GlobalAveragePooling2D()(f) for f in backbone.outputs]
        outputs = keras.layers.Dense(5, "softmax", kernel_initializer="ones")(keras.layers.Concatenate()(pooled))
        flat = nfk.NormalizerFreeModel(backbone.input, outputs)
        assert not flat.remat
        flat.remat = remat
        nested = nfk.NormalizerFreeModel(backbone.input, flat(backbone.input))
        for model in (flat, nested):
            found.append(gradients(loss_of(model, x, y), backbone.trainable_variables))
            for generator in [layer.seed_generator for layer in backbone.layers if hasattr(layer, "seed_generator")]:
                generator.state.assign(generator.state * 0 + 7)
    check_close(found[2], found[0], 1e-5)
    check_close(found[3], found[1], 1e-5)


def test_the_option():
    model = make(True)
    assert model.get_config()["remat"] is True
    assert type(model).from_config(model.get_config()).remat
    assert nfk.replace_head(model, 3).remat
    plain = make(False)
    assert "remat" not in plain.get_config()
    assert [v.path for v in plain.weights] == [v.path for v in model.weights]
    plain.set_weights(model.get_weights())
    x, _ = data()
    check_close([ops.convert_to_numpy(plain(x))], [ops.convert_to_numpy(model(x))], 1e-6)
    with pytest.raises(TypeError, match="'full'"):
        plain.remat = "full"


@pytest.mark.parametrize("name", ["nf_regnet_b0", "nf_resnet50", "timm_nf_resnet26", "timm_nfnet_l0"])
def test_every_family_has_it(name):
    from nfnet_keras.complexity import without_weights

    with without_weights():
        model = nfk.create_model(name, weights=None, input_shape=(64, 64, 3), remat=True)
    segments = [step for step in plan(model) if isinstance(step, Segment)]
    assert len(segments) == sum(layer.name.endswith("_add") for layer in model.layers)


@pytest.mark.slow
def test_a_step_with_sam():
    x, y = data()
    after = []
    for remat in (False, True):
        model = make(remat)
        model.compile(nfk.optimizers.SGD_AGC(0.05), "categorical_crossentropy", sam=nfk.SAM(0.05, 0.5))
        model.train_on_batch(x, y)
        after.append(values(model.variables))
    check_close(after[1], after[0], 1e-4)
