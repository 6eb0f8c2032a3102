"""The rule of adaptive gradient clipping, as pure functions on any Keras backend."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import keras
import numpy as np
from keras import ops

# A gradient's norm below this is taken for this: the authors' guard against division by zero.
_SMALLEST_NORM = 1e-6
# From this number of elements up a parameter is clipped by itself: its gradient need not wait for all others.
MIN_SIZE_ALONE = 2**19


def _unit_axes(shape: Sequence[int], axis: int | Sequence[int] | None) -> tuple[tuple[int, ...], bool]:
    """Returns the axes that one norm runs over, and whether they are kept."""
    rank = len(shape)
    if axis is not None:
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        for a in axes:
            if not -rank <= a < rank:
                raise ValueError(f"`axis` {axis} does not fit a tensor of shape {tuple(shape)}.")
        return tuple(a % rank for a in axes), True
    if sum(size != 1 for size in shape) <= 1:
        return tuple(range(rank)), False
    return ((0,) if rank <= 3 else tuple(range(rank - 1))), True


def count_units(shape: Sequence[int], axis: int | Sequence[int] | None = None) -> int:
    """Returns how many units (norms) a parameter of this shape has in adaptive gradient clipping.

    Args:
        shape: Shape of the parameter.
        axis: As in `unitwise_norm`.

    Returns:
        The number of norms.

    Example:

    >>> from nfnet_keras.optimizers import count_units
    >>> count_units((3, 3, 16, 32)), count_units((32,))
    (32, 1)
    """
    axes, _ = _unit_axes(shape, axis)
    return math.prod(size for i, size in enumerate(shape) if i not in axes)


def unitwise_norm(x, axis: int | Sequence[int] | None = None):
    """Euclidean norm of each unit of a parameter or of its gradient.

    Without `axis`, the authors' rule by shape: what squeezes to a scalar or a vector (biases, gains) is one unit; a
    matrix, and a tensor of rank 3, has one unit a column (axis 0 is summed); from rank 4 on, one unit an output channel
    (all axes but the last are summed).

    Some kernels need `axis`, because their shape does not tell: depthwise kernels (height, width, channels,
    multiplier) take `(0, 1)`, transposed convolutions (height, width, outputs, inputs) `(0, 1, 3)`, 1-D convolutions
    (width, inputs, outputs) `(0, 1)`. `NormalizerFreeModel` picks it from the layer that owns the weight.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 4, equation 3.

    Args:
        x: Tensor of any rank.
        axis: Integer or integers: the axes that a norm sums over, which are kept with size 1. Defaults to `None`.

    Returns:
        float32 tensor (float64 for float64) that broadcasts against `x`.

    Raises:
        ValueError: If `axis` is outside the rank of `x`.

    Example:

    >>> from nfnet_keras.optimizers import unitwise_norm
    >>> keras.ops.convert_to_numpy(unitwise_norm(keras.ops.ones((4, 3)))).tolist()
    [[2.0, 2.0, 2.0]]
    """
    x = ops.convert_to_tensor(x)
    axes, keepdims = _unit_axes(x.shape, axis)
    if keras.backend.standardize_dtype(x.dtype) != "float64":
        # The square of a half-precision number overflows early.
        x = ops.cast(x, "float32")
    if not x.shape:
        return ops.abs(x)
    return ops.sqrt(ops.sum(ops.square(x), axis=axes, keepdims=keepdims))


def clip_gradient(
    gradient,
    parameter,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    axis: int | Sequence[int] | None = None,
):
    """Adaptive gradient clipping (AGC) of one parameter's gradient.

    A unit whose gradient norm is above `clip_factor * max(norm of the unit's weights, eps)` is scaled down to it.

    Source: Brock et al. 2021, <https://arxiv.org/abs/2102.06171>, section 4, equation 3.

    Args:
        gradient: Tensor, the gradient that the optimizer will use (summed over replicas, unscaled).
        parameter: Tensor of the same shape.
        clip_factor: Largest ratio of the two norms (the paper's lambda). Defaults to `0.01`.
        eps: Floor of the parameter's norm, so that zero-initialised parameters can move. Defaults to `1e-3`.
        axis: As in `unitwise_norm`.

    Returns:
        Tensor of the shape and dtype of `gradient`.

    Raises:
        ValueError: If the shapes differ, or `axis` does not fit them.

    Example:

    >>> from nfnet_keras.optimizers import clip_gradient
    >>> clipped = clip_gradient(keras.ops.ones((4, 1)), keras.ops.ones((4, 1)), clip_factor=0.5)
    >>> keras.ops.convert_to_numpy(clipped).ravel().tolist()
    [0.5, 0.5, 0.5, 0.5]
    """
    gradient = ops.convert_to_tensor(gradient)
    parameter = ops.convert_to_tensor(parameter)
    if tuple(gradient.shape) != tuple(parameter.shape):
        raise ValueError(
            f"A gradient and its parameter must have one shape. Received: {tuple(gradient.shape)} and "
            f"{tuple(parameter.shape)}."
        )
    gradient_norm = unitwise_norm(gradient, axis)
    parameter_norm = ops.cast(unitwise_norm(parameter, axis), gradient_norm.dtype)
    factor, _ = clip_factors(gradient_norm, parameter_norm, clip_factor, eps)
    return ops.multiply(gradient, ops.cast(factor, gradient.dtype))


def clip_factors(gradient_norm, parameter_norm, clip_factor: float, eps: float):
    """What multiplies the gradient of each unit, and which units are scaled down.

    Args:
        gradient_norm: Tensor of the units' gradient norms.
        parameter_norm: Tensor of the units' weight norms, of the same shape.
        clip_factor: As in `clip_gradient`.
        eps: As in `clip_gradient`.

    Returns:
        Tensor of factors, at most 1, and boolean tensor, both of the shape of the norms.

    Example:

    >>> from nfnet_keras.optimizers.clipping import clip_factors
    >>> factors, over = clip_factors(keras.ops.array([1.0, 4.0]), keras.ops.array([100.0, 100.0]), 0.02, 1e-3)
    >>> keras.ops.convert_to_numpy(factors).tolist(), keras.ops.convert_to_numpy(over).tolist()
    ([1.0, 0.5], [False, True])
    """
    limit = ops.multiply(ops.maximum(parameter_norm, eps), clip_factor)
    over = ops.greater(gradient_norm, limit)
    shrink = ops.divide(limit, ops.maximum(gradient_norm, _SMALLEST_NORM))
    return ops.where(over, shrink, ops.ones_like(shrink)), over


@dataclasses.dataclass(frozen=True)
class Units:
    """The units of several parameters, end to end.

    Args:
        gradient_norms: float32 tensor (units,), before clipping.
        parameter_norms: float32 tensor (units,).
        over: Boolean tensor (units,): which were scaled down. `None` where nothing is clipped.
        owners: Integer array (units,): the position of the parameter that a unit is of.

    Example:

    >>> measure_units([keras.ops.ones((4, 2))], [keras.ops.ones((4, 2))], [None]).owners.tolist()
    [0, 0]
    """

    gradient_norms: object
    parameter_norms: object
    over: object
    owners: np.ndarray


def norm_over(x, axes: tuple[int, ...]):
    """Euclidean norm over some axes.

    Example:

    >>> keras.ops.convert_to_numpy(norm_over(keras.ops.array([[3.0], [4.0]]), (0,))).tolist()
    [5.0]
    """
    return ops.sqrt(ops.sum(ops.square(x), axis=axes))


def call(function: Callable, *tensors):
    """Calls a function.

    Example:

    >>> call(max, 1, 2)
    2
    """
    return function(*tensors)


@dataclasses.dataclass(frozen=True)
class Ways:
    """How the clipping is computed, where there is a faster way than that of all backends.

    Args:
        norm: Takes the norm of a tensor over some axes. Defaults to `norm_over`.
        call: Calls a pure function of tensors that returns a list of tensors. The same function comes again for each
            large parameter of the same kind. Defaults to calling it.

    Example:

    >>> Ways().call(max, 1, 2)
    2
    """

    norm: Callable = norm_over
    call: Callable = call


def measure_units(gradients, parameters, axes, ways: Ways | None = None) -> Units:
    """Takes the norms of the units of many parameters and of their gradients, and clips nothing.

    Args:
        gradients: List of tensors.
        parameters: List of tensors of the same shapes.
        axes: List with the `axis` of each parameter.
        ways: As in `clip_units`.

    Returns:
        The `Units`.

    Example:

    >>> units = measure_units([keras.ops.ones((4, 2))], [keras.ops.ones((4, 2))], [None])
    >>> keras.ops.convert_to_numpy(units.gradient_norms).tolist()
    [2.0, 2.0]
    """
    layout = _Layout([p.shape for p in parameters], axes, (ways or Ways()).norm)
    return Units(layout.norms(gradients), layout.norms(parameters), None, layout.owners)


def clip_units(
    gradients, parameters, clip_factor: float, eps: float, axes, ways: Ways | None = None
) -> tuple[list, Units]:
    """Clips the gradients of many parameters: `clip_gradient` for each, in far fewer operations.

    The many small parameters (biases, gains) are joined before their norms are taken, and the rule itself is computed
    once for all parameters but the largest. Each of these is clipped by itself, as soon as its gradient is there: an
    update may then follow at once, while the gradient is in the cache, and its memory is free before the next
    gradients need theirs.

    Args:
        gradients: List of tensors.
        parameters: List of tensors of the same shapes.
        clip_factor: As in `clip_gradient`.
        eps: As in `clip_gradient`.
        axes: List with the `axis` of each parameter.
        ways: How it is computed. Defaults to that of all backends.

    Returns:
        List of the clipped gradients, and the `Units`: what was measured on the way.

    Example:

    >>> ones = keras.ops.ones((4, 2))
    >>> clipped, units = clip_units([ones, ones[:, 0]], [ones, ones[:, 0]], 0.5, 1e-3, [None, None])
    >>> float(clipped[0][0, 0]), float(clipped[1][0])
    (0.5, 0.5)
    >>> keras.ops.convert_to_numpy(units.over).tolist()
    [True, True, True]
    """
    ways = ways or Ways()
    gradients = [ops.convert_to_tensor(g) for g in gradients]
    parameters = [ops.convert_to_tensor(p) for p in parameters]
    large = [
        i
        for i, p in enumerate(parameters)
        if not _is_segment(p.shape, axes[i]) and math.prod(p.shape) >= MIN_SIZE_ALONE
    ]
    rest = sorted(set(range(len(parameters))) - set(large))
    clipped, measured = list(gradients), []
    if rest:
        some, units = _clip_together(
            *([each[i] for i in rest] for each in (gradients, parameters, axes)), clip_factor, eps, ways.norm
        )
        for i, gradient in zip(rest, some, strict=True):
            clipped[i] = gradient
        measured.append(dataclasses.replace(units, owners=np.array(rest)[units.owners]))
    for i in large:
        rule = _clip_alone(
            axes[i] if axes[i] is None else tuple(np.ravel(axes[i]).tolist()), clip_factor, eps, ways.norm
        )
        factor, *vectors = ways.call(rule, gradients[i], parameters[i])
        # Not by the rule: a function's arguments stay where they are, and the product may take the gradient's place.
        clipped[i] = ops.multiply(gradients[i], factor)
        measured.append(Units(*vectors, np.full(count_units(parameters[i].shape, axes[i]), i)))
    vectors = (
        _join([getattr(units, name) for units in measured]) for name in ("gradient_norms", "parameter_norms", "over")
    )
    return clipped, Units(*vectors, np.concatenate([units.owners for units in measured]))


@functools.cache
def _clip_alone(axis: tuple[int, ...] | None, clip_factor: float, eps: float, norm: Callable) -> Callable:
    """Returns a function of a gradient and its parameter to what multiplies it, its norms, the parameter's, `over`."""

    def measure(gradient, parameter):
        layout = _Layout([parameter.shape], [axis], norm)
        of_gradient, of_parameter = layout.norms([gradient]), layout.norms([parameter])
        factor, over = clip_factors(of_gradient, of_parameter, clip_factor, eps)
        factor = ops.cast(_broadcastable(factor, gradient.shape, axis), gradient.dtype)
        return [factor, of_gradient, of_parameter, over]

    return measure


def _clip_together(gradients, parameters, axes, clip_factor: float, eps: float, norm: Callable) -> tuple[list, Units]:
    layout = _Layout([p.shape for p in parameters], axes, norm)
    of_gradients, of_parameters = layout.norms(gradients), layout.norms(parameters)
    factors, over = clip_factors(of_gradients, of_parameters, clip_factor, eps)
    return layout.scale(gradients, factors), Units(of_gradients, of_parameters, over, layout.owners)


def _is_segment(shape: Sequence[int], axis) -> bool:
    """Whether a parameter has one unit and at most one long axis, so that it can be a segment of a vector."""
    return axis is None and not _unit_axes(shape, None)[1]


class _Layout:
    """Where the units of several parameters stand: those of the small ones, then of the others."""

    def __init__(self, shapes, axes, norm: Callable):
        self.norm = norm
        self.shapes = [tuple(shape) for shape in shapes]
        self.axes = axes
        self.small = [i for i, shape in enumerate(self.shapes) if _is_segment(shape, axes[i])]
        joined = set(self.small)
        self.others = [i for i in range(len(self.shapes)) if i not in joined]
        self.segments = _Segments([self.shapes[i] for i in self.small])
        self.counts = [count_units(self.shapes[i], axes[i]) for i in self.others]

    @property
    def owners(self) -> np.ndarray:
        return np.repeat(self.small + self.others, [1] * len(self.small) + self.counts)

    def norms(self, tensors):
        """Returns the norms of all units in one float32 vector."""
        joined = []
        if self.small:
            squares = ops.square(self.segments.join([tensors[i] for i in self.small]))
            joined.append(ops.sqrt(self.segments.sums(squares)))
        for i in self.others:
            x = ops.cast(tensors[i], "float32")
            joined.append(_flat(self.norm(x, _unit_axes(x.shape, self.axes[i])[0])))
        return _join(joined)

    def scale(self, gradients, factors) -> list:
        """Returns the gradients, those of each unit multiplied by its factor; `factors` are laid out as the norms."""
        scaled, few = list(gradients), len(self.small)
        if self.small:
            vector = self.segments.join([gradients[i] for i in self.small])
            vector = ops.multiply(vector, self.segments.spread(factors[:few]))
            for i, gradient in zip(self.small, self.segments.split(vector), strict=True):
                scaled[i] = ops.cast(gradient, gradients[i].dtype)
        for i, factor in zip(self.others, _split(factors[few:], self.counts) if self.others else [], strict=True):
            factor = _broadcastable(factor, self.shapes[i], self.axes[i])
            scaled[i] = ops.multiply(gradients[i], ops.cast(factor, gradients[i].dtype))
        return scaled


def _join(vectors: list):
    """Puts vectors end to end."""
    return vectors[0] if len(vectors) == 1 else ops.concatenate(vectors)


def _split(vector, sizes):
    """Cuts a vector into parts of the given sizes."""
    # TensorFlow cannot split into one part.
    return [vector] if len(sizes) == 1 else ops.split(vector, np.cumsum(sizes)[:-1].tolist())


def _flat(x):
    """Returns a tensor as a vector."""
    # Not reshaped without need: every operation less a parameter shortens the tracing of large networks.
    return x if len(x.shape) == 1 else ops.reshape(x, (-1,))


def _broadcastable(factor, shape, axis):
    """Shapes the vector of a parameter's factors, one a unit, so that it multiplies the parameter's gradient."""
    summed, _ = _unit_axes(shape, axis)
    if summed == tuple(range(len(shape) - 1)):
        return factor
    return ops.reshape(factor, tuple(1 if i in summed else size for i, size in enumerate(shape)))


class _Segments:
    """Small tensors laid end to end in one vector, and back."""

    def __init__(self, shapes):
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.ids = np.repeat(np.arange(len(self.sizes), dtype="int32"), self.sizes)

    def join(self, tensors):
        return ops.concatenate([_flat(ops.cast(x, "float32")) for x in tensors])

    def sums(self, joined):
        return ops.segment_sum(joined, self.ids, num_segments=len(self.sizes))

    def spread(self, values):
        return ops.take(values, self.ids)

    def split(self, joined):
        parts = _split(joined, self.sizes)
        return [
            part if len(shape) == 1 else ops.reshape(part, shape)
            for part, shape in zip(parts, self.shapes, strict=True)
        ]
