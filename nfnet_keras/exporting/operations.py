"""What stands for an operation where another program reads it: forms that converters know."""

import functools
import math
from collections.abc import Callable

from keras import ops

from nfnet_keras.layers import ScaledActivation
from nfnet_keras.layers.activations import ACTIVATION_GAINS


def run_for(model, inputs, format: str):
    """Runs a model with every operation in the form that converters to a format know.

    Args:
        model: A functional Keras model.
        inputs: Its inputs, as its own structure asks for: of another network that is being made, or arrays.
        format: The format by Keras's name.

    Returns:
        The model's outputs.

    Example:

    >>> import keras
    >>> inputs = keras.Input((2,))
    >>> model = keras.Model(inputs, ScaledActivation("gelu")(inputs))
    >>> run_for(model, inputs, "onnx").shape
    (None, 2)
    """
    return model._run_through_graph(inputs, operation_fn=functools.partial(_operation, format=format))


def _operation(operation, format: str) -> Callable:
    if isinstance(operation, ScaledActivation) and operation.activation == "gelu" and format != "tf_saved_model":
        gain = ACTIVATION_GAINS["gelu"] if operation.gain is None else operation.gain
        factor = gain * operation.scale

        def gelu(x, *args, **kwargs):
            # Converters know Keras's own form, and make one operation of it; TensorFlow is faster with the layer's.
            y = _gelu(x, operation.approximate, format)
            return y if factor == 1.0 else ops.multiply(y, factor)

        return gelu
    if hasattr(operation, "_run_through_graph"):
        return lambda inputs, *args, **kwargs: run_for(operation, inputs, format)
    return operation


def _gelu(x, approximate: bool, format: str):
    if format in ("onnx", "openvino") and not approximate:
        # TensorFlow computes it by erfc: ONNX has no operation for that and tf2onnx no way round, OpenVINO does not see
        # that it is GELU.
        return ops.multiply(ops.multiply(x, 0.5), ops.add(ops.erf(ops.multiply(x, math.sqrt(0.5))), 1.0))
    return ops.gelu(x, approximate=approximate)
