"""What a run would do, as a table: every value and what it comes to. Nothing is trained, written or downloaded."""

import dataclasses
import json
import os
import textwrap

from nfnet_keras import data, distribution
from nfnet_keras.applications import create_model
from nfnet_keras.complexity import parameters, without_weights
from nfnet_keras.training.counting import Counts, count
from nfnet_keras.training.plan import Plan
from nfnet_keras.training.recipes import RECIPES, STAGES, Recipe
from nfnet_keras.training.settings import Settings

_UNKNOWN = "not known before the images are counted"
_WIDTH = 120


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        name: Name of the value.
        value: The value.
        meaning: What it comes to, in words.
        changed: Whether it differs from the recipe of that name.

    Example:

    >>> Row("epochs", 90).meaning
    ''
    """

    name: str
    value: object
    meaning: str = ""
    changed: bool = False


def dry_run(config: Settings) -> str:
    """Returns the table of a run: its settings, its recipe, what they come to.

    Args:
        config: What `settings` gives.

    Raises:
        DataError: If there are images on this machine and something is wrong with them.
        ValueError: If the run could not start.

    Example:

    >>> from nfnet_keras.training import settings
    >>> print(dry_run(settings()).splitlines()[0])
    Dry run of nfnet_tiny with the recipe digits (our choice, for the embedded set of handwritten digits)
    """
    recipe, counts = config.recipe, count(config)
    plan = Plan(recipe, counts.train) if counts.train else None
    devices = _devices(config, recipe.batch_size // recipe.gradient_accumulation_steps if plan is None else plan.batch)
    title = f"Dry run of {config.model} with the recipe {recipe.name}" + (f" ({recipe.about})" if recipe.about else "")
    parts = [title, *_table("the run", _run_rows(config, counts, devices[1]))]
    parts += _table("the recipe", _recipe_rows(config, plan, devices[0]))
    parts += _table("the images", _augment_rows(recipe))
    known = RECIPES.get(recipe.name)
    if known is not None and known != recipe:
        parts += ["", f"* not the value of the recipe {recipe.name}"]
    return "\n".join([*parts, "", "Nothing was trained, and no folder was made."])


def augment_words(augment: data.Augment) -> str:
    """Returns what is done to training images, in words.

    Example:

    >>> from nfnet_keras.training import DIGITS
    >>> augment_words(DIGITS.augment)
    'shifted by up to 10 % of the side, MixUp (alpha 0.2)'
    """
    said = []
    if augment.min_area < 1:
        said.append(f"random crops of at least {augment.min_area:.0%} of the area".replace("%", " %"))
    if augment.shift:
        said.append(f"shifted by up to {augment.shift:.0%} of the side".replace("%", " %"))
    if augment.flip:
        said.append("every second one mirrored")
    mixes = [("MixUp", augment.mixup), ("CutMix", augment.cutmix)]
    mixes = [f"{name} (alpha {alpha:g})" for name, alpha in mixes if alpha]
    if mixes:
        mixed = " and ".join(f"half {mix}" for mix in mixes) if len(mixes) > 1 else mixes[0]
        said.append(mixed + (" of pairs from twice the batch" if augment.mix_from_twice else ""))
    if augment.randaugment_layers:
        layers, magnitude = augment.randaugment_layers, augment.randaugment_magnitude
        said.append(f"RandAugment ({layers} operations of magnitude {magnitude:g})")
    return ", ".join(said) or "as they are"


def _run_rows(config: Settings, counts: Counts, devices: str) -> list[Row]:
    images = [
        "training images: " + ("not known" if counts.train is None else f"{counts.train:,}"),
        "test images: " + ("not known" if counts.test is None else f"{counts.test:,}"),
        "classes: " + ("not known" if counts.classes is None else f"{counts.classes:,}"),
    ]
    note = f" ({counts.note})" if counts.note else ""
    return [
        Row("model", config.model, _size_words(config, counts.classes)),
        Row("data", config.data or "the embedded digits", ", ".join(images) + note),
        Row("weights", config.weights, "random ones to begin with" if config.weights is None else ""),
        Row("seed", config.seed),
        Row("strategy", config.strategy, devices),
        *([] if config.tpu is None else [Row("tpu", config.tpu)]),
        Row("data_dir", config.data_dir, "TensorFlow Datasets' own choice" if config.data_dir is None else ""),
        Row("cache", config.cache, "read anew in each epoch" if config.cache is None else ""),
        Row("keep", config.keep, "checkpoints"),
        Row("checkpoint_minutes", config.checkpoint_minutes),
    ]


def _size_words(config: Settings, classes: int | None) -> str:
    with without_weights():
        size = config.recipe.test_size or config.recipe.image_size
        model = create_model(config.model, weights=None, input_shape=(size, size, 3), classes=classes or 1000)
    return f"{parameters(model):,} parameters" + (" with 1,000 classes" if classes is None else "")


def _devices(config: Settings, batch: int) -> tuple[int | None, str]:
    """Returns on how many devices a batch is spread, as far as that is known without calling for them, and in words."""
    if config.strategy == "tpu":
        return None, "replicas: known once the TPU answers"
    if config.strategy == "multi_worker":
        try:
            cluster = json.loads(os.environ["TF_CONFIG"])["cluster"]
            machines = len(cluster.get("chief", ())) + len(cluster["worker"])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None, "replicas: not known, TF_CONFIG does not list the machines"
        return None, f"{machines} machines by TF_CONFIG; replicas: known once they meet"
    found = distribution.make(config.strategy)
    found.check_batch_size(batch)
    return found.replicas, f"replicas: {found.replicas}"


def _recipe_rows(config: Settings, plan: Plan | None, replicas: int | None) -> list[Row]:
    recipe = config.recipe
    meanings = {
        **_time_words(recipe, plan),
        "batch_size": _batch_words(recipe, plan, replicas),
        "learning_rate": _rate_words(recipe, plan),
        "final_learning_rate": "a cosine leads to it",
        "clip_factor": "adaptive gradient clipping" if recipe.clip_factor else "no clipping",
        "ema_momentum": f"average over some {1 / (1 - recipe.ema_momentum):,.0f} updates, fewer at the beginning",
        "dropout_rate": _own(config, "drop_rate") if recipe.dropout_rate is None else "",
        "stochastic_depth_rate": "the network's own" if recipe.stochastic_depth_rate is None else "at the last block",
        "test_size": f"{recipe.image_size}, as in training" if recipe.test_size is None else "",
        "sam_rho": "no sharpness-aware minimisation" if recipe.sam_rho is None else "sharpness-aware minimisation",
        "sam_fraction": "unused" if recipe.sam_rho is None else "of each replica's images, for the ascent",
        "freeze_stages": "the stem and the first so many stages stay as they are" if recipe.freeze_stages else "",
        "layer_decay": ""
        if recipe.layer_decay == 1
        else f"the stem learns at {recipe.layer_decay ** (STAGES + 1):.2g}",
    }
    known = RECIPES.get(recipe.name, recipe)
    skipped = ("name", "about", "model", "augment")
    fields = [field.name for field in dataclasses.fields(Recipe) if field.name not in skipped]
    order = [name for name in _ORDER if name in fields] + [name for name in fields if name not in _ORDER]
    return [
        Row(name, getattr(recipe, name), meanings.get(name, ""), getattr(recipe, name) != getattr(known, name))
        for name in order
    ]


# What belongs together stands together; fields that are not listed follow.
_ORDER = (
    "epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "scale_learning_rate",
    "warmup_epochs",
)
_ORDER += ("final_learning_rate", "momentum", "nesterov", "weight_decay", "clip_factor", "clip_eps", "sam_rho")
_ORDER += ("sam_fraction", "ema_momentum", "label_smoothing", "stochastic_depth_rate", "dropout_rate", "image_size")
_ORDER += ("test_size", "evaluation_crop", "antialias", "precision")


def _time_words(recipe: Recipe, plan: Plan | None) -> dict[str, str]:
    if plan is None:
        return {"epochs": f"steps: {_UNKNOWN}", "warmup_epochs": f"steps: {_UNKNOWN}"}
    each, total = plan.steps // plan.accumulation, plan.total_steps // plan.accumulation
    seen = plan.total_steps * plan.batch
    words = f"{each:,} step{'s' * (each != 1)} each, {total:,} in all, {seen:,} images seen"
    if recipe.augment.mix_from_twice:
        words += f" (each mixed from two, {2 * seen:,} are read)"
    left_out = plan.images - each * plan.update_images
    if left_out:
        words += f"; {left_out:,} of each epoch are left over"
    warm = [f"{plan.warmup_updates(phase):,} steps" for phase in plan.phases]
    found = {"epochs": words, "warmup_epochs": " and ".join(warm) + (" (head, all)" if len(warm) > 1 else "")}
    if recipe.head_epochs:
        found["head_epochs"] = f"{plan.updates(plan.phases[0]):,} steps for the new classifier alone"
    return found


def _rate_words(recipe: Recipe, plan: Plan | None) -> str:
    if not recipe.scale_learning_rate:
        return f"peak {recipe.peak_learning_rate:g}, for any batch"
    of, images = (recipe, recipe.batch_size) if plan is None else (plan, plan.update_images)
    return f"peak {of.peak_learning_rate:g} (times {images} / 256)"


def _batch_words(recipe: Recipe, plan: Plan | None, replicas: int | None) -> str:
    parts, words = recipe.gradient_accumulation_steps, []
    batch = recipe.batch_size // parts if plan is None else plan.batch
    if parts > 1:
        words.append(f"{parts} parts of {batch} images")
    elif batch != recipe.batch_size:
        words.append(f"{batch}, as there are no more images")
    if replicas is None:
        words.append("shared by the replicas")
    elif replicas > 1:
        words.append(f"{batch // replicas} for each of {replicas} replicas")
    return ", ".join(words)


def _own(config: Settings, name: str) -> str:
    from nfnet_keras.applications.registry import get_row

    value = getattr(get_row(config.model), name, None)
    return "the network's own" + ("" if value is None else f", {value:g}")


def _augment_rows(recipe: Recipe) -> list[Row]:
    known = RECIPES.get(recipe.name, recipe).augment
    rows = [Row("augment", "", augment_words(recipe.augment))]
    for field in dataclasses.fields(recipe.augment):
        value = getattr(recipe.augment, field.name)
        rows.append(Row(field.name, value, changed=value != getattr(known, field.name)))
    return rows


def _table(title: str, rows: list[Row]) -> list[str]:
    cells = [(("* " if row.changed else "  ") + row.name, _shown(row.value), row.meaning) for row in rows]
    first, second = max(len(cell[0]) for cell in cells), min(40, max(len(cell[1]) for cell in cells))
    lines = ["", title]
    for name, value, meaning in cells:
        head = f"{name:{first}}  {value:{second}}"
        room = max(30, _WIDTH - first - second - 4)
        for place, part in enumerate(textwrap.wrap(meaning, room) or [""]):
            lines.append(f"{head if not place else ' ' * (first + second + 2)}  {part}".rstrip())
    return lines


def _shown(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
