"""Dropout that draws anew on every replica."""

import keras


class ReplicaSeed(keras.random.SeedGenerator):
    """A seed generator's seeds, another one for each replica of a `tf.distribute` strategy.

    The state of a seed generator is the same on all replicas, and so would be what is drawn from it: each replica would
    drop the same places of its share of the batch. Replica 0, and any single device, draws what it always did.

    Args:
        generator: The `keras.random.SeedGenerator` that holds the state.

    Example:

    >>> ReplicaSeed(keras.random.SeedGenerator(7)).generator.next().shape == (2,)
    True
    """

    # An odd number far from the small ones that seeds and counters are.
    _APART = 0x9E3779B1

    def __init__(self, generator: keras.random.SeedGenerator):
        # No state of its own, which is what the base class would make.
        self.generator = generator

    def next(self, ordered: bool = True):
        seed = self.generator.next(ordered)
        from nfnet_keras.tensorflow_replicas import replica_number

        number = replica_number()
        if number is None:
            return seed
        return seed + keras.ops.cast(keras.ops.stack([number * self._APART, 0 * number]), seed.dtype)


def replica_seed(generator: keras.random.SeedGenerator) -> keras.random.SeedGenerator:
    """Returns what to draw from: on TensorFlow other seeds on each replica, elsewhere the generator itself.

    Example:

    >>> replica_seed(keras.random.SeedGenerator(7)).next().shape == (2,)
    True
    """
    return ReplicaSeed(generator) if keras.backend.backend() == "tensorflow" else generator


@keras.saving.register_keras_serializable(package="nfnet_keras")
class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` that draws another mask on each replica of a `tf.distribute` strategy.

    Keyword Args:
        rate: Share of the inputs that is dropped, in [0, 1].
        noise_shape: As for `keras.layers.Dropout`.
        seed: Integer seed, or `None` for one drawn at random.
        **kwargs: Arguments of `keras.layers.Layer`.

    Example:

    >>> import nfnet_keras as nfk
    >>> y = nfk.layers.Dropout(0.5, seed=1)(keras.ops.ones((4, 8)), training=True)
    >>> set(keras.ops.convert_to_numpy(y).ravel().tolist()) <= {0.0, 2.0}
    True
    """

    def call(self, inputs, training=False):
        if not training or not self.rate > 0:
            return inputs
        seed = replica_seed(self.seed_generator)
        return keras.random.dropout(inputs, self.rate, noise_shape=self.noise_shape, seed=seed)
