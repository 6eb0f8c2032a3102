"""The Keras model that trains the normalizer-free way: adaptive gradient clipping in every step."""

import json
import warnings

import keras

from nfnet_keras.layers.devices import runs_on_cpu
from nfnet_keras.multi_worker import DistributedTraining
from nfnet_keras.optimizers import AGC, clips_adaptively
from nfnet_keras.optimizers.agc import clipped_share, find_clipper, leaves, nest, portable
from nfnet_keras.optimizers.clipper import release
from nfnet_keras.optimizers.clipping import Ways
from nfnet_keras.optimizers.units import unit_axes
from nfnet_keras.remat import Rematerialization
from nfnet_keras.sam import SAM, as_sam, sharpness_aware_step

CLIPPED = "agc_clipped"


@keras.saving.register_keras_serializable(package="nfnet_keras")
class NormalizerFreeModel(DistributedTraining, Rematerialization, keras.Model):
    """A `keras.Model` whose training step clips gradients adaptively (AGC) before the optimizer uses them.

    All constructors of this package return one. Make one yourself to put a head of your own on a backbone:
    `NormalizerFreeModel(inputs, outputs)` takes what the functional `keras.Model` takes and works like it: `fit`,
    `evaluate`, `predict`, `save`, `keras.models.load_model`.

    A backbone inside a plain `keras.Sequential` or `keras.Model` is trained by that outer model, whose training step
    knows nothing of AGC: clipping is then lost without a word, unless the optimizer itself clips. So either make the
    outer model a `NormalizerFreeModel`, or compile the plain one with `nfk.optimizers.AGC(optimizer)` or
    `nfk.optimizers.SGD_AGC(...)`.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 4.

    Args:
        *args: As for `keras.Model`: `inputs` and `outputs`.
        **kwargs: As for `keras.Model`: `inputs`, `outputs`, `name`, `trainable`.

    Raises:
        TypeError: Without inputs and outputs; a model with a `call` of its own subclasses `keras.Model` and is
            compiled with `nfk.optimizers.AGC(optimizer)`.

    Example:

    >>> import nfnet_keras as nfk
    >>> backbone = nfk.create_model("nfnet_tiny", weights=None, include_top=False, pooling="avg")
    >>> outputs = keras.layers.Dense(5, activation="softmax", name="predictions")(backbone.output)
    >>> model = nfk.NormalizerFreeModel(backbone.input, outputs)
    >>> model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "categorical_crossentropy", clip_factor=0.02)
    """

    def __init__(self, *args, **kwargs):
        if len(args) < 2 and not {"inputs", "outputs"} <= kwargs.keys() and not (args and "outputs" in kwargs):
            raise TypeError(
                "NormalizerFreeModel takes inputs and outputs, as the functional keras.Model does. For a model with a "
                "call() of its own, subclass keras.Model and compile it with nfnet_keras.optimizers.AGC(optimizer)."
            )
        super().__init__(*args, **kwargs)
        self._clipped_share = keras.metrics.Mean(name=CLIPPED)
        self._clip_factor = None
        self._sam = None
        self._metadata = _Untracked({})

    @property
    def metadata(self) -> dict:
        """What travels with the model besides its weights: class names, image size, preprocessing.

        A dictionary that JSON can hold; `save` writes it and `keras.models.load_model` brings it back. A model that you
        make of a backbone's tensors starts with an empty one: `model.metadata = backbone.metadata` takes it over.

        Raises:
            TypeError: When it is set to no dictionary, or to something that JSON cannot hold.

        Example:

        >>> import nfnet_keras as nfk
        >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=2)
        >>> model.metadata["class_names"] = ["cat", "dog"]
        >>> model.metadata["class_names"][1]
        'dog'
        """
        return self._metadata.value

    @metadata.setter
    def metadata(self, value: dict) -> None:
        if not isinstance(value, dict):
            raise TypeError(f"`metadata` must be a dictionary that JSON can hold. Received: {value!r:.80}")
        self._metadata = _Untracked(json.loads(json.dumps(value)))

    def get_config(self) -> dict:
        config = super().get_config()
        # A copy, so that a configuration does not change with the model.
        return {**config, "metadata": json.loads(json.dumps(self.metadata))} if self.metadata else config

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None):
        config = dict(config)
        metadata = config.pop("metadata", {})
        model = super().from_config(config, custom_objects=custom_objects)
        model.metadata = metadata
        return model

    def compile(
        self,
        optimizer="rmsprop",
        *args,
        clip_factor: float | None = 0.01,
        sam: SAM | float | None = None,
        **kwargs,
    ) -> None:
        """Configures the model for training, as `keras.Model.compile`, with adaptive gradient clipping.

        Args:
            optimizer: Name or instance of a Keras optimizer. It is wrapped in `nfk.optimizers.AGC`. One that clips
                already wins over `clip_factor` and is used as it is: `AGC`, `SGD_AGC`, and any with `clipnorm`,
                `clipvalue` or `global_clipnorm` (then a warning says so; give `AGC(optimizer)` to have both).
            *args: Further arguments of `keras.Model.compile`, by position. `jit_compile="auto"` leaves XLA off where
                TensorFlow has nothing but a CPU.
            clip_factor: Largest ratio of a unit's gradient norm to its weight norm. Defaults to `0.01`, the paper's
                value for batches of 4096; smaller batches bear larger ones. `None` leaves clipping to the optimizer.
            sam: Sharpness-aware minimisation: an `nfk.SAM`, or a positive number for its `rho`. `None` (default)
                trains without. The training metrics are then those at the moved weights.
            **kwargs: Further arguments of `keras.Model.compile`.

        Raises:
            ValueError: If `clip_factor` or `sam` is out of range, or the optimizer accumulates gradients
                (`gradient_accumulation_steps`) with `sam` set.

        Example:

        >>> import nfnet_keras as nfk
        >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=10)
        >>> model.compile("sgd", "categorical_crossentropy", metrics=["accuracy"], clip_factor=0.05)
        """
        sam = as_sam(sam)
        if optimizer is not None:
            optimizer = keras.optimizers.get(optimizer)
            if sam is not None:
                _refuse_accumulation(optimizer)
            optimizer = _clipping(optimizer, clip_factor)
            if _scales_loss(optimizer):
                # Keras looks for loss scaling only on the outside and would scale a second time.
                kwargs["auto_scale_loss"] = False
        self._clip_factor = clip_factor
        self._sam = sam
        # Position 6 behind the optimizer is `jit_compile`.
        self._auto_jit = len(args) < 7 and kwargs.get("jit_compile", "auto") == "auto"
        if self._auto_jit and keras.backend.backend() == "tensorflow" and runs_on_cpu():
            # There XLA takes three times as long to the first step and then is no faster.
            kwargs["jit_compile"] = False
        super().compile(optimizer, *args, **kwargs)
        clipper = find_clipper(self.optimizer)
        if clipper is not None:
            clipper.unit_axes = unit_axes(self)
            clipper.ways = self._clipping_ways()

    def _clipping_ways(self) -> Ways:
        if keras.backend.backend() != "tensorflow" or self.jit_compile or not runs_on_cpu():
            # XLA, as on any TPU, knows no Euclidean norm, and needs none: it writes no squares to memory.
            return Ways()
        from nfnet_keras.tensorflow_calls import call_once
        from nfnet_keras.tensorflow_step import euclidean_norm

        return Ways(euclidean_norm, call_once)

    def get_compile_config(self) -> dict:
        config = super().get_compile_config()
        if config:
            config = portable(config)
            config["clip_factor"] = self._clip_factor
            config["sam"] = keras.saving.serialize_keras_object(self._sam)
            if self._auto_jit:
                # The machine that loads the model decides for itself.
                config["jit_compile"] = "auto"
        return config

    def compile_from_config(self, config: dict) -> None:
        self.compile(**keras.saving.deserialize_keras_object(portable(config)))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def make_train_function(self, force: bool = False):
        if self.train_function is not None and not force:
            return self.train_function
        function = super().make_train_function(force=force)
        if keras.backend.backend() == "tensorflow":
            from nfnet_keras.tensorflow_step import building_ahead

            function = self.train_function = building_ahead(self, self.train_function)
        return function

    def train_step(self, *args):
        """One step: forward, loss, gradients, clipping, update. Keras calls it; its arguments are the backend's."""
        if self._sam is None or not self.trainable_variables:
            result = super().train_step(*args)
        else:
            result = sharpness_aware_step(self, self._sam, *args)
        clipper = find_clipper(self.optimizer)
        if clipper is None or clipper.clip_factor is None:
            return result
        if keras.backend.backend() == "jax":
            return self._log_clipped_stateless(*result)
        self._track_clipped()
        return {**result, CLIPPED: self._clipped_share.result()}

    def _track_clipped(self) -> None:
        share = clipped_share(self.optimizer)
        leaf = leaves(self.optimizer)[0]
        if leaf.gradient_accumulation_steps:
            # Nothing is clipped on the batches that only accumulate.
            updated = keras.ops.equal(leaf._iterations % leaf.gradient_accumulation_steps, 0)
            self._clipped_share.update_state(share, sample_weight=keras.ops.cast(updated, "float32"))
        else:
            self._clipped_share.update_state(share)

    def _log_clipped_stateless(self, logs: dict, state: tuple):
        trainable, non_trainable, optimizer_variables, metrics_variables = state
        mapping = [
            *zip(self.optimizer.variables, optimizer_variables, strict=True),
            *zip(self.metrics_variables, metrics_variables, strict=True),
        ]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            self._track_clipped()
            logs = {**logs, CLIPPED: self._clipped_share.result()}
        metrics_variables = [scope.get_current_value(v) for v in self.metrics_variables]
        return logs, (trainable, non_trainable, optimizer_variables, metrics_variables)

    def get_metrics_result(self) -> dict:
        """Returns the metrics' values by name, as `keras.Model` does; what only training has is left out."""
        return {name: value for name, value in super().get_metrics_result().items() if name != CLIPPED}

    def _flatten_metrics_in_order(self, logs):
        # What `train_on_batch` returns without `return_dict` has the shape of any Keras model's.
        return super()._flatten_metrics_in_order({k: v for k, v in logs.items() if k != CLIPPED})

    def _get_metrics_result_or_logs(self, logs):
        # Keras warns of a key in the logs of a step that `get_metrics_result` does not have.
        if not isinstance(logs, dict) or CLIPPED not in logs:
            return super()._get_metrics_result_or_logs(logs)
        rest = {name: value for name, value in logs.items() if name != CLIPPED}
        return {**super()._get_metrics_result_or_logs(rest), CLIPPED: self._clipped_share.result()}


class _Untracked:
    """Holds a dictionary that Keras would otherwise replace by one that it tracks."""

    def __init__(self, value: dict):
        self.value = value


def _clipping(optimizer, clip_factor: float | None):
    """Returns the optimizer, wrapped in AGC unless it clips already or is not to clip."""
    if clips_adaptively(optimizer):
        return optimizer
    for leaf in leaves(optimizer):
        # It may have clipped for a model that was compiled with it before.
        release(leaf)
    if clip_factor is None:
        return optimizer
    for leaf in leaves(optimizer):
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            value = getattr(leaf, name, None)
            if value is not None:
                warnings.warn(
                    f"The optimizer clips gradients itself ({name}={value}): adaptive gradient clipping is left out. "
                    "Wrap it in nfnet_keras.optimizers.AGC to have both, or pass clip_factor=None to say that this "
                    "is meant.",
                    stacklevel=3,
                )
                return optimizer
    return AGC(optimizer, clip_factor=clip_factor)


def _refuse_accumulation(optimizer) -> None:
    for leaf in leaves(optimizer):
        if leaf.gradient_accumulation_steps:
            raise ValueError(
                "Sharpness-aware minimisation takes a whole step for each batch and cannot accumulate gradients. "
                f"Received: sam with gradient_accumulation_steps={leaf.gradient_accumulation_steps}. Leave one of the "
                "two out; larger batches need more replicas."
            )


def _scales_loss(optimizer) -> bool:
    return any(isinstance(each, keras.optimizers.LossScaleOptimizer) for each in nest(optimizer))
