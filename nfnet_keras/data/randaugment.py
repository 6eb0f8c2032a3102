"""RandAugment as in the paper's input pipeline: operations drawn evenly, one fixed magnitude."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nfnet_keras.data._tensorflow import tensorflow
from nfnet_keras.data.image_operations import OPERATIONS, operate
from nfnet_keras.data.randomness import fold, uniform

if TYPE_CHECKING:
    import tensorflow as tf

_OPERATION, _SIGN, _CENTRE = range(3)

# Images of a batch that go through RandAugment together, on one thread. A resumed run draws by it: never change it.
AT_ONCE = 8


def randaugment(images: tf.Tensor, key: tf.Tensor, layers: int, magnitude: float) -> tf.Tensor:
    """Do `layers` random operations to each image, one after the other.

    Each is drawn evenly and with replacement from the sixteen of `image_operations`; the magnitude is
    the same for all and is not drawn; a direction is one or the other with probability one half
    (Cubuk et al., 2020, as in the code of Brock et al., 2021). Every image has draws of its own,
    which follow from `key` and its number in the batch.

    The operations work on whole grey levels: values are clipped to 0..255 and fractions cut off
    first, as the authors do.

    Args:
        images: float32 or uint8 of shape (B, H, W, 3), on 0..255, not normalised.
        key: An int64 key of shape (2,).
        layers: Operations an image; 0 gives the images back as they are.
        magnitude: Their strength, 0 to 30; see `image_operations.operate`. The paper has 4 layers of
            magnitude 5 for NFNet-F0, 10 for F1 and 15 for the larger ones.

    Returns:
        float32 of shape (B, H, W, 3), on 0..255.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import randomness
        >>> from nfnet_keras.data.randaugment import randaugment
        >>> images = tf.zeros((2, 8, 8, 3), tf.uint8)
        >>> randaugment(images, randomness.key(0, randomness.RANDAUGMENT, 0), 2, 5.0).shape
        TensorShape([2, 8, 8, 3])
    """
    tf = tensorflow()
    if not layers:
        return tf.cast(images, tf.float32)
    if images.dtype != tf.uint8:
        images = tf.cast(tf.clip_by_value(images, 0.0, 255.0), tf.uint8)

    numbers = tf.range(tf.shape(images)[0])
    spec = tf.TensorSpec(images.shape[1:], tf.uint8)
    distorted = tf.map_fn(
        lambda pair: distort(pair[0], fold(key, pair[1]), layers, magnitude),
        (images, numbers),
        fn_output_signature=spec,
    )
    return tf.ensure_shape(tf.cast(distorted, tf.float32), images.shape)


def distort(image: tf.Tensor, key: tf.Tensor, layers: int, magnitude: float) -> tf.Tensor:
    """Do `layers` random operations to one image; see `randaugment`.

    Args:
        image: uint8 of shape (H, W, 3).
        key: An int64 key of shape (2,), of this image alone.
        layers: Operations an image.
        magnitude: Their strength, 0 to 30.

    Returns:
        uint8 of the same shape.

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import randomness
        >>> from nfnet_keras.data.randaugment import distort
        >>> distort(tf.zeros((8, 8, 3), tf.uint8), randomness.key(0, 5, 0), 1, 5.0).shape
        TensorShape([8, 8, 3])
    """
    tf = tensorflow()
    chosen, signs, centres = draws(key, layers, tf.shape(image)[:2])

    def layer(step: tf.Tensor, current: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        arguments = current, magnitude, signs[step], centres[step]
        branches = [lambda name=name: operate(name, *arguments) for name in OPERATIONS]
        return step + 1, tf.switch_case(chosen[step], branches)

    # A loop, and not one copy of the branches a layer: the graph is traced `layers` times faster.
    return tf.while_loop(lambda step, _: step < layers, layer, [tf.constant(0), image])[1]


def key_in_batch(key: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Make the key of an image of a batch, which goes through RandAugment `AT_ONCE` images at a time.

    Args:
        key: An int64 key of shape (2,), of the batch.
        number: Scalar int64, the number of the image in the batch.

    Returns:
        An int64 key of shape (2,).

    Example:
        >>> import tensorflow as tf
        >>> from nfnet_keras.data import randomness
        >>> from nfnet_keras.data.randaugment import key_in_batch
        >>> key_in_batch(randomness.key(0, 5, 0), tf.constant(9)).shape
        TensorShape([2])
    """
    return fold(fold(key, number // AT_ONCE), number % AT_ONCE)


def draws(key: tf.Tensor, layers: int, size: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Draw what is done to one image.

    Args:
        key: An int64 key of shape (2,), of this image alone.
        layers: How many operations.
        size: int32 (height, width) of the image.

    Returns:
        For each layer: the operation's number, int32 of shape (layers,); its sign, 1 or -1, float32
        of shape (layers,); the centre of the square, should it be Cutout, int32 of shape
        (layers, 2), row and column uniform over the image.

    Example:
        >>> from nfnet_keras.data import randomness
        >>> from nfnet_keras.data.randaugment import draws
        >>> draws(randomness.key(0, 5, 0), 4, (192, 192))[2].shape
        TensorShape([4, 2])
    """
    tf = tensorflow()
    chosen = tf.random.stateless_uniform(
        [layers], fold(key, _OPERATION), 0, len(OPERATIONS), dtype=tf.int32, alg="philox"
    )
    signs = tf.where(uniform(fold(key, _SIGN), [layers]) < 0.5, -1.0, 1.0)
    places = tf.floor(uniform(fold(key, _CENTRE), [layers, 2]) * tf.cast(size, tf.float32))
    # The product may round up to the size itself.
    centres = tf.minimum(tf.cast(places, tf.int32), tf.convert_to_tensor(size, tf.int32) - 1)
    return chosen, signs, centres
