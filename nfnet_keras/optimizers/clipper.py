"""Where adaptive gradient clipping meets a Keras optimizer.

The gradient that must be clipped is the one that the update uses: summed over replicas, with the loss scale divided
out and accumulation done. Keras has two seams there. With TensorFlow, gradients are summed in
`_all_reduce_sum_gradients`, the last thing before the update; elsewhere they arrive complete in `_backend_update_step`.
"""

import functools
import re
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from nfnet_keras.optimizers.clipping import Units, Ways, clip_units, measure_units

# The classifier's kernel is the one parameter that the authors do not clip.
DEFAULT_EXCLUDED = (r"(^|/)predictions/kernel$",)


def path_of(variable) -> str:
    """Returns the path of a variable, as patterns are searched in it."""
    return getattr(variable, "path", variable.name)


class Clipper:
    """Which parameters are clipped, and how: the settings of `AGC` and `SGD_AGC`, and the clipping itself.

    Args:
        clip_factor: Largest ratio of gradient norm to parameter norm, positive; `None` where nothing is clipped.
        eps: Floor of the parameter norm, positive.
        exclude_from_clipping: Regular expressions searched in the variables' paths, or `None` for the kernel of a
            layer named `predictions`.

    Raises:
        ValueError: If a setting is out of range or a pattern is no regular expression.
    """

    def __init__(self, clip_factor: float | None, eps: float, exclude_from_clipping: Sequence[str] | None):
        if clip_factor is not None and (isinstance(clip_factor, (bool, str)) or not clip_factor > 0):
            raise ValueError(f"`clip_factor` must be a positive number. Received: clip_factor={clip_factor!r}")
        if not eps > 0:
            raise ValueError(f"`eps` must be positive. Received: eps={eps}")
        if isinstance(exclude_from_clipping, str):
            raise ValueError(
                "`exclude_from_clipping` must be a list of patterns. "
                f"Received a string; write [{exclude_from_clipping!r}]."
            )
        self.clip_factor = clip_factor
        self.eps = eps
        self.exclude_from_clipping = None if exclude_from_clipping is None else list(exclude_from_clipping)
        self._patterns = []
        for pattern in DEFAULT_EXCLUDED if exclude_from_clipping is None else exclude_from_clipping:
            try:
                self._patterns.append(re.compile(pattern))
            except re.error as error:
                raise ValueError(
                    f"`exclude_from_clipping`: {pattern!r} is not a regular expression ({error}). A plain part of a "
                    "path, such as 'head/kernel', is one; '.*' stands for any text."
                ) from error
        self.unit_axes: dict[int, tuple[int, ...]] = {}
        # Faster ones, where whoever trains knows them.
        self.ways = Ways()

    def get_config(self) -> dict:
        """Returns the settings, as the optimizers' configurations hold them."""
        return {
            "clip_factor": self.clip_factor,
            "eps": self.eps,
            "exclude_from_clipping": self.exclude_from_clipping,
        }

    def clips(self, variable) -> bool:
        """Whether this variable's gradient is clipped."""
        path = path_of(variable)
        return not any(pattern.search(path) for pattern in self._patterns)

    def clip(self, optimizer, gradients, variables) -> list:
        """Clips the gradients of one update and leaves the number of clipped units with the optimizer."""
        present = [i for i, gradient in enumerate(gradients) if gradient is not None]
        chosen = [i for i in present if self.clips(variables[i])] if self.clip_factor is not None else []
        axes = {i: self.unit_axes.get(id(variables[i])) for i in present}
        clipped, measured = list(gradients), []
        if chosen:
            some, units = clip_units(
                [gradients[i] for i in chosen],
                [variables[i] for i in chosen],
                self.clip_factor,
                self.eps,
                [axes[i] for i in chosen],
                self.ways,
            )
            optimizer.clipped_units.assign(ops.sum(ops.cast(units.over, "float32")))
            for i, gradient in zip(chosen, some, strict=True):
                clipped[i] = gradient
            measured.append(([variables[i] for i in chosen], units))
        optimizer.clippable_units = sum(len(units.owners) for _, units in measured)
        watch = getattr(optimizer, "agc_watch", None)
        if watch is not None:
            rest = sorted(set(present) - set(chosen))
            if rest:
                kept = [variables[i] for i in rest]
                units = measure_units([gradients[i] for i in rest], kept, [axes[i] for i in rest], self.ways)
                measured.append((kept, units))
            watch.record(optimizer, measured)
        return clipped


class Watch:
    """Sums what the clipping measures in one update by groups of variables, in a variable beside the optimizer's own.

    Args:
        groups: {path of a variable: name of its group}.

    Example:

    >>> Watch({}).names
    []
    """

    def __init__(self, groups: dict[str, str]):
        self.groups = groups
        self.names = list(dict.fromkeys(groups.values()))
        # How many units of each group can be clipped; known once a step was traced.
        self.clippable: list[int] = [0] * len(self.names)

    def record(self, optimizer, measured: Sequence[tuple[list, Units]]) -> None:
        """Leaves the table (groups, 3) of one update with the optimizer.

        Its columns are the number of clipped units and the sums of squares of gradients and of parameters.

        Args:
            optimizer: Where `table` is.
            measured: Variables and their units; `over` is `None` for those that are not clipped.
        """
        self.clippable = [0] * len(self.names)
        columns, numbers = ([], [], []), []
        for variables, units in measured:
            group_of = np.array([self.names.index(self.groups[path_of(v)]) for v in variables], "int32")
            numbers.append(group_of[units.owners])
            squares = ops.square(units.gradient_norms)
            if units.over is None:
                over = ops.zeros_like(squares)
            else:
                over = ops.cast(units.over, "float32")
                self.clippable = np.bincount(numbers[-1], minlength=len(self.names)).tolist()
            for column, value in zip(columns, (over, squares, ops.square(units.parameter_norms)), strict=True):
                column.append(value)
        if numbers:
            joined = ops.stack([ops.concatenate(c) if len(c) > 1 else c[0] for c in columns], axis=1)
            table = ops.segment_sum(joined, np.concatenate(numbers), num_segments=len(self.names))
            optimizer.agc_table.assign(table)


def add_counter(optimizer) -> None:
    """Gives a built optimizer the variable that counts the units clipped in the latest update, unless it has it."""
    if hasattr(optimizer, "clipped_units"):
        return
    optimizer.clippable_units = 0
    optimizer.clipped_units = optimizer.add_variable(
        shape=(), dtype="float32", name="clipped_units", aggregation="only_first_replica"
    )


def clip_reduced(optimizer, reduce, decay, grads_and_vars):
    """TensorFlow's seam: sums gradients over replicas, then clips them."""
    from nfnet_keras import tensorflow_replicas as replicas
    from nfnet_keras import tensorflow_sharing, tensorflow_step

    grads_and_vars = list(grads_and_vars)
    if optimizer.gradient_accumulation_steps and replicas.has_strategy():
        raise ValueError(
            "Keras's optimizers cannot accumulate gradients inside of a tf.distribute strategy. Received: "
            f"gradient_accumulation_steps={optimizer.gradient_accumulation_steps}. Each replica has its share of a "
            "batch anyway; leave it out, or accumulate without a strategy."
        )
    missing = any(g is None for g, _ in grads_and_vars)
    once = not missing and replicas.shares_processor()
    # Even the sum over one replica waits for the gradients of all variables; where some are missing, Keras says so.
    if missing or not (once or replicas.is_alone()):
        grads_and_vars = reduce(grads_and_vars)
    variables = [v for _, v in grads_and_vars]
    gradients = [tensorflow_step.densify(g) for g, _ in grads_and_vars]
    known = [optimizer._trainable_variables[optimizer._get_variable_index(v)] for v in variables]

    def clip(gradients):
        return _clip(optimizer, gradients, known)

    clipped = tensorflow_sharing.on_the_sum(gradients, clip) if once else clip(gradients)
    decay(known)
    return list(zip(clipped, variables, strict=True))


def clip_then_update(optimizer, update, decay, grads, trainable_variables, learning_rate):
    """The seam of all other backends: clips gradients, then updates."""
    clipped = _clip(optimizer, grads, trainable_variables)
    decay(trainable_variables)
    update(clipped, trainable_variables, learning_rate)


def _clip(optimizer, gradients, variables) -> list:
    clipper = optimizer.agc_clipper
    return list(gradients) if clipper is None else clipper.clip(optimizer, gradients, variables)


def decay_later(variables) -> None:
    """Stands in for an optimizer's decoupled weight decay, which the seams call once they have clipped."""


def hook(optimizer, clipper: Clipper) -> None:
    """Makes one optimizer clip its gradients right before it uses them; a hooked one gets the new settings.

    Keras decays weights before the seams. The decay is put off until after them, so that gradients are clipped against
    the weights that they were taken at; then clipping, decay and update follow each other as Keras's own clipping does.
    """
    hooked = hasattr(optimizer, "agc_clipper")
    optimizer.agc_clipper = clipper
    if hooked:
        return
    # Partials rather than closures: they survive copy.deepcopy.
    decay = optimizer._apply_weight_decay
    if keras.backend.backend() == "tensorflow":
        reduce = optimizer._all_reduce_sum_gradients
        optimizer._all_reduce_sum_gradients = functools.partial(clip_reduced, optimizer, reduce, decay)
    else:
        update = optimizer._backend_update_step
        optimizer._backend_update_step = functools.partial(clip_then_update, optimizer, update, decay)
    optimizer._apply_weight_decay = decay_later


def release(optimizer) -> None:
    """Makes a hooked optimizer stop clipping."""
    if hasattr(optimizer, "agc_clipper"):
        optimizer.agc_clipper = None
