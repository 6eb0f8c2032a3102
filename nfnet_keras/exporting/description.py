"""What travels with an exported network: what goes in, what comes out, and the names of the classes."""

import json

import keras

from nfnet_keras.version import __version__


def kind_of_outputs(model: keras.Model) -> str:
    """Returns what a network's outputs are: `"logits"`, `"probabilities"`, or `"outputs"` of another sort.

    Example:

    >>> import nfnet_keras as nfk
    >>> kind_of_outputs(nfk.create_model("nfnet_tiny", weights=None, classes=2))
    'probabilities'
    """
    last = model.layers[-1]
    while isinstance(last, keras.Model):
        last = last.layers[-1]
    kinds = {keras.activations.linear: "logits", keras.activations.softmax: "probabilities"}
    single = len(model.outputs) == 1 and len(model.outputs[0].shape) == 2
    return kinds.get(getattr(last, "activation", None), "outputs") if single else "outputs"


def describe(model: keras.Model, network: keras.Model, format: str, include_preprocessing: bool) -> dict:
    """Returns what a user of an exported file has to know, as JSON holds it.

    Args:
        model: The model that was exported, with its metadata.
        network: What was written of it.
        format: Keras's name of the format.
        include_preprocessing: Whether the file takes pixels.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=2)
    >>> describe(model, model, "onnx", True)["input"]["pixels"]
    'RGB, 0 to 255'
    """
    metadata = dict(getattr(model, "metadata", {}))
    pixels = "RGB, 0 to 255" if include_preprocessing else "(RGB from 0 to 255 - mean_rgb) / stddev_rgb"
    shape = list(network.inputs[0].shape)
    description = {
        "format": format,
        "written_by": f"nfnet_keras {__version__}, keras {keras.__version__} on {keras.backend.backend()}",
        "model": metadata.pop("model", model.name),
        "input": {"name": "images", "shape": shape, "dtype": "float32"},
        "outputs": [{"kind": kind_of_outputs(model), "shape": list(output.shape)} for output in network.outputs],
    }
    if {"mean_rgb", "stddev_rgb"} <= set(metadata):
        description["input"]["pixels"] = pixels
    size = shape[1] or metadata.get("image_size")
    if size and "crop" in metadata:
        interpolation = metadata.get("interpolation", "bicubic")
        made_by = crop_in_words(metadata["crop"], size, interpolation)
        description["input"]["made_by"] = f"turn upright by the EXIF orientation, drop alpha, {made_by}"
    metadata["image_size"] = size
    return json.loads(json.dumps({**description, **metadata}, default=str))


def crop_in_words(rule: str, size: int, interpolation: str) -> str:
    """Says what the name of a crop means for images of a size; the rules are those of `data.evaluation_crop`.

    Example:

    >>> crop_in_words("center_0.9", 288, "bicubic")
    'resize the shorter side to 320 (bicubic, antialiased), cut out the central 288 x 288'
    """
    from nfnet_keras.data.crops import parse_rule

    kind, number = parse_rule(rule)
    square, centre = f"{size} x {size}", f"cut out the central {size} x {size}"
    scaled = round(size + number) if number > 1 else round(size / number)
    return {
        "crop_resize": f"cut out the central square of {size / (size + 32):.4f} of the shorter side, resize it to "
        f"{square} ({interpolation}, without antialiasing)",
        "resize_crop": f"resize to {scaled} x {scaled} ({interpolation}, without antialiasing), {centre}",
        "center": f"resize the shorter side to {scaled} ({interpolation}, antialiased), {centre}",
        "squash": f"resize to {scaled} x {scaled} ({interpolation}, antialiased), {centre}",
        "training": f"resize the shorter side to {round(size * 8 / 7)} (bicubic, antialiased), {centre}",
    }[kind]
