"""What joins a residual branch to its shortcut: stochastic depth and the skip gain."""

import keras
from keras import ops

from nfnet_keras.layers.branch import join, multiply
from nfnet_keras.layers.dropout import replica_seed


@keras.saving.register_keras_serializable(package="nfnet_keras")
class StochasticDepth(keras.layers.Layer):
    """Drops the residual branch of a random share of the images of a batch, without rescaling the others.

    Only in training, and on every replica for itself. Unlike dropout, what is kept is not divided by the keep
    probability: the authors' networks are trained that way (`rescale=True` is timm's way).

    Source: Huang et al. 2016, <https://arxiv.org/abs/1603.09382>; without rescaling: the authors' code.

    Args:
        rate: Share of images whose branch is dropped, in [0, 1).
        seed: Integer seed, or `None` for one drawn at random (`keras.utils.set_random_seed` fixes it).
        rescale: Whether what is kept is divided by the keep probability. Defaults to `False`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of shape (batch, ...).
        training: Whether to drop. Defaults to the mode of the model.

    Returns:
        Tensor of the shape of `inputs`.

    Raises:
        ValueError: If `rate` is outside [0, 1).

    Example:

    >>> import nfnet_keras as nfk
    >>> y = nfk.layers.StochasticDepth(0.25, seed=1)(keras.ops.ones((8, 4, 4, 2)), training=True)
    >>> set(keras.ops.convert_to_numpy(y).ravel().tolist()) <= {0.0, 1.0}
    True
    """

    def __init__(self, rate: float, seed: int | None = None, rescale: bool = False, **kwargs):
        super().__init__(**kwargs)
        if not 0 <= rate < 1:
            raise ValueError(f"`rate` must be in [0, 1). Received: rate={rate}")
        self.rate = rate
        self.seed = seed
        self.rescale = rescale
        if rate > 0:
            self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True

    def call(self, inputs, training=False):
        if not training or self.rate == 0:
            return inputs
        shape = (ops.shape(inputs)[0],) + (1,) * (len(inputs.shape) - 1)
        # Drawn in float32: in bfloat16 the rate itself would be rounded.
        kept = keras.random.uniform(shape, dtype="float32", seed=replica_seed(self.seed_generator)) >= self.rate
        factor = ops.cast(kept, "float32") / (1 - self.rate) if self.rescale else kept
        return multiply(inputs, ops.cast(factor, inputs.dtype), training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "rate": self.rate, "seed": self.seed, "rescale": self.rescale}


@keras.saving.register_keras_serializable(package="nfnet_keras")
class SkipGain(keras.layers.Layer):
    """Learnt scalar on a residual branch, zero at first, times the constant alpha.

    With the gain at zero every block starts as its shortcut ("SkipInit"). `alpha` sets how fast the variance grows
    from block to block once the gain is 1.

    Source: De and Smith 2020, <https://arxiv.org/abs/2002.10444>; alpha: Brock et al. 2021, section 2.

    Args:
        alpha: Constant factor on the branch. Defaults to `1.0`.
        initializer: Initializer of the scalar. Defaults to `"zeros"`.
        **kwargs: Arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor of any shape.

    Returns:
        Tensor of the shape of `inputs`.

    Example:

    >>> import nfnet_keras as nfk
    >>> float(keras.ops.sum(nfk.layers.SkipGain(alpha=0.2)(keras.ops.ones((2, 2)))))
    0.0
    """

    def __init__(self, alpha: float = 1.0, initializer="zeros", **kwargs):
        super().__init__(**kwargs)
        self.alpha = alpha
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape):
        self.skip_gain = self.add_weight(name="skip_gain", shape=(), initializer=self.initializer)

    def call(self, inputs, training=False):
        return multiply(inputs, ops.multiply(self.skip_gain, self.alpha), training)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        initializer = keras.initializers.serialize(self.initializer)
        return {**super().get_config(), "alpha": self.alpha, "initializer": initializer}


@keras.saving.register_keras_serializable(package="nfnet_keras")
class ResidualAdd(keras.layers.Add):
    """Sum of a shortcut and of the residual branch beside it.

    `keras.layers.Add` of the two, whose arguments it takes. In a TensorFlow training step on a CPU, what a large
    branch is multiplied by (attention, stochastic depth, the skip gain) and the sum are one pass over memory.

    Call arguments:
        inputs: List of the shortcut and the residual branch, tensors of one shape.

    Returns:
        Tensor of that shape.

    Example:

    >>> import nfnet_keras as nfk
    >>> x = keras.ops.ones((1, 2, 2, 3))
    >>> float(keras.ops.sum(nfk.layers.ResidualAdd()([x, x])))
    24.0
    """

    def call(self, inputs):
        return join(*inputs) if len(inputs) == 2 else super().call(inputs)
