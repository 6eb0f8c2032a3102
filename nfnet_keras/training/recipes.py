"""Recipes: how a network is trained, as values."""

import dataclasses

from nfnet_keras.data import Augment


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: the paper's recipe with the values of one data set.

    Source of the recipe: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 5 and appendix.

    Args:
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: Peak learning rate for a batch of 256; it grows in proportion with the batch size.
        warmup_epochs: Epochs of linear warm-up, at most a tenth of the run; a cosine to 0 follows.
        clip_factor: Largest ratio of a unit's gradient norm to its weight norm (AGC).
        image_size: Side of the images in pixels, or `None` for the network's own training size.
        augment: What is done to the images at random.
        momentum: Nesterov momentum.
        weight_decay: Coupled weight decay of the kernels.
        ema_momentum: Momentum of the weights' moving average, by step.
        label_smoothing: Share of each label that is spread over all classes.
        stochastic_depth_rate: Drop rate of the residual branches, growing with depth to this.

    Example:

    >>> from nfnet_keras.training import DIGITS
    >>> DIGITS.batch_size
    64
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    clip_factor: float
    image_size: int | None
    augment: Augment
    momentum: float = 0.9
    weight_decay: float = 2e-5
    ema_momentum: float = 0.99
    label_smoothing: float = 0.1
    stochastic_depth_rate: float = 0.25

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up, for this batch size."""
        return self.learning_rate * self.batch_size / 256


# The embedded set: 1,437 small scans of digits, which must not be mirrored. Small batches bear a larger clip factor
# than the paper's 0.01 at 4096 images (its section 4.1).
DIGITS = Recipe(
    epochs=40,
    batch_size=64,
    learning_rate=0.8,
    warmup_epochs=3,
    clip_factor=0.02,
    image_size=32,
    augment=Augment(flip=False, min_area=1.0, shift=0.1, mixup=0.2, cutmix=0.0),
    stochastic_depth_rate=0.1,
)

# A folder of one's own photographs: some hundreds to some ten thousands, trained from scratch.
FOLDER = Recipe(
    epochs=60,
    batch_size=32,
    learning_rate=0.4,
    warmup_epochs=5,
    clip_factor=0.02,
    image_size=None,
    augment=Augment(flip=True, min_area=0.25, mixup=0.2, cutmix=1.0),
    stochastic_depth_rate=0.1,
)
