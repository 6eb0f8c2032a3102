"""What a recipe comes to with a given number of images."""

import dataclasses

from nfnet_keras.training.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run in which the same weights are trained with one optimizer.

    Args:
        name: "head" while only the classifier is trained, else "all".
        first_epoch: Its first epoch, from 0.
        last_epoch: The epoch after its last.
    """

    name: str
    first_epoch: int
    last_epoch: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a recipe comes to: batches, updates, learning rate, phases.

    An epoch is `steps` batches. Where gradients are accumulated, `accumulation` batches make one update and hold
    together the recipe's batch size.

    Args:
        recipe: The recipe.
        images: Images to train on.

    Raises:
        ValueError: If there are too few images for the parts of a batch.

    Example:

    >>> from nfnet_keras.training import DIGITS
    >>> plan = Plan(DIGITS, images=1437)
    >>> plan.steps, plan.total_steps, plan.updates(plan.phases[0])
    (22, 880, 880)
    """

    recipe: Recipe
    images: int

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(
                f"{self.images} images cannot be cut into {self.accumulation} parts of a batch; lower "
                "`gradient_accumulation_steps` or give more images"
            )

    @property
    def accumulation(self) -> int:
        """Batches that make one update."""
        return self.recipe.gradient_accumulation_steps

    @property
    def batch(self) -> int:
        """Images of one batch, of which a step takes one; all images where there are fewer."""
        return min(self.recipe.batch_size, self.images) // self.accumulation

    @property
    def update_images(self) -> int:
        """Images of one update: the recipe's batch, or all images where there are fewer."""
        return self.batch * self.accumulation

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up: that of the images that an update really has."""
        share = self.update_images / self.recipe.batch_size if self.recipe.scale_learning_rate else 1.0
        return self.recipe.peak_learning_rate * share

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return self.images // self.update_images * self.accumulation

    @property
    def total_steps(self) -> int:
        """Batches of the run."""
        return self.recipe.epochs * self.steps

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of the run, in order."""
        head = min(self.recipe.head_epochs, self.recipe.epochs)
        found = [Phase("head", 0, head), Phase("all", head, self.recipe.epochs)]
        return tuple(phase for phase in found if phase.last_epoch > phase.first_epoch)

    def phase(self, position: int) -> Phase:
        """Returns the phase of the batch at a position, the last one at the end."""
        epoch = position // self.steps
        return next((phase for phase in self.phases if epoch < phase.last_epoch), self.phases[-1])

    def updates(self, phase: Phase) -> int:
        """Returns the updates of a phase."""
        return (phase.last_epoch - phase.first_epoch) * self.steps // self.accumulation

    def warmup_updates(self, phase: Phase) -> int:
        """Returns the updates of a phase's warm-up: the recipe's epochs, at most a tenth of the phase."""
        wanted = int(self.recipe.warmup_epochs * self.steps / self.accumulation)
        return min(wanted, self.updates(phase) // 10)
