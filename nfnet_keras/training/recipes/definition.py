"""What a recipe is: how a network is trained, as values."""

import dataclasses
import math
from collections.abc import Callable

from nfnet_keras.data import Augment, Preprocessing

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
"""What `Recipe.precision` may be: names of Keras's dtype policies."""

STAGES = 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained: the paper's recipe with the values of one network or data set.

    Source of the recipe: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 5 and appendix.

    Args:
        epochs: Passes over the training images.
        batch_size: Images of one update, over all replicas and all `gradient_accumulation_steps` together.
        learning_rate: Peak learning rate for a batch of 256; it grows in proportion with the batch size.
        warmup_epochs: Epochs of linear warm-up, at most a tenth of the run; a cosine follows.
        clip_factor: Largest ratio of a unit's gradient norm to its weight norm (AGC); `None` for no clipping.
        image_size: Side of the training images in pixels, or `None` for the network's own training size.
        augment: What is done to the training images at random.
        momentum: Momentum of SGD.
        weight_decay: Coupled weight decay of the kernels.
        ema_momentum: Momentum of the weights' moving average, by step.
        label_smoothing: Share of each label that is spread over all classes.
        stochastic_depth_rate: Drop rate of the residual branches, growing with depth to this; `None` for the network's
            own. Defaults to `0.25`.
        name: Name of the recipe. Defaults to `"custom"`.
        about: Where the values come from. Defaults to `""`.
        model: The network that the recipe is for. Defaults to `"nfnet_tiny"`.
        scale_learning_rate: Whether the peak grows with the batch size; otherwise `learning_rate` is the peak. Defaults
            to `True`.
        final_learning_rate: Learning rate at the end of the cosine. Defaults to `0.0`.
        clip_eps: Floor of a unit's weight norm in AGC. The paper's 1e-3 is for 100,000 steps; runs of some hundred from
            scratch need 0.1, or the skip gains stay near 0. Defaults to `1e-3`.
        nesterov: Whether the momentum is Nesterov's. Defaults to `True`.
        dropout_rate: Dropout before the classifier; `None` for the network's own. Defaults to `None`.
        test_size: Side of the test images in pixels; `None` for that of the training images. Defaults to `None`.
        evaluation_crop: Rule that cuts test images: crop_resize, resize_crop_32, training and others of
            `nfnet_keras.data.evaluation_crop`. Defaults to `"training"`.
        antialias: Whether training images from files are resized with antialiasing; the authors' resize has none.
            Defaults to `True`.
        sam_rho: Radius of sharpness-aware minimisation (SAM); `None` leaves it out. Defaults to `None`.
        sam_fraction: Share of each batch that SAM's ascent gradient is taken on. Defaults to `0.2`.
        gradient_accumulation_steps: Parts of a batch that are computed one after the other to save memory. Defaults to
            `1`.
        precision: float32, mixed_bfloat16 or mixed_float16. Defaults to `"float32"`.
        freeze_stages: Stages that stay as they are, from the first; the stem stays with them. Defaults to `0`, and the
            stem learns too.
        head_epochs: Epochs, the first of the run, in which nothing but the new classifier is trained. Defaults to `0`.
        layer_decay: Factor on the learning rate from one stage to the one before it; the classifier has the full rate.
            Defaults to `1.0`.

    Raises:
        ValueError: If a value is of the wrong type or out of its range; the message names it.

    Example:

    >>> from nfnet_keras.training import recipe
    >>> paper = recipe("nfnet_f0")
    >>> paper.batch_size, round(paper.peak_learning_rate, 3)
    (4096, 1.6)
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    clip_factor: float | None
    image_size: int | None
    augment: Augment
    momentum: float = 0.9
    weight_decay: float = 2e-5
    ema_momentum: float = 0.99
    label_smoothing: float = 0.1
    stochastic_depth_rate: float | None = 0.25
    name: str = "custom"
    about: str = ""
    model: str = "nfnet_tiny"
    scale_learning_rate: bool = True
    final_learning_rate: float = 0.0
    clip_eps: float = 1e-3
    nesterov: bool = True
    dropout_rate: float | None = None
    test_size: int | None = None
    evaluation_crop: str = "training"
    antialias: bool = True
    sam_rho: float | None = None
    sam_fraction: float = 0.2
    gradient_accumulation_steps: int = 1
    precision: str = "float32"
    freeze_stages: int = 0
    head_epochs: int = 0
    layer_decay: float = 1.0

    def __post_init__(self):
        for name, kind, good, wanted in _CHECKS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not _is(value, kind) or not good(value):
                raise ValueError(f"`{name}` must be {wanted}. Received: {name}={value!r}")
        try:
            Preprocessing(1, (0, 0, 0), (1, 1, 1), crop=self.evaluation_crop)
        except ValueError as error:
            raise ValueError(f"`evaluation_crop` is wrong: {error}") from error
        self._check_together()

    def _check_together(self) -> None:
        if self.final_learning_rate > self.peak_learning_rate:
            raise ValueError(
                f"`final_learning_rate` must be at most the peak, {self.peak_learning_rate:g}. "
                f"Received: final_learning_rate={self.final_learning_rate!r}"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"`gradient_accumulation_steps` must divide the batch size, {self.batch_size}. "
                f"Received: gradient_accumulation_steps={self.gradient_accumulation_steps!r}"
            )
        if self.gradient_accumulation_steps > 1 and self.sam_rho is not None:
            raise ValueError(
                "`gradient_accumulation_steps` must be 1 with SAM, whose ascent needs the whole update at once. "
                f"Received: gradient_accumulation_steps={self.gradient_accumulation_steps!r}, sam_rho={self.sam_rho!r}"
            )
        if self.gradient_accumulation_steps > 1 and self.precision == "mixed_float16":
            raise ValueError(
                "`gradient_accumulation_steps` must be 1 with mixed_float16, whose skipped steps would tear the parts "
                "of an update apart; mixed_bfloat16 has none. "
                f"Received: gradient_accumulation_steps={self.gradient_accumulation_steps!r}"
            )
        if self.head_epochs > self.epochs:
            raise ValueError(
                f"`head_epochs` (of the recipe {self.name!r}: epochs for the new classifier alone) must be at most the "
                f"epochs, {self.epochs}; give more epochs, or head_epochs=0 to train everything from the start. "
                f"Received: head_epochs={self.head_epochs!r}"
            )

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate at the end of the warm-up, for this batch size."""
        return self.learning_rate * self.batch_size / 256 if self.scale_learning_rate else self.learning_rate


def _is(value, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _anything(value) -> bool:
    return True


_POSITIVE: Callable = lambda v: v > 0  # noqa: E731 (a row of the table below)
_NOT_NEGATIVE: Callable = lambda v: v >= 0  # noqa: E731
_SHARE: Callable = lambda v: 0 <= v < 1  # noqa: E731
_WHOLE = "positive and a whole number"

_OPTIONAL = ("clip_factor", "image_size", "stochastic_depth_rate", "dropout_rate", "test_size", "sam_rho")

# Field, type, range, and the range in words.
_CHECKS = (
    ("name", str, bool, "a text"),
    ("about", str, _anything, "a text"),
    ("model", str, bool, "the name of a network"),
    ("augment", Augment, _anything, "an `Augment`"),
    ("epochs", int, _POSITIVE, _WHOLE),
    ("batch_size", int, _POSITIVE, _WHOLE),
    ("image_size", int, _POSITIVE, f"{_WHOLE}, or None"),
    ("test_size", int, _POSITIVE, f"{_WHOLE}, or None"),
    ("gradient_accumulation_steps", int, _POSITIVE, _WHOLE),
    ("learning_rate", float, _POSITIVE, "positive"),
    ("final_learning_rate", float, _NOT_NEGATIVE, "0 or a positive number"),
    ("warmup_epochs", float, _NOT_NEGATIVE, "0 or a positive number"),
    ("scale_learning_rate", bool, _anything, "True or False"),
    ("nesterov", bool, _anything, "True or False"),
    ("antialias", bool, _anything, "True or False"),
    ("clip_factor", float, _POSITIVE, "positive, or None"),
    ("clip_eps", float, _POSITIVE, "positive"),
    ("momentum", float, _SHARE, "at least 0 and below 1"),
    ("weight_decay", float, _NOT_NEGATIVE, "0 or a positive number"),
    ("ema_momentum", float, _SHARE, "at least 0 and below 1"),
    ("label_smoothing", float, _SHARE, "at least 0 and below 1"),
    ("stochastic_depth_rate", float, _SHARE, "at least 0 and below 1, or None"),
    ("dropout_rate", float, _SHARE, "at least 0 and below 1, or None"),
    ("sam_rho", float, _POSITIVE, "positive, or None"),
    ("sam_fraction", float, lambda v: 0 < v <= 1, "above 0 and at most 1"),
    ("precision", str, PRECISIONS.__contains__, f"one of {', '.join(PRECISIONS)}"),
    ("freeze_stages", int, lambda v: 0 <= v <= STAGES, f"a whole number from 0 to {STAGES}"),
    ("head_epochs", int, _NOT_NEGATIVE, "0 or a positive whole number"),
    ("layer_decay", float, lambda v: 0 < v <= 1, "above 0 and at most 1"),
)
