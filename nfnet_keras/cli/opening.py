"""What a model is on the command line: the name of a network, a .keras file, or the folder of a run.

`nfnet predict`, `nfnet evaluate` and `nfnet inspect` open one here.
"""

import os
import zipfile
from collections.abc import Sequence


def only_model(arguments: Sequence[str]) -> str:
    """Returns the one argument of a command that takes a model.

    Raises:
        ValueError: If there is none, or more than one.

    Example:

    >>> only_model(["nfnet_f0"])
    'nfnet_f0'
    """
    if len(arguments) != 1:
        raise ValueError(
            f"one MODEL is needed, {len(arguments)} are given; a run's folder, a .keras file or a name that "
            "`nfnet list` knows"
        )
    return arguments[0]


def model_file(name: str, advice: str = "give a whole model, or the name of a network") -> str | None:
    """Finds the file that a model is in.

    A network's name comes first: a folder of that name in the working directory does not hide it.

    Args:
        name: What stands on the command line.
        advice: What to do with a file that is no whole model.

    Returns:
        Path of a .keras file; `None` where `name` is that of a network.

    Raises:
        ValueError: If it is neither; the message names the nearest networks.

    Example:

    >>> model_file("nfnet_f0") is None
    True
    """
    from nfnet_keras.applications import get_constructor, list_models
    from nfnet_keras.training.run_folder import MODEL

    if name in list_models():
        return None
    if os.path.isdir(name):
        path = os.path.join(name, MODEL)
        if not os.path.isfile(path):
            raise ValueError(f"the folder {name!r} holds no {MODEL}; give the folder of a run that has ended")
        return path
    if not os.path.exists(name):
        if name.endswith(".keras") or os.path.dirname(name):
            raise ValueError(f"model file does not exist: {name!r}; check the path")
        try:
            get_constructor(name)  # Raises, and names the nearest.
        except ValueError as error:
            raise ValueError(f"there is no file or folder {name!r} here. {error}") from None
    if not name.endswith(".keras"):
        raise ValueError(f"{name!r} is no .keras file, which holds a whole model; {advice}")
    return name


def load(path: str):
    """Loads a .keras file; code in it is not run.

    Raises:
        ValueError: If it cannot be loaded.

    Example:

    >>> load("no/such.keras")
    Traceback (most recent call last):
    ...
    ValueError: the model 'no/such.keras' cannot be loaded (...)
    """
    import keras

    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:
        # Keras has no error of its own for a damaged file: zipfile's, h5py's, KeyError and others come through.
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if os.path.isfile(path) and not zipfile.is_zipfile(path):
            first = "it is no .keras file, or a part of one: damaged or cut short"
        raise ValueError(f"the model {path!r} cannot be loaded ({first})") from error


def open_classifier(name: str, weights: str | None, image_size: int | None, written: str = "NAME"):
    """Opens a model that classifies colour images, and finds out what it needs done to them.

    Args:
        name: Name of a network, path of a .keras file, or folder of a run.
        weights: Weights of a network by name, `None` for the published ones.
        image_size: Side of the images in pixels, or `None` for the model's own.
        written: How a network's name is written in the command that opens it.

    Returns:
        The model and its `nfnet_keras.data.Preprocessing`.

    Raises:
        ValueError: If it cannot be opened, is no classifier of colour images, or lacks what must be known.

    Example:

    >>> open_classifier("no/such.keras", None, None)
    Traceback (most recent call last):
    ...
    ValueError: model file does not exist: 'no/such.keras'; check the path
    """
    from nfnet_keras.data import MEAN_RGB, STDDEV_RGB, Preprocessing

    if image_size is not None and image_size < 1:
        raise ValueError(f"--image-size must be positive, not {image_size}")
    path = model_file(name, f"a file of weights goes with the name of its network: {written} --weights={name}")
    model = _by_name(name, weights, image_size) if path is None else _from_file(path, name, weights, image_size)
    metadata = dict(getattr(model, "metadata", {}))
    if path is None:
        # All published networks were trained with ImageNet's statistics.
        metadata = {"mean_rgb": MEAN_RGB, "stddev_rgb": STDDEV_RGB, **metadata}
    height, width = _input_size(model, name)
    image_size = image_size or height or metadata.get("image_size")
    if image_size is None:
        raise ValueError(f"the model {name!r} takes images of any size; say which with --image-size")
    if (height or image_size, width or image_size) != (image_size, image_size):
        raise ValueError(
            f"the model {name!r} takes images of {height} x {width} pixels, and pictures are cut to squares here; in "
            "Python it runs on arrays of its own size: model.predict(images)"
        )
    try:
        return model, Preprocessing.from_metadata({**metadata, "image_size": image_size})
    except ValueError as error:
        raise ValueError(
            f"it is not known how images are made ready for the model {name!r} ({error}); set model.metadata before "
            "saving it, as `nfnet train` does"
        ) from error


def folded(model):
    """Returns the same function of its input with constant kernels; a model whose layers cannot be seen as it is.

    Example:

    >>> import nfnet_keras as nfk
    >>> folded(nfk.create_model("nfnet_tiny", weights=None, classes=2)).output_shape
    (None, 2)
    """
    from nfnet_keras.folding import can_fold, fold_weight_standardization

    return fold_weight_standardization(model) if can_fold(model) else model


def class_names(model) -> tuple[list[str], list[str] | None]:
    """Returns the names of a classifier's classes, "class 0" and so on where it has none, and their ids or `None`.

    Raises:
        ValueError: If there are more or fewer than outputs.

    Example:

    >>> import nfnet_keras as nfk
    >>> class_names(nfk.create_model("nfnet_tiny", weights=None, classes=2))
    (['class 0', 'class 1'], None)
    """
    classes = model.output_shape[-1]
    metadata = getattr(model, "metadata", {})
    names = metadata.get("class_names") or [f"class {i}" for i in range(classes)]
    ids = metadata.get("class_ids")
    for found in filter(None, (names, ids)):
        if len(found) != classes:
            raise ValueError(f"the model has {classes} outputs, and its metadata {len(found)} class names or ids")
    return names, ids


def printable(text) -> str:
    r"""Returns text that any terminal takes: a file's name may hold bytes that are no text.

    Example:

    >>> printable("a\udcff")
    'a?'
    """
    return str(text).encode("utf-8", "replace").decode("utf-8")


def _by_name(name: str, weights: str | None, image_size: int | None):
    from nfnet_keras import create_model
    from nfnet_keras.checkpoints.manifest import shipped

    options = {} if image_size is None else {"input_shape": (image_size, image_size, 3)}
    own = shipped(name, weights)
    if own is not None:
        options["classes"] = len(own.class_names)
    return create_model(name, weights=weights or "imagenet", **options)


def _from_file(path: str, name: str, weights: str | None, image_size: int | None):
    if weights is not None:
        raise ValueError(f"--weights is for networks by name; the model {name!r} has its own")
    model = load(path)
    return model if image_size is None else _resized(model, image_size)


def _resized(model, image_size: int):
    """Returns the model for images of another size."""
    import keras

    height, width = _input_size(model, model.name)
    if (height or image_size, width or image_size) == (image_size, image_size):
        return model
    images = keras.Input((image_size, image_size, 3))
    changed = keras.models.clone_model(model, input_tensors=[images] if isinstance(model.input, list) else images)
    try:
        changed.set_weights(model.get_weights())
    except ValueError as error:
        raise ValueError(f"the model {model.name!r} takes images of no other size than its own") from error
    changed.metadata = getattr(model, "metadata", {})
    return changed


def _input_size(model, name: str) -> tuple[int | None, int | None]:
    shapes = getattr(model, "input_shape", None), getattr(model, "output_shape", None)
    shapes = tuple(shape[0] if isinstance(shape, list) and len(shape) == 1 else shape for shape in shapes)
    single = all(isinstance(shape, tuple) and shape for shape in shapes)
    if not single or len(shapes[0]) != 4 or shapes[0][3] != 3 or len(shapes[1]) != 2:
        raise ValueError(f"the model {name!r} does not classify colour images: it maps {shapes[0]} to {shapes[1]}")
    return shapes[0][1:3]
