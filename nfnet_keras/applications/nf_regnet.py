"""NF-RegNets B0 to B8: normalizer-free RegNets scaled like EfficientNets, small and quick."""

import dataclasses
from typing import ClassVar

from nfnet_keras.applications import common
from nfnet_keras.applications.blocks import Style, growing_rates, stages
from nfnet_keras.applications.common import preprocess_input
from nfnet_keras.applications.labels import decode_predictions
from nfnet_keras.applications.weights import find_weights
from nfnet_keras.layers import SqueezeExcite
from nfnet_keras.model import NormalizerFreeModel

__all__ = ["VARIANTS", "NFRegNet", "NFRegNetVariant", "decode_predictions", "preprocess_input"]


@dataclasses.dataclass(frozen=True)
class NFRegNetVariant:
    """One row of the table of NF-RegNets.

    Args:
        name: The model's name in `list_models()`.
        widths: Output channels of the four stages, before `width` is multiplied in.
        depths: Blocks of the four stages.
        drop_rate: Dropout before the classifier, in [0, 1).
        train_size: Height and width of the published training images.
        test_size: Height and width of the published test images, the default input.
        group_width: Channels of a group of the 3 x 3 convolutions.
        expansion: Width of a block's 3 x 3 convolution as a multiple of its input channels (1 in the first block).
        width: Factor on all widths.

    Example:

    >>> from nfnet_keras.applications.nf_regnet import VARIANTS
    >>> VARIANTS["nf_regnet_b0"].test_size
    224
    """

    name: str
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    drop_rate: float
    train_size: int
    test_size: int
    group_width: int = 8
    expansion: float = 2.25
    width: float = 0.75

    attention: ClassVar[str] = "se"
    skip_gain: ClassVar[bool] = True

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of the stages."""
        return tuple(int(value * self.width) for value in self.widths)

    def inner_widths(self, inputs: int, channels: int, index: int) -> tuple[int, int]:
        """Returns channels and groups of the 3 x 3 convolution of block `index` between so many channels."""
        inner = int(inputs * (self.expansion if index else 1))
        groups = inner // self.group_width
        if groups < 1:
            raise ValueError(
                f"Block {index + 1} of '{self.name}' has {inner} channels in its 3 x 3 convolution, less than one "
                f"group of {self.group_width}. Raise `width` or lower `group_width`."
            )
        return groups * self.group_width, groups


# Brock et al. 2021, appendix on NF-RegNets, and the authors' table.
VARIANTS = {
    row.name: row
    for row in (
        NFRegNetVariant("nf_regnet_b0", (48, 104, 208, 440), (1, 3, 6, 6), 0.2, 192, 224),
        NFRegNetVariant("nf_regnet_b1", (48, 104, 208, 440), (2, 4, 7, 7), 0.2, 224, 256),
        NFRegNetVariant("nf_regnet_b2", (56, 112, 232, 488), (2, 4, 8, 8), 0.3, 240, 272),
        NFRegNetVariant("nf_regnet_b3", (56, 128, 248, 528), (2, 5, 9, 9), 0.3, 288, 320),
        NFRegNetVariant("nf_regnet_b4", (64, 144, 288, 616), (2, 6, 11, 11), 0.4, 320, 384),
        NFRegNetVariant("nf_regnet_b5", (80, 168, 336, 704), (3, 7, 14, 14), 0.4, 384, 456),
        NFRegNetVariant("nf_regnet_b6", (88, 184, 376, 792), (3, 8, 16, 16), 0.5, 448, 528),
        NFRegNetVariant("nf_regnet_b7", (96, 208, 416, 880), (4, 10, 19, 19), 0.5, 512, 600),
        NFRegNetVariant("nf_regnet_b8", (104, 232, 456, 968), (4, 11, 22, 22), 0.5, 600, 672),
    )
}


def NFRegNet(  # noqa: N802 (keras.applications names constructors like classes)
    variant: NFRegNetVariant,
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
    width: float | None = None,
    expansion: float | None = None,
    se_ratio: float | None = 0.5,
    alpha: float = 0.2,
    activation: str = "silu",
    stochastic_depth_rate: float = 0.1,
    drop_rate: float | None = None,
    group_width: int | None = None,
    remat: bool = False,
) -> NormalizerFreeModel:
    """Builds an NF-RegNet from a row of the table, or from a row of your own.

    A stem of one convolution, blocks whose 3 x 3 convolution is a multiple of the block's input wide, with
    squeeze-and-excitation behind it, and a last 1 x 1 convolution. The classifier starts at zero.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, appendix on NF-RegNets, and the authors' code. No
    weights of these networks were published (timm's `timm_nf_regnet_b1` has some).

    Args:
        variant: The row: widths, depths, sizes.
        include_top: Whether to end in global average pooling, dropout and the classifier. Defaults to `True`.
        weights: `None` for random weights, or the path of a file of weights, told apart by its content. Defaults to
            `"imagenet"`, as in keras.applications.
        input_tensor: Keras tensor to build on: an `keras.Input` or the output of a layer. Defaults to `None`.
        input_shape: (height, width, channels), at least 32 x 32; sizes may be `None`. Defaults to the published test
            size with three channels; without top to (None, None, 3).
        pooling: Without top: `None` for the last feature map, `"avg"` or `"max"` for a vector. Defaults to `None`.
        classes: Number of classes. Defaults to `1000`.
        classifier_activation: Activation of the classifier; `None` gives logits. Defaults to `"softmax"`.
        name: Name of the model. Defaults to the row's.
        features: Whether the outputs are those of the four stages, at strides 4, 8, 16 and 32. `include_top` and
            `pooling` are then without effect. Defaults to `False`.
        output_stride: 8 or 16: later stages keep the size of their input, by dilated convolutions. Defaults to `32`.
        width: Factor on all widths. Defaults to the row's.
        expansion: Width of the 3 x 3 convolutions as a multiple of a block's input. Defaults to the row's.
        se_ratio: Hidden width of squeeze-and-excitation as a share of its channels; `None` or 0 leaves it out.
            Defaults to `0.5`.
        alpha: Factor on each residual branch. Defaults to `0.2`.
        activation: Name of a scaled activation. Defaults to `"silu"`.
        stochastic_depth_rate: Drop rate that grows linearly from 0 with depth towards this. Defaults to `0.1`.
        drop_rate: Dropout before the classifier. Defaults to the row's.
        group_width: Channels of a group of the 3 x 3 convolutions. Defaults to the row's.
        remat: Whether training computes the inside of each block again in the backward pass instead of keeping it: much
            less memory for about a third more time, and the same numbers. Kept with the model. Defaults to `False`.

    Returns:
        A `NormalizerFreeModel`.

    Raises:
        ValueError: If an argument is wrong; the message says which.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.NFRegNetB0(weights=None, input_shape=(64, 64, 3), classes=7).output_shape
    (None, 7)
    """
    given = {"width": width, "expansion": expansion, "group_width": group_width, "drop_rate": drop_rate}
    variant = dataclasses.replace(variant, **{k: v for k, v in given.items() if v is not None})
    common.check_rate("stochastic_depth_rate", stochastic_depth_rate)
    top = common.Top(
        include_top, pooling, classes, classifier_activation, variant.drop_rate, features, "zeros", remat=remat
    )
    x, inputs = common.resolve_input(input_shape, input_tensor, variant.test_size, include_top and not features)
    source = find_weights(weights, variant.name)
    style = Style(
        activation,
        alpha,
        attention=(lambda channels, name: SqueezeExcite(se_ratio, name=name)) if se_ratio else None,
        attention_inside=True,
    )

    channels = variant.channels
    x = style.conv(channels[0], 3, "stem_conv0", strides=2)(x)
    rates = growing_rates(stochastic_depth_rate, sum(variant.depths))
    outputs = stages(x, style, channels, variant.depths, variant.inner_widths, rates, 2, output_stride)

    def last(x):
        return style.act("final_act")(style.conv(1280 * channels[-1] // 440, 1, "final_conv")(x))

    return common.finish(variant, inputs, outputs, last, top, source, name)


def _constructor(variant: NFRegNetVariant):
    about = (
        f"widths {variant.widths} x {variant.width}, depths {variant.depths}, trained at {variant.train_size} and "
        f"tested at {variant.test_size} pixels, dropout {variant.drop_rate}.\n\n"
        "Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>."
    )
    title = "NFRegNet" + variant.name.removeprefix("nf_regnet_").upper()
    return common.make_constructor(NFRegNet, variant, title, about)


NFRegNetB0 = _constructor(VARIANTS["nf_regnet_b0"])
NFRegNetB1 = _constructor(VARIANTS["nf_regnet_b1"])
NFRegNetB2 = _constructor(VARIANTS["nf_regnet_b2"])
NFRegNetB3 = _constructor(VARIANTS["nf_regnet_b3"])
NFRegNetB4 = _constructor(VARIANTS["nf_regnet_b4"])
NFRegNetB5 = _constructor(VARIANTS["nf_regnet_b5"])
NFRegNetB6 = _constructor(VARIANTS["nf_regnet_b6"])
NFRegNetB7 = _constructor(VARIANTS["nf_regnet_b7"])
NFRegNetB8 = _constructor(VARIANTS["nf_regnet_b8"])
