"""The values of a recipe by name, from text: what flags and files may say, and how it is understood."""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping

from nfnet_keras.data import Augment
from nfnet_keras.training.recipes import Recipe

_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

# What the recipe is called is no value to train with.
_NOT_OFFERED = ("name", "about", "augment", "model")


@dataclasses.dataclass(frozen=True)
class Option:
    """A value that a flag or a file may give.

    Args:
        name: Its name: the field's.
        kind: bool, int, float or str.
        optional: Whether it may be "none".
        help: What it is, in a sentence.

    Example:

    >>> recipe_options()["clip_factor"].optional
    True
    """

    name: str
    kind: type
    optional: bool
    help: str

    def read(self, value):
        """Returns a value from a file or the command line as the type that it should be.

        Args:
            value: Text, number, truth value or `None`.

        Raises:
            ValueError: If it is of another type.

        Example:

        >>> recipe_options()["weight_decay"].read("1e-5")
        1e-05
        """
        if self.optional and (value is None or (isinstance(value, str) and value.lower() in ("none", "null"))):
            return None
        try:
            return _READERS[self.kind](value)
        except (TypeError, ValueError, KeyError, OverflowError):
            wanted = _WANTED[self.kind] + (", or none" if self.optional else "")
            raise ValueError(f"`{self.name}` must be {wanted}. Received: {self.name}={value!r}") from None


def _read_bool(value) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "yes": True, "false": False, "no": False}[str(value).lower()]


def _read_int(value) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError
    return int(value)


def _read_float(value) -> float:
    # YAML takes 1e-5, without a point, for a text.
    if isinstance(value, bool) or not math.isfinite(float(value)):
        raise ValueError
    return float(value)


def _read_str(value) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


_READERS = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}


def options(cls: type, leave_out: Iterable[str] = ()) -> dict[str, Option]:
    """Returns the options that the fields of a dataclass are, with the texts of its docstring.

    Args:
        cls: A dataclass with a docstring that has "Args:".
        leave_out: Fields that are none.

    Example:

    >>> options(Augment)["flip"].kind
    <class 'bool'>
    """
    texts = _texts(cls)
    kinds = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        if field.name in leave_out:
            continue
        choices = typing.get_args(kinds[field.name]) if isinstance(kinds[field.name], types.UnionType) else ()
        kind = next((choice for choice in choices if choice is not types.NoneType), kinds[field.name])
        found[field.name] = Option(field.name, kind, types.NoneType in choices, texts.get(field.name, ""))
    return found


def _texts(cls: type) -> dict[str, str]:
    """What a docstring says of each argument, in one line, without the default: that is the recipe's."""
    section = re.search(r"\nArgs:\n(.*?)(?:\n\S|$)", inspect.cleandoc(cls.__doc__ or ""), re.DOTALL)
    entries = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE)
    found = {}
    for name, text in entries:
        text = re.sub(r"\s*Defaults? .*", "", " ".join(text.split())).replace("`None`", "none").replace("`", "")
        text = re.sub(r"\bnfnet_keras\.data\.", "", text).rstrip(".")
        first = text.partition(" ")[0]
        found[name] = first.lower() + text[len(first) :] if first[1:].islower() else text
    return found


@functools.cache
def recipe_options() -> dict[str, Option]:
    """Returns the values of a recipe that may be overridden, those of its augmentation among them.

    Example:

    >>> recipe_options()["mixup"].help
    "the alpha of MixUp's Beta(alpha, alpha)"
    """
    return {**options(Recipe, _NOT_OFFERED), **options(Augment)}


def unknown(name: str, known: Iterable[str]) -> str:
    """Returns what is wrong with a name that is not known, and the known names most like it.

    Example:

    >>> unknown("epocs", ["epochs", "seed"])
    "there is no value 'epocs'; nearest: epochs"
    """
    plain, known = name.replace("-", "_").rpartition(".")[2].lower(), list(known)
    nearest = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
    return f"there is no value {name!r}; " + (
        f"nearest: {', '.join(nearest)}" if nearest else f"there is: {', '.join(known)}"
    )


def replaced(recipe: Recipe, changes: Mapping) -> Recipe:
    """Returns a recipe with other values.

    Args:
        recipe: The recipe.
        changes: Values by name: fields of `Recipe` and, with `augment.` before the name or without, of `Augment`.
            `learning_rate` is the peak at the batch size that results.

    Raises:
        ValueError: If a name is unknown (the message names the nearest), or a value of the wrong type or out of range.

    Example:

    >>> from nfnet_keras.training import DIGITS
    >>> changed = replaced(DIGITS, {"batch_size": 32, "learning_rate": 0.1, "augment.mixup": 0})
    >>> changed.augment.mixup, round(changed.peak_learning_rate, 3)
    (0.0, 0.1)
    """
    values = checked(changes)
    rate = values.get("learning_rate")
    if rate is not None:
        if not rate > 0:
            raise ValueError(f"`learning_rate` must be positive. Received: learning_rate={changes['learning_rate']}")
        batch = values.get("batch_size", recipe.batch_size)
        if values.get("scale_learning_rate", recipe.scale_learning_rate) and batch > 0:
            values["learning_rate"] = rate * 256 / batch
    inner = {name: values.pop(name) for name in options(Augment) if name in values}
    if inner:
        mixed = inner.get("mixup", recipe.augment.mixup) or inner.get("cutmix", recipe.augment.cutmix)
        if not mixed:
            inner.setdefault("mix_from_twice", False)  # with nothing to mix, pairs have no use
        values["augment"] = dataclasses.replace(recipe.augment, **inner)
    return dataclasses.replace(recipe, **values) if values else recipe


def checked(changes: Mapping) -> dict:
    """Returns values of a recipe under their plain names and in their types.

    Raises:
        ValueError: If a name is unknown or given twice, or a value is of the wrong type.

    Example:

    >>> checked({"augment.mixup": "0.5", "weight-decay": 1})
    {'mixup': 0.5, 'weight_decay': 1.0}
    """
    known = recipe_options()
    values = {}
    for name, value in changes.items():
        prefix, _, plain = str(name).replace("-", "_").rpartition(".")
        if plain not in known or (prefix and (prefix != "augment" or plain not in options(Augment))):
            raise ValueError(unknown(str(name), known))
        if plain in values:
            raise ValueError(f"{plain!r} is given twice; leave one out")
        values[plain] = known[plain].read(value)
    return values
