"""Models by name."""

import difflib
import fnmatch
from collections.abc import Callable

from nfnet_keras.checkpoints.manifest import published

_CONSTRUCTORS: dict[str, Callable] = {}
_ROWS: dict[str, object] = {}


def register(name: str, constructor: Callable, row=None) -> None:
    """Makes a constructor, and the row of its family's table, known under `name`."""
    if name in _CONSTRUCTORS:
        raise ValueError(f"A model named {name!r} is registered already.")
    _CONSTRUCTORS[name] = constructor
    _ROWS[name] = row


def get_row(name: str):
    """Returns the row of the table that the model `name` is built from: a frozen dataclass, or `None`."""
    get_constructor(name)
    return _ROWS[name]


def list_models(pattern: str = "*", pretrained: bool = False) -> list[str]:
    """Names of the models that `create_model` can make.

    Args:
        pattern: Shell-style pattern that the names must match. Defaults to `"*"`.
        pretrained: Whether only those with published weights are listed. Defaults to `False`.

    Returns:
        The names, sorted.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.list_models("nfnet_f0*")
    ['nfnet_f0', 'nfnet_f0_plus']
    """
    names = sorted(fnmatch.filter(_CONSTRUCTORS, pattern))
    return [name for name in names if published(name)] if pretrained else names


def get_constructor(name: str) -> Callable:
    """Returns the constructor registered under `name`.

    Raises:
        ValueError: If there is none; the message names the nearest ones.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.applications.get_constructor("nfnet_f0") is nfk.NFNetF0
    True
    """
    if name not in _CONSTRUCTORS:
        nearest = _nearest(str(name))
        hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
        raise ValueError(f"Unknown model: {name!r}.{hint} `nfnet_keras.list_models()` lists all, as does `nfnet list`.")
    return _CONSTRUCTORS[name]


def _nearest(name: str) -> list[str]:
    """Names like this one, however it is spelt: 'NFNetF0', 'timm/dm_nfnet_f0.dm_in1k'."""

    def plain(text: str) -> str:
        return "".join(character for character in text.lower() if character.isalnum())

    wanted = name.rpartition("/")[2].partition(".")[0]
    same = [known for known in _CONSTRUCTORS if plain(known) in (plain(wanted), "timm" + plain(wanted))]
    near = difflib.get_close_matches(wanted.lower(), _CONSTRUCTORS, n=3, cutoff=0.4)
    return list(dict.fromkeys([*same, *near]))[:3]


def create_model(name: str, /, **kwargs):
    """Makes a model by its name.

    Args:
        name: One of `list_models()`, such as `"nfnet_f0"`; by position.
        **kwargs: Arguments of the model's constructor, such as `weights`, `input_shape`, `classes`, `name`.

    Returns:
        A `NormalizerFreeModel`.

    Raises:
        ValueError: If there is no such model, or an argument is wrong.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10).output_shape
    (None, 10)
    """
    return get_constructor(name)(**kwargs)
