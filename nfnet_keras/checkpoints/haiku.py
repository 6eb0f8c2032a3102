"""The authors' parameter names (Haiku modules) mapped to the variables of this package's models."""

import re
from collections.abc import Iterator, Mapping

import keras
import numpy as np

_PARAMETERS = {"w": "kernel", "b": "bias", "gain": "gain", "bias": "bias", "skip_gain": "skip_gain"}
_SUFFIXES = {"squeeze_excite/~/linear": "se/reduce", "squeeze_excite/~/linear_1": "se/expand"}


def _layer_path(module: str, prefixes: list[str]) -> str:
    """Translates a module such as 'NFNet/~/nf_block_3/~/conv0' to a layer path such as 'stage2_block2_conv0'."""
    module = module.partition("/~/")[2] or module
    block = re.fullmatch(r"nf_block(?:_(\d+))?(?:/~/(.+))?", module)
    if block is None:
        return "predictions" if module == "linear" else module
    index = int(block[1] or 0)
    if index >= len(prefixes):
        raise ValueError(f"The parameters hold block {index + 1}; the model has {len(prefixes)}.")
    inner = block[2] or "skip_gain"
    return f"{prefixes[index]}_{_SUFFIXES.get(inner, inner)}"


def haiku_names(model: keras.Model, tree: Mapping[str, Mapping]) -> Iterator[tuple[str, str, keras.Variable]]:
    """Pairs the authors' parameters with a model's variables.

    Args:
        model: An NFNet of this package.
        tree: {module: {parameter: anything}} with the authors' names.

    Yields:
        Module, parameter and variable, each variable once.

    Raises:
        ValueError: If a parameter has no variable or a variable no parameter; the message names it.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=10)
    >>> list(haiku_names(model, {"NFNet/~/linear": {"w": 0}}))
    Traceback (most recent call last):
    ...
    ValueError: The parameters lack that of the variable 'stem_conv0/gain' and 92 others.
    """
    suffix = "_skip_gain"
    prefixes = [layer.name.removesuffix(suffix) for layer in model.layers if layer.name.endswith(suffix)]
    left = {variable.path: variable for variable in model.trainable_variables}
    for module, parameters in tree.items():
        for parameter in parameters:
            path = f"{_layer_path(module, prefixes)}/{_PARAMETERS.get(parameter, parameter)}"
            if path not in left:
                raise ValueError(f"The parameter {module!r} {parameter!r} has no place in the model '{model.name}'.")
            yield module, parameter, left.pop(path)
    if left:
        others = f" and {len(left) - 1} others" if len(left) > 1 else ""
        raise ValueError(f"The parameters lack that of the variable {next(iter(left))!r}{others}.")


def assign_haiku(model: keras.Model, tree: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Sets all variables of a model from the authors' parameters; nothing is set if one does not fit.

    Args:
        model: An NFNet of this package.
        tree: {module: {parameter: array}} with the authors' names.

    Raises:
        ValueError: If a parameter is missing, unknown or of another shape; the message names it.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=10)
    >>> assign_haiku(model, {"NFNet/~/linear": {"w": np.zeros((3, 3))}})
    Traceback (most recent call last):
    ...
    ValueError: 'NFNet/~/linear' 'w' has shape (3, 3), the model's 'predictions/kernel' (256, 10).
    """
    pairs = []
    for module, parameter, variable in haiku_names(model, tree):
        array = np.asarray(tree[module][parameter])
        if array.shape != tuple(variable.shape):
            raise ValueError(
                f"{module!r} {parameter!r} has shape {array.shape}, the model's {variable.path!r} "
                f"{tuple(variable.shape)}."
            )
        pairs.append((variable, array))
    for variable, array in pairs:
        variable.assign(array)
