"""What a residual branch is multiplied by, in a TensorFlow training step on a CPU.

Attention, stochastic depth and the skip gain each multiply the branch by a number for an image and a channel, and then
it is added to its shortcut. Layer by layer that is a pass over memory each, and three more for their gradients. Here
the numbers are multiplied instead, and the branch once, in the pass that adds it. The other way round, the gradient of
that product and that of the means which attention looks at are one pass too.
"""

import math

import tensorflow as tf

from nfnet_keras.tensorflow_fusion import product_and_sum
from nfnet_keras.tensorflow_step import likely_batch

# Elements of a branch from which on a pass less is worth what XLA takes to compile it.
MIN_SIZE = 2**20


def times(x, factor):
    """Multiplies images by a factor. What earlier calls multiplied them by and this are one product.

    Args:
        x: Tensor of shape (batch, height, width, channels).
        factor: Tensor of shape (batch or 1, 1, 1, channels or 1), or a scalar.

    Returns:
        Tensor of the shape of `x`.

    Example:

    >>> x = tf.ones((1, 2, 2, 1))
    >>> tf.function(lambda x: times(times(x, tf.fill((1, 1, 1, 1), 2.0)), 3.0))(x).numpy().ravel().tolist()
    [6.0, 6.0, 6.0, 6.0]
    """
    # A tensor that is left out is not computed: nothing else needs it.
    x, earlier = getattr(x, "_nfnet_keras_product", (x, None))
    factor = factor if earlier is None else tf.multiply(earlier, factor)
    if len(x.shape) != 4:
        return tf.multiply(x, factor)
    factor = factor if len(factor.shape) == 4 else tf.reshape(factor, (1, 1, 1, 1))
    product = _times(x, factor)
    product._nfnet_keras_product = (x, factor)
    return product


@tf.custom_gradient
def _times(x, factor):
    return tf.multiply(x, factor), lambda upstream: _gradient_of_product(x, factor, upstream)


def _gradient_of_product(x, factor, upstream):
    axes = [axis for axis in range(4) if factor.shape[axis] == 1]
    # Sums of half-precision numbers stop growing early.
    a, b = (upstream, x) if x.dtype.size >= 4 else (tf.cast(upstream, tf.float32), tf.cast(x, tf.float32))
    of_factor = tf.reduce_sum(tf.multiply(a, b), axes, keepdims=True)
    of_images = tf.multiply(upstream, factor)
    if _is_large(x):
        # Not computed either, where `with_means` takes what it is made of.
        of_images._nfnet_keras_product = (upstream, factor)
    return of_images, tf.cast(of_factor, factor.dtype)


def plus(shortcut, branch):
    """Adds a residual branch to its shortcut, a large one in one pass with what it is multiplied by.

    Args:
        shortcut: Tensor of shape (batch, height, width, channels), of known height and width.
        branch: Tensor of that shape. (Others are added as `tf.add` does.)

    Returns:
        Tensor of that shape.

    Example:

    >>> x = tf.ones((1, 2, 2, 1))
    >>> tf.function(lambda x: plus(x, times(x, tf.fill((1, 1, 1, 1), 2.0))))(x).numpy().ravel().tolist()
    [3.0, 3.0, 3.0, 3.0]
    """
    x, factor = getattr(branch, "_nfnet_keras_product", (branch, None))
    fits = factor is not None and shortcut.shape.as_list() == x.shape.as_list()
    return _plus_product(shortcut, x, factor) if fits and _is_large(x) else tf.add(shortcut, branch)


def _is_large(x) -> bool:
    return likely_batch(x) * math.prod(x.shape[1:]) >= MIN_SIZE


@tf.custom_gradient
def _plus_product(shortcut, x, factor):
    def gradient(upstream):
        return (upstream, *_gradient_of_product(x, factor, upstream))

    return product_and_sum(x, factor, shortcut), gradient


@tf.custom_gradient
def with_means(x):
    """Returns images and the means of their channels; the gradients of both meet in one pass over memory.

    With `times` behind, that pass has its product in it.

    Args:
        x: Tensor of shape (batch, height, width, channels), of known height and width.

    Returns:
        `x`, and a tensor of shape (batch, channels).

    Example:

    >>> with_means(tf.ones((2, 4, 4, 3)))[1].shape
    TensorShape([2, 3])
    """

    def gradient(of_images, of_means):
        of_each = tf.multiply(of_means, tf.constant(1 / (x.shape[1] * x.shape[2]), x.dtype))[:, None, None, :]
        product = getattr(of_images, "_nfnet_keras_product", None)
        return tf.add(of_images, of_each) if product is None else product_and_sum(*product, of_each)

    return (tf.identity(x), tf.reduce_mean(x, (1, 2))), gradient
