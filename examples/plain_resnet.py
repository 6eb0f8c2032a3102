"""The residual network that an NF-ResNet is without what makes it normalizer-free, for other examples to compare."""

from collections.abc import Callable, Sequence

from keras import layers


def plain_resnet(inputs, depths: Sequence[int], widths: Sequence[int], act: Callable):
    """Applies the stem and the pre-activation bottleneck blocks of the shape of an NF-ResNet.

    Args:
        inputs: Images, `keras.Input`.
        depths: Blocks of each stage.
        widths: Output channels of each stage; the stem has a quarter of the first, each block's inside of its own.
        act: What stands before every convolution of a block but the shortcut's.

    Returns:
        The last stage's output.
    """

    def conv(channels: int, size: int, strides: int = 1):
        options = {"use_bias": False, "kernel_initializer": "he_normal"}
        return layers.Conv2D(channels, size, strides=strides, padding="same", **options)

    x = layers.MaxPooling2D(3, 2, padding="same")(conv(widths[0] // 4, 7, 2)(inputs))
    for stage, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
        for block in range(depth):
            strides = 2 if stage and not block else 1
            out = act(x)
            shortcut = x if block else conv(channels, 1, strides)(out)
            out = conv(channels // 4, 1)(out)
            out = conv(channels // 4, 3, strides)(act(out))
            x = layers.Add()([shortcut, conv(channels, 1)(act(out))])
    return x
