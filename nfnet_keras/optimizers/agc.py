"""Adaptive gradient clipping round any Keras optimizer."""

from collections.abc import Sequence

import keras

from nfnet_keras.optimizers import clipper as clipper_lib

# Settings that live in the wrapped optimizer and are read and written through the wrapper.
_DELEGATED = (
    "learning_rate",
    "iterations",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


def _delegated(name: str) -> property:
    def get(self):
        return getattr(self.inner_optimizer, name)

    def set_(self, value):
        # The base class writes its defaults before there is anything to delegate to.
        if "inner_optimizer" in self.__dict__:
            setattr(self.inner_optimizer, name, value)

    return property(get, set_, doc=f"`{name}` of the wrapped optimizer.")


def leaves(optimizer) -> list:
    """Returns the optimizers that do the updates: what is inside loss scaling, AGC and `MultiOptimizer`."""
    if hasattr(type(optimizer), "inner_optimizer") or "inner_optimizer" in vars(optimizer):
        return leaves(optimizer.inner_optimizer)
    if isinstance(optimizer, keras.optimizers.Optimizer) and hasattr(type(optimizer), "optimizers"):
        return [leaf for inner in optimizer.optimizers for leaf in leaves(inner)]
    return [optimizer]


def nest(optimizer) -> list:
    """Returns an optimizer and all that are in it: inside loss scaling, AGC and `MultiOptimizer`."""
    if optimizer is None:
        return []
    found = [optimizer, *nest(vars(optimizer).get("inner_optimizer"))]
    if hasattr(type(optimizer), "optimizers"):
        for each in optimizer.optimizers:
            found += nest(each)
    return found


@keras.saving.register_keras_serializable(package="nfnet_keras")
class AGC(keras.optimizers.Optimizer):
    """Adaptive gradient clipping (AGC) round an instance of any Keras optimizer.

    Every gradient is clipped where the wrapped optimizer uses it: summed over replicas, the loss scale divided out,
    accumulation done, and against the weights as they were before decoupled weight decay. Schedules, weight decay,
    moving average, gradient accumulation and loss scaling of the wrapped optimizer go on as before; its attributes
    can be read and set through the wrapper. The wrapped optimizer belongs to the wrapper from then on: used by itself
    it clips too. Wrapped again, it clips with the new settings only.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 4.

    Args:
        optimizer: A `keras.optimizers.Optimizer`, a `LossScaleOptimizer` or `MultiOptimizer` among them.
        clip_factor: Largest ratio of a unit's gradient norm to its weight norm (the paper's lambda; it recommends
            0.01 for batches of 4096 and larger values for small batches). Defaults to `0.01`.
        eps: Floor of the weight norm. Defaults to `1e-3`.
        exclude_from_clipping: List of regular expressions; a variable whose path matches one is not clipped. `None`
            (default) means the kernel of a layer named `predictions`; `[]` clips everything.
        name: Name of the optimizer.

    Raises:
        TypeError: If `optimizer` is not a Keras optimizer.
        ValueError: If it clips adaptively already, or a setting is out of range.

    Example:

    >>> import nfnet_keras as nfk
    >>> optimizer = nfk.optimizers.AGC(keras.optimizers.AdamW(1e-3), clip_factor=0.02)
    >>> round(float(optimizer.learning_rate), 6)
    0.001
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        exclude_from_clipping: Sequence[str] | None = None,
        name: str | None = None,
    ):
        if not isinstance(optimizer, keras.optimizers.Optimizer):
            raise TypeError(
                "`AGC` wraps an instance of a Keras optimizer, such as keras.optimizers.SGD(0.1). "
                f"Received: {optimizer!r} of type {type(optimizer).__name__}"
            )
        if clips_adaptively(optimizer):
            raise ValueError(
                f"The {type(optimizer).__name__} given to `AGC` clips gradients adaptively already. Wrap a fresh "
                "optimizer, or use this one as it is."
            )
        if clip_factor is None:
            raise ValueError("`clip_factor` must be a positive number. Received: clip_factor=None")
        super().__init__(learning_rate=0.0, name=name)
        self.clipper = clipper_lib.Clipper(clip_factor, eps, exclude_from_clipping)
        self.inner_optimizer = optimizer
        self._hook_leaves()

    def _hook_leaves(self) -> None:
        for leaf in leaves(self.inner_optimizer):
            clipper_lib.hook(leaf, self.clipper)

    def build(self, variables) -> None:
        if self.built:
            return
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        # A MultiOptimizer with a callable map knows its optimizers only now.
        self._hook_leaves()
        for leaf in leaves(self.inner_optimizer):
            if leaf.built:
                clipper_lib.add_counter(leaf)
        self._trainable_variables = variables[:]
        self.built = True

    @property
    def variables(self):
        return self.inner_optimizer.variables

    def apply(self, grads, trainable_variables=None):
        if not self.built and trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            with keras.name_scope(self.name):
                self.build(trainable_variables)
        self.inner_optimizer.apply(grads, trainable_variables)

    def apply_gradients(self, grads_and_vars):
        super().apply_gradients(grads_and_vars)
        return self.iterations

    def save_own_variables(self, store):
        # The wrapped optimizer, a part of this one, saves them; twice would double the file.
        return

    def load_own_variables(self, store):
        return

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        return self.inner_optimizer.stateless_apply(optimizer_variables, grads, trainable_variables)

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights):
        self.inner_optimizer.set_weights(weights)

    @property
    def clipped_share(self):
        """Share of the clippable units whose gradient was scaled down in the latest update, a scalar tensor."""
        return clipped_share(self)

    def __getattr__(self, name):
        # Reached only for what the wrapper has not: `momentum`, `beta_1`, the moving average that callbacks swap in.
        inner = self.__dict__.get("inner_optimizer")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(inner, name)

    def get_config(self):
        inner = portable(keras.saving.serialize_keras_object(self.inner_optimizer))
        return {"optimizer": inner, **self.clipper.get_config(), "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        inner = portable(config.pop("optimizer"))
        return cls(keras.saving.deserialize_keras_object(inner, custom_objects=custom_objects), **config)


for _name in _DELEGATED:
    setattr(AGC, _name, _delegated(_name))


def portable(config):
    """Names Keras's public optimizer where Keras names the class that stands for it on PyTorch alone.

    Without this a model that was saved on PyTorch does not train on another backend.

    Args:
        config: A serialized optimizer, and whatever is in it.

    Returns:
        The same, with no module of one backend.

    Example:

    >>> portable({"module": "keras.src.backend.torch.optimizers.torch_adam", "class_name": "Adam"})["module"]
    'keras.optimizers'
    """
    if isinstance(config, list):
        return [portable(value) for value in config]
    if not isinstance(config, dict):
        return config
    config = {key: portable(value) for key, value in config.items()}
    module = config.get("module")
    if isinstance(module, str) and module.startswith("keras.src.backend.torch.optimizers."):
        config |= {"module": "keras.optimizers", "registered_name": None}
    return config


def clips_adaptively(optimizer) -> bool:
    """Whether an optimizer is, or holds, one that clips gradients adaptively: an `AGC` or an `SGD_AGC`.

    An optimizer that was wrapped in an `AGC` is none by itself: it can be wrapped again, with other settings.

    Example:

    >>> sgd = keras.optimizers.SGD(0.1)
    >>> clips_adaptively(sgd), clips_adaptively(AGC(sgd)), clips_adaptively(sgd)
    (False, True, False)
    """
    clippers = [find_clipper(optimizer), *(find_clipper(leaf) for leaf in leaves(optimizer))]
    return any(clipper is not None and clipper.clip_factor is not None for clipper in clippers)


def find_clipper(optimizer) -> clipper_lib.Clipper | None:
    """Returns the settings of the adaptive clipping inside an optimizer, or `None` where there is none."""
    while optimizer is not None:
        clipper = vars(optimizer).get("clipper")
        if clipper is not None:
            return clipper
        optimizer = vars(optimizer).get("inner_optimizer")
    return None


def clipped_share(optimizer):
    """Share of the clippable units whose gradient was scaled down in the latest update, a float32 scalar tensor."""
    clipping = [leaf for leaf in leaves(optimizer) if getattr(leaf, "clippable_units", 0)]
    units = sum(leaf.clippable_units for leaf in clipping)
    total = keras.ops.zeros((), "float32")
    for leaf in clipping:
        total = total + keras.ops.cast(leaf.clipped_units, "float32")
    return total / max(units, 1)
