"""Logits and gradients of every family equal those of the authors' program and of timm, with the same parameters."""

import json

import judge
import keras
import numpy as np
import pytest
import seeded
import small_networks
from keras import ops

import nfnet_keras as nfk
from nfnet_keras.checkpoints import assign_haiku, haiku_names

BACKEND = keras.backend.backend()


@pytest.fixture(scope="module", params=small_networks.SMALL)
def seeded_small(request, small_nfnet):
    numbers = judge.numbers("models", request.param)
    model = small_networks.small(request.param, small_nfnet)
    tree = json.loads(str(numbers["tree"]))
    assign_haiku(model, seeded.fill(tree, int(numbers["seed"])))
    return model, numbers, tree


def test_logits_and_features(seeded_small):
    model, numbers, _ = seeded_small
    pooled = keras.Model(model.input, [model.get_layer("avg_pool").output, model.output])
    features, logits = pooled.predict(numbers["x"], verbose=0)
    assert judge.error(logits, numbers["logits"]) < 2e-5
    assert judge.error(features, numbers["pool"]) < 2e-5


def wrong_gradients(model, numbers, x, gradients) -> list[str]:
    """Names of the parameters whose gradient is not the reference's."""
    triples = list(haiku_names(model))
    labels = np.eye(10, dtype="float32")[numbers["labels"]]

    def loss():
        return ops.mean(ops.categorical_crossentropy(labels, model(x, training=False), from_logits=True))

    found = gradients(loss, [variable for *_, variable in triples])
    names = [str(name) for name in numbers["dp_names"]]
    assert len(names) == len(triples)
    wrong = []
    for (module, parameter, _), gradient in zip(triples, found, strict=True):
        name = f"{module}/{parameter}"
        reference, dot = (numbers[key][names.index(name)] for key in ("dp_norm", "dp_dot"))
        direction = seeded.array(module, parameter, gradient.shape, int(numbers["seed"]) + 1000)
        close = abs(np.linalg.norm(gradient) - reference) <= 1e-4 * reference + 1e-6
        bound = 1e-4 * reference * np.linalg.norm(direction) + 1e-6
        if not close or abs(np.sum(gradient * direction) - dot) > bound:
            wrong.append(name)
    return wrong


def test_gradients(seeded_small, gradients):
    model, numbers, _ = seeded_small
    # One activation of `nf_resnet` is 6e-8 from zero. Rounding decides on which side of ReLU's kink it falls, and so
    # which of two gradients is right: images that differ in their last bits fall on the reference's side.
    nudges = (0, 3e-7, -3e-7) if any(getattr(layer, "activation", None) == "relu" for layer in model.layers) else (0,)
    wrong = []
    for nudge in nudges:
        wrong = wrong_gradients(model, numbers, (numbers["x"] * (1 + nudge)).astype("float32"), gradients)
        if not wrong:
            break
    assert wrong == []


def test_the_judgement_tells_networks_apart(seeded_small):
    """One flipped kernel is more than the tolerance."""
    model, numbers, _ = seeded_small
    kernel = model.get_layer("stage2_block1_conv1").kernel
    value = ops.convert_to_numpy(kernel)
    kernel.assign(value[::-1].copy())
    try:
        assert judge.error(model.predict(numbers["x"], verbose=0), numbers["logits"]) > 2e-3
    finally:
        kernel.assign(value)


# These run on every backend by default, with TensorFlow all but timm's F0; `make slow` runs the rest.
QUICK = ("NFNet-F0", "NF-RegNet-B0", "test_nfnet", "nf_ecaresnet26")
AUTHORS = {"NFNet-F0": "nfnet_f0", "NF-RegNet-B0": "nf_regnet_b0", "NF-ResNet50": "nf_resnet50"}
TIMM = (
    "nfnet_l0",
    "eca_nfnet_l0",
    "nf_resnet26",
    "nf_ecaresnet26",
    "nf_seresnet26",
    "nf_regnet_b0",
    "dm_nfnet_f0",
    "nfnet_f0",
    "test_nfnet",
)


def quick_first(names):
    whole = BACKEND == "tensorflow"
    return [
        name if name in QUICK or (whole and name != "nfnet_f0") else pytest.param(name, marks=pytest.mark.slow)
        for name in names
    ]


def full_error(numbers: dict, name: str, source) -> float:
    seed, size = int(numbers["seed"]), tuple(map(int, numbers["hw"]))
    x = seeded.image((int(numbers["batch"]), *size, 3), seed)

    def make():
        return nfk.create_model(name, weights=None, classifier_activation=None, input_shape=(*size, 3))

    return judge.error(judge.logits(make, source, x), numbers["logits"])


@pytest.mark.parametrize("name", quick_first(AUTHORS))
def test_logits_of_the_authors_networks(name):
    numbers = judge.numbers("logits", name)
    source = judge.checkpoint(judge.tree("haiku", name), int(numbers["seed"]))
    assert full_error(numbers, AUTHORS[name], source) < 2e-5


@pytest.mark.parametrize("name", quick_first(TIMM))
def test_logits_of_timms_networks(name):
    numbers = judge.numbers("timm_logits", name)
    source = judge.checkpoint(judge.tree("timm", name), int(numbers["seed"]), "timm")
    assert full_error(numbers, f"timm_{name}", source) < 2e-5


@pytest.mark.slow
def test_timms_file_in_the_authors_network():
    """The same numbers, the authors' arithmetic: another function, and not by much."""
    numbers = judge.numbers("timm_logits", "dm_nfnet_f0")
    source = judge.checkpoint(judge.tree("timm", "dm_nfnet_f0"), int(numbers["seed"]), "timm")
    assert 2e-4 < full_error(numbers, "nfnet_f0", source) < 2e-2
