"""timm's normalizer-free networks, in timm's arithmetic: the same ideas with other widths, shortcuts and constants."""

import dataclasses

import keras

from nfnet_keras.applications import common
from nfnet_keras.applications.blocks import Style, deep_stem, divisible, stages
from nfnet_keras.applications.labels import decode_predictions
from nfnet_keras.applications.registry import get_row
from nfnet_keras.applications.weights import find_weights
from nfnet_keras.layers import EfficientChannelAttention, SqueezeExcite, SymmetricMaxPooling2D
from nfnet_keras.model import NormalizerFreeModel

__all__ = ["VARIANTS", "TimmNet", "TimmVariant", "decode_predictions", "preprocess_input"]


@dataclasses.dataclass(frozen=True)
class TimmVariant:
    """One row of the table of timm's networks.

    Args:
        name: The model's name in `list_models()`: `timm_` and timm's own.
        widths: Output channels of the four stages, before `width` is multiplied in.
        depths: Blocks of the four stages.
        train_size: Height and width of training images.
        test_size: Height and width of test images, the default input.
        activation: Name of a scaled activation (`"gelu"` is the exact one).
        stem: `"deep"` (four 3 x 3 convolutions), `"3x3"`, or `"7x7_pool"`.
        stem_width: Channels of the stem's last convolution, before `width` is multiplied in.
        group_width: Channels of a group of the 3 x 3 convolutions; `None` for a single group.
        expansion: Width of a block's 3 x 3 convolutions as a share of its output (of its input where `regnet`).
        attention: `"se"`, `"eca"` or `None`.
        se_ratio: Hidden width of squeeze-and-excitation as a share of its channels, rounded to a multiple of 8.
        final_width: Channels of the last convolution, before `width` is multiplied in; 0 for none.
        regnet: Whether blocks widen their input and have attention inside, as in RegNets.
        extra_conv: Whether a block has a second 3 x 3 convolution.
        authors: Whether padding, activation gains and skip gains are those of the authors' networks, whose weights then
            fit.
        width: Factor on all widths.
        crop: Rule for the crop of a test image.
        mean: Mean of red, green and blue in [0, 1] that preprocessing takes off.
        stddev: What it then divides by.

    Example:

    >>> from nfnet_keras.applications.timm import VARIANTS
    >>> VARIANTS["timm_nfnet_l0"].test_size
    288
    """

    name: str
    widths: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    train_size: int
    test_size: int
    activation: str
    stem: str
    stem_width: int
    group_width: int | None
    expansion: float
    attention: str | None
    se_ratio: float = 0.0
    final_width: int = 0
    regnet: bool = False
    extra_conv: bool = False
    authors: bool = False
    width: float = 1.0
    crop: str = "center_0.9"
    mean: tuple[float, float, float] = common.MEAN
    stddev: tuple[float, float, float] = common.STDDEV

    @property
    def skip_gain(self) -> bool:
        """Whether branches end in a learnt scalar."""
        return self.authors

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of the stages."""
        return tuple(divisible(value * self.width) for value in self.widths)

    def inner_widths(self, inputs: int, channels: int, index: int) -> tuple[int, int]:
        """Returns channels and groups of the 3 x 3 convolutions of block `index` between so many channels."""
        expansion = 1 if self.regnet and index == 0 else self.expansion
        inner = divisible((inputs if self.regnet else channels) * expansion)
        if not self.group_width:
            return inner, 1
        groups = inner // self.group_width
        return groups * self.group_width, groups


def _nfnet_rows():
    widths, wide = (256, 512, 1536, 1536), {"stem": "deep", "stem_width": 128, "extra_conv": True}
    sizes = ((192, 256), (224, 320), (256, 352), (320, 416), (384, 512), (416, 544), (448, 576), (480, 608))
    fractions = (0.9, 0.91, 0.92, 0.94, 0.951, 0.954, 0.956)
    full = {**wide, "group_width": 128, "expansion": 0.5, "attention": "se", "se_ratio": 0.5, "final_width": 3072}
    for level, (train, test) in enumerate(sizes):
        depths = tuple(blocks * (level + 1) for blocks in (1, 2, 6, 3))
        yield TimmVariant(f"timm_nfnet_f{level}", widths, depths, train, test, "gelu", **full)
        if level < len(fractions):
            options = {**full, "authors": True, "crop": f"squash_{fractions[level]}"}
            yield TimmVariant(f"timm_dm_nfnet_f{level}", widths, depths, train, test, "gelu", **options)
    light = {**wide, "group_width": 64, "expansion": 0.25, "crop": "center_1.0"}
    squeeze = {"attention": "se", "se_ratio": 0.25}
    yield TimmVariant(
        "timm_nfnet_l0", widths, (1, 2, 6, 3), 224, 288, "silu", **light, **squeeze, final_width=widths[-1] * 3 // 2
    )
    for level, (train, test) in enumerate(((224, 288), (256, 320), (320, 384), (352, 448))):
        depths = tuple(blocks * (level + 1) for blocks in (1, 2, 6, 3))
        options = {**light, "attention": "eca", "final_width": widths[-1] * 2 if level else widths[-1] * 3 // 2}
        yield TimmVariant(f"timm_eca_nfnet_l{level}", widths, depths, train, test, "silu", **options)
    half = (0.5, 0.5, 0.5)
    options = {**light, **squeeze, "group_width": 8, "final_width": 192, "crop": "center_0.95"}
    small = (32, 64, 96, 128)
    yield TimmVariant("timm_test_nfnet", small, (1, 1, 1, 1), 160, 160, "silu", **options, mean=half, stddev=half)


def _regnet_rows():
    table = (
        ((48, 104, 208, 440), (1, 3, 6, 6), 192, 256),
        ((48, 104, 208, 440), (2, 4, 7, 7), 256, 288),
        ((56, 112, 232, 488), (2, 4, 8, 8), 240, 272),
        ((56, 128, 248, 528), (2, 5, 9, 9), 288, 320),
        ((64, 144, 288, 616), (2, 6, 11, 11), 320, 384),
        ((80, 168, 336, 704), (3, 7, 14, 14), 384, 456),
    )
    shared = {"group_width": 8, "expansion": 2.25, "attention": "se", "se_ratio": 0.5, "regnet": True, "width": 0.75}
    for level, (widths, *rest) in enumerate(table):
        options = {"stem": "3x3", "stem_width": widths[0], "final_width": 1280 * widths[-1] // 440, **shared}
        yield TimmVariant(f"timm_nf_regnet_b{level}", widths, *rest, "silu", **options)


def _resnet_rows():
    shared = {"stem": "7x7_pool", "stem_width": 64, "group_width": None, "expansion": 0.25}
    for layers, depths in ((26, (2, 2, 2, 2)), (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))):
        for kind, attention in (("", None), ("se", "se"), ("eca", "eca")):
            name = f"timm_nf_{kind}resnet{layers}"
            # The one that timm has trained.
            trained = name == "timm_nf_resnet50"
            sizes, crop = ((256, 288), "center_0.94") if trained else ((224, 224), "center_0.9")
            options = {**shared, "attention": attention, "se_ratio": 1 / 16, "crop": crop}
            yield TimmVariant(name, (256, 512, 1024, 2048), depths, *sizes, "relu", **options)


VARIANTS = {row.name: row for rows in (_nfnet_rows(), _regnet_rows(), _resnet_rows()) for row in rows}


def _style(variant: TimmVariant, activation: str | None, alpha: float) -> Style:
    def attention(channels: int, name: str) -> keras.layers.Layer:
        if variant.attention == "eca":
            return EfficientChannelAttention(name=name)
        return SqueezeExcite(hidden_units=divisible(channels * variant.se_ratio, limit=0.0), name=name)

    return Style(
        activation or variant.activation,
        alpha,
        attention=attention if variant.attention else None,
        attention_inside=variant.regnet,
        extra_conv=variant.extra_conv,
        skip_gain=variant.skip_gain,
        approximate_gelu=False,
        gain_in_kernel=not variant.authors,
        variance_epsilon=1e-5,
        padding="same" if variant.authors else "symmetric",
        rescale_kept=True,
        zero_edge=True,
    )


def _stem(x, variant: TimmVariant, style: Style):
    width = divisible(variant.stem_width * variant.width)
    if variant.stem == "deep":
        return deep_stem(x, style, (width // 8, width // 4, width // 2, width)), 4
    if variant.stem == "3x3":
        return style.conv(width, 3, "stem_conv0", strides=2)(x), 2
    x = style.conv(width, 7, "stem_conv0", strides=2)(x)
    return SymmetricMaxPooling2D(name="stem_pool")(x), 4


def TimmNet(  # noqa: N802 (keras.applications names constructors like classes)
    variant: TimmVariant,
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
    alpha: float = 0.2,
    activation: str | None = None,
    stochastic_depth_rate: float = 0.0,
    drop_rate: float = 0.0,
    remat: bool = False,
) -> NormalizerFreeModel:
    """Builds one of timm's networks from a row of the table, or from a row of your own.

    The same parameters give the logits of timm 1.0.31. What is different from the authors' networks: exact GELU, the
    variance of a kernel plus 1e-5 instead of a floor, widths rounded to multiples of 8; and outside `timm_dm_nfnet_*`
    symmetric padding, activation gains inside the kernels, and no skip gain (the last convolution of a branch starts
    with zero gains instead).

    Source: <https://github.com/huggingface/pytorch-image-models>, `timm/models/nfnet.py`.

    Args:
        variant: The row: widths, depths, sizes, kind of stem and of attention.
        include_top: Whether to end in global average pooling, dropout and the classifier. Defaults to `True`.
        weights: `"imagenet"` for the published weights, downloaded once and kept; `None` for random ones; or the path
            of a file of weights, told apart by its content. Defaults to `"imagenet"`.
        input_tensor: Keras tensor to build on: an `keras.Input` or the output of a layer. Defaults to `None`.
        input_shape: (height, width, channels), at least 32 x 32; sizes may be `None`. Defaults to timm's test size with
            three channels; without top to (None, None, 3).
        pooling: Without top: `None` for the last feature map, `"avg"` or `"max"` for a vector. Defaults to `None`.
        classes: Number of classes. Defaults to `1000`.
        classifier_activation: Activation of the classifier; `None` gives logits. Defaults to `"softmax"`.
        name: Name of the model. Defaults to the row's.
        features: Whether the outputs are those of the four stages, at strides 4, 8, 16 and 32. `include_top` and
            `pooling` are then without effect. Defaults to `False`.
        output_stride: 8 or 16: later stages keep the size of their input, by dilated convolutions. Defaults to `32`.
        alpha: Factor on each residual branch. Defaults to `0.2`.
        activation: Name of a scaled activation. Defaults to the row's.
        stochastic_depth_rate: Drop rate that grows linearly from 0 in the first block to this in the last. Defaults to
            `0.0`.
        drop_rate: Dropout before the classifier. Defaults to `0.0`.
        remat: Whether training computes the inside of each block again in the backward pass instead of keeping it: much
            less memory for about a third more time, and the same numbers. Kept with the model. Defaults to `False`.

    Returns:
        A `NormalizerFreeModel`.

    Raises:
        ValueError: If an argument is wrong; the message says which.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.create_model("timm_test_nfnet", weights=None, classes=7).output_shape
    (None, 7)
    """
    common.check_rate("stochastic_depth_rate", stochastic_depth_rate)
    top = common.Top(include_top, pooling, classes, classifier_activation, drop_rate, features, remat=remat)
    x, inputs = common.resolve_input(input_shape, input_tensor, variant.test_size, include_top and not features)
    source = find_weights(weights, variant.name)
    style = _style(variant, activation, alpha)
    x, stem_stride = _stem(x, variant, style)
    blocks = sum(variant.depths)
    rates = [stochastic_depth_rate * index / max(1, blocks - 1) for index in range(blocks)]
    outputs = stages(
        x, style, variant.channels, variant.depths, variant.inner_widths, rates, stem_stride, output_stride
    )

    def last(x):
        if variant.final_width:
            x = style.conv(divisible(variant.final_width * variant.width), 1, "final_conv")(x)
        return style.act("final_act")(x)

    return common.finish(variant, inputs, outputs, last, top, source, name)


def preprocess_input(x, data_format: str | None = None, *, model: str = "timm_nfnet_l0"):
    """Normalises images as one of timm's networks expects them: mean taken off, divided by the deviation.

    Source: timm's configurations. All have ImageNet's mean and deviation but `timm_test_nfnet`, which has 0.5 and 0.5.

    Args:
        x: Array or tensor of images, RGB, values 0 to 255. It is left as it is.
        data_format: `"channels_last"`, `"channels_first"` or `None` for Keras's setting.
        model: Name of the network. Defaults to `"timm_nfnet_l0"`.

    Returns:
        float images of the same shape.

    Example:

    >>> import numpy as np
    >>> from nfnet_keras.applications.timm import preprocess_input
    >>> float(preprocess_input(np.full((1, 1, 1, 3), 255.0), model="timm_test_nfnet")[0, 0, 0, 0])
    1.0
    """
    if get_row(model).mean == common.MEAN:
        return common.preprocess_input(x, data_format)
    return common.normalized(x, data_format, "tf")


_NAMES = {"timm_nfnet_l0": "NFNetL0", **{f"timm_eca_nfnet_l{level}": f"ECANFNetL{level}" for level in range(4)}}


def _constructor(variant: TimmVariant):
    about = (
        f"timm's `{variant.name.removeprefix('timm_')}`, widths {variant.widths}, depths {variant.depths}, input "
        f"{variant.test_size} pixels.\n\nSource: <https://github.com/huggingface/pytorch-image-models>."
    )
    return common.make_constructor(TimmNet, variant, _NAMES.get(variant.name, variant.name), about)


_CONSTRUCTORS = {name: _constructor(row) for name, row in VARIANTS.items()}
NFNetL0 = _CONSTRUCTORS["timm_nfnet_l0"]
ECANFNetL0 = _CONSTRUCTORS["timm_eca_nfnet_l0"]
ECANFNetL1 = _CONSTRUCTORS["timm_eca_nfnet_l1"]
ECANFNetL2 = _CONSTRUCTORS["timm_eca_nfnet_l2"]
ECANFNetL3 = _CONSTRUCTORS["timm_eca_nfnet_l3"]
