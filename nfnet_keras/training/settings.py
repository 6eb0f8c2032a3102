"""What one run is told, and how what it is not told is filled in."""

import dataclasses
import math
import os
from collections.abc import Mapping

from nfnet_keras.applications.registry import get_constructor, get_row
from nfnet_keras.checkpoints.manifest import shipped_words
from nfnet_keras.data import Augment
from nfnet_keras.distribution import NAMES
from nfnet_keras.training.errors import TrainingError
from nfnet_keras.training.overrides import replaced
from nfnet_keras.training.recipes import DIGITS, FINETUNE, FOLDER, RECIPES, Recipe
from nfnet_keras.training.recipes import recipe as recipe_named
from nfnet_keras.training.run_folder import MODEL

TINY = "nfnet_tiny"
STRATEGIES = tuple(NAMES)
"""What `Settings.strategy` may be."""

DATA_SPECS = ("tfds:", "tfrecord:")
"""How a `data` begins that is not a folder."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one run is told.

    Args:
        model: Name of the network.
        data: Folder of class folders, `tfds:NAME`, `tfrecord:PATTERN`, or `None` for the embedded set.
        seed: Seed of everything random.
        recipe: How to train.
        weights: Weights to begin with: `"imagenet"`, `"digits"` or the path of a file; `None` for random ones. Defaults
            to `None`.
        data_dir: Folder where TensorFlow Datasets keeps its sets; `None` for its own choice. Defaults to `None`.
        cache: Where decoded input is kept between epochs: `"memory"`, a folder, or `None` for nowhere. Defaults to
            `None`.
        strategy: What the run is spread over: one, mirrored (all GPUs of a machine), multi_worker, tpu, or
            data_parallel (all JAX devices). Defaults to `"one"`.
        tpu: Name or address of the TPU, or `"local"`; `None` for what the environment says. Defaults to `None`.
        keep: Checkpoints that are kept, the newest. Defaults to `3`.
        checkpoint_minutes: Minutes from one checkpoint to the next within an epoch. Defaults to `10.0`.

    Raises:
        ValueError: If a value is of the wrong type or out of its range, or gradients are to be accumulated inside of
            one of TensorFlow's strategies; the message names it.

    Example:

    >>> settings(epochs=2).recipe.epochs
    2
    """

    model: str
    data: str | None
    seed: int
    recipe: Recipe
    weights: str | None = None
    data_dir: str | None = None
    cache: str | None = None
    strategy: str = "one"
    tpu: str | None = None
    keep: int = 3
    checkpoint_minutes: float = 10.0

    def __post_init__(self):
        for name, good, wanted in (
            ("seed", _whole(self.seed) and 0 <= self.seed < 2**32, f"in 0 to {2**32 - 1}"),
            ("strategy", self.strategy in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
            ("tpu", self.tpu is None or self.strategy == "tpu", "left out unless the strategy is tpu"),
            ("keep", _whole(self.keep) and self.keep >= 1, "positive and a whole number"),
            ("checkpoint_minutes", _positive(self.checkpoint_minutes), "positive"),
            *(
                (name, getattr(self, name) is None or bool(_text(getattr(self, name))), "a text, or None")
                for name in ("data", "weights", "data_dir", "cache", "tpu")
            ),
        ):
            if not good:
                raise ValueError(f"`{name}` must be {wanted}. Received: {name}={getattr(self, name)!r}")
        steps = self.recipe.gradient_accumulation_steps
        if steps > 1 and NAMES[self.strategy] == "tensorflow":
            raise ValueError(
                "Keras's optimizers cannot accumulate gradients inside of a tf.distribute strategy "
                f"({self.strategy!r}). Received: gradient_accumulation_steps={steps}. Each replica has its share of a "
                "batch anyway; take 1, 'one' device, or JAX and 'data_parallel'."
            )

    def to_dict(self) -> dict:
        """Returns the settings as JSON holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Settings":
        """Returns the settings that `to_dict` gave; what an older version did not know gets its default.

        Raises:
            TrainingError: If something is missing or unknown.
        """
        try:
            values = {name: value for name, value in values.items() if name != "images"}
            recipe = dict(values["recipe"])
            recipe["augment"] = Augment(**recipe["augment"])
            return cls(**{**values, "recipe": Recipe(**recipe)})
        except (KeyError, TypeError, ValueError) as error:
            raise TrainingError(f"the settings of the run are not this version's ({error})") from error


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _text(value) -> str:
    return value if isinstance(value, str) else ""


def settings(
    model: str | None = None,
    data: str | os.PathLike | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    learning_rate: float | None = None,
    clip_factor: float | None = None,
    seed: int = 0,
    *,
    recipe: str | Recipe | None = None,
    weights: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    strategy: str = "one",
    tpu: str | None = None,
    keep: int = 3,
    checkpoint_minutes: float = 10.0,
    changes: Mapping | None = None,
) -> Settings:
    """Fills in what a run is not told from the recipe of its data.

    Args:
        model: Name of the network. Defaults to the recipe's.
        data: Folder of class folders of JPEG and PNG files, `tfds:NAME` or `tfrecord:PATTERN`. Defaults to the embedded
            digits.
        epochs: Passes over the training images.
        batch_size: Images of one update.
        image_size: Side of the training images in pixels; without a `test_size` in `changes`, of the test images too.
            Defaults to the recipe's, or the network's own sizes where the recipe is for another network.
        learning_rate: Peak learning rate at this batch size. Defaults to the recipe's, scaled with the batch.
        clip_factor: AGC's largest ratio of gradient norm to weight norm.
        seed: Seed of everything random. Defaults to `0`.
        recipe: Name of a recipe, or one of your own. Defaults to "finetune" where weights are given, to "digits"
            without data, to the network's own recipe, if there is one, for `tfds:` and `tfrecord:`, else to "folder".
        weights: Weights to begin with: `"imagenet"`, `"digits"`, the path of a file, or of a run's folder. Defaults to
            random ones.
        data_dir: As in `Settings`. Defaults to `None`.
        cache: As in `Settings`. Defaults to `None`.
        strategy: As in `Settings`. Defaults to `"one"`.
        tpu: As in `Settings`. Defaults to `None`.
        keep: As in `Settings`. Defaults to `3`.
        checkpoint_minutes: As in `Settings`. Defaults to `10.0`.
        changes: Other values of the recipe and of its augmentation by name, such as
            `{"weight_decay": 1e-5, "mixup": 0.0, "clip_factor": None}`. Defaults to none.

    Returns:
        The settings.

    Raises:
        ValueError: If the model or the recipe does not exist, a name in `changes` is unknown, or a value is of the
            wrong type or out of range.

    Example:

    >>> settings(batch_size=128).recipe.batch_size
    128
    >>> settings(recipe="nfnet_f1", data="tfds:imagenet2012", changes={"mixup": 0.0}).recipe.image_size
    224
    """
    if model is not None:
        get_constructor(model)
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "image_size": image_size,
        "learning_rate": learning_rate,
        "clip_factor": clip_factor,
    }
    changes = {**(changes or {}), **{name: value for name, value in given.items() if value is not None}}
    if weights is not None and os.path.isfile(os.path.join(weights, MODEL)):
        # The folder of a run: what it ended with.
        weights = os.path.join(weights, MODEL)
    places = placed({"data": data, "weights": weights, "data_dir": data_dir, "cache": cache})
    data, weights = places["data"], places["weights"]
    _check_file(weights)
    if isinstance(recipe, Recipe):
        base, fits = recipe, True
    else:
        base = recipe_named(recipe) if recipe is not None else _own_choice(model, data, weights)
        fits = model in (None, base.model)
    model = model or base.model
    get_constructor(model)
    fitted = _fitted(base, fits, model, data, replaced(base, changes), changes)
    _check_weights(fitted, weights)
    return Settings(
        model,
        seed=seed,
        recipe=fitted,
        **places,
        strategy=strategy,
        tpu=tpu,
        keep=keep,
        checkpoint_minutes=checkpoint_minutes,
    )


# What is no path on this machine, though it stands where a path may.
_WEIGHTS = ("imagenet", *shipped_words())
_NO_PATHS = {"data": DATA_SPECS, "weights": _WEIGHTS, "data_dir": ("gs://",), "cache": ("memory", "gs://")}


def placed(values: Mapping) -> dict:
    """Returns settings with their paths made absolute, so that they hold when a run is resumed elsewhere.

    Args:
        values: Settings by name; what is no path stays as it is, `tfds:` and `"imagenet"` among it.

    Example:

    >>> placed({"data": "tfds:imagenet2012", "seed": 3})
    {'data': 'tfds:imagenet2012', 'seed': 3}
    """
    found = dict(values)
    for name, others in _NO_PATHS.items():
        if not found.get(name):
            continue
        text = os.fspath(found[name])
        words = tuple(other for other in others if not other.endswith((":", "/")))
        prefixes = tuple(other for other in others if other not in words)
        found[name] = text if text in words or text.startswith(prefixes) else os.path.abspath(text)
    return found


def _own_choice(model: str | None, data: str | None, weights) -> Recipe:
    if weights is not None:
        return FINETUNE
    if data is None:
        return DIGITS
    if data.startswith(DATA_SPECS) and model in RECIPES:
        return RECIPES[model]
    return FOLDER


def _fitted(base: Recipe, fits: bool, model: str, data: str | None, recipe: Recipe, changes: Mapping) -> Recipe:
    """Returns the recipe with the network's own values where it was made for another network, or names none."""
    asked = {str(name).replace("-", "_") for name in changes}
    row = get_row(model)
    sizes = {"image_size": row.train_size, "test_size": row.test_size}
    if model == TINY and data is not None:
        # The small network's published size is the digits'; photographs need more.
        sizes = {"image_size": 64, "test_size": 64}
    values = {}
    if model == TINY and "evaluation_crop" not in asked and base.evaluation_crop == "resize_crop_32":
        # Of an image this small the 32 pixels would be half of each side.
        values["evaluation_crop"] = "training"
    if recipe.image_size is None or (not fits and "image_size" not in asked):
        values["image_size"] = sizes["image_size"]
    if "test_size" not in asked and base.test_size is not None:
        if recipe.image_size not in (None, base.image_size):
            values["test_size"] = None
        elif not fits:
            values["test_size"] = sizes["test_size"]
    if not fits and "dropout_rate" not in asked and base.dropout_rate is not None:
        values["dropout_rate"] = None
    return dataclasses.replace(recipe, **values) if values else recipe


def _check_file(weights: str | None) -> None:
    if weights is not None and weights not in _WEIGHTS and not os.path.exists(weights):
        words = ", ".join(map(repr, _WEIGHTS))
        raise ValueError(f"`weights` must be {words} or the path of a file. There is no file {weights!r}")


def _check_weights(recipe: Recipe, weights: str | None) -> None:
    if weights is not None:
        return
    for name in ("head_epochs", "freeze_stages"):
        if getattr(recipe, name):
            raise ValueError(
                f"the recipe {recipe.name!r} goes out from trained weights ({name}={getattr(recipe, name)}): give "
                f"`weights`, the path of a file or 'imagenet', or set {name} to 0"
            )
