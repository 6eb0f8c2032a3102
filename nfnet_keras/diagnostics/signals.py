"""How the signal propagates: mean and variance of a network's activations by depth."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence

import keras
import numpy as np
from keras import ops
from keras.src.ops.numpy import Add

from nfnet_keras.diagnostics.graph import Graph, Step
from nfnet_keras.diagnostics.passes import forward
from nfnet_keras.diagnostics.signal_report import SignalPropagation, SignalRow, plot_signals
from nfnet_keras.layers import Dropout, ScaledActivation, SkipGain, StochasticDepth, WSConv2D

__all__ = ["SignalPropagation", "SignalRow", "plot_signals", "signal_propagation"]

_L = keras.layers
# What ends a residual branch without being measured, as in the authors' program.
_BEHIND_A_BRANCH = (SkipGain, StochasticDepth, _L.Rescaling, Dropout, _L.Dropout)
# What a pre-activation block may have in front of the point where it divides.
_IN_FRONT_OF_A_BLOCK = (
    *(ScaledActivation, _L.Activation, _L.ReLU, _L.LeakyReLU, _L.PReLU, _L.ELU),
    *(_L.BatchNormalization, _L.LayerNormalization, _L.GroupNormalization, _L.RMSNormalization, _L.Rescaling),
)
_OWN_BLOCK = re.compile(r"(?:.*/)?(?P<stage>stage\d+)_block(?P<block>\d+)_")


def signal_propagation(
    model: keras.Model,
    images,
    *,
    skip_gain: float | None = None,
    training: bool = False,
    batch_size: int = 32,
) -> SignalPropagation:
    """Measures how the signal propagates through any network: means and variances of its activations by depth.

    A network that can be trained keeps its signal: neither the variance nor the squared mean of the channels grows or
    shrinks without bound with depth. In the normalizer-free networks the variance grows by alpha^2 in each block and
    starts anew in each stage, which gives the saw-tooth of the paper.

    Where it measures: at the input of the first residual block and the output of each one; and at the end of each
    residual branch. A residual block ends where two values of one shape are added (`keras.layers.Add`, or `a + b`) that
    come from the same value. If one of the two is that value, it is the shortcut; else the shortcut is the one with
    fewer layers with kernels behind the point where they part, or, where these are equally many, with fewer layers. If
    this does not tell either, the sum is measured and no branch. The input of the first block is where the two part; in
    front of the activation and normalisation there, where the shortcut is not that value itself. The end of a branch is
    before stochastic depth, dropout and constant or learnt factors, as in the authors' program. Without such a sum, the
    output of every layer that has positions and channels is measured (if none has, of every layer).

    Stages are told by the names of the layers, as this package gives them, else by the shape of the blocks' outputs.
    Variables stay as they are, and the values of only one batch, and no longer than needed, are in memory.

    Skip gains are zero at initialisation: every block then is its shortcut, and the variance does not grow. The paper's
    plots are of networks without them; `skip_gain=1.0` shows these. Where a shortcut averages over pixels, as in NFNets
    and NF-RegNets, independent noise loses variance at the first block of a stage. In a folded network alpha and the
    skip gains are part of the kernels, so that the variance at the end of a branch has their squares in it.

    Source: Brock, De, Smith 2021, <https://arxiv.org/abs/2101.08692>, section 3; `signal_metrics` in the authors' code.

    Args:
        model: A functional or Sequential model, with models inside or without.
        images: Array of shape (images, height, width, channels), preprocessed as the network asks for; or what else the
            model takes. The paper takes noise of mean 0 and variance 1.
        skip_gain: What to take the learnt factor at the end of each residual branch for: the scalar of `SkipGain`, and
            in those of timm's networks that have none, the gains of the branch's last convolution. Defaults to `None`:
            as they are.
        training: Whether layers behave as in training: batch normalisation takes the statistics of the batch, dropout
            drops. Nothing is updated. Defaults to `False`.
        batch_size: Images at once. Means and variances are those of all. Defaults to `32`.

    Returns:
        A `SignalPropagation`: rows, `metrics()`, `plot(path)`, and as text a table.

    Raises:
        ValueError: If Keras does not know the model's layers (a subclass with a `call` of its own), the images have
            another shape than the model takes, `skip_gain` is given and there is none, or nothing can be measured.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None)
    >>> images = np.random.default_rng(0).standard_normal((8, 32, 32, 3))
    >>> report = nfk.signal_propagation(model, images, skip_gain=1.0)
    >>> [row.name for row in report.rows][:3]
    ['stem_conv3', 'stage1_block1_add', 'stage2_block1_add']
    """
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1. Received: batch_size={batch_size}")
    graph = Graph(model, "signal_propagation")
    tensors = graph.tensors(images)
    points = _residual_points(graph)
    residual = bool(points)
    points = points or _layer_points(graph)
    if not points:
        raise ValueError(f"The model {model.name!r} has no layer whose output could be measured.")
    changed = [] if skip_gain is None else _changed_gains(graph, points, float(skip_gain))
    measured = _measure(graph, points, tensors, model.variables, changed, training, batch_size)
    notes = [f"skip gains taken for {skip_gain:g}"] if skip_gain is not None else []
    notes += ["in training mode"] if training else []
    return SignalPropagation(model.name, tuple(_rows(points, measured, residual)), ", ".join(notes))


@dataclasses.dataclass(frozen=True)
class _Point:
    """A value to measure, by its number, and that at the end of the residual branch of the block that it ends."""

    name: str
    value: int
    branch: int | None = None
    behind: tuple[Step, ...] = ()


def _residual_points(graph: Graph) -> list[_Point]:
    points = []
    for step in graph.steps:
        if not _is_sum(step):
            continue
        branch, start = _branch(graph, *step.inputs)
        if not points and start is not None:
            # A shortcut that is no identity may part behind the block's own activation.
            while start not in step.inputs and _is_in_front(graph.producers.get(start)):
                start = graph.producers[start].inputs[0]
            made = graph.producers.get(start)
            points.append(_Point("input" if made is None else made.name, start))
        behind = []
        while branch is not None and isinstance(graph.producers[branch].operation, _BEHIND_A_BRANCH):
            behind.append(graph.producers[branch])
            branch = behind[-1].inputs[0]
        points.append(_Point(step.name, step.outputs[0], branch, tuple(behind)))
    return points if any(point.branch is not None for point in points) else []


def _is_sum(step: Step) -> bool:
    shapes = [tuple(tensor.shape) for tensor in step.node.input_tensors]
    return (
        isinstance(step.operation, (_L.Add, Add))
        and len(step.inputs) == len(set(step.inputs)) == 2
        and shapes[0] == shapes[1]
        and len(shapes[0]) > 1
    )


def _branch(graph: Graph, a: int, b: int) -> tuple[int | None, int | None]:
    """Returns which of two values ends a residual branch, and where it parted from the shortcut."""
    from_a, from_b = graph.ancestors[a], graph.ancestors[b]
    common = from_a & from_b
    if not common:
        return None, None
    start = common.bit_length() - 1
    costs = []
    for value, others in ((a, from_b), (b, from_a)):
        alone = graph.ancestors[value] & ~others
        layers = [step.operation for step in graph.steps if alone >> step.outputs[0] & 1]
        kernels = [layer for layer in layers if any(len(w.shape) > 1 for w in getattr(layer, "weights", ()))]
        costs.append((len(layers) > 0, len(kernels), len(layers)))
    if costs[0] == costs[1]:
        return None, start
    return (a if costs[0] > costs[1] else b), start


def _is_in_front(step: Step | None) -> bool:
    if step is None or len(step.inputs) != 1:
        return False
    operation = step.operation
    return isinstance(operation, _IN_FRONT_OF_A_BLOCK) or type(operation).__module__ == "keras.src.ops.nn"


def _layer_points(graph: Graph) -> list[_Point]:
    found = [
        (len(tensor.shape), _Point(step.name, number))
        for step in graph.steps
        for number, tensor in zip(step.outputs, step.node.outputs, strict=True)
        if "float" in tensor.dtype and len(tensor.shape) > 1
    ]
    return [point for rank, point in found if rank > 2] or [point for _, point in found]


def _changed_gains(graph: Graph, points: Sequence[_Point], value: float) -> list[tuple]:
    """Returns pairs of the variables that scale the ends of the residual branches and what they are taken for."""
    changed = []
    for point in points:
        gains = [step.operation.skip_gain for step in point.behind if isinstance(step.operation, SkipGain)]
        if not gains and point.behind:
            number = point.branch
            while number in graph.producers and len(graph.producers[number].inputs) == 1:
                operation = graph.producers[number].operation
                if isinstance(operation, WSConv2D):
                    gains = [operation.gain]
                    break
                number = graph.producers[number].inputs[0]
        changed += [(gain, ops.full(gain.shape, value, gain.dtype)) for gain in gains]
    if not changed:
        raise ValueError(
            f"`skip_gain` is for networks whose residual branches end in a learnt factor. Received: {value:g} for a "
            "network that has none, or whose factors were folded into its kernels."
        )
    return changed


def _measure(
    graph: Graph, points: Sequence[_Point], tensors: list, variables: list, changed: list, training: bool, size: int
) -> dict[int, tuple[tuple[int, ...], float, float]]:
    """Returns shape, average squared mean and average variance of each value that a point names."""
    wanted = {point.value for point in points} | {point.branch for point in points if point.branch is not None}
    shapes: dict[int, tuple] = {}

    def function(*inputs):
        found = {}

        def visit(number, value):
            if number in wanted:
                shapes[number] = tuple(value.shape[1:])
                found[str(number)] = _moments(value)
            return value

        graph.run(inputs, visit, training)
        return found

    run = forward(function, variables, changed)
    images = int(tensors[0].shape[0])
    shares, parts = [], collections.defaultdict(list)
    for start in range(0, images, size):
        batch = run(*(x[start : start + size] for x in tensors))
        shares.append(min(size, images - start) / images)
        for number, pair in batch.items():
            parts[int(number)].append([ops.convert_to_numpy(x).astype(np.float64) for x in pair])
    measured = {}
    for number, pairs in parts.items():
        means, variances = (np.stack(column) for column in zip(*pairs, strict=True))
        mean = np.average(means, axis=0, weights=shares)
        # The variance over all images: that inside of the batches and that between them.
        variance = np.average(variances + (means - mean) ** 2, axis=0, weights=shares)
        measured[number] = (shapes[number], float(np.mean(mean**2)), float(np.mean(variance)))
    return measured


def _moments(value):
    """Returns mean and variance of each channel over images and positions."""
    first = keras.config.image_data_format() == "channels_first" and len(value.shape) > 3
    axes = [axis for axis in range(len(value.shape)) if axis != (1 if first else len(value.shape) - 1)]
    value = ops.cast(value, "float32")
    return ops.mean(value, axes), ops.var(value, axes)


def _rows(points: Sequence[_Point], measured: Mapping[int, tuple], residual: bool) -> list[SignalRow]:
    rows, stage, block, before = [], 0, 0, None
    for i, point in enumerate(points):
        shape, squared_mean, variance = measured[point.value]
        named = _OWN_BLOCK.match(point.name)
        place = (None, None)
        if residual and named:
            place = (named["stage"], int(named["block"]))
        elif residual and i:
            stage, block = (stage, block + 1) if shape == before else (stage + 1, 1)
            before, place = shape, (f"stage{stage}", block)
        end = None if point.branch is None else measured[point.branch][2]
        rows.append(SignalRow(point.name, *place, shape, squared_mean, variance, end))
    return rows
