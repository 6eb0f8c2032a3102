"""Scaled activations: nonlinearities that keep the variance of a standard normal input."""

import difflib
import math
from collections.abc import Callable

import keras
from keras import ops

from nfnet_keras.layers.devices import trains_as_graph_on_cpu

# Gain of each nonlinearity: 1 / sqrt(Var[f(z)]), z ~ N(0, 1), as the authors measured and published it. They are
# copied to the last digit because trained weights depend on them.
ACTIVATION_GAINS: dict[str, float] = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "glu": 1.8484294414520264,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "log_softmax": 1.0002083778381348,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "soft_sign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
}


_GELU_LINEAR = 2 * math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715 * _GELU_LINEAR


def _gelu_slope(x, factor: float = 1.0):
    return ops.add(ops.multiply(ops.square(x), factor * _GELU_CUBIC), factor * _GELU_LINEAR)


def _gelu_gate(x):
    return ops.sigmoid(ops.multiply(x, _gelu_slope(x)))


def _gelu_in_inference(x):
    """The same without a gradient of its own: exporters make an output of what such a gradient would need."""
    return ops.multiply(x, _gelu_gate(x))


def _silu_in_inference(x):
    # TensorFlow's own has a gradient of its own too.
    return ops.multiply(x, ops.sigmoid(x))


@ops.custom_gradient
def _gelu_of_sigmoid(x):
    # (1 + tanh(u)) / 2 = sigmoid(2 u), so this is the tanh approximation. Written out with its gradient, it takes half
    # of TensorFlow's operations, no power, and keeps two tensors for the backward pass instead of six.
    gate = _gelu_gate(x)

    def gradient(*args, upstream=None):
        upstream = args[0] if upstream is None else upstream
        slope = ops.add(ops.multiply(ops.square(x), 3 * _GELU_CUBIC), _GELU_LINEAR)
        inner = ops.multiply(ops.multiply(x, ops.subtract(1.0, gate)), slope)
        return ops.multiply(upstream, ops.multiply(gate, ops.add(inner, 1.0)))

    return ops.multiply(x, gate), gradient


def _gelu(x):
    """GELU in its tanh approximation."""
    if keras.backend.backend() == "tensorflow" and ops.is_tensor(x):
        return _gelu_of_sigmoid(ops.copy(x))
    return ops.gelu(x, approximate=True)


def _exact_gelu(x):
    return ops.gelu(x, approximate=False)


def _gelu_in_training(x):
    # XLA takes a fifth less time for a tanh than for a sigmoid.
    return ops.multiply(x, ops.add(ops.multiply(ops.tanh(ops.multiply(x, _gelu_slope(x, 0.5))), 0.5), 0.5))


def _exact_gelu_in_training(x):
    # Keras has TensorFlow compute 1 + erf by erfc, for which XLA takes more than twice as long.
    return ops.multiply(x, ops.add(ops.multiply(ops.erf(ops.multiply(x, math.sqrt(0.5))), 0.5), 0.5))


# What takes the place of a function that TensorFlow knows with a gradient of its own.
_IN_INFERENCE = {_gelu: _gelu_in_inference, ops.silu: _silu_in_inference}
# What XLA computes faster, where it compiles a training step's activations.
_IN_TRAINING = {_gelu: _gelu_in_training, _exact_gelu: _exact_gelu_in_training}


_FUNCTIONS: dict[str, Callable] = {
    "identity": lambda x: x,
    "celu": ops.celu,
    "elu": ops.elu,
    "gelu": _gelu,
    "glu": lambda x: ops.glu(x, axis=-1),
    "leaky_relu": lambda x: ops.leaky_relu(x, negative_slope=0.01),
    "log_sigmoid": ops.log_sigmoid,
    "log_softmax": lambda x: ops.log_softmax(x, axis=-1),
    "relu": ops.relu,
    "relu6": ops.relu6,
    "selu": ops.selu,
    "sigmoid": ops.sigmoid,
    "silu": ops.silu,
    "soft_sign": ops.softsign,
    "softplus": ops.softplus,
    "tanh": ops.tanh,
}


@keras.saving.register_keras_serializable(package="nfnet_keras")
class ScaledActivation(keras.layers.Layer):
    """A nonlinearity times the gain that keeps the variance of its input, times a constant.

    For z ~ N(0, 1), `gain * f(z)` has variance 1, so that a network of such activations and of convolutions with
    scaled weight standardization neither explodes nor vanishes. `gelu` is the authors' tanh approximation unless
    `approximate=False` (timm's networks), `glu` halves the last axis, `log_softmax` runs over it.

    Source: section 2 and the table of gains in the code of Brock et al. 2021, <https://arxiv.org/abs/2102.06171>;
    gains first derived in Brock, De, Smith 2021, <https://arxiv.org/abs/2101.08692>, section 4.

    Args:
        activation: Name of a row of `ACTIVATION_GAINS`, such as `"gelu"`, `"relu"` or `"silu"`.
        scale: Constant that multiplies the output besides the gain. A residual block downscales its input by
            `beta` here, which saves a multiplication over the whole feature map. Defaults to `1.0`.
        gain: Replaces the gain of the table: `1.0` where the kernels carry it (`WSConv2D(..., scale=)`), as in timm's
            networks. Defaults to `None`, the table's.
        approximate: Whether `gelu` is its tanh approximation. Defaults to `True`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of any shape.

    Returns:
        Tensor of the shape of `inputs` (`glu`: the last axis is halved).

    Raises:
        ValueError: If `activation` is not in the table.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.layers.ScaledActivation("relu")(keras.ops.ones((2, 4))).shape == (2, 4)
    True
    """

    def __init__(
        self, activation: str, scale: float = 1.0, gain: float | None = None, approximate: bool = True, **kwargs
    ):
        super().__init__(**kwargs)
        if activation not in _FUNCTIONS:
            nearest = difflib.get_close_matches(str(activation), _FUNCTIONS, n=1)
            hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
            raise ValueError(
                f"Unknown scaled activation: {activation!r}.{hint} The authors' table has: {', '.join(_FUNCTIONS)}."
            )
        self.activation = activation
        self.scale = scale
        self.gain = gain
        self.approximate = approximate

    def call(self, inputs, training=False):
        factor = (ACTIVATION_GAINS[self.activation] if self.gain is None else self.gain) * self.scale
        exact_gelu = self.activation == "gelu" and not self.approximate
        function = _exact_gelu if exact_gelu else _FUNCTIONS[self.activation]
        if training and trains_as_graph_on_cpu(inputs):
            from nfnet_keras import tensorflow_fusion

            return tensorflow_fusion.scaled(_IN_TRAINING.get(function, function), inputs, factor)
        if not training and keras.backend.backend() == "tensorflow":
            function = _IN_INFERENCE.get(function, function)
        outputs = function(inputs)
        return outputs if factor == 1.0 else ops.multiply(outputs, factor)

    def compute_output_shape(self, input_shape):
        if self.activation == "glu" and input_shape[-1] is not None:
            return (*input_shape[:-1], input_shape[-1] // 2)
        return input_shape

    def get_config(self):
        config = {"activation": self.activation, "scale": self.scale, "gain": self.gain}
        return {**super().get_config(), **config, "approximate": self.approximate}
