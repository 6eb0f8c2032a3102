"""The published weights: where each file is, how it is checked, and what its publisher says of it."""

import functools
import json
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Checksum:
    """A file's checksum and who states it.

    Args:
        algorithm: A name that `hashlib` knows: "md5" or "sha256".
        value: Hexadecimal digits; None if only the server states them, when the file is fetched.
        source: "publisher" if they were published apart from the file, "server" if the server that sends the file
            states them: that finds damage on the way, not a file that was exchanged. "package" for files that come
            with this package.

    Example:

    >>> Checksum("md5", "0a41039da1cb43adf47f1b7d86ddfe0f", "publisher").algorithm
    'md5'
    """

    algorithm: str
    value: str | None
    source: str


@dataclass(frozen=True)
class Accuracy:
    """What the publisher measured on ImageNet's validation images, in percent."""

    size: int
    top1: float
    top5: float
    crop: str


@dataclass(frozen=True)
class Crop:
    """How the square for the network is taken.

    `mode` is "resize_crop_32" (both sides are resized to the image size + 32, whatever the shape, then the centre is
    cut out), "center" (the shorter side is resized to image size / fraction, then the centre is cut out) or "squash"
    (both sides are resized to image size / fraction, then the centre is cut out).
    """

    mode: str
    fraction: float


@dataclass(frozen=True)
class Preprocessing:
    """What was done to the images that the accuracy was measured on; mean and deviation are on the scale 0..1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    image_size: int
    crop: Crop
    interpolation: str
    antialias: bool


@dataclass(frozen=True)
class Verified:
    """What this project checked.

    `names`: the file's parameter names and shapes, as the publisher's program has them, against this package's model.
    `parameters`: their number. `arithmetic`: the model on which logits were held against the publisher's program, on
    seeded parameters. `file`: whether the published file itself was read.
    """

    names: bool
    parameters: bool
    arithmetic: str
    file: bool


@dataclass(frozen=True)
class PublishedWeights:
    """One published file.

    Args:
        model: The model's name, as for `nfnet_keras.create_model`.
        format: "haiku" (the authors' pickled parameter tree) or "timm" (safetensors).
        url: Where it is published.
        checksum: How it is checked.
        licence: SPDX identifier of the weights' licence.
        source: The page that says so.
        training_data: What the weights were trained on.
        classes: How many outputs the classifier has.
        parameters: How many parameters the model has.
        accuracy: What the publisher measured.
        preprocessing: What the images went through there.
        verified: What this project checked.

    Example:

    >>> published("nfnet_f0").preprocessing.image_size
    256
    """

    model: str
    format: str
    url: str
    checksum: Checksum
    licence: str
    source: str
    training_data: str
    classes: int
    parameters: int
    accuracy: tuple[Accuracy, ...]
    preprocessing: Preprocessing
    verified: Verified

    @property
    def address(self) -> str:
        """Where to fetch it: `url`, or the same path under `$NFNET_WEIGHTS_URL`, the base address of a mirror."""
        base = os.environ.get("NFNET_WEIGHTS_URL")
        if not base:
            return self.url
        parts = urllib.parse.urlsplit(self.url)
        return base.rstrip("/") + parts.path + (f"?{parts.query}" if parts.query else "")


@dataclass(frozen=True)
class ShippedWeights:
    """One file that this project trained and that comes with the package.

    Args:
        model: The model's name, as for `nfnet_keras.create_model`.
        weights: The word that `weights=` knows it by.
        file: Its name in the folder `weights` of the source.
        checksum: How it is checked.
        licence: SPDX identifier of the weights' licence.
        source: The program that made it.
        training_data: What the weights were trained on.
        class_names: Names of the classifier's outputs.
        parameters: How many parameters it holds.
        top1: Share of the held-out images that are recognised, in percent.
        image_size: Side in pixels of the images that it was trained on.
        crop: How images were brought to that size, as in `nfnet_keras.data.Preprocessing`.

    Example:

    >>> shipped("nfnet_tiny", "digits").class_names
    ('0', '1', '2', '3', '4')
    """

    model: str
    weights: str
    file: str
    checksum: Checksum
    licence: str
    source: str
    training_data: str
    class_names: tuple[str, ...]
    parameters: int
    top1: float
    image_size: int
    crop: str


def _parse(entry: dict) -> PublishedWeights:
    images = entry["preprocessing"]
    preprocessing = Preprocessing(
        **{**images, "mean": tuple(images["mean"]), "std": tuple(images["std"]), "crop": Crop(**images["crop"])}
    )
    return PublishedWeights(
        **{
            **entry,
            "checksum": Checksum(**entry["checksum"]),
            "accuracy": tuple(Accuracy(**row) for row in entry["accuracy"]),
            "preprocessing": preprocessing,
            "verified": Verified(**entry["verified"]),
        }
    )


@functools.cache
def _read() -> dict[str, list[dict]]:
    return json.loads(Path(__file__).with_name("manifest.json").read_text(encoding="utf-8"))


@functools.cache
def _manifest() -> dict[str, PublishedWeights]:
    return {entry["model"]: _parse(entry) for entry in _read()["files"]}


@functools.cache
def _shipped() -> tuple[ShippedWeights, ...]:
    return tuple(
        ShippedWeights(
            **{
                **entry,
                "checksum": Checksum(**entry["checksum"]),
                "class_names": tuple(entry["class_names"]),
            }
        )
        for entry in _read()["shipped"]
    )


def published(model_name: str) -> PublishedWeights | None:
    """Finds the published weights of a model.

    Args:
        model_name: Such as "nfnet_f0".

    Returns:
        What is known of the file, or None if no weights of that model are published.

    Example:

    >>> published("nfnet_f0").checksum.value
    '0a41039da1cb43adf47f1b7d86ddfe0f'
    >>> published("nfnet_f7") is None
    True
    """
    return _manifest().get(model_name)


def models_with_weights() -> list[str]:
    """Names of the models that weights are published for.

    Returns:
        The names, sorted.

    Example:

    >>> models_with_weights()[:2]
    ['nfnet_f0', 'nfnet_f1']
    """
    return sorted(_manifest())


def shipped(model_name: str, weights: str) -> ShippedWeights | None:
    """Finds weights that come with this package.

    Args:
        model_name: Such as "nfnet_tiny".
        weights: The word for them, such as "digits".

    Returns:
        What is known of the file, or None if there is none.

    Example:

    >>> shipped("nfnet_tiny", "digits").licence
    'Apache-2.0'
    >>> shipped("nfnet_f0", "digits") is None
    True
    """
    found = (entry for entry in _shipped() if (entry.model, entry.weights) == (model_name, weights))
    return next(found, None)


def shipped_words(model_name: str | None = None) -> list[str]:
    """Words that `weights=` takes for files that come with this package.

    Args:
        model_name: The model that they are for; None for those of all models. Defaults to None.

    Returns:
        The words, sorted.

    Example:

    >>> shipped_words("nfnet_tiny"), shipped_words("nfnet_f0")
    (['digits'], [])
    """
    return sorted({entry.weights for entry in _shipped() if model_name in (None, entry.model)})


def models_with_shipped(weights: str) -> list[str]:
    """Names of the models that this package ships weights of that word for.

    Args:
        weights: The word, such as "digits".

    Returns:
        The names, sorted.

    Example:

    >>> models_with_shipped("digits")
    ['nfnet_tiny']
    """
    return sorted(entry.model for entry in _shipped() if entry.weights == weights)
