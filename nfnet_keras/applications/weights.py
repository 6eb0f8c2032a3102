"""What the `weights` argument of a constructor stands for, and how it gets into a model."""

import contextlib
import dataclasses
import gc
import math
import os
import sys
import warnings
from collections.abc import Iterator

import keras

from nfnet_keras.applications.identify import explain
from nfnet_keras.applications.labels import imagenet_classes
from nfnet_keras.applications.registry import get_constructor
from nfnet_keras.checkpoints import cache
from nfnet_keras.checkpoints.formats import open_checkpoint
from nfnet_keras.checkpoints.loading import Loaded, load_checkpoint
from nfnet_keras.checkpoints.manifest import (
    models_with_shipped,
    models_with_weights,
    published,
    shipped,
    shipped_words,
)
from nfnet_keras.checkpoints.names import is_own
from nfnet_keras.checkpoints.shipped import shipped_path
from nfnet_keras.checkpoints.stored import Checkpoint, CheckpointError
from nfnet_keras.checkpoints.writing import save_checkpoint

IMAGENET = "imagenet"

_PACKAGE = os.path.join(os.path.dirname(os.path.dirname(__file__)), "")


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of weights, opened before the model is built, so that a wrong one is known at once.

    Args:
        checkpoint: The file's arrays, still in the file.
        variant: Name of the model that it is for, or `None` where that is not known.
    """

    checkpoint: Checkpoint
    variant: str | None = None


def find_weights(weights: str | os.PathLike | None, name: str) -> Source | None:
    """Finds what the `weights` argument names, and downloads it if need be.

    Args:
        weights: `None`, `"imagenet"`, a word for weights that come with this package (`"digits"`), or the path of a
            file.
        name: The model's name in `list_models()`.

    Returns:
        The opened file, or `None`.

    Raises:
        ValueError: If the word is unknown, the file missing or no checkpoint, or nothing was published for the model.
        OSError: If the file cannot be read or fetched.
    """
    if weights is None:
        return None
    try:
        path = os.fspath(weights)
    except TypeError:
        raise ValueError(
            f"`weights` must be None, '{IMAGENET}' or the path of a file. Received: {weights!r} (model '{name}')"
        ) from None
    if path == IMAGENET:
        return _published(name)
    if path in shipped_words():
        return _shipped(name, path)
    path = os.path.expanduser(path)
    if not os.path.exists(path):
        raise ValueError(
            f"`weights` must be None, '{IMAGENET}' or the path of a file. There is no file {path!r} (model '{name}')."
            f"{_or_shipped(name)}"
        )
    return Source(open_checkpoint(path))


def _published(name: str) -> Source:
    if published(name) is None:
        raise ValueError(
            f"No weights were published for '{name}' (weights='{IMAGENET}'). Pass weights=None for random ones, or the "
            f"path of a file. Published weights are there for: {', '.join(models_with_weights())}.{_or_shipped(name)}"
        )
    path = _cached(name)
    try:
        return _open_converted(name, path)
    except CheckpointError:
        # Damaged on the disk since it was written: it is made anew, once.
        cache.forget(name)
        return _open_converted(name, _cached(name))


def _or_shipped(name: str) -> str:
    """The sentence of an error that says which weights of a network come with this package; empty if none do."""
    found = [shipped(name, word) for word in shipped_words(name)]
    return "".join(
        f" weights='{one.weights}' comes with this package: trained on {one.training_data}." for one in found
    )


def _shipped(name: str, word: str) -> Source:
    weights = shipped(name, word)
    if weights is None:
        raise ValueError(
            f"weights='{word}' is for {', '.join(models_with_shipped(word))} alone. Received: model '{name}'"
        )
    metadata = {"class_names": list(weights.class_names), "crop": weights.crop}
    return Source(dataclasses.replace(open_checkpoint(shipped_path(weights)), metadata=metadata), name)


def _cached(name: str) -> str:
    return cache.cached(name, lambda source, target: convert_published(name, source, target))


def _open_converted(name: str, path: str) -> Source:
    checkpoint = open_checkpoint(path)
    parameters = sum(math.prod(stored.shape) for stored in checkpoint.arrays.values())
    # Bytes that changed in a name or a shape leave a file that opens and does not fit.
    if parameters != published(name).parameters or not all(map(is_own, checkpoint.arrays)):
        raise CheckpointError(f"{path!r} does not hold the {published(name).parameters} parameters of '{name}'.")
    return Source(checkpoint, name)


@contextlib.contextmanager
def plain_keras() -> Iterator[None]:
    """Makes models of float32 and channels last, whatever this user's Keras is set to.

    Files hold float32; and what was fetched is not thrown away because a program has its images the other way.
    """
    policy, layout = keras.config.dtype_policy(), keras.config.image_data_format()
    keras.config.set_dtype_policy("float32")
    keras.config.set_image_data_format("channels_last")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)
        keras.config.set_image_data_format(layout)


def convert_published(name: str, source: str, target: str) -> None:
    """Turns a published file into a Keras weights file of the whole network.

    Args:
        name: The model's name.
        source: Path of the published file.
        target: Path of the file to write; its name ends in `.weights.h5`.
    """
    checkpoint = open_checkpoint(source)
    with plain_keras():
        model = get_constructor(name)(weights=None)
    load_checkpoint(model, checkpoint, explain)
    save_checkpoint(model, target, "weights.h5")
    # A model is in cycles of references; the one that is built next would stand beside it in memory.
    del model
    gc.collect()


def load_weights(model: keras.Model, source: Source) -> Loaded:
    """Loads an opened file into a model, says what became of the classifier, and adds the class names.

    Args:
        model: A network of this package.
        source: From `find_weights`.

    Returns:
        What was done.

    Raises:
        ValueError: If the file does not fit; the message names the parameter and the network that the file is for.
    """
    loaded = load_checkpoint(model, source.checkpoint, lambda found: explain(found, model.metadata.get("model")))
    head = next((layer for layer in model.layers if layer.name == "predictions"), None)
    if head is not None and not loaded.head:
        has = f"has a classifier of {loaded.file_classes} classes" if loaded.file_classes else "has no classifier"
        warnings.warn(
            f"The file of weights {has}, the model '{model.name}' one of {head.units}: that layer ('predictions') "
            "starts anew, everything else is loaded.",
            stacklevel=_callers_level(),
        )
    metadata = {**model.metadata, **_preprocessing(source)}
    if loaded.head:
        metadata |= _class_names(source, loaded)
    model.metadata = metadata
    return loaded


def _class_names(source: Source, loaded: Loaded) -> dict:
    own = {k: v for k, v in source.checkpoint.metadata.items() if k in ("class_names", "class_ids")}
    if own and all(isinstance(v, list) and len(v) == loaded.file_classes for v in own.values()):
        return own
    # All files that the authors or timm published are for ImageNet's 1000 classes.
    if loaded.file_classes == 1000 and (source.variant or source.checkpoint.format in ("haiku", "timm")):
        classes = imagenet_classes()
        return {"class_names": [name for _, name in classes], "class_ids": [wnid for wnid, _ in classes]}
    return {}


def _preprocessing(source: Source) -> dict:
    names = ("mean_rgb", "stddev_rgb", "crop")
    return {k: v for k, v in source.checkpoint.metadata.items() if k in names}


def _callers_level() -> int:
    """Returns the `stacklevel` of the line that calls into this package, seen from the function that warns."""
    frame, level = sys._getframe(1), 1
    # `create_model`, a constructor and a builder are different numbers of calls away.
    while frame.f_back and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
