"""Convolution in groups, as one operation or as one a group, and with PyTorch's padding."""

import dataclasses

import keras
from keras import ops

from nfnet_keras.layers.devices import runs_on_cpu

# More groups than this are left to the backend's grouped convolution even on a CPU: the tensors of each group get too
# small for a convolution of their own.
MAX_SPLIT_GROUPS = 16


@dataclasses.dataclass(frozen=True)
class CPUConvolution:
    """A convolution as it is computed on a CPU: each of a few groups by itself, and channels last.

    Args:
        kernel_size: Pair.
        strides: Pair.
        padding: `"same"` or `"valid"`.
        dilation_rate: Pair.
        groups: Number of groups.
        data_format: `"channels_last"` or `"channels_first"`.
        pads: What is put round the images first, above and below, and left and right: a pair.

    Example:

    >>> same = CPUConvolution((3, 3), (1, 1), "same", (1, 1), 1, "channels_last", (0, 0))
    >>> same(keras.ops.ones((1, 4, 4, 2)), keras.ops.ones((3, 3, 2, 5))).shape == (1, 4, 4, 5)
    True
    """

    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: str
    dilation_rate: tuple[int, int]
    groups: int
    data_format: str
    pads: tuple[int, int]

    @property
    def splits(self) -> bool:
        """Whether each group has a convolution of its own."""
        return 1 < self.groups <= MAX_SPLIT_GROUPS

    @property
    def is_dilated(self) -> bool:
        """Whether the kernel has holes."""
        return max(self.dilation_rate) > 1

    @property
    def is_matrix_product(self) -> bool:
        """Whether every pixel is a row of a matrix that is multiplied by the kernel."""
        pointwise = self.kernel_size == self.strides == (1, 1) and not any(self.pads)
        return pointwise and self.groups == 1 and self.data_format == "channels_last"

    def __call__(self, inputs, kernel):
        """Returns the convolution of images, a tensor of rank 4, with a kernel (height, width, inputs, outputs)."""
        inputs = padded(inputs, self.pads, self.data_format)
        channels_first = self.data_format == "channels_first"
        if channels_first:
            # TensorFlow has no such convolution on a CPU.
            inputs = ops.transpose(inputs, (0, 2, 3, 1))
        outputs = self._channels_last(inputs, kernel)
        return ops.transpose(outputs, (0, 3, 1, 2)) if channels_first else outputs

    def _channels_last(self, inputs, kernel):
        options = {
            "strides": list(self.strides),
            "padding": self.padding,
            "dilation_rate": self.dilation_rate,
            "data_format": "channels_last",
        }
        if not self.splits:
            return ops.conv(inputs, kernel, **options)
        pairs = zip(ops.split(inputs, self.groups, axis=-1), ops.split(kernel, self.groups, axis=-1), strict=True)
        return ops.concatenate([ops.conv(x, w, **options) for x, w in pairs], axis=-1)


def padded(inputs, pads: tuple[int, int], data_format: str):
    """Returns images with zeros around them.

    Args:
        inputs: Tensor of rank 4.
        pads: Rows above and below, and columns left and right.
        data_format: `"channels_last"` or `"channels_first"`.

    Returns:
        Tensor of rank 4.

    Example:

    >>> padded(keras.ops.ones((1, 4, 4, 2)), (1, 2), "channels_last").shape == (1, 6, 8, 2)
    True
    """
    if not any(pads):
        return inputs
    vertical, horizontal = ((pad, pad) for pad in pads)
    last = data_format == "channels_last"
    around = ((0, 0), vertical, horizontal, (0, 0)) if last else ((0, 0), (0, 0), vertical, horizontal)
    return ops.pad(inputs, around)


@keras.saving.register_keras_serializable(package="nfnet_keras")
class GroupedConv2D(keras.layers.Conv2D):
    """2D convolution that also pads as PyTorch does, and whose groups are quick on a CPU.

    It takes every argument of `keras.layers.Conv2D`. A grouped convolution is one op on GPU and TPU. On a CPU
    (TensorFlow, JAX) it is one ordinary convolution a group, up to 16 groups; the numbers are the same.

    Args:
        filters: Number of output channels.
        kernel_size: Integer or pair: height and width of the kernel.
        **kwargs: All other arguments of `keras.layers.Conv2D`, with its defaults.

    Keyword Args:
        padding: `"valid"`, `"same"`, or `"symmetric"`, which pads both sides alike whatever the stride, as PyTorch
            does: half the kernel's extent, rounded down. Defaults to `"valid"`.

    Call arguments:
        inputs: Tensor of shape (batch, height, width, channels), or (batch, channels, height, width) with
            `data_format="channels_first"`.

    Returns:
        Tensor of rank 4.

    Raises:
        ValueError: For the reasons of `keras.layers.Conv2D`.

    Example:

    >>> import nfnet_keras as nfk
    >>> layer = nfk.layers.GroupedConv2D(16, 3, strides=2, padding="symmetric", groups=2)
    >>> layer(keras.ops.ones((1, 32, 32, 8))).shape == (1, 16, 16, 16)
    True
    """

    def __init__(self, filters: int, kernel_size: int | tuple[int, int], *args, **kwargs):
        args, kwargs, symmetric = _without_symmetric(args, kwargs)
        super().__init__(filters, kernel_size, *args, **kwargs)
        self.symmetric = symmetric
        extents = [rate * (size - 1) for rate, size in zip(self.dilation_rate, self.kernel_size, strict=True)]
        # What PyTorch users write as padding: the two rules agree where the stride is 1 and the extent even.
        self._pads = tuple((stride - 1 + extent) // 2 for stride, extent in zip(self.strides, extents, strict=True))
        if symmetric and set(self.strides) == {1} and not any(extent % 2 for extent in extents):
            self.padding = "same"

    def call(self, inputs):
        outputs = self._with_bias(self.convolve(inputs, self.kernel), self.bias)
        return outputs if self.activation is None else self.activation(outputs)

    def convolution_op(self, inputs, kernel):
        return self.convolve(inputs, kernel)

    def _with_bias(self, outputs, bias):
        if bias is None:
            return outputs
        if self.data_format == "channels_first":
            # Keras on TensorFlow adds what looks like a bias to the last axis wherever that is as long as the bias.
            return ops.subtract(outputs, ops.reshape(ops.negative(bias), (1, -1, 1, 1)))
        return ops.add(outputs, ops.reshape(bias, (1, 1, 1, -1)))

    def convolve(self, inputs, kernel):
        """Convolves with a kernel, on a CPU each of a few groups by itself; bias and activation are not applied."""
        if runs_on_cpu():
            return self._on_cpu(inputs, kernel)
        pads = self._pads if self._pads_itself else (0, 0)
        return super().convolution_op(padded(inputs, pads, self.data_format), kernel)

    @property
    def _on_cpu(self) -> CPUConvolution:
        return CPUConvolution(
            kernel_size=self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation_rate=self.dilation_rate,
            groups=self.groups,
            data_format=self.data_format,
            pads=self._pads if self._pads_itself else (0, 0),
        )

    @property
    def _pads_itself(self) -> bool:
        return self.symmetric and self.padding == "valid"

    def compute_output_shape(self, input_shape):
        if self._pads_itself:
            axes = (1, 2) if self.data_format == "channels_last" else (2, 3)
            input_shape = list(input_shape)
            for axis, pad in zip(axes, self._pads, strict=True):
                if input_shape[axis] is not None:
                    input_shape[axis] += 2 * pad
        return super().compute_output_shape(tuple(input_shape))

    def get_config(self):
        return {**super().get_config(), "padding": "symmetric" if self.symmetric else self.padding}


def _without_symmetric(args: tuple, kwargs: dict) -> tuple[tuple, dict, bool]:
    """Takes `padding="symmetric"`, which Keras does not know, out of the arguments behind `kernel_size`."""
    # Position 1 behind `kernel_size` is `padding`.
    if len(args) > 1 and args[1] == "symmetric":
        return (args[0], "valid", *args[2:]), kwargs, True
    if kwargs.get("padding") == "symmetric":
        return args, {**kwargs, "padding": "valid"}, True
    return args, kwargs, False
