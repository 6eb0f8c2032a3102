"""What the constructors of all families share: the input, the head, the making of a constructor."""

import dataclasses
import inspect
import numbers
from collections.abc import Callable

import keras
import numpy as np

from nfnet_keras.applications.registry import register
from nfnet_keras.applications.weights import Source, load_weights
from nfnet_keras.checkpoints.manifest import published
from nfnet_keras.layers import Dropout
from nfnet_keras.model import NormalizerFreeModel

MIN_SIZE = 32
# Of ImageNet's red, green and blue in [0, 1], as in the authors' and timm's code.
MEAN = (0.485, 0.456, 0.406)
STDDEV = (0.229, 0.224, 0.225)


def resolve_input(input_shape, input_tensor, default_size: int, include_top: bool):
    """Makes the input of a network, as keras.applications does.

    Args:
        input_shape: (height, width, channels), `None` sizes allowed, or `None` for the default.
        input_tensor: A Keras tensor to build on, or `None`.
        default_size: Height and width where `include_top` and no shape is given.
        include_top: Whether the network ends in a classifier.

    Returns:
        The tensor to build on, and the inputs of the model.

    Raises:
        ValueError: If the shape is no image's, is under 32 x 32, or `input_tensor` is no Keras tensor or another shape.
    """
    if keras.config.image_data_format() != "channels_last":
        raise ValueError(
            "The networks of this package take images with channels last. "
            "Call keras.config.set_image_data_format('channels_last')."
        )
    if input_tensor is not None:
        if not isinstance(input_tensor, keras.KerasTensor):
            raise ValueError(
                "`input_tensor` must be a Keras tensor: the result of keras.Input or of a layer called on one. "
                f"Received: {type(input_tensor).__name__}"
            )
        shape = tuple(input_tensor.shape[1:])
        if input_shape is not None and tuple(input_shape) != shape:
            raise ValueError(f"`input_shape` {tuple(input_shape)} is not the shape of `input_tensor`, {shape}.")
        check_input_shape(shape)
        sources = keras.utils.get_source_inputs(input_tensor)
        return input_tensor, sources[0] if len(sources) == 1 else sources
    if input_shape is None:
        input_shape = (default_size, default_size, 3) if include_top else (None, None, 3)
    check_input_shape(input_shape)
    tensor = keras.Input(tuple(input_shape))
    return tensor, tensor


def check_input_shape(shape) -> None:
    """Raises a `ValueError` unless `shape` is (height, width, channels) of an image of at least 32 x 32."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 3 or not shape[-1]:
        raise ValueError(
            f"`input_shape` must be (height, width, channels); height and width may be None. Received: {shape}"
        )
    if any(size is not None and size < MIN_SIZE for size in shape[:2]):
        raise ValueError(
            f"`input_shape` must be at least {MIN_SIZE} x {MIN_SIZE}: the network halves an image five times. "
            f"Received: {tuple(shape)}"
        )


@dataclasses.dataclass(frozen=True)
class Top:
    """What comes behind the last stage, and what becomes of the model: the arguments that all constructors take.

    Args:
        include_top: Whether to end in pooling, dropout and the classifier.
        pooling: Without top: `None`, `"avg"` or `"max"`.
        classes: Number of classes.
        activation: Activation of the classifier.
        drop_rate: Dropout before the classifier, in [0, 1).
        features: Whether the outputs are those of the four stages, and nothing comes behind them.
        kernel_initializer: Initializer of the classifier; `None` for the authors' N(0, 0.01^2).
        remat: Whether training recomputes the blocks.
    """

    include_top: bool
    pooling: str | None
    classes: int
    activation: str | Callable | None
    drop_rate: float
    features: bool
    kernel_initializer: str | None = None
    remat: bool = False

    def __post_init__(self):
        check_rate("drop_rate", self.drop_rate)
        if self.pooling not in (None, "avg", "max"):
            raise ValueError(f"`pooling` must be None, 'avg' or 'max'. Received: pooling={self.pooling!r}")
        if self.include_top and not self.features:
            check_classes(self.classes)

    def __call__(self, x):
        """Adds pooling, dropout and the classifier to the last feature map, or pooling alone."""
        if not self.include_top:
            if self.pooling == "avg":
                return keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
            return keras.layers.GlobalMaxPooling2D(name="max_pool")(x) if self.pooling == "max" else x
        x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
        if self.drop_rate > 0:
            x = Dropout(self.drop_rate, name="dropout")(x)
        return classifier(self.classes, self.activation, self.kernel_initializer)(x)


def classifier(classes: int, activation, kernel_initializer=None) -> keras.layers.Dense:
    """Makes the classifier: a Dense layer named `predictions`."""
    return keras.layers.Dense(
        classes,
        activation=activation,
        kernel_initializer=kernel_initializer or keras.initializers.RandomNormal(stddev=0.01),
        # Under mixed precision, probabilities and their loss are computed in the precision of the variables.
        dtype=keras.config.dtype_policy().variable_dtype,
        name="predictions",
    )


def check_classes(classes: int) -> None:
    """Raises a `ValueError` unless `classes` is a whole number of at least 1."""
    if not isinstance(classes, numbers.Integral) or classes < 1:
        raise ValueError(f"`classes` must be a whole number of at least 1. Received: classes={classes!r}")


def check_rate(label: str, value: float) -> None:
    """Raises a `ValueError` unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"`{label}` must be in [0, 1). Received: {label}={value}")


def finish(
    variant, inputs, outputs: list, last: Callable, top: Top, source: Source | None, name: str | None
) -> NormalizerFreeModel:
    """Makes the model from its stages.

    Args:
        variant: Row of a table of variants.
        inputs: Inputs of the model.
        outputs: Outputs of the four stages.
        last: What comes between the last stage and the top, a function of a tensor.
        top: What comes behind it.
        source: Where the weights come from, or `None`.
        name: Name of the model, or `None` for the row's.

    Returns:
        The model, its weights loaded, with the metadata of its variant.
    """
    outputs = outputs if top.features else top(last(outputs[-1]))
    model = NormalizerFreeModel(inputs, outputs, name=name or variant.name)
    model.metadata = describe(variant, model)
    model.remat = top.remat
    if source is not None:
        load_weights(model, source)
    return model


def describe(variant, model: keras.Model) -> dict:
    """Returns what travels with a model: its variant, the image size and preprocessing that it was made for."""
    shape = model.inputs[0].shape
    mean, stddev = getattr(variant, "mean", MEAN), getattr(variant, "stddev", STDDEV)
    return {
        "model": variant.name,
        "image_size": (shape[1] if len(shape) == 4 else None) or variant.test_size,
        "mean_rgb": [255 * value for value in mean],
        "stddev_rgb": [255 * value for value in stddev],
        "crop": getattr(variant, "crop", "resize_crop_32"),
    }


def _arguments(builder: Callable) -> str:
    """Returns what a builder's docstring says of its arguments but the first, which is the row, and all behind them."""
    text = inspect.cleandoc(builder.__doc__)
    entries = text.partition("Args:\n")[2]
    entries = entries[entries.index("\n    include_top:") :].partition("\n\nExample:")[0]
    return f"Args:{entries}\n"


def _example(name: str, title: str) -> str:
    # timm's that have no constructor of their own in the package are asked for by name.
    call = f'create_model("{name}", ' if title == name else f"{title}("
    return (
        "Example:\n\n>>> import nfnet_keras as nfk\n"
        f">>> model = nfk.{call}weights=None, input_shape=(64, 64, 3), classes=10)\n"
        ">>> model.output_shape\n(None, 10)\n"
    )


def make_constructor(builder: Callable, variant, title: str, about: str) -> Callable[..., NormalizerFreeModel]:
    """Makes and registers the constructor of one row: the family's builder with the row filled in."""

    def constructor(*args, **kwargs):
        return builder(variant, *args, **kwargs)

    signature = inspect.signature(builder)
    parameters = list(signature.parameters.values())[1:]
    parameters = [p.replace(default=variant.name) if p.name == "name" else p for p in parameters]
    constructor.__signature__ = signature.replace(parameters=parameters)
    constructor.__name__ = constructor.__qualname__ = title
    constructor.__module__ = builder.__module__
    missing = (
        ""
        if published(variant.name)
        else ("No weights were published for it: pass `weights=None`, or the path of a file.\n\n")
    )
    constructor.__doc__ = f"Builds {title}: {about}\n\n{missing}{_arguments(builder)}\n{_example(variant.name, title)}"
    register(variant.name, constructor, variant)
    return constructor


def preprocess_input(x, data_format: str | None = None):
    """Normalises images as the authors' networks expect them: ImageNet's mean taken off, divided by its deviation.

    Source: the authors' code (the same constants as torchvision's and timm's).

    Args:
        x: Array or tensor of images, RGB, values 0 to 255. It is left as it is.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras's setting.

    Returns:
        float images of the same shape.

    Example:

    >>> import numpy as np
    >>> from nfnet_keras.applications.nfnet import preprocess_input
    >>> float(preprocess_input(np.full((1, 1, 1, 3), 255.0))[0, 0, 0, 0].round(3))
    2.249
    """
    return normalized(x, data_format, "torch")


def normalized(x, data_format: str | None, mode: str):
    """Keras's `preprocess_input` in one of its modes, on a copy.

    Example:

    >>> pixels = np.zeros((1, 1, 1, 3))
    >>> float(normalized(pixels, None, "tf")[0, 0, 0, 0]), float(pixels[0, 0, 0, 0])
    (-1.0, 0.0)
    """
    if isinstance(x, np.ndarray):
        # Keras would change an array of floats in place, and a notebook's cell run twice would do it twice.
        x = x.copy()
    return keras.applications.imagenet_utils.preprocess_input(x, data_format=data_format, mode=mode)
