"""Trains a network with the paper's recipe, at its scale or a small one: adaptive gradient clipping, warm-up and
cosine, moving average of the weights, label smoothing, MixUp, CutMix and RandAugment.

Without flags it trains the small NFNet on the embedded set, scans of handwritten digits. With --data it trains
on a folder that has a folder of JPEG or PNG images for each class; a fifth of each class is held out, or the folders
train/ and test/ are used where they exist. --data=tfds:NAME is a set of TensorFlow Datasets, --data=tfrecord:PATTERN
files of records. The run's folder then holds model.keras, metrics.json, metrics.csv and curves.png. Ctrl-C stops after
the step in flight and keeps what was learnt in a checkpoint; --resume goes on from there to the model.

--recipe names how to train; --list-recipes lists what there is. Each of its values can be given by a flag of its name,
or in a YAML or JSON file with --config; flags come before the file, the file before the recipe. --dry-run shows all
values and what they come to, and trains nothing.
"""

import math
import os
import signal
import sys

from absl import flags

# What says where and how a run goes on but not what it learns may be another when it is resumed.
_FREE = ("data_dir", "cache", "tpu", "keep", "checkpoint_minutes")
_NONE = "none"

_HELP = {
    "model": "network to train, such as nfnet_tiny or nfnet_f0; without it, the recipe's",
    "data": "folder of class folders of JPEG and PNG files, tfds:NAME or tfrecord:PATTERN; without it, the digits",
    "image_size": "side of the training images in pixels; without --test-size, of the test images too",
    "learning_rate": "peak learning rate at this batch size",
    "seed": "seed of everything random (0)",
    "weights": "weights to begin with: imagenet, digits (of nfnet_tiny), or the path of a file",
}


def define_flags() -> flags.FlagValues:
    """Returns the flags of `nfnet train`: one for each value of the settings and of a recipe, and those for the run."""
    from nfnet_keras.data import Augment
    from nfnet_keras.training.config_file import run_options
    from nfnet_keras.training.overrides import options, recipe_options

    values = flags.FlagValues()
    named = {"flag_values": values}
    flags.DEFINE_string("recipe", None, "name of the recipe; list shows all", **named)
    flags.DEFINE_string("config", None, "YAML or JSON file of settings and values of the recipe", **named)
    flags.DEFINE_boolean("dry_run", False, "show every value and what it comes to, and train nothing", **named)
    flags.DEFINE_boolean("list_recipes", False, "list the recipes, and train nothing", **named)
    flags.DEFINE_string("out", None, "folder of the run; without it, a new one in runs/", **named)
    flags.DEFINE_boolean("resume", False, "go on with the run in --out, with its own settings", **named)
    for option in (run_options() | recipe_options()).values():
        about = _HELP.get(option.name, option.help)
        if option.kind is bool:
            flags.DEFINE_boolean(option.name, None, about, **named)
        else:
            flags.DEFINE(_Parser(option), option.name, None, about, **named)
    for name in list(values):
        # The dashes that people type as well as the underscores of absl.
        if "_" in name:
            flags.DEFINE_alias(name.replace("_", "-"), name, flag_values=values)
    for name in options(Augment):
        for alias in {f"augment.{name}", f"augment.{name}".replace("_", "-")}:
            flags.DEFINE_alias(alias, name, flag_values=values)
    return values


class _Parser(flags.ArgumentParser):
    """Reads a flag as its option does; "none" stays a word, because `None` is a flag that was not given."""

    def __init__(self, option):
        self.option = option

    def parse(self, argument):
        value = self.option.read(argument)
        return _NONE if value is None else value

    def flag_type(self) -> str:
        return self.option.kind.__name__


def run(values: flags.FlagValues) -> int:
    """Runs `nfnet train` and returns its exit status."""
    from nfnet_keras.training import run as training

    if values.list_recipes or values.recipe == "list":
        print(_recipes())
        return 0
    config = _resumed(values) if values.resume else _settings(values)
    if values.dry_run:
        from nfnet_keras.training.dry_run import dry_run

        print(dry_run(config))
        return 0
    out = values.out or training.default_out(config)
    try:
        metrics = training.train(config, out, resume=values.resume, verbose=1)
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            raise
        print(
            f"\nStopped; the checkpoints in {out} hold what was learnt. To go on, and to get a model: "
            f"nfnet train --resume --out={out}",
            file=sys.stderr,
        )
        return 128 + int(interrupt.args[0] or signal.SIGINT)
    except (RuntimeError, ValueError, OSError):
        # Off the line of the progress bar.
        print(flush=True)
        raise
    print(
        f"Test accuracy {metrics['test_accuracy']:.4f} on {metrics['test_images']} held-out images; model, metrics and "
        f"curves are in {out}"
    )
    return _judged(metrics)


# The loss of a run that learns stays within some times that of guessing.
_DIVERGED = 10.0


def _judged(metrics: dict) -> int:
    """Says what a run came to where that is nothing, and returns the exit status."""
    loss, guessing, chance = metrics["test_loss"], math.log(max(metrics["classes"], 2)), 1 / metrics["classes"]
    if math.isfinite(loss) and metrics["test_accuracy"] >= 1.2 * chance:
        return 0
    if not loss < _DIVERGED * guessing:
        print(
            f"The test loss is {loss:.4g}, where guessing has {guessing:.4g}: the run diverged. Start one in another "
            "folder with a lower --learning-rate or --clip-factor.",
            file=sys.stderr,
        )
        # A model that gives no numbers is none.
        return 0 if math.isfinite(loss) else 1
    print(
        f"That is hardly better than chance ({chance:.4f}). More epochs, more images, or trained weights to begin "
        "with (--recipe finetune) may help."
    )
    return 0


def _recipes() -> str:
    from nfnet_keras.training import RECIPES

    width = max(map(len, RECIPES))
    return "\n".join(f"{name:{width}}  {recipe.about}" for name, recipe in RECIPES.items())


def _asked(values: flags.FlagValues) -> tuple[dict, dict]:
    """Returns what the file and the flags say of the run, and of the recipe; flags come before the file."""
    from nfnet_keras.training.config_file import read_config, run_options
    from nfnet_keras.training.overrides import recipe_options

    run, changes = read_config(values.config) if values.config else ({}, {})
    if values.recipe is not None:
        run["recipe"] = values.recipe
    for known, told in ((run_options(), run), (recipe_options(), changes)):
        for option in known.values():
            value = values[option.name].value
            if value is not None:
                told[option.name] = None if value == _NONE and option.optional else value
    return run, changes


def _settings(values: flags.FlagValues):
    from nfnet_keras.training import settings

    run, changes = _asked(values)
    return settings(**run, changes=changes)


def _resumed(values: flags.FlagValues):
    """Returns the settings of the run in --out; a flag or a file that says otherwise is refused."""
    import dataclasses

    from nfnet_keras.training import Recipe, Settings
    from nfnet_keras.training.run_folder import RunFolder
    from nfnet_keras.training.settings import placed

    if not values.out:
        raise ValueError("--resume needs --out, the folder of the run to go on with")
    config = Settings.from_dict(RunFolder(values.out).read_config())
    run, changes = _asked(values)
    run = placed(run)
    asked = {**_values(run.pop("recipe")), **run} if isinstance(run.get("recipe"), Recipe) else run
    has = {**vars(config), **_values(config.recipe), "model": config.model, "recipe": config.recipe.name}
    free = (*_FREE, "data") if _moved(config.data, run.get("data")) else _FREE
    for name, new in {**asked, **changes}.items():
        if name not in free and not _same(has[name], new):
            raise ValueError(
                f"the run in {values.out!r} has {name} {_text(has[name])}, not {_text(new)}; leave it out to go on "
                "with the run as it is, or start a new run in another folder"
            )
    config = dataclasses.replace(config, **{name: run[name] for name in free if name in run})
    if config.data and _kind(config.data) == "folder" and not os.path.isdir(config.data):
        raise ValueError(
            f"the images of the run in {values.out!r} are not in {config.data!r}; say where: --data=FOLDER"
        )
    return config


def _kind(data: str) -> str:
    from nfnet_keras.training.settings import DATA_SPECS

    return next((spec for spec in DATA_SPECS if data.startswith(spec)), "folder")


def _moved(old: str | None, new: str | None) -> bool:
    """Whether the same images may lie in another place: that they are the same is checked once they are there."""
    return bool(old and new) and _kind(old) == _kind(new) != "tfds:"


def _values(recipe) -> dict:
    """Returns what a recipe comes to by the names of the flags."""
    values = {**vars(recipe), **vars(recipe.augment), "learning_rate": recipe.peak_learning_rate}
    return {name: value for name, value in values.items() if name not in ("name", "about", "model", "augment")}


def _same(old, new) -> bool:
    if isinstance(old, int | float) and isinstance(new, float):
        return math.isclose(old, new)
    return old == new


def _text(value) -> str:
    return _NONE if value is None else str(value)
