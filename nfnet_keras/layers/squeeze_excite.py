"""Squeeze-and-excitation: channels reweighted by what the whole image shows."""

import keras
from keras import ops

from nfnet_keras.layers.branch import attend


@keras.saving.register_keras_serializable(package="nfnet_keras")
class SqueezeExcite(keras.layers.Layer):
    """Squeeze-and-excitation that keeps the variance: `scale * sigmoid(fc(relu(fc(mean(x))))) * x`.

    The sigmoid is about one half at initialisation, so a normalizer-free network multiplies by 2.

    Source: Hu et al. 2018, <https://arxiv.org/abs/1709.01507>; the factor: Brock et al. 2021, appendix, and the
    authors' code.

    Args:
        se_ratio: Width of the hidden layer as a share of the input channels (rounded down, at least 1). Defaults to
            `0.5`.
        scale: Factor on the gated output. Defaults to `2.0`.
        hidden_units: Width of the hidden layer, in place of `se_ratio`. Defaults to `None`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape (batch, height, width, channels).

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        ValueError: If `se_ratio` or `hidden_units` is not positive.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.layers.SqueezeExcite(0.25)(keras.ops.ones((1, 8, 8, 16))).shape == (1, 8, 8, 16)
    True
    """

    def __init__(self, se_ratio: float = 0.5, scale: float = 2.0, hidden_units: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if not se_ratio > 0:
            raise ValueError(f"`se_ratio` must be positive. Received: se_ratio={se_ratio}")
        if hidden_units is not None and hidden_units < 1:
            raise ValueError(f"`hidden_units` must be at least 1. Received: hidden_units={hidden_units}")
        self.se_ratio = se_ratio
        self.scale = scale
        self.hidden_units = hidden_units

    def build(self, input_shape):
        channels = input_shape[-1]
        hidden = self.hidden_units or max(1, int(channels * self.se_ratio))
        self.reduce = self._dense(channels, hidden, "relu", "reduce")
        self.expand = self._dense(hidden, channels, "sigmoid", "expand")
        self.built = True

    def _dense(self, inputs: int, outputs: int, activation: str, name: str) -> keras.layers.Dense:
        # The authors' library truncates at two deviations without correcting the variance for it.
        initializer = keras.initializers.TruncatedNormal(stddev=inputs**-0.5)
        layer = keras.layers.Dense(
            outputs,
            activation=activation,
            kernel_initializer=initializer,
            # A layer that was frozen is built again, frozen, when its model is loaded or cloned.
            trainable=self.trainable,
            dtype=self.dtype_policy,
            name=name,
        )
        layer.build((None, inputs))
        return layer

    def call(self, inputs, training=False):
        return attend(inputs, self._factor, training)

    def _factor(self, means):
        return ops.multiply(self.expand(self.reduce(means)), self.scale)[:, None, None, :]

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = {"se_ratio": self.se_ratio, "scale": self.scale, "hidden_units": self.hidden_units}
        return {**super().get_config(), **config}
