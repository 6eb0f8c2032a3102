"""What the constructors of all families share: the input, the head, the weights."""

import os
import warnings

import keras

MIN_SIZE = 32


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
        return input_tensor, keras.utils.get_source_inputs(input_tensor)
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


def add_head(x, include_top: bool, pooling: str | None, classes: int, activation, drop_rate: float):
    """Adds what comes after the last feature map: pooling, dropout and the classifier, or pooling alone."""
    if not include_top:
        if pooling not in (None, "avg", "max"):
            raise ValueError(f"`pooling` must be None, 'avg' or 'max'. Received: pooling={pooling!r}")
        if pooling == "avg":
            return keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
        return keras.layers.GlobalMaxPooling2D(name="max_pool")(x) if pooling == "max" else x
    if classes < 1:
        raise ValueError(f"`classes` must be at least 1. Received: classes={classes}")
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    if drop_rate > 0:
        x = keras.layers.Dropout(drop_rate, name="dropout")(x)
    return keras.layers.Dense(
        classes,
        activation=activation,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        # Under mixed precision, probabilities and their loss are computed in the precision of the variables.
        dtype=keras.config.dtype_policy().variable_dtype,
        name="predictions",
    )(x)


def load_weights(model: keras.Model, weights: str | os.PathLike | None, name: str) -> None:
    """Loads what the `weights` argument of a constructor names.

    Args:
        model: The model to load into.
        weights: `None`, or the path of a `.weights.h5` or `.keras` file that Keras wrote for this network.
        name: The model's name in `list_models()`, for messages.

    Raises:
        ValueError: If the weights are unknown, the file is missing or does not fit.
    """
    if weights is None:
        return
    path = os.fspath(weights)
    if path == "imagenet":
        raise ValueError(
            f"This version has no published weights for '{name}' (weights='imagenet'). "
            "Pass weights=None for random ones, or the path of a .weights.h5 or .keras file."
        )
    if not os.path.exists(path):
        raise ValueError(
            f"`weights` must be None, 'imagenet' or the path of a file. There is no file {path!r} (model '{name}')."
        )
    if not path.endswith((".weights.h5", ".keras")):
        raise ValueError(
            f"`weights`: {path!r} is not a file that Keras can load; its name must end in .weights.h5 or .keras."
        )
    try:
        with warnings.catch_warnings():
            # Keras warns of every layer before it raises.
            warnings.simplefilter("ignore")
            model.load_weights(path)
    except OSError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise ValueError(
            f"The weights in {path!r} do not fit the model '{name}' (for a file with another classifier, pass "
            f"include_top=False): {reason}"
        ) from error
