"""Efficient channel attention: channels reweighted by what the whole image shows, each from its neighbours alone."""

import math

import keras
from keras import ops

from nfnet_keras.layers.branch import attend


@keras.saving.register_keras_serializable(package="nfnet_keras")
class EfficientChannelAttention(keras.layers.Layer):
    """Efficient channel attention that keeps the variance: `scale * sigmoid(conv1d(mean(x))) * x`.

    A convolution along the channels takes the place of squeeze-and-excitation's two matrices: a handful of parameters.

    Source: Wang et al. 2020, <https://arxiv.org/abs/1910.03151>, section 3; the factor as for squeeze-and-excitation.

    Args:
        kernel_size: Odd number of neighbouring channels that meet. Defaults to `None`: the paper's equation 12, the
            odd number at or above `(log2(channels) + 1) / 2`, at least 3.
        scale: Factor on the gated output. Defaults to `2.0`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape (batch, height, width, channels).

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        ValueError: If `kernel_size` is not odd and positive.

    Example:

    >>> import nfnet_keras as nfk
    >>> layer = nfk.layers.EfficientChannelAttention()
    >>> layer(keras.ops.ones((1, 8, 8, 256))).shape == (1, 8, 8, 256) and layer.kernel.shape == (5, 1, 1)
    True
    """

    def __init__(self, kernel_size: int | None = None, scale: float = 2.0, **kwargs):
        super().__init__(**kwargs)
        if kernel_size is not None and (kernel_size < 1 or kernel_size % 2 == 0):
            raise ValueError(f"`kernel_size` must be odd and positive. Received: kernel_size={kernel_size}")
        self.kernel_size = kernel_size
        self.scale = scale

    def build(self, input_shape):
        size = self.kernel_size
        if size is None:
            size = int((math.log2(input_shape[-1]) + 1) / 2)
            size = max(size if size % 2 else size + 1, 3)
        limit = size**-0.5
        initializer = keras.initializers.RandomUniform(-limit, limit)
        self.kernel = self.add_weight(name="kernel", shape=(size, 1, 1), initializer=initializer)

    def call(self, inputs, training=False):
        return attend(inputs, self._factor, training)

    def _factor(self, means):
        gate = ops.sigmoid(ops.conv(means[:, :, None], self.kernel, padding="same", data_format="channels_last"))
        return ops.multiply(gate, self.scale)[:, None, None, :, 0]

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "kernel_size": self.kernel_size, "scale": self.scale}
