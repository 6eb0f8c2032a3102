"""NF-ResNets 50 to 600: pre-activation ResNets without normalisation."""

import dataclasses
from typing import ClassVar

import keras

from nfnet_keras.applications import common
from nfnet_keras.applications.blocks import Style, growing_rates, stages
from nfnet_keras.applications.common import preprocess_input
from nfnet_keras.applications.labels import decode_predictions
from nfnet_keras.applications.weights import find_weights
from nfnet_keras.layers import SqueezeExcite
from nfnet_keras.model import NormalizerFreeModel

__all__ = ["VARIANTS", "NFResNet", "NFResNetVariant", "decode_predictions", "preprocess_input"]


@dataclasses.dataclass(frozen=True)
class NFResNetVariant:
    """One row of the table of NF-ResNets.

    Args:
        name: The model's name in `list_models()`.
        depths: Blocks of the four stages.
        drop_rate: Dropout before the classifier, in [0, 1).
        train_size: Height and width of training images.
        test_size: Height and width of test images, the default input.
        width: Factor on the widths (64, 128, 256, 512) of the stages and 16 of the stem.

    Example:

    >>> from nfnet_keras.applications.nf_resnet import VARIANTS
    >>> VARIANTS["nf_resnet50"].channels
    (256, 512, 1024, 2048)
    """

    name: str
    depths: tuple[int, int, int, int]
    # The authors' code names no rate for these networks: this one is our choice.
    drop_rate: float = 0.2
    train_size: int = 224
    test_size: int = 224
    width: float = 4

    attention: ClassVar[None] = None
    skip_gain: ClassVar[bool] = True

    @property
    def channels(self) -> tuple[int, ...]:
        """Output channels of the stages."""
        return tuple(int(value * self.width) for value in (64, 128, 256, 512))

    def inner_widths(self, inputs: int, channels: int, index: int) -> tuple[int, int]:
        """Returns channels and groups of the 3 x 3 convolution of block `index` between so many channels."""
        return channels // 4, 1


VARIANTS = {
    row.name: row
    for row in (
        NFResNetVariant("nf_resnet50", (3, 4, 6, 3)),
        NFResNetVariant("nf_resnet101", (3, 4, 23, 3)),
        NFResNetVariant("nf_resnet152", (3, 8, 36, 3)),
        NFResNetVariant("nf_resnet200", (3, 24, 36, 3)),
        NFResNetVariant("nf_resnet288", (24, 24, 24, 24)),
        NFResNetVariant("nf_resnet600", (50, 50, 50, 50)),
    )
}


def NFResNet(  # noqa: N802 (keras.applications names constructors like classes)
    variant: NFResNetVariant,
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
    use_se: bool = False,
    se_ratio: float = 0.25,
    alpha: float = 0.2,
    activation: str = "relu",
    stochastic_depth_rate: float = 0.1,
    drop_rate: float | None = None,
    remat: bool = False,
) -> NormalizerFreeModel:
    """Builds an NF-ResNet from a row of the table, or from a row of your own.

    Source: Brock, De, Smith 2021, <https://arxiv.org/abs/2101.08692>, and the authors' code of Brock et al. 2021. No
    weights of these networks were published (timm's `timm_nf_resnet50` has some). The authors publish no dropout rate
    for them; the default is ours.

    Args:
        variant: The row: depths, sizes.
        include_top: Whether to end in global average pooling, dropout and the classifier. Defaults to `True`.
        weights: `None` for random weights, or the path of a file of weights, told apart by its content. Defaults to
            `"imagenet"`, as in keras.applications.
        input_tensor: Keras tensor to build on: an `keras.Input` or the output of a layer. Defaults to `None`.
        input_shape: (height, width, channels), at least 32 x 32; sizes may be `None`. Defaults to 224 x 224 with three
            channels; without top to (None, None, 3).
        pooling: Without top: `None` for the last feature map, `"avg"` or `"max"` for a vector. Defaults to `None`.
        classes: Number of classes. Defaults to `1000`.
        classifier_activation: Activation of the classifier; `None` gives logits. Defaults to `"softmax"`.
        name: Name of the model. Defaults to the row's.
        features: Whether the outputs are those of the four stages, at strides 4, 8, 16 and 32. `include_top` and
            `pooling` are then without effect. Defaults to `False`.
        output_stride: 8 or 16: later stages keep the size of their input, by dilated convolutions. Defaults to `32`.
        width: Factor on the widths. Defaults to the row's, 4.
        use_se: Whether squeeze-and-excitation ends each branch. Defaults to `False`.
        se_ratio: Hidden width of squeeze-and-excitation as a share of its channels. Defaults to `0.25`.
        alpha: Factor on each residual branch. Defaults to `0.2`.
        activation: Name of a scaled activation. Defaults to `"relu"`.
        stochastic_depth_rate: Drop rate that grows linearly from 0 with depth towards this. Defaults to `0.1`.
        drop_rate: Dropout before the classifier. Defaults to the row's.
        remat: Whether training computes the inside of each block again in the backward pass instead of keeping it: much
            less memory for about a third more time, and the same numbers. Kept with the model. Defaults to `False`.

    Returns:
        A `NormalizerFreeModel`.

    Raises:
        ValueError: If an argument is wrong; the message says which.

    Example:

    >>> import nfnet_keras as nfk
    >>> nfk.NFResNet50(weights=None, input_shape=(64, 64, 3), classes=7).output_shape
    (None, 7)
    """
    given = {"width": width, "drop_rate": drop_rate}
    variant = dataclasses.replace(variant, **{k: v for k, v in given.items() if v is not None})
    common.check_rate("stochastic_depth_rate", stochastic_depth_rate)
    top = common.Top(include_top, pooling, classes, classifier_activation, variant.drop_rate, features, remat=remat)
    x, inputs = common.resolve_input(input_shape, input_tensor, variant.test_size, include_top and not features)
    source = find_weights(weights, variant.name)
    style = Style(
        activation,
        alpha,
        attention=(lambda channels, name: SqueezeExcite(se_ratio, name=name)) if use_se else None,
        pool_shortcut=False,
    )
    x = style.conv(int(16 * variant.width), 7, "stem_conv0", strides=2)(x)
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name="stem_pool")(x)
    rates = growing_rates(stochastic_depth_rate, sum(variant.depths))
    outputs = stages(x, style, variant.channels, variant.depths, variant.inner_widths, rates, 4, output_stride)
    return common.finish(variant, inputs, outputs, style.act("final_act"), top, source, name)


def _constructor(variant: NFResNetVariant):
    about = (
        f"depths {variant.depths}, stages of {64 * variant.width} to {512 * variant.width} channels.\n\n"
        "Source: Brock, De, Smith 2021, <https://arxiv.org/abs/2101.08692>."
    )
    title = "NFResNet" + variant.name.removeprefix("nf_resnet")
    return common.make_constructor(NFResNet, variant, title, about)


NFResNet50 = _constructor(VARIANTS["nf_resnet50"])
NFResNet101 = _constructor(VARIANTS["nf_resnet101"])
NFResNet152 = _constructor(VARIANTS["nf_resnet152"])
NFResNet200 = _constructor(VARIANTS["nf_resnet200"])
NFResNet288 = _constructor(VARIANTS["nf_resnet288"])
NFResNet600 = _constructor(VARIANTS["nf_resnet600"])
