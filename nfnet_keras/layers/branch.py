"""What a residual branch is multiplied by, as each backend is fastest at it."""

from collections.abc import Callable

from keras import ops

from nfnet_keras.layers.devices import trains_as_graph_on_cpu


def multiply(inputs, factor, training: bool):
    """Multiplies images by a factor.

    Args:
        inputs: Tensor of shape (batch, height, width, channels).
        factor: Tensor of shape (batch or 1, 1, 1, channels or 1), or a scalar.
        training: Whether this is a training step.

    Returns:
        Tensor of the shape of `inputs`.

    Example:

    >>> multiply(ops.ones((1, 2, 2, 1)), 3.0, training=False).shape == (1, 2, 2, 1)
    True
    """
    if training and trains_as_graph_on_cpu(inputs):
        from nfnet_keras.tensorflow_branch import times

        return times(inputs, factor)
    return ops.multiply(inputs, factor)


def attend(inputs, factor: Callable, training: bool):
    """Multiplies images by a factor that depends on the means of their channels.

    Args:
        inputs: Tensor of shape (batch, height, width, channels).
        factor: Function of the means (batch, channels) to a factor of shape (batch, 1, 1, channels).
        training: Whether this is a training step.

    Returns:
        Tensor of the shape of `inputs`.

    Example:

    >>> attend(ops.ones((1, 2, 2, 1)), lambda means: means[:, None, None], training=False).shape == (1, 2, 2, 1)
    True
    """
    if training and trains_as_graph_on_cpu(inputs):
        from nfnet_keras.tensorflow_branch import times, with_means

        images, means = with_means(inputs)
        return times(images, factor(means))
    return ops.multiply(inputs, factor(ops.mean(inputs, axis=(1, 2))))


def join(shortcut, branch):
    """Adds a residual branch to its shortcut.

    Args:
        shortcut: Tensor of shape (batch, height, width, channels).
        branch: Tensor of that shape.

    Returns:
        Tensor of that shape.

    Example:

    >>> join(ops.ones((1, 2, 2, 1)), ops.ones((1, 2, 2, 1))).shape == (1, 2, 2, 1)
    True
    """
    if trains_as_graph_on_cpu(branch):
        from nfnet_keras.tensorflow_branch import plus

        return plus(shortcut, branch)
    return ops.add(shortcut, branch)
