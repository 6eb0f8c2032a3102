"""NFNets: F0 to F7, F0+ to F7+, and a small one for 32 to 64 pixels."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from nfnet_keras.applications import common
from nfnet_keras.applications.blocks import Style, deep_stem, growing_rates, stages
from nfnet_keras.applications.common import preprocess_input
from nfnet_keras.applications.labels import decode_predictions
from nfnet_keras.applications.weights import find_weights
from nfnet_keras.layers import SqueezeExcite
from nfnet_keras.model import NormalizerFreeModel

__all__ = ["VARIANTS", "NFNet", "NFNetVariant", "decode_predictions", "preprocess_input"]


@dataclasses.dataclass(frozen=True)
class NFNetVariant:
    """One row of the table of NFNets.

    Args:
        name: The model's name in `list_models()`.
        widths: Output channels of the four stages.
        depths: Blocks of the four stages.
        drop_rate: Dropout before the classifier, in [0, 1).
        train_size: Height and width of the published training images.
        test_size: Height and width of the published test images, the default input.
        group_width: Channels of a group of the 3 x 3 convolutions.
        expansion: Width of a block's 3 x 3 convolutions as a share of its output channels.
        stem_widths: Channels of the first three convolutions.

    Example:

    >>> from nfnet_keras.applications.nfnet import VARIANTS
    >>> VARIANTS["nfnet_f0"].depths
    (1, 2, 6, 3)
    """

    name: str
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    drop_rate: float
    train_size: int
    test_size: int
    group_width: int = 128
    expansion: float = 0.5
    stem_widths: tuple[int, int, int] = (16, 32, 64)

    attention: ClassVar[str] = "se"
    skip_gain: ClassVar[bool] = True

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of the stages."""
        return self.widths

    def inner_widths(self, inputs: int, channels: int, index: int) -> tuple[int, int]:
        """Returns channels and groups of the 3 x 3 convolutions of block `index` between so many channels."""
        groups = int(channels * self.expansion) // self.group_width
        if groups < 1:
            raise ValueError(
                f"A stage of {channels} channels in '{self.name}' has {int(channels * self.expansion)} in its "
                f"3 x 3 convolutions, less than one group of {self.group_width}. Raise `width` or lower "
                "`group_width`."
            )
        return groups * self.group_width, groups


def _rows() -> dict[str, NFNetVariant]:
    base, wide = (256, 512, 1536, 1536), (384, 768, 2048, 2048)
    # Dropout, training size and test size of F0, F1, ...: Brock et al. 2021, tables 1 and 6.
    published = (
        (0.2, 192, 256),
        (0.3, 224, 320),
        (0.4, 256, 352),
        (0.4, 320, 416),
        (0.5, 384, 512),
        (0.5, 416, 544),
        (0.5, 448, 576),
        (0.5, 480, 608),
    )
    rows = [NFNetVariant("nfnet_tiny", (32, 64, 128, 128), (1, 1, 2, 1), 0.1, 32, 32, group_width=16)]
    for suffix, widths in (("", base), ("_plus", wide)):
        for level, settings in enumerate(published):
            depths = tuple(blocks * (level + 1) for blocks in (1, 2, 6, 3))
            rows.append(NFNetVariant(f"nfnet_f{level}{suffix}", widths, depths, *settings))
    return {row.name: row for row in rows}


VARIANTS = _rows()


def NFNet(  # noqa: N802 (keras.applications names constructors like classes)
    variant: NFNetVariant,
    include_top: bool = True,
    weights: str | None = "imagenet",
    input_tensor=None,
    input_shape: tuple | None = None,
    pooling: str | None = None,
    classes: int = 1000,
    classifier_activation="softmax",
    name: str | None = None,
    *,
    features: bool = False,
    output_stride: int = 32,
    width: float = 1.0,
    se_ratio: float | None = 0.5,
    alpha: float = 0.2,
    activation: str = "gelu",
    use_two_convs: bool = True,
    final_conv_mult: float = 2,
    stochastic_depth_rate: float = 0.25,
    drop_rate: float | None = None,
    group_width: int | None = None,
    remat: bool = False,
) -> NormalizerFreeModel:
    """Builds an NFNet from a row of the table, or from a row of your own.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 3, figure 3 and table 1.

    Args:
        variant: The row: widths, depths, sizes.
        include_top: Whether to end in global average pooling, dropout and the classifier. Defaults to `True`.
        weights: `"imagenet"` for the published weights, downloaded once and kept; `None` for random ones; `"digits"`,
            for `nfnet_tiny` alone, for those that come with this package, trained on the handwritten digits 0 to 4
            (`classes=5`); or the path of a file, told apart by its content: the authors' checkpoint, timm's
            `.safetensors`, Keras's `.weights.h5` or `.keras`. Files for other classes keep everything but the
            classifier. Published weights were trained with the defaults of the options below. Defaults to `"imagenet"`.
        input_tensor: Keras tensor to build on: an `keras.Input` or the output of a layer. Defaults to `None`.
        input_shape: (height, width, channels), at least 32 x 32; sizes may be `None`. Weights adapt to other numbers of
            channels than three. Defaults to the published test size with three channels; without top to
            (None, None, 3).
        pooling: Without top: `None` for the last feature map, `"avg"` or `"max"` for a vector. Defaults to `None`.
        classes: Number of classes. Defaults to `1000`.
        classifier_activation: Activation of the classifier; `None` gives logits. Defaults to `"softmax"`.
        name: Name of the model. Defaults to the row's.
        features: Whether the outputs are those of the four stages, at strides 4, 8, 16 and 32, for heads that detect or
            segment. `include_top` and `pooling` are then without effect. Defaults to `False`.
        output_stride: 8 or 16: later stages keep the size of their input, by dilated convolutions. Defaults to `32`.
        width: Factor on the widths of the stages (not of the stem). Defaults to `1.0`.
        se_ratio: Hidden width of squeeze-and-excitation as a share of its channels; `None` or 0 leaves it out.
            Defaults to `0.5`.
        alpha: Factor on each residual branch. Defaults to `0.2`.
        activation: Name of a scaled activation. Defaults to `"gelu"`.
        use_two_convs: Whether a block has two 3 x 3 convolutions. Defaults to `True`.
        final_conv_mult: Channels of the last convolution as a multiple of those of the last stage. Defaults to `2`.
        stochastic_depth_rate: Drop rate that grows linearly from 0 with depth towards this. Defaults to `0.25`.
        drop_rate: Dropout before the classifier. Defaults to the row's.
        group_width: Channels of a group of the 3 x 3 convolutions. Defaults to the row's.
        remat: Whether training computes the inside of each block again in the backward pass instead of keeping it: much
            less memory for about a third more time, and the same numbers. Kept with the model. Defaults to `False`.

    Returns:
        A `NormalizerFreeModel`.

    Raises:
        ValueError: If an argument is wrong; the message says which.

    Example:

    >>> from nfnet_keras.applications.nfnet import NFNet, NFNetVariant
    >>> row = NFNetVariant("mine", (32, 64, 96, 96), (1, 1, 1, 1), 0.0, 32, 32, group_width=16)
    >>> NFNet(row, weights=None, classes=7).output_shape
    (None, 7)
    """
    if group_width is not None and group_width < 1:
        raise ValueError(f"`group_width` must be at least 1. Received: group_width={group_width}")
    if group_width is not None:
        variant = dataclasses.replace(variant, group_width=group_width)
    drop_rate = variant.drop_rate if drop_rate is None else drop_rate
    common.check_rate("stochastic_depth_rate", stochastic_depth_rate)
    top = common.Top(include_top, pooling, classes, classifier_activation, drop_rate, features, remat=remat)
    x, inputs = common.resolve_input(input_shape, input_tensor, variant.test_size, include_top and not features)
    source = find_weights(weights, variant.name)
    style = Style(
        activation,
        alpha,
        attention=(lambda channels, name: SqueezeExcite(se_ratio, name=name)) if se_ratio else None,
        extra_conv=use_two_convs,
    )
    channels = [int(value * width) for value in variant.widths]
    x = deep_stem(x, style, (*variant.stem_widths, variant.widths[0] // 2))
    rates = growing_rates(stochastic_depth_rate, sum(variant.depths))
    outputs = stages(x, style, channels, variant.depths, variant.inner_widths, rates, 4, output_stride)

    def last(x):
        return style.act("final_act")(style.conv(int(final_conv_mult * channels[-1]), 1, "final_conv")(x))

    return common.finish(variant, inputs, outputs, last, top, source, name)


_NAMES = {"nfnet_tiny": "NFNetTiny"}


def _constructor(variant: NFNetVariant) -> Callable[..., NormalizerFreeModel]:
    title = _NAMES.get(variant.name) or "NFNet" + variant.name.removeprefix("nfnet_").replace("_plus", "Plus").replace(
        "f", "F", 1
    )
    about = (
        f"widths {variant.widths}, depths {variant.depths}, trained at {variant.train_size} and tested at "
        f"{variant.test_size} pixels, dropout {variant.drop_rate}.\n\n"
        "Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>."
    )
    return common.make_constructor(NFNet, variant, title, about)


NFNetTiny = _constructor(VARIANTS["nfnet_tiny"])
NFNetF0 = _constructor(VARIANTS["nfnet_f0"])
NFNetF1 = _constructor(VARIANTS["nfnet_f1"])
NFNetF2 = _constructor(VARIANTS["nfnet_f2"])
NFNetF3 = _constructor(VARIANTS["nfnet_f3"])
NFNetF4 = _constructor(VARIANTS["nfnet_f4"])
NFNetF5 = _constructor(VARIANTS["nfnet_f5"])
NFNetF6 = _constructor(VARIANTS["nfnet_f6"])
NFNetF7 = _constructor(VARIANTS["nfnet_f7"])
NFNetF0Plus = _constructor(VARIANTS["nfnet_f0_plus"])
NFNetF1Plus = _constructor(VARIANTS["nfnet_f1_plus"])
NFNetF2Plus = _constructor(VARIANTS["nfnet_f2_plus"])
NFNetF3Plus = _constructor(VARIANTS["nfnet_f3_plus"])
NFNetF4Plus = _constructor(VARIANTS["nfnet_f4_plus"])
NFNetF5Plus = _constructor(VARIANTS["nfnet_f5_plus"])
NFNetF6Plus = _constructor(VARIANTS["nfnet_f6_plus"])
NFNetF7Plus = _constructor(VARIANTS["nfnet_f7_plus"])
