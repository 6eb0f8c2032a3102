"""The authors' names and this package's variables."""

import json

import numpy as np
import pytest
import seeded
from keras import ops

from nfnet_keras.checkpoints import assign_haiku, haiku_names


@pytest.fixture(scope="module")
def model(small_nfnet):
    return small_nfnet()


@pytest.fixture
def tree(golden) -> dict:
    numbers = golden("models")
    return seeded.fill(json.loads(str(numbers["nfnet|tree"])), int(numbers["nfnet|seed"]))


def weights(model) -> list[np.ndarray]:
    return [np.array(ops.convert_to_numpy(v)) for v in model.trainable_variables]


def test_every_variable_once(model, tree):
    triples = list(haiku_names(model, tree))
    assert len(triples) == sum(len(parameters) for parameters in tree.values())
    assert {v.path for *_, v in triples} == {v.path for v in model.trainable_variables}
    for module, parameter, variable in triples:
        assert tree[module][parameter].shape == tuple(variable.shape)


@pytest.mark.parametrize(
    ("module", "parameter", "path"),
    [
        ("NFNet/~/stem_conv0", "w", "stem_conv0/kernel"),
        ("NFNet/~/linear", "w", "predictions/kernel"),
        ("NFNet/~/linear", "b", "predictions/bias"),
        ("NFNet/~/final_conv", "gain", "final_conv/gain"),
        ("NFNet/~/nf_block", "skip_gain", "stage1_block1_skip_gain/skip_gain"),
        ("NFNet/~/nf_block_2/~/conv1b", "w", "stage2_block2_conv1b/kernel"),
        ("NFNet/~/nf_block_5/~/squeeze_excite/~/linear_1", "b", "stage4_block1_se/expand/bias"),
        ("NFNet/~/nf_block_3/~/conv_shortcut", "bias", "stage3_block1_conv_shortcut/bias"),
    ],
)
def test_names(model, tree, module, parameter, path):
    assert {(m, p): v.path for m, p, v in haiku_names(model, tree)}[module, parameter] == path


def test_assign(model, tree):
    assign_haiku(model, tree)
    for module, parameter, variable in haiku_names(model, tree):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), tree[module][parameter])


def _without(tree):
    del tree["NFNet/~/nf_block_1"]["skip_gain"]


def _unknown(tree):
    tree["NFNet/~/linear"]["scale"] = np.ones(10)


def _unknown_module(tree):
    tree["NFNet/~/nf_block_1/~/conv9"] = {"w": np.ones((1, 1, 2, 2))}


def _too_deep(tree):
    tree["NFNet/~/nf_block_9"] = {"skip_gain": np.ones(())}


def _misshapen(tree):
    tree["NFNet/~/linear"]["w"] = np.ones((96, 9), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without, "lack that of the variable 'stage2_block1_skip_gain/skip_gain'"),
        (_unknown, "'NFNet/~/linear' 'scale' has no place"),
        (_unknown_module, "conv9' 'w' has no place"),
        (_too_deep, "block 10; the model has 6"),
        (_misshapen, r"'NFNet/~/linear' 'w' has shape \(96, 9\), the model's 'predictions/kernel' \(96, 10\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_set(model, tree, change, message):
    before = weights(model)
    change(tree)
    with pytest.raises(ValueError, match=message):
        assign_haiku(model, {k: {p: np.asarray(a) + 1 for p, a in v.items()} for k, v in tree.items()})
    for a, b in zip(weights(model), before, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_module_without_a_root_is_an_error_that_names_it(model, tree):
    tree["optimizer"] = {"count": np.zeros(())}
    with pytest.raises(ValueError, match="optimizer"):
        assign_haiku(model, tree)
