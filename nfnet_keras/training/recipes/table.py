"""The recipes by name: the paper's, those that the authors published as code, and our own."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from nfnet_keras.applications import nf_regnet, nf_resnet, nfnet
from nfnet_keras.data import Augment
from nfnet_keras.training.recipes.definition import Recipe

# RandAugment's layers and magnitude by level, F0 to F6: the authors' experiment_nfnets.py ("405" is 4 layers of 5).
_RANDAUGMENT = ((4, 5), (4, 10), (4, 10), (4, 15), (4, 15), (4, 15), (4, 15))

# Distorted boxes of at least 8 % of the image, flip, half MixUp and half CutMix from twice the batch.
_MIXED = Augment(flip=True, min_area=0.08, mixup=0.2, cutmix=1.0, mix_from_twice=True)

# The floor of a unit's weight norm in AGC, for runs of some hundred or thousand steps. A skip gain starts at 0, and the
# gradient of a step can move it by clip_factor * floor * learning rate at most: with the paper's 1e-3, which is for
# 112,000 steps, the residual branches would still be shut at the end.
_SHORT_RUN_CLIP_EPS = 0.1

# The embedded set: 1,437 small scans of digits, which must not be mirrored. Small batches bear a larger clip factor
# than the paper's 0.01 at 4096 images (its section 4.1).
DIGITS = Recipe(
    name="digits",
    about="our choice, for the embedded set of handwritten digits",
    model="nfnet_tiny",
    epochs=40,
    batch_size=64,
    learning_rate=0.8,
    warmup_epochs=3,
    clip_factor=0.02,
    clip_eps=_SHORT_RUN_CLIP_EPS,
    image_size=32,
    augment=Augment(flip=False, min_area=1.0, shift=0.1, mixup=0.2, cutmix=0.0),
    stochastic_depth_rate=0.1,
)

# A folder of one's own photographs: some hundreds to some ten thousands, trained from scratch.
FOLDER = Recipe(
    name="folder",
    about="our choice, for a folder of photographs, from scratch",
    model="nfnet_tiny",
    epochs=60,
    batch_size=32,
    learning_rate=0.4,
    warmup_epochs=5,
    clip_factor=0.02,
    clip_eps=_SHORT_RUN_CLIP_EPS,
    image_size=None,
    augment=Augment(flip=True, min_area=0.25, mixup=0.2, cutmix=1.0),
    stochastic_depth_rate=0.1,
)

# Some hundreds of photographs and a pretrained network. The new classifier learns alone at first, so that its random
# beginning does not spoil what it stands on; runs of a few hundred steps need a shorter moving average. The peak of 0.1
# at a batch of 32 is from examples/transfer.py, where 0.1 to 0.4 did about equally well and 0.8 did not.
# Clipping keeps the paper's floor: pretrained skip gains are open already. (On the weights "digits", ten images of each
# of five new digits, five seeds, 60 steps of all layers, peak 0.1: 93.3 ± 1.5 % with 1e-3, 93.3 ± 1.9 % with 0.1.)
FINETUNE = Recipe(
    name="finetune",
    about="our choice, for some hundreds of photographs, from pretrained weights",
    model="nfnet_f0",
    epochs=20,
    batch_size=32,
    learning_rate=0.8,
    warmup_epochs=1,
    clip_factor=0.01,
    image_size=None,
    augment=Augment(flip=True, min_area=0.25),
    ema_momentum=0.95,
    stochastic_depth_rate=0.1,
    evaluation_crop="resize_crop_32",
    head_epochs=2,
)


def _nfnet(level: int) -> Recipe:
    """Brock et al. 2021, section 5 and appendix; RandAugment and precision: the authors' experiment_nfnets.py."""
    row = nfnet.VARIANTS[f"nfnet_f{level}"]
    layers, magnitude = _RANDAUGMENT[level]
    sam = level == 6
    return Recipe(
        name=row.name,
        about="the paper" + (", with sharpness-aware minimisation" if sam else ""),
        model=row.name,
        epochs=360,
        batch_size=4096,
        learning_rate=0.1,
        warmup_epochs=5,
        clip_factor=0.01,
        image_size=row.train_size,
        test_size=row.test_size,
        augment=dataclasses.replace(_MIXED, randaugment_layers=layers, randaugment_magnitude=magnitude),
        weight_decay=2e-5,
        ema_momentum=0.99999,
        stochastic_depth_rate=0.25,
        dropout_rate=row.drop_rate,
        evaluation_crop="resize_crop_32",
        antialias=False,
        sam_rho=0.05 if sam else None,
        precision="mixed_bfloat16",
    )


def _nf_regnet(level: int) -> Recipe:
    """The authors' experiment_nf_regnets.py, which ends at B5."""
    row = nf_regnet.VARIANTS[f"nf_regnet_b{level}"]
    return Recipe(
        name=row.name,
        about="as published" if level <= 5 else "our choice: as published for B0 to B5, weight decay carried on",
        model=row.name,
        epochs=360,
        batch_size=1024,
        learning_rate=0.4,
        scale_learning_rate=False,
        final_learning_rate=0.001,
        warmup_epochs=5,
        clip_factor=None,
        image_size=row.train_size,
        test_size=row.test_size,
        augment=_MIXED,
        weight_decay=(5 + level) / 1e5,
        ema_momentum=0.99999,
        stochastic_depth_rate=0.1,
        dropout_rate=row.drop_rate,
        evaluation_crop="crop_resize",
        antialias=False,
    )


def _nf_resnet(row: nf_resnet.NFResNetVariant) -> Recipe:
    """Ours: no recipe for NF-ResNets with clipping was published with the code."""
    return Recipe(
        name=row.name,
        about="our choice, for ImageNet",
        model=row.name,
        epochs=90,
        batch_size=1024,
        learning_rate=0.1,
        warmup_epochs=5,
        clip_factor=0.02,
        image_size=row.train_size,
        test_size=row.test_size,
        augment=Augment(flip=True, min_area=0.08),
        weight_decay=5e-5,
        ema_momentum=0.9999,
        stochastic_depth_rate=0.1,
        evaluation_crop="crop_resize",
    )


RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {
        found.name: found
        for found in (
            DIGITS,
            FOLDER,
            FINETUNE,
            *(_nfnet(level) for level in range(len(_RANDAUGMENT))),
            *(_nf_regnet(level) for level in range(len(nf_regnet.VARIANTS))),
            *(_nf_resnet(row) for row in nf_resnet.VARIANTS.values()),
        )
    }
)
"""All recipes by name."""


def list_recipes() -> list[str]:
    """Returns the names of the recipes.

    Example:

    >>> from nfnet_keras.training import list_recipes
    >>> list_recipes()[:4]
    ['digits', 'folder', 'finetune', 'nfnet_f0']
    """
    return list(RECIPES)


def recipe(name: str) -> Recipe:
    """Returns the recipe of this name.

    Args:
        name: One of `list_recipes()`.

    Returns:
        The recipe.

    Raises:
        ValueError: If there is none; the message names the nearest ones.

    Example:

    >>> from nfnet_keras.training import recipe
    >>> recipe("nfnet_f6").sam_rho
    0.05
    """
    if name in RECIPES:
        return RECIPES[name]
    nearest = difflib.get_close_matches(str(name).lower().replace("-", "_"), RECIPES, n=3, cutoff=0.4)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    raise ValueError(f"Unknown recipe: {name!r}.{hint} `nfnet train --list-recipes` lists all.")
