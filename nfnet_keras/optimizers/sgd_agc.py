"""The authors' optimizer: SGD with adaptive gradient clipping and coupled weight decay."""

import math
import re
from collections.abc import Mapping, Sequence

import keras
from keras import ops

from nfnet_keras.optimizers import clipper as clipper_lib
from nfnet_keras.optimizers.agc import clipped_share


@keras.saving.register_keras_serializable(package="nfnet_keras")
class SGD_AGC(keras.optimizers.Optimizer):
    """SGD with momentum, adaptive gradient clipping (AGC) and weight decay, as NFNets were trained.

    One step, for every parameter w with gradient g: `g = clip(g)`; `g = g + weight_decay * w`;
    `m = momentum * m + g`; with Nesterov momentum `g = g + momentum * m`, else `g = m`; `w = w - learning_rate * g`.
    The decay goes through the momentum (it is coupled), unlike that of `keras.optimizers.SGD`.

    As in the authors' experiments, the kernel of the classifier is not clipped, and weight decay is for kernels alone:
    biases, gains and skip gains (parameters of rank 0 and 1) have none.

    With `use_ema=True`, the moving average is warmed up like the authors': its momentum at step t is
    `min(ema_momentum, (1 + t) / (10 + t))`, and it starts from the weights that the optimizer was built on. (The
    paper's `ema_momentum` is 0.99999.)

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, sections 4 and 5 and the authors' code.

    Args:
        learning_rate: Float, `keras.optimizers.schedules.LearningRateSchedule` or callable. The
            paper's peak is 0.1 times the batch size over 256.
        momentum: Float in [0, 1]. Defaults to `0.9`.
        nesterov: Whether to use Nesterov momentum. Defaults to `True`.
        weight_decay: Coupled weight decay. Defaults to `2e-5`.
        clip_factor: Largest ratio of a unit's gradient norm to its weight norm. Defaults to `0.01`. `None` turns
            clipping off.
        eps: Floor of the weight norm. Defaults to `1e-3`.
        exclude_from_clipping: List of regular expressions; a variable whose path matches one is not clipped. `None`
            (default) means the kernel of a layer named `predictions`; `[]` clips everything.
        learning_rate_factors: {regular expression: factor}, for fine-tuning: the learning rate of a variable is
            multiplied by the factor of the first expression that its path matches, and by 1 where none does; 0 keeps
            it where it is. `nfnet_keras.training.learning_rate_factors` makes one for a network. Defaults to `None`.
        **kwargs: Further arguments of `keras.optimizers.Optimizer`: `use_ema`, `ema_momentum`,
            `ema_overwrite_frequency`, `gradient_accumulation_steps`, `loss_scale_factor`, `name`.

    Raises:
        ValueError: If a setting is out of range.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10)
    >>> model.compile(nfk.optimizers.SGD_AGC(0.1, clip_factor=0.1), "categorical_crossentropy")
    """

    def __init__(
        self,
        learning_rate,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float | None = 2e-5,
        clip_factor: float | None = 0.01,
        eps: float = 1e-3,
        exclude_from_clipping: Sequence[str] | None = None,
        name: str = "sgd_agc",
        learning_rate_factors: Mapping[str, float] | None = None,
        **kwargs,
    ):
        if isinstance(learning_rate, int):
            learning_rate = float(learning_rate)
        super().__init__(learning_rate=learning_rate, weight_decay=weight_decay, name=name, **kwargs)
        if not 0 <= momentum <= 1:
            raise ValueError(f"`momentum` must be in [0, 1]. Received: momentum={momentum}")
        if weight_decay is not None and weight_decay < 0:
            raise ValueError(f"`weight_decay` must not be negative. Received: weight_decay={weight_decay}")
        self.momentum = momentum
        self.nesterov = nesterov
        self.learning_rate_factors = _checked_factors(learning_rate_factors)
        self._factors: list[float] = []
        self.clipper = clipper_lib.Clipper(clip_factor, eps, exclude_from_clipping)
        if clip_factor is not None:
            clipper_lib.hook(self, self.clipper)

    def build(self, variables) -> None:
        if self.built:
            return
        super().build(variables)
        self.momentums = self.add_optimizer_variables(variables, "momentum") if self.momentum else []
        self._factors = [self._factor_of(variable) for variable in variables] if self.learning_rate_factors else []
        if self.use_ema:
            for average, variable in zip(self._model_variables_moving_average, variables, strict=True):
                if average is not None:
                    # A copy: two variables on one buffer cannot both be donated to JAX's step.
                    average.assign(ops.copy(variable))
        clipper_lib.add_counter(self)

    def _factor_of(self, variable) -> float:
        path = getattr(variable, "path", variable.name)
        return next((factor for pattern, factor in self.learning_rate_factors.items() if re.search(pattern, path)), 1.0)

    def _apply_weight_decay(self, variables) -> None:
        # Keras would decay the weights apart from the gradient; `update_step` adds the decay to it.
        return

    def _backend_update_step(self, grads, trainable_variables, learning_rate) -> None:
        # Read here, once, and not for each variable: Keras takes TensorFlow's variable for a tensor, but a copy is one.
        super()._backend_update_step(grads, trainable_variables, ops.copy(ops.convert_to_tensor(learning_rate)))

    def update_step(self, gradient, variable, learning_rate) -> None:
        factor = self._factors[self._get_variable_index(variable)] if self._factors else 1.0
        if factor != 1.0:
            learning_rate = ops.multiply(learning_rate, factor)
        learning_rate = ops.cast(learning_rate, variable.dtype)
        gradient = ops.cast(gradient, variable.dtype)
        if self.weight_decay and len(variable.shape) > 1 and self._use_weight_decay(variable):
            gradient = _with_decay(gradient, variable, self.weight_decay)
        if self.momentum:
            velocity = self.momentums[self._get_variable_index(variable)]
            if keras.backend.backend() == "tensorflow":
                # Here, so that the optimizers can be imported without TensorFlow.
                from nfnet_keras.tensorflow_step import apply_momentum

                apply_momentum(variable, velocity.value, gradient, learning_rate, self.momentum, self.nesterov)
                return
            updated = ops.add(ops.multiply(velocity, self.momentum), gradient)
            self.assign(velocity, updated)
            gradient = ops.add(gradient, ops.multiply(updated, self.momentum)) if self.nesterov else updated
        self.assign_sub(variable, ops.multiply(gradient, learning_rate))

    def _update_model_variables_moving_average(self, trainable_variables) -> None:
        if not self.use_ema:
            return
        step = ops.cast(self.iterations, "float32")
        momentum = ops.minimum(self.ema_momentum, (1.0 + step) / (10.0 + step))
        if self.gradient_accumulation_steps:
            # `apply` comes here after every small batch; only the last of each round has moved the weights.
            steps = self.gradient_accumulation_steps
            momentum = ops.where(ops.equal((self._iterations + 1) % steps, 0), momentum, 1.0)
        for variable, average in zip(trainable_variables, self._model_variables_moving_average, strict=True):
            if average is not None:
                change = ops.multiply(ops.subtract(average, variable), ops.cast(1.0 - momentum, variable.dtype))
                average.assign(ops.subtract(average, change))

    def finalize_variable_values(self, var_list) -> None:
        super().finalize_variable_values(var_list)
        if self.use_ema and keras.backend.backend() == "jax":
            # Keras leaves weights and averages on one buffer, which the next step cannot donate twice.
            for average in self._model_variables_moving_average:
                if average is not None:
                    average.assign(ops.copy(average))

    @property
    def clipped_share(self):
        """Share of the clippable units whose gradient was scaled down in the latest update, a scalar tensor."""
        return clipped_share(self)

    def get_config(self):
        config = {**super().get_config(), "momentum": self.momentum, "nesterov": self.nesterov}
        for name in ("clipnorm", "clipvalue", "global_clipnorm"):
            if config[name] is None:
                del config[name]
        if self.learning_rate_factors:
            config["learning_rate_factors"] = dict(self.learning_rate_factors)
        return {**config, **self.clipper.get_config()}


def _with_decay(gradient, variable, weight_decay: float):
    if keras.backend.backend() == "tensorflow":
        from nfnet_keras.tensorflow_fusion import add_decay

        return add_decay(gradient, variable, weight_decay)
    return ops.add(gradient, ops.multiply(variable, weight_decay))


def _checked_factors(factors: Mapping[str, float] | None) -> dict[str, float] | None:
    if factors is None:
        return None
    if not isinstance(factors, Mapping):
        raise ValueError(
            "`learning_rate_factors` must be a dictionary of patterns and factors, such as {'stem_': 0.1}. "
            f"Received: {factors!r}"
        )
    checked = {}
    for pattern, factor in factors.items():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"`learning_rate_factors`: {pattern!r} is not a regular expression ({error})") from error
        if isinstance(factor, (bool, str)) or not 0 <= factor < math.inf:
            raise ValueError(
                f"`learning_rate_factors` must be finite and not negative. Received: {{{pattern!r}: {factor!r}}}"
            )
        checked[pattern] = float(factor)
    return checked
