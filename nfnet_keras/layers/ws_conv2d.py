"""Convolution with scaled weight standardization."""

import functools
import math

import keras
from keras import ops

# More groups than this are left to the backend's grouped convolution even on a CPU: the tensors of each group get too
# small for a convolution of their own.
MAX_SPLIT_GROUPS = 16


def standardize_kernel(kernel, gain=None, epsilon: float = 1e-4):
    """Scaled weight standardization of a convolution kernel.

    Every output unit's weights get mean 0 and variance 1 / fan-in, times its gain:
    `gain * (w - mean(w)) / sqrt(max(fan_in * var(w), epsilon))`, with the biased variance.

    Source: Brock et al. 2021, equation 1, with the floor of the authors' code.

    Args:
        kernel: Tensor of shape (..., inputs, outputs).
        gain: Tensor of shape (outputs,), or `None` for 1.
        epsilon: Floor of fan-in times variance. Defaults to `1e-4`.

    Returns:
        Tensor of the shape of `kernel`.

    Example:

    >>> import keras
    >>> from nfnet_keras.layers import standardize_kernel
    >>> kernel = standardize_kernel(keras.random.normal((3, 3, 8, 16), seed=0))
    >>> bool(abs(keras.ops.sum(kernel[..., 0] ** 2) - 1) < 1e-4)
    True
    """
    if gain is not None and keras.backend.backend() == "tensorflow" and ops.is_tensor(kernel):
        # A variable would be watched beside the arguments; what it holds is meant.
        kernel, gain = ops.copy(kernel), ops.copy(gain)
        return _standardize_with_gradient(float(epsilon))(kernel, gain)
    centred, scale, _ = _centre_and_scale(kernel, epsilon)
    return ops.multiply(centred, scale if gain is None else ops.multiply(scale, gain))


def _centre_and_scale(kernel, epsilon: float):
    axes = tuple(range(len(kernel.shape) - 1))
    centred = ops.subtract(kernel, ops.mean(kernel, axis=axes, keepdims=True))
    # fan_in * var(w) is the plain sum of squares of the centred weights.
    energy = ops.sum(ops.square(centred), axis=axes)
    return centred, ops.rsqrt(ops.maximum(energy, epsilon)), energy


@functools.cache
def _standardize_with_gradient(epsilon: float):
    """Returns the standardization with its gradient written out.

    TensorFlow derives one of some forty operations a convolution; this one has a dozen, and tracing a training step of
    a large network is mostly a matter of how many operations it has.
    """

    @ops.custom_gradient
    def standardize(kernel, gain):
        axes = tuple(range(len(kernel.shape) - 1))
        centred, scale, energy = _centre_and_scale(kernel, epsilon)
        gained = ops.multiply(scale, gain)

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            along = ops.sum(ops.multiply(upstream, centred), axis=axes)
            # At the floor the scale is a constant and has no part in the gradient.
            pull = ops.multiply(ops.square(scale), along)
            pull = ops.where(ops.greater(energy, epsilon), pull, ops.zeros_like(pull))
            inner = ops.subtract(ops.subtract(upstream, ops.mean(upstream, axis=axes)), ops.multiply(centred, pull))
            return ops.multiply(inner, gained), ops.multiply(along, scale)

        return ops.multiply(centred, gained), gradient

    return standardize


def runs_on_cpu() -> bool:
    """True where a grouped convolution as one op is slow to train and channels first is missing."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return not (keras.distribution.list_devices("gpu") or keras.distribution.list_devices("tpu"))
    if backend == "jax":
        return all(name.startswith("cpu") for name in keras.distribution.list_devices())
    return False


@keras.saving.register_keras_serializable(package="nfnet_keras")
class WSConv2D(keras.layers.Conv2D):
    """2D convolution whose kernel is standardised at every call (scaled weight standardization).

    It takes every argument of `keras.layers.Conv2D`. The kernel that meets the input is
    `gain * (w - mean) / sqrt(max(fan_in * var, epsilon))`, each output channel for itself, with a learnt gain a
    channel; gradients go through the standardization. It is computed in the precision of the variables (float32) under
    mixed precision too, and only its result is cast.

    A grouped convolution is one op on GPU and TPU. On a CPU (TensorFlow, JAX) it is one ordinary convolution a group,
    because there the gradient of the grouped op is several times slower; the numbers are the same.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 2, equation 1.

    Args:
        filters: Number of output channels.
        kernel_size: Integer or pair: height and width of the kernel.
        gain_initializer: Initializer of the gain, shape (filters,). Defaults to `"ones"`.
        gain_regularizer: Regularizer of the gain, or `None`.
        gain_constraint: Constraint on the gain, or `None`.
        epsilon: Floor of fan-in times variance. Defaults to `1e-4`.
        kernel_initializer: Defaults to the authors' N(0, 1 / fan-in), untruncated.
        **kwargs: All other arguments of `keras.layers.Conv2D`, with its defaults.

    Call arguments:
        inputs: Tensor of shape (batch, height, width, channels), or (batch, channels, height, width) with
            `data_format="channels_first"`.

    Returns:
        Tensor of rank 4.

    Raises:
        ValueError: For the reasons of `keras.layers.Conv2D`, and if `epsilon` is not positive.

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
        **kwargs,
    ):
        # Only where the caller did not give one by position (Conv2D's tenth argument) or by name.
        if len(args) < 8:
            kwargs.setdefault(
                "kernel_initializer",
                keras.initializers.VarianceScaling(1.0, mode="fan_in", distribution="untruncated_normal"),
            )
        super().__init__(filters, kernel_size, *args, **kwargs)
        if not epsilon > 0:
            raise ValueError(f"`epsilon` must be positive. Received: epsilon={epsilon}")
        self.gain_initializer = keras.initializers.get(gain_initializer)
        self.gain_regularizer = keras.regularizers.get(gain_regularizer)
        self.gain_constraint = keras.constraints.get(gain_constraint)
        self.epsilon = epsilon

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
        gain = ops.cast(self.gain, self.kernel.dtype)
        return ops.cast(standardize_kernel(self.kernel, gain, self.epsilon), self.compute_dtype)

    def convolution_op(self, inputs, kernel):
        kernel = self.standardized_kernel()
        if not runs_on_cpu():
            return super().convolution_op(inputs, kernel)
        channels_first = self.data_format == "channels_first"
        if channels_first:
            # TensorFlow has no such convolution on a CPU.
            inputs = ops.transpose(inputs, (0, 2, 3, 1))
        outputs = self._convolve_on_cpu(inputs, kernel)
        return ops.transpose(outputs, (0, 3, 1, 2)) if channels_first else outputs

    def _convolve_on_cpu(self, inputs, kernel):
        options = {
            "strides": list(self.strides),
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "data_format": "channels_last",
        }
        if not 1 < self.groups <= MAX_SPLIT_GROUPS:
            return ops.conv(inputs, kernel, **options)
        pairs = zip(ops.split(inputs, self.groups, axis=-1), ops.split(kernel, self.groups, axis=-1), strict=True)
        return ops.concatenate([ops.conv(x, w, **options) for x, w in pairs], axis=-1)

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
        }
