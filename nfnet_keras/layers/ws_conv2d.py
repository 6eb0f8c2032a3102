"""Convolution with scaled weight standardization."""

import functools
import math

import keras
from keras import ops

from nfnet_keras.layers.devices import trains_as_graph_on_cpu
from nfnet_keras.layers.grouped_conv2d import GroupedConv2D


def standardize_kernel(kernel, gain=None, epsilon: float = 1e-4, variance_epsilon: float | None = None):
    """Scaled weight standardization of a convolution kernel.

    Every output unit's weights get mean 0 and variance 1 / fan-in, times its gain:
    `gain * (w - mean(w)) / sqrt(max(fan_in * var(w), epsilon))`, with the biased variance.

    Source: Brock et al. 2021, equation 1, with the floor of the authors' code.

    Args:
        kernel: Tensor of shape (..., inputs, outputs).
        gain: Tensor of shape (outputs,), or `None` for 1.
        epsilon: Floor of fan-in times variance. Defaults to `1e-4`.
        variance_epsilon: Added to the variance in place of the floor, as timm's networks do. Defaults to `None`.

    Returns:
        Tensor of the shape of `kernel`.

    Example:

    >>> import keras
    >>> from nfnet_keras.layers import standardize_kernel
    >>> kernel = standardize_kernel(keras.random.normal((3, 3, 8, 16), seed=0))
    >>> bool(abs(keras.ops.sum(kernel[..., 0] ** 2) - 1) < 1e-4)
    True
    """
    epsilon, added = _floor(kernel.shape, epsilon, variance_epsilon)
    if gain is not None and keras.backend.backend() == "tensorflow" and ops.is_tensor(kernel):
        # A variable would be watched beside the arguments; what it holds is meant.
        kernel, gain = ops.copy(kernel), ops.copy(gain)
        return _standardize_with_gradient(epsilon, added)(kernel, gain)
    centred, scale, _ = _centre_and_scale(kernel, epsilon, added)
    return ops.multiply(centred, scale if gain is None else ops.multiply(scale, gain))


def _floor(shape, epsilon: float, variance_epsilon: float | None) -> tuple[float, float]:
    """Returns what fan-in times variance is at least, and what is added to it."""
    if variance_epsilon is None:
        return float(epsilon), 0.0
    return 0.0, float(variance_epsilon * math.prod(shape[:-1]))


def _centre_and_scale(kernel, epsilon: float, added: float):
    axes = tuple(range(len(kernel.shape) - 1))
    centred = kernel
    # A sum of thousands rounds, so a mean is off, and all weights of a unit by as much: inputs of one sign add that up.
    # The mean of what is left is exact enough.
    for _ in range(2):
        centred = ops.subtract(centred, ops.mean(centred, axis=axes, keepdims=True))
    # fan_in * var(w) is the plain sum of squares of the centred weights.
    energy = ops.sum(ops.square(centred), axis=axes)
    return centred, ops.rsqrt(ops.add(energy, added) if added else ops.maximum(energy, epsilon)), energy


@functools.cache
def _standardize_with_gradient(epsilon: float, added: float):
    """Returns the standardization with its gradient written out.

    TensorFlow derives one of some forty operations a convolution; this one has a dozen, and tracing a training step of
    a large network is mostly a matter of how many operations it has.
    """

    @ops.custom_gradient
    def standardize(kernel, gain):
        axes = tuple(range(len(kernel.shape) - 1))
        centred, scale, energy = _centre_and_scale(kernel, epsilon, added)
        gained = ops.multiply(scale, gain)

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            along = ops.sum(ops.multiply(upstream, centred), axis=axes)
            pull = ops.multiply(ops.square(scale), along)
            if not added:
                # At the floor the scale is a constant and has no part in the gradient.
                pull = ops.where(ops.greater(energy, epsilon), pull, ops.zeros_like(pull))
            inner = ops.subtract(ops.subtract(upstream, ops.mean(upstream, axis=axes)), ops.multiply(centred, pull))
            return ops.multiply(inner, gained), ops.multiply(along, scale)

        return ops.multiply(centred, gained), gradient

    return standardize


@keras.saving.register_keras_serializable(package="nfnet_keras")
class WSConv2D(GroupedConv2D):
    """2D convolution whose kernel is standardised at every call (scaled weight standardization).

    It takes every argument of `keras.layers.Conv2D`. The kernel that meets the input is
    `gain * (w - mean) / sqrt(max(fan_in * var, epsilon))`, each output channel for itself, with a learnt gain a
    channel; gradients go through the standardization. It is computed in the precision of the variables (float32) under
    mixed precision too, and only its result is cast.

    A grouped convolution is one op on GPU and TPU. On a CPU (TensorFlow, JAX) it is one ordinary convolution a group,
    up to 16 groups, because there the gradient of the grouped op is several times slower; not so with oneDNN's, which
    a TensorFlow training step takes. The numbers are the same.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 2, equation 1.

    Args:
        filters: Number of output channels.
        kernel_size: Integer or pair: height and width of the kernel.
        gain_initializer: Initializer of the gain, shape (filters,). Defaults to `"ones"`.
        gain_regularizer: Regularizer of the gain, or `None`.
        gain_constraint: Constraint on the gain, or `None`.
        epsilon: Floor of fan-in times variance. Defaults to `1e-4`.
        variance_epsilon: Added to the variance in place of the floor, as in timm's networks. Defaults to `None`.
        scale: Constant factor on the standardised kernel: an activation's gain, in timm's networks. Defaults to `1.0`.
        **kwargs: All other arguments of `keras.layers.Conv2D`, with its defaults.

    Keyword Args:
        padding: `"valid"`, `"same"`, or `"symmetric"`, which pads both sides alike whatever the stride, as PyTorch
            does: half the kernel's extent, rounded down. Defaults to `"valid"`.
        kernel_initializer: Defaults to the authors' N(0, 1 / fan-in), untruncated.

    Call arguments:
        inputs: Tensor of shape (batch, height, width, channels), or (batch, channels, height, width) with
            `data_format="channels_first"`.

    Returns:
        Tensor of rank 4.

    Raises:
        ValueError: For the reasons of `keras.layers.Conv2D`, and if `epsilon`, `variance_epsilon` or `scale` is not
            positive.

    Example:

    >>> import nfnet_keras as nfk
    >>> layer = nfk.layers.WSConv2D(16, 3, strides=2, padding="same", groups=2)
    >>> layer(keras.ops.ones((1, 32, 32, 8))).shape == (1, 16, 16, 16)
    True
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | tuple[int, int],
        *args,
        gain_initializer="ones",
        gain_regularizer=None,
        gain_constraint=None,
        epsilon: float = 1e-4,
        variance_epsilon: float | None = None,
        scale: float = 1.0,
        **kwargs,
    ):
        # Only where the caller did not give one by position (Conv2D's tenth argument) or by name.
        if len(args) < 8:
            kwargs.setdefault(
                "kernel_initializer",
                keras.initializers.VarianceScaling(1.0, mode="fan_in", distribution="untruncated_normal"),
            )
        super().__init__(filters, kernel_size, *args, **kwargs)
        for label, value in (("epsilon", epsilon), ("variance_epsilon", variance_epsilon), ("scale", scale)):
            if value is not None and not value > 0:
                raise ValueError(f"`{label}` must be positive. Received: {label}={value}")
        self.gain_initializer = keras.initializers.get(gain_initializer)
        self.gain_regularizer = keras.regularizers.get(gain_regularizer)
        self.gain_constraint = keras.constraints.get(gain_constraint)
        self.epsilon = epsilon
        self.variance_epsilon = variance_epsilon
        self.scale = scale

    def add_weight(self, *args, **kwargs):
        # Standardization in bfloat16 or float16 would lose the small differences that it is about.
        if kwargs.get("name") in ("kernel", "gain"):
            kwargs["autocast"] = False
        return super().add_weight(*args, **kwargs)

    def build(self, input_shape):
        self.gain = self.add_weight(
            name="gain",
            shape=(self.filters,),
            initializer=self.gain_initializer,
            regularizer=self.gain_regularizer,
            constraint=self.gain_constraint,
        )
        super().build(input_shape)

    def standardized_kernel(self):
        """Returns the kernel that convolves the input, in the layer's compute dtype."""
        return ops.cast(
            standardize_kernel(self.kernel, self._scaled_gain(), self.epsilon, self.variance_epsilon),
            self.compute_dtype,
        )

    def _scaled_gain(self):
        gain = ops.cast(self.gain, self.kernel.dtype)
        return gain if self.scale == 1.0 else ops.multiply(gain, self.scale)

    def call(self, inputs, training=False):
        if training and trains_as_graph_on_cpu(inputs):
            outputs = self._train_as_graph(inputs)
        else:
            outputs = self._with_bias(self.convolve(inputs, self.standardized_kernel()), self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def _train_as_graph(self, inputs):
        from nfnet_keras.tensorflow_standardization import convolve_standardized, standardization_for

        floor = _floor(self.kernel.shape, self.epsilon, self.variance_epsilon)
        standardization = standardization_for(_standardize_with_gradient(*floor), self.kernel, *floor, self.scale)
        # A gradient that is asked for is computed. Keras leaves frozen variables with the tapes that watch them.
        variables = (
            v if v is None or v.trainable else ops.stop_gradient(v) for v in (self.kernel, self.gain, self.bias)
        )
        return convolve_standardized(standardization, self._on_cpu, inputs, *variables)

    def convolution_op(self, inputs, kernel):
        return self.convolve(inputs, self.standardized_kernel())

    @property
    def fan_in(self) -> int:
        """Number of weights of one output unit."""
        return math.prod(self.kernel.shape[:-1])

    def save_own_variables(self, store):
        super().save_own_variables(store)
        if self.built:
            store["gain"] = self.gain

    def load_own_variables(self, store):
        super().load_own_variables(store)
        if self.built:
            self.gain.assign(store["gain"])

    def get_config(self):
        return {
            **super().get_config(),
            "gain_initializer": keras.initializers.serialize(self.gain_initializer),
            "gain_regularizer": keras.regularizers.serialize(self.gain_regularizer),
            "gain_constraint": keras.constraints.serialize(self.gain_constraint),
            "epsilon": self.epsilon,
            "variance_epsilon": self.variance_epsilon,
            "scale": self.scale,
        }
