"""What the networks of all families are made of: one residual block, and the loop over blocks and stages."""

import dataclasses
from collections.abc import Callable, Sequence

import keras

from nfnet_keras.layers import ACTIVATION_GAINS, ResidualAdd, ScaledActivation, SkipGain, StochasticDepth, WSConv2D


@dataclasses.dataclass(frozen=True)
class Style:
    """What all blocks of a network have in common, its arithmetic included. The defaults are the authors'.

    Args:
        activation: Name of a scaled activation.
        alpha: Constant factor on each residual branch.
        attention: Makes a channel attention layer from a number of channels and a name; `None` for none.
        attention_inside: Whether attention stands before the last convolution of a block, and not behind it.
        extra_conv: Whether a block has a second 3 x 3 convolution.
        pool_shortcut: Whether a shortcut that halves the size averages, and not its convolution strides.
        skip_gain: Whether a branch ends in a learnt scalar; if not, its last convolution's gains start at zero.
        approximate_gelu: Whether GELU is its tanh approximation.
        gain_in_kernel: Whether the gain of the activation stands in the kernels.
        variance_epsilon: Added to a kernel's variance in place of the authors' floor.
        padding: Padding of the convolutions.
        rescale_kept: Whether stochastic depth divides what it keeps by the keep probability.
        zero_edge: Whether the average pooling of a dilated shortcut counts zeros behind the edge.
    """

    activation: str = "gelu"
    alpha: float = 0.2
    attention: Callable[[int, str], keras.layers.Layer] | None = None
    attention_inside: bool = False
    extra_conv: bool = False
    pool_shortcut: bool = True
    skip_gain: bool = True
    approximate_gelu: bool = True
    gain_in_kernel: bool = False
    variance_epsilon: float | None = None
    padding: str = "same"
    rescale_kept: bool = False
    zero_edge: bool = False

    def act(self, name: str, scale: float = 1.0) -> keras.layers.Layer:
        """Makes an activation."""
        gain = 1.0 if self.gain_in_kernel else None
        return ScaledActivation(self.activation, scale, gain, self.approximate_gelu, name=name)

    def conv(self, filters: int, kernel_size: int, name: str, **options) -> keras.layers.Layer:
        """Makes a convolution."""
        scale = ACTIVATION_GAINS[self.activation] if self.gain_in_kernel else 1.0
        options = {"padding": self.padding, "scale": scale, "variance_epsilon": self.variance_epsilon, **options}
        return WSConv2D(filters, kernel_size, name=name, **options)


@dataclasses.dataclass(frozen=True)
class Block:
    """One residual block: name, widths, stride, dilation of its two 3 x 3 convolutions, 1 / beta, drop rate."""

    prefix: str
    channels: int
    inner: int
    groups: int
    stride: int = 1
    first_dilation: int = 1
    dilation: int = 1
    expected_std: float = 1.0
    drop_rate: float = 0.0

    def __call__(self, x, style: Style):
        """Returns shortcut + alpha * gain * branch(beta * activation(x))."""
        prefix = self.prefix
        out = style.act(f"{prefix}_preact", 1 / self.expected_std)(x)
        changes = self.stride > 1 or self.dilation != self.first_dilation or x.shape[-1] != self.channels
        shortcut = self._shortcut(out, style) if changes else x
        out = style.conv(self.inner, 1, f"{prefix}_conv0")(out)
        convolutions = [("conv1", self.stride, self.first_dilation)]
        if style.extra_conv:
            convolutions.append(("conv1b", 1, self.dilation))
        for name, stride, dilation in convolutions:
            out = style.act(f"{prefix}_{name}_preact")(out)
            options = {"strides": stride, "dilation_rate": dilation, "groups": self.groups}
            out = style.conv(self.inner, 3, f"{prefix}_{name}", **options)(out)
        if style.attention and style.attention_inside:
            out = style.attention(self.inner, f"{prefix}_se")(out)
        out = style.act(f"{prefix}_conv2_preact")(out)
        gain = "ones" if style.skip_gain else "zeros"
        out = style.conv(self.channels, 1, f"{prefix}_conv2", gain_initializer=gain)(out)
        if style.attention and not style.attention_inside:
            out = style.attention(self.channels, f"{prefix}_se")(out)
        if self.drop_rate > 0:
            out = StochasticDepth(self.drop_rate, rescale=style.rescale_kept, name=f"{prefix}_stochastic_depth")(out)
        if style.skip_gain:
            out = SkipGain(style.alpha, name=f"{prefix}_skip_gain")(out)
        else:
            out = keras.layers.Rescaling(style.alpha, name=f"{prefix}_alpha")(out)
        return ResidualAdd(name=f"{prefix}_add")([shortcut, out])

    def _shortcut(self, x, style: Style):
        stride, name = self.stride, f"{self.prefix}_shortcut_pool"
        if style.pool_shortcut:
            if self.dilation > 1 and style.zero_edge:
                x = keras.layers.ZeroPadding2D(((0, 1), (0, 1)), name=f"{self.prefix}_shortcut_pad")(x)
                x = keras.layers.AveragePooling2D(2, 1, name=name)(x)
            elif stride > 1 or self.dilation > 1:
                x = keras.layers.AveragePooling2D(2, stride, padding="same", name=name)(x)
            stride = 1
        return style.conv(self.channels, 1, f"{self.prefix}_conv_shortcut", strides=stride)(x)


def stages(
    x,
    style: Style,
    widths: Sequence[int],
    depths: Sequence[int],
    inner_widths: Callable[[int, int, int], tuple[int, int]],
    drop_rates: Sequence[float],
    stem_stride: int,
    output_stride: int,
) -> list:
    """Builds the four stages.

    Args:
        x: Output of the stem.
        style: What the blocks have in common.
        widths: Output channels of each stage.
        depths: Blocks of each stage.
        inner_widths: Gives (width, groups) of a block's 3 x 3 convolutions from its input channels, its output
            channels and its index in the network.
        drop_rates: Stochastic depth rate of each block.
        stem_stride: How much smaller `x` is than the image.
        output_stride: Stride at which dilation takes the place of striding: 8, 16 or 32.

    Returns:
        The outputs of the stages.

    Raises:
        ValueError: If `output_stride` is none of these.
    """
    if output_stride not in (8, 16, 32):
        raise ValueError(f"`output_stride` must be 8, 16 or 32. Received: output_stride={output_stride}")
    outputs, index, expected_std, net_stride, dilation = [], 0, 1.0, stem_stride, 1
    for stage, (channels, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        stride = 1 if stage == 1 and stem_stride > 2 else 2
        first_dilation = dilation
        if stride > 1 and net_stride >= output_stride:
            stride, dilation = 1, dilation * stride
        net_stride *= stride
        for block in range(1, depth + 1):
            inner, groups = inner_widths(x.shape[-1], channels, index)
            plan = Block(
                f"stage{stage}_block{block}",
                channels,
                inner,
                groups,
                stride=stride if block == 1 else 1,
                first_dilation=first_dilation if block == 1 else dilation,
                dilation=dilation,
                expected_std=expected_std,
                drop_rate=drop_rates[index],
            )
            x = plan(x, style)
            # The first block of a stage starts the variance anew, on its shortcut.
            expected_std = ((1.0 if block == 1 else expected_std**2) + style.alpha**2) ** 0.5
            index += 1
        outputs.append(x)
    return outputs


def growing_rates(rate: float, blocks: int) -> list[float]:
    """Drop rates that grow linearly with depth from 0 towards `rate`, which no block reaches (the authors' way)."""
    return [rate * index / blocks for index in range(blocks)]


def deep_stem(x, style: Style, widths: Sequence[int]):
    """Four 3 x 3 convolutions of strides 2, 1, 1, 2: the stem of the NFNets."""
    for i, (channels, stride) in enumerate(zip(widths, (2, 1, 1, 2), strict=True)):
        if i:
            x = style.act(f"stem_conv{i}_preact")(x)
        x = style.conv(channels, 3, f"stem_conv{i}", strides=stride)(x)
    return x


def divisible(value: float, divisor: int = 8, limit: float = 0.9) -> int:
    """Rounds a width to a multiple of `divisor`, up where rounding down would lose more than `1 - limit` of it."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * value else rounded
