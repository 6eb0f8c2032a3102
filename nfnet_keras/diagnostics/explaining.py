"""Where in an image a network sees a class: Grad-CAM, and its picture."""

import copy
import difflib
import numbers
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from nfnet_keras.diagnostics.graph import Graph
from nfnet_keras.diagnostics.passes import backward, forward

# Behind the scores of the classes: what turns them into probabilities.
_TO_PROBABILITIES = ("softmax", "sigmoid", "log_softmax")
_PROBABILITY_OPERATIONS = ("Softmax", "Sigmoid", "LogSoftmax")


def grad_cam(
    model: keras.Model,
    images,
    class_index: int | Sequence[int] | None = None,
    layer: str | keras.layers.Layer | None = None,
) -> np.ndarray:
    """Shows where in each image a network sees a class: Grad-CAM.

    The map is ReLU(sum over channels k of a_k A_k), where A are the layer's outputs and a_k is the average over
    positions of the gradient of the class's score by A_k. It is enlarged to the image's size (bilinear) and divided by
    its largest value. The score is the logit, before softmax or sigmoid, even where the model gives probabilities.

    A map that is zero everywhere says that nothing at this layer speaks for the class. How fine a map is depends on the
    layer: the last one of these networks is 32 times smaller than the image. Variables stay as they are.

    Source: Selvaraju et al. 2017, <https://arxiv.org/abs/1610.02391>, equations 1 and 2.

    Args:
        model: A functional or Sequential classifier, with models inside or without.
        images: Array of shape (images, height, width, channels), preprocessed as the network asks for. All are computed
            at once.
        class_index: The class, from 0: one for all images, or a sequence with one for each. Defaults to `None`: of each
            image the class with the highest score.
        layer: A layer of the model, or its name (in a nested model, also "model/layer"), whose output has height and
            width. Defaults to `None`: the last one that all of the signal goes through (no shortcut leads past it) and
            whose output is larger than 1 x 1.

    Returns:
        float32 array of shape (images, height, width), values in [0, 1].

    Raises:
        ValueError: If Keras does not know the model's layers (a subclass with a `call` of its own), its output is not
            one row of scores for each image, the images have another shape than the model takes, there is no such
            class, or the layer is not in the model, has no height and width or does not lead to the scores.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=3)
    >>> images = np.random.default_rng(0).standard_normal((2, 32, 32, 3))
    >>> nfk.grad_cam(model, images, class_index=1).shape
    (2, 32, 32)
    """
    graph = Graph(model, "grad_cam")
    tensors = graph.tensors(images)
    if len(tensors) != 1 or len(tensors[0].shape) != 4:
        raise ValueError(
            f"`grad_cam` takes a model of one batch of images. {model.name!r} takes "
            f"{', '.join(str(tuple(tensor.shape)) for tensor in model.inputs)}."
        )
    count, *sides = tensors[0].shape
    height, width = sides[1:] if _channels_first() else sides[:2]
    scores, shapes = _scores(graph, model, tensors)
    chosen = _classes(class_index, scores)
    number = _layer_value(graph, layer, shapes)
    mask = ops.convert_to_tensor(np.eye(scores.shape[1], dtype="float32")[chosen])
    place, instead = _logits(graph)

    def function(at, inputs):
        found = []

        def visit(value_number, value):
            value = at(value) if value_number == number else value
            if value_number == place:
                found.append(value)
            return value

        graph.run([inputs], visit, instead=instead)
        return ops.sum(ops.cast(found[0], "float32") * mask)

    maps, gradient = backward(function, model.variables)(tensors[0])
    if gradient is None:
        raise ValueError(f"The scores of {model.name!r} do not depend on the output of {_name_of(graph, number)!r}.")
    maps, gradient = (ops.convert_to_numpy(ops.cast(x, "float32")) for x in (maps, gradient))
    if _channels_first():
        maps, gradient = np.moveaxis(maps, 1, -1), np.moveaxis(gradient, 1, -1)
    weights = gradient.mean((1, 2), keepdims=True, dtype="float64")
    seen = np.maximum((maps * weights).sum(-1), 0)
    if not np.isfinite(seen).all():
        raise ValueError(f"The map of {model.name!r} is not finite (NaN): its weights or the images are not.")
    return _enlarged(seen, int(height), int(width)).reshape(int(count), int(height), int(width))


def overlay_heatmap(images, maps: np.ndarray, alpha: float = 0.5, colormap: str = "jet") -> np.ndarray:
    """Lays heat maps over images.

    Args:
        images: Array of shape (images, height, width, 3) or (height, width, 3), values 0 to 255: as seen, not as
            preprocessed.
        maps: What `grad_cam` gives: shape (images, height, width) or (height, width), values in [0, 1].
        alpha: How much of the colour of a heat of 1 covers the image, in [0, 1]; colder places are covered less in
            proportion, so that what does not count stays as it is. Defaults to `0.5`.
        colormap: Name of a colour map of matplotlib. Defaults to `"jet"`.

    Returns:
        uint8 array of the shape of `images`.

    Raises:
        ValueError: If the shapes do not go together, `alpha` is outside [0, 1] or there is no such colour map.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.overlay_heatmap(np.zeros((2, 4, 4, 3)), np.ones((2, 4, 4)), alpha=1.0)[0, 0, 0].tolist()
    [127, 0, 0]
    """
    import matplotlib

    images, maps = np.asarray(images, "float32"), np.asarray(maps, "float32")
    if images.shape != (*maps.shape, 3) or maps.ndim not in (2, 3):
        raise ValueError(
            "`images` must be of shape (..., height, width, 3) and `maps` of (..., height, width), of the same sizes. "
            f"Received: {images.shape} and {maps.shape}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be in [0, 1]. Received: alpha={alpha}")
    if colormap not in matplotlib.colormaps:
        raise ValueError(f"`colormap` must be one of matplotlib's. Received: colormap={colormap!r}")
    colours = 255 * matplotlib.colormaps[colormap](np.clip(maps, 0, 1))[..., :3]
    covered = alpha * np.clip(maps, 0, 1)[..., None]
    return np.clip(np.floor((1 - covered) * images + covered * colours), 0, 255).astype("uint8")


def plot_explanations(images, maps: np.ndarray, titles: Sequence[str]):
    """Draws each image beside itself with its heat map laid over.

    Args:
        images: Array of shape (images, height, width, 3), values 0 to 255.
        maps: What `grad_cam` gives: shape (images, height, width).
        titles: What stands over each pair.

    Returns:
        The `matplotlib.figure.Figure`; its `savefig(path)` writes it.

    Raises:
        ValueError: If the shapes do not go together, or there is not one title for each image.

    Example:

    >>> len(plot_explanations(np.zeros((3, 8, 8, 3)), np.zeros((3, 8, 8)), ["cat", "dog", "cow"]).axes)
    6
    """
    # Without pyplot: no window system and no state shared with the user's own pictures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    laid_over = overlay_heatmap(images, maps)
    if not 0 < len(titles) == len(laid_over) or laid_over.ndim != 4:
        raise ValueError(f"Each image needs a title. Received: {laid_over.shape[0]} images and {len(titles)} titles")
    pairs = 1 if len(titles) < 4 else 2
    rows = -(-len(titles) // pairs)
    figure = Figure(figsize=(6 * pairs, 3.3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (image, covered, title) in enumerate(zip(np.asarray(images), laid_over, titles, strict=True)):
        pair = [figure.add_subplot(rows, 2 * pairs, 2 * place + side) for side in (1, 2)]
        for axes, pixels in zip(pair, (np.clip(image, 0, 255).astype("uint8"), covered), strict=True):
            axes.imshow(pixels, interpolation="nearest")
            axes.set_axis_off()
        # A name may hold a dollar sign, which would begin a formula.
        pair[0].set_title(title, fontsize=10, loc="left", parse_math=False)
    return figure


def _channels_first() -> bool:
    return keras.config.image_data_format() == "channels_first"


def _logits(graph: Graph) -> tuple[int, dict]:
    """Returns the value that holds the scores before they become probabilities, and what is called in whose place."""
    number = graph.outputs[0]
    while number in graph.producers:
        step = graph.producers[number]
        operation = step.operation
        activation = getattr(getattr(operation, "activation", None), "__name__", None)
        if type(operation).__name__ in _PROBABILITY_OPERATIONS or (
            isinstance(operation, keras.layers.Activation) and activation in _TO_PROBABILITIES
        ):
            number = step.inputs[0]
        elif activation in _TO_PROBABILITIES:
            # A copy shares the weights: the model itself stays as it is.
            bare = copy.copy(operation)
            bare.activation = keras.activations.linear
            return number, {number: bare}
        else:
            break
    return number, {}


def _scores(graph: Graph, model: keras.Model, tensors: list) -> tuple[np.ndarray, dict[int, tuple]]:
    """Returns the scores of all images and classes, and the shapes of all values."""
    shapes: dict[int, tuple] = {}
    if len(graph.outputs) != 1:
        raise ValueError(f"`grad_cam` takes a classifier. {model.name!r} has {len(graph.outputs)} outputs.")
    place, instead = _logits(graph)

    def function(inputs):
        found = []

        def visit(number, value):
            shapes[number] = tuple(value.shape)
            if number == place:
                found.append(value)
            return value

        graph.run([inputs], visit, instead=instead)
        return found[0]

    scores = ops.convert_to_numpy(ops.cast(forward(function, model.variables)(tensors[0]), "float32"))
    if scores.ndim != 2:
        raise ValueError(
            "`grad_cam` takes a classifier, whose output is of shape (images, classes). "
            f"That of {model.name!r} is {scores.shape}."
        )
    return scores, shapes


def _classes(class_index, scores: np.ndarray) -> np.ndarray:
    images, classes = scores.shape
    if class_index is None:
        return scores.argmax(axis=1)
    chosen = np.asarray(class_index)
    if isinstance(class_index, numbers.Integral):
        chosen = np.full(images, chosen)
    if chosen.shape != (images,) or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(
            f"`class_index` must be a whole number, or one for each of the {images} images. Received: {class_index!r}"
        )
    if chosen.min() < 0 or chosen.max() >= classes:
        raise ValueError(
            f"`class_index` must be from 0 to {classes - 1}, as the model has {classes} classes. "
            f"Received: {class_index!r}"
        )
    return chosen


def _layer_value(graph: Graph, layer, shapes: dict[int, tuple]) -> int:
    """Returns the number of the value that is the layer's output."""
    leading = graph.ancestors[graph.outputs[0]]
    if layer is None:
        maps = [
            number
            for number in _bottlenecks(graph, leading)
            if len(shapes[number]) == 4 and max(_sides(shapes[number])) > 1
        ]
        if maps:
            return maps[-1]
        raise ValueError(
            "The model has no layer that all of the signal goes through and whose output is of shape (images, height, "
            "width, channels), larger than 1 x 1. Name one with `layer`."
        )
    if isinstance(layer, keras.layers.Layer):
        calls = [step for step in graph.steps if step.operation is layer]
        layer = layer.name
    else:
        calls = [step for step in graph.steps if layer in (step.name, step.operation.name)]
    if not calls:
        names = [step.name for step in graph.steps]
        near = difflib.get_close_matches(str(layer), names, n=3, cutoff=0.4)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise ValueError(f"`layer` must be a layer of the model or its name. Received: layer={layer!r}.{hint}")
    if len({step.name for step in calls}) > 1:
        names = ", ".join(repr(step.name) for step in calls)
        raise ValueError(f"There are several layers {layer!r}: {names}. Give the whole name.")
    number = calls[-1].outputs[0]
    if len(shapes[number]) != 4:
        raise ValueError(
            f"`layer` must be one whose output is (images, height, width, channels). That of {layer!r} is "
            f"{shapes[number]}."
        )
    if not leading >> number & 1:
        raise ValueError(f"The scores do not depend on the output of the layer {layer!r}.")
    return number


def _bottlenecks(graph: Graph, leading: int) -> list[int]:
    """Returns the outputs of layers that all of the signal goes through: no shortcut leads past them."""
    steps = [step for step in graph.steps if leading >> step.outputs[0] & 1]
    found, first_taken = [], len(steps)
    made = {number: i for i, step in enumerate(steps) for number in step.outputs}
    # From the end: what is taken later than a step must not be made before it.
    for i in range(len(steps) - 1, -1, -1):
        if first_taken >= i:
            found.append(steps[i].outputs[0])
        first_taken = min([first_taken, *(made.get(number, -1) for number in steps[i].inputs)])
    return found[::-1]


def _name_of(graph: Graph, number: int) -> str:
    return graph.producers[number].name


def _sides(shape: tuple) -> tuple:
    return shape[2:] if _channels_first() else shape[1:3]


def _enlarged(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """Brings maps to the size of the image, the largest value of each to 1."""
    large = ops.image.resize(
        maps[..., None].astype("float32"), (height, width), interpolation="bilinear", data_format="channels_last"
    )
    large = np.maximum(ops.convert_to_numpy(large)[..., 0], 0)
    largest = large.max((1, 2), keepdims=True)
    return np.where(largest > 0, large / np.where(largest > 0, largest, 1), 0).astype("float32")
