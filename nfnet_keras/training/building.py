"""From settings to a compiled network."""

import contextlib
from collections.abc import Iterator

import keras

from nfnet_keras import data
from nfnet_keras.applications import create_model
from nfnet_keras.optimizers import SGD_AGC, warmup_cosine
from nfnet_keras.sam import SAM
from nfnet_keras.training.fine_tuning import freeze, head_only, learning_rate_factors, unfreeze
from nfnet_keras.training.plan import Phase, Plan
from nfnet_keras.training.recipes import Recipe
from nfnet_keras.training.settings import Settings


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    """Makes layers compute in a precision: "float32", "mixed_bfloat16" or "mixed_float16".

    Example:

    >>> with precision("mixed_bfloat16"):
    ...     keras.layers.Dense(1).compute_dtype
    'bfloat16'
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def new_model(config: Settings, class_names: tuple[str, ...]) -> keras.Model:
    """Makes the network of a run, with what travels with it, not yet compiled.

    Args:
        config: The settings of the run.
        class_names: Name of each class.

    Returns:
        The network; its input has no fixed size where it is trained and tested at different ones.

    Example:

    >>> from nfnet_keras.training import settings
    >>> new_model(settings(), ("a", "b")).output_shape
    (None, 2)
    """
    recipe = config.recipe
    size, test_size = recipe.image_size, recipe.test_size or recipe.image_size
    options = {"stochastic_depth_rate": recipe.stochastic_depth_rate, "drop_rate": recipe.dropout_rate}
    with precision(recipe.precision):
        model = create_model(
            config.model,
            weights=config.weights,
            input_shape=(size, size, 3) if size == test_size else (None, None, 3),
            classes=len(class_names),
            **{name: value for name, value in options.items() if value is not None},
        )
    model.metadata = {
        "model": config.model,
        "class_names": list(class_names),
        "image_size": test_size,
        "mean_rgb": list(data.MEAN_RGB),
        "stddev_rgb": list(data.STDDEV_RGB),
        "crop": recipe.evaluation_crop,
    }
    return model


def enter_phase(model: keras.Model, plan: Plan, phase: Phase) -> None:
    """Chooses what is trained in a phase of a run, and compiles the network with a fresh optimizer for it.

    Args:
        model: The network.
        plan: What the recipe comes to.
        phase: The phase.

    Example:

    >>> from nfnet_keras.training import settings
    >>> config = settings()
    >>> plan = Plan(config.recipe, images=1437)
    >>> model = new_model(config, tuple("0123456789"))
    >>> enter_phase(model, plan, plan.phases[0])
    >>> model.optimizer.name
    'sgd_agc'
    """
    recipe = plan.recipe
    if phase.name == "head":
        head_only(model)
    elif len(plan.phases) > 1:
        unfreeze(model, recipe.freeze_stages)
    else:
        freeze(model, recipe.freeze_stages)
    peak = plan.peak_learning_rate
    last = min(recipe.final_learning_rate, peak)
    schedule = warmup_cosine(peak, plan.updates(phase), plan.warmup_updates(phase), last)
    layer_wise = recipe.layer_decay != 1.0
    optimizer = SGD_AGC(
        schedule,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
        clip_factor=recipe.clip_factor,
        eps=recipe.clip_eps,
        use_ema=True,
        ema_momentum=recipe.ema_momentum,
        learning_rate_factors=learning_rate_factors(model, recipe.layer_decay) if layer_wise else None,
        gradient_accumulation_steps=plan.accumulation if plan.accumulation > 1 else None,
    )
    sam = None if recipe.sam_rho is None else SAM(recipe.sam_rho, recipe.sam_fraction)
    compile_model(model, recipe, optimizer, sam)
    model.optimizer.build(model.trainable_variables)


def compile_model(model: keras.Model, recipe: Recipe, optimizer=None, sam: SAM | None = None) -> None:
    """Compiles a network with a recipe's loss; without an optimizer for evaluation only, with labels as they are.

    Example:

    >>> from nfnet_keras.training import DIGITS
    >>> import nfnet_keras as nfk
    >>> compile_model(nfk.create_model("nfnet_tiny", weights=None, classes=10), DIGITS)
    """
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=0.0 if optimizer is None else recipe.label_smoothing)
    metrics = ["accuracy"]
    if model.output_shape[-1] >= 100:
        metrics.append(keras.metrics.TopKCategoricalAccuracy(5, name="top5_accuracy"))
    model.compile(optimizer, loss, metrics=metrics, clip_factor=None, sam=sam)
