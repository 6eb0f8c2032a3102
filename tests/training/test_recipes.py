"""Recipes: what was published is what they say, and values that make no sense are refused."""

import dataclasses

import pytest

from nfnet_keras.applications import nf_resnet
from nfnet_keras.applications.registry import get_constructor, get_row
from nfnet_keras.data import Augment
from nfnet_keras.training import DIGITS, FINETUNE, FOLDER, RECIPES, list_recipes, recipe


def test_there_is_one_for_each_network_and_use():
    networks = [f"nfnet_f{level}" for level in range(7)] + [f"nf_regnet_b{level}" for level in range(9)]
    assert set(list_recipes()) == {"digits", "folder", "finetune", *networks, *nf_resnet.VARIANTS}
    for name, found in RECIPES.items():
        assert found.name == name
        get_constructor(found.model)
        assert any(source in found.about for source in ("the paper", "as published", "our choice"))
        assert ("our choice" in found.about) == (
            name in ("digits", "folder", "finetune") or "resnet" in name or name[-2:] in ("b6", "b7", "b8")
        )


# Brock et al. 2021, tables 1 and 6, and the authors' experiment_nfnets.py: RandAugment, dropout, train and test size.
PAPER = {
    "nfnet_f0": (5, 0.2, 192, 256),
    "nfnet_f1": (10, 0.3, 224, 320),
    "nfnet_f2": (10, 0.4, 256, 352),
    "nfnet_f3": (15, 0.4, 320, 416),
    "nfnet_f4": (15, 0.5, 384, 512),
    "nfnet_f5": (15, 0.5, 416, 544),
    "nfnet_f6": (15, 0.5, 448, 576),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_values(name):
    found = recipe(name)
    magnitude, dropout, train_size, test_size = PAPER[name]
    augment = Augment(
        flip=True,
        min_area=0.08,
        mixup=0.2,
        cutmix=1.0,
        mix_from_twice=True,
        randaugment_layers=4,
        randaugment_magnitude=magnitude,
    )
    assert found.augment == augment
    assert (found.dropout_rate, found.image_size, found.test_size) == (dropout, train_size, test_size)
    assert (found.epochs, found.batch_size, found.warmup_epochs, found.final_learning_rate) == (360, 4096, 5, 0.0)
    assert found.peak_learning_rate == pytest.approx(1.6)
    assert (found.clip_factor, found.clip_eps) == (0.01, 1e-3)
    assert (found.momentum, found.nesterov, found.weight_decay) == (0.9, True, 2e-5)
    assert not found.antialias
    assert (found.ema_momentum, found.label_smoothing, found.stochastic_depth_rate) == (0.99999, 0.1, 0.25)
    assert (found.evaluation_crop, found.precision) == ("resize_crop_32", "mixed_bfloat16")
    assert (found.sam_rho, found.sam_fraction) == ((0.05 if name == "nfnet_f6" else None), 0.2)
    assert (found.freeze_stages, found.head_epochs, found.layer_decay) == (0, 0, 1.0)


@pytest.mark.parametrize("level", range(9))
def test_the_published_values_of_nf_regnets(level):
    found = recipe(f"nf_regnet_b{level}")
    row = get_row(found.model)
    assert (found.epochs, found.batch_size, found.warmup_epochs) == (360, 1024, 5)
    assert found.peak_learning_rate == 0.4
    assert dataclasses.replace(found, batch_size=64).peak_learning_rate == 0.4
    assert found.final_learning_rate == 0.001
    assert found.weight_decay == pytest.approx([5e-5, 6e-5, 7e-5, 8e-5, 9e-5, 1e-4, 1.1e-4, 1.2e-4, 1.3e-4][level])
    assert (found.clip_factor, found.sam_rho, found.stochastic_depth_rate) == (None, None, 0.1)
    assert found.augment == Augment(min_area=0.08, mixup=0.2, cutmix=1.0, mix_from_twice=True)
    assert (found.image_size, found.test_size, found.dropout_rate) == (row.train_size, row.test_size, row.drop_rate)
    assert (found.evaluation_crop, found.ema_momentum, found.precision) == ("crop_resize", 0.99999, "float32")


def test_those_for_small_sets_have_their_values():
    values = (DIGITS.epochs, DIGITS.batch_size, DIGITS.learning_rate, DIGITS.warmup_epochs, DIGITS.clip_factor)
    assert values == (40, 64, 0.8, 3, 0.02)
    assert DIGITS.augment == Augment(flip=False, min_area=1.0, shift=0.1, mixup=0.2)
    values = (FOLDER.epochs, FOLDER.batch_size, FOLDER.learning_rate, FOLDER.warmup_epochs, FOLDER.clip_factor)
    assert values == (60, 32, 0.4, 5, 0.02)
    assert FOLDER.augment == Augment(flip=True, min_area=0.25, mixup=0.2, cutmix=1.0)
    for found in (DIGITS, FOLDER):
        assert found.clip_eps == 0.1
        assert (found.momentum, found.weight_decay, found.ema_momentum) == (0.9, 2e-5, 0.99)
        assert (found.stochastic_depth_rate, found.evaluation_crop, found.test_size) == (0.1, "training", None)
    assert FINETUNE.peak_learning_rate == pytest.approx(0.1)
    assert FINETUNE.head_epochs < FINETUNE.epochs < FOLDER.epochs


def test_an_unknown_one_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"Unknown recipe: 'nfnet-F00'.*nfnet_f0"):
        recipe("nfnet-F00")


WRONG = {
    "epochs": (0, -1, 1.5, True, "3", None),
    "batch_size": (0, 2.0, None),
    "learning_rate": (0, -0.1, float("nan"), float("inf"), "1", True),
    "final_learning_rate": (-1, 1e9),
    "warmup_epochs": (-1,),
    "scale_learning_rate": (1, "yes"),
    "clip_factor": (0, -1, "none"),
    "clip_eps": (0,),
    "momentum": (1, -0.1),
    "nesterov": (0,),
    "antialias": (0, "yes"),
    "weight_decay": (-1e-5,),
    "ema_momentum": (1.0, None),
    "label_smoothing": (1, -0.1),
    "stochastic_depth_rate": (1.0, -0.1),
    "dropout_rate": (1.0,),
    "image_size": (0, 32.5),
    "test_size": (0,),
    "evaluation_crop": ("crop", None, "center_7"),
    "augment": ({}, None),
    "sam_rho": (0, -1),
    "sam_fraction": (0, 1.1),
    "gradient_accumulation_steps": (0, 3),
    "precision": ("float16", None),
    "freeze_stages": (-1, 5, 1.0),
    "head_epochs": (-1, 41, 0.5),
    "layer_decay": (0, 1.1),
    "name": ("", None),
    "about": (None,),
    "model": ("",),
}


def test_every_value_is_checked():
    assert set(WRONG) == {field.name for field in dataclasses.fields(DIGITS)}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_values_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}`") as caught:
        dataclasses.replace(DIGITS, **{name: value})
    assert str(value) in str(caught.value)


def test_sam_and_accumulation_exclude_each_other():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2, sam_rho=0.05"):
        dataclasses.replace(DIGITS, gradient_accumulation_steps=2, sam_rho=0.05)
