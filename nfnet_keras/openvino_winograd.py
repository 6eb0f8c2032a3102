"""Winograd's convolution along the rows of images, as operations of OpenVINO.

A 3 x 3 convolution of stride 1 takes twelve products of a row and a row of the kernel for four rows of outputs.
Winograd's algorithm takes six, of sums of rows; or four instead of six for two rows of outputs. The products stay
convolutions, 1 x 3 now, so they run at the rate of any other; what comes with them are sums of images.

The sums take every fourth row together. What does not mind the order of rows (1 x 1 convolutions, activations, residual
sums, means) leaves them in that order, so rows are moved where a stage of a network begins and ends, not at each
convolution.

Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", <https://arxiv.org/abs/1509.09308>.
"""

from collections.abc import Callable

import numpy as np

# With fewer inputs (of a group), what the products save is less than what the sums take, on AVX2.
MIN_INPUTS = 64
# For each product, the factors of the kernel's three rows, by how many rows of outputs are computed together.
KERNELS = {
    2: [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    4: [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ],
}
UNARY = {"Clamp", "Elu", "Gelu", "HSigmoid", "HSwish", "Mish", "Relu", "Selu", "Sigmoid", "SoftPlus", "Swish", "Tanh"}
BINARY = {"Add", "Divide", "Maximum", "Minimum", "Multiply", "Subtract"}


def use_winograd(network, least: int = MIN_INPUTS) -> int:
    """Makes 3 x 3 convolutions Winograd's, where that takes less time.

    Those of stride 1, with a border of zeros, an even number of rows and enough channels. The network's outputs change
    by rounding alone.

    Args:
        network: `openvino.Model` of a known input shape, in float32; it is changed.
        least: The number of inputs (of a group) from which a convolution has enough of them. Defaults to `64`.

    Returns:
        The number of convolutions that were replaced.

    Example:

    >>> import openvino.opset8 as op
    >>> from openvino import Model
    >>> x = op.parameter([1, 64, 8, 8], np.float32)
    >>> y = op.convolution(x, np.ones((64, 64, 3, 3), "float32"), [1, 1], [1, 1], [1, 1], [1, 1])
    >>> network = Model([y], [x])
    >>> use_winograd(network)
    1
    >>> sum(node.get_type_name() == "Convolution" for node in network.get_ops())
    6
    """
    nodes = network.get_ordered_ops()
    rows = _Rows(nodes, least)
    replaced = 0
    for node in nodes:
        phases = _rows_together(node, least)
        if phases:
            found = _convolution(rows.ordered(node.input_value(0), phases), node, phases)
            rows.take_place(node.output(0), found, phases)
            replaced += 1
        elif _ignores_order(node):
            rows.carry(node)
        else:
            for each in node.inputs():
                rows.feed(each, 1)
    network.validate_nodes_and_infer_types()
    return replaced


class _Rows:
    """The order of the rows of tensors.

    A tensor in four phases has rows 0, 4, 8 and so on first, then 1, 5, 9 and so on; one in one phase is as it was.
    """

    def __init__(self, nodes: list, least: int):
        self._phases, self._ordered = {}, {}
        # What the convolutions behind a tensor want it in, and the tensors that something needs as they were.
        self._wanted, self._needed = {}, set()
        for node in reversed(nodes):
            phases = _rows_together(node, least)
            if not phases and not _ignores_order(node):
                self._needed |= {_key(each) for each in node.input_values()}
                continue
            phases = phases or self._wanted.get(_key(node.output(0)), 1)
            for each in _inputs_with_rows(node):
                key = _key(each.get_source_output())
                self._wanted[key] = max(self._wanted.get(key, 1), phases)

    def take_place(self, old, new, phases: int) -> None:
        """Puts a tensor in phases where there was one in one."""
        self._phases[_key(new)] = phases
        if _key(old) in self._needed:
            self._needed.add(_key(new))
        old.replace(new)

    def carry(self, node) -> None:
        """Feeds a node that leaves rows where they are."""
        inputs = _inputs_with_rows(node)
        if not inputs:
            return  # a mean
        phases = self._wanted.get(_key(node.output(0)), 1)
        if phases == 1:
            sources = [_key(each.get_source_output()) for each in inputs]
            # Of a tensor that is put back anyway, nothing else has to be; nor what is added to one that was not moved.
            phases = min(1 if source in self._needed else self._phases.get(source, 1) for source in sources)
        for each in inputs:
            self.feed(each, phases)
        self._phases[_key(node.output(0))] = phases

    def feed(self, to, phases: int) -> None:
        """Feeds an input of a node with its tensor in a number of phases."""
        source = to.get_source_output()
        if self._phases.get(_key(source), 1) != phases:
            to.replace_source_output(self.ordered(source, phases))

    def ordered(self, x, phases: int):
        """Returns a tensor in a number of phases."""
        now = self._phases.get(_key(x), 1)
        if now == phases:
            return x
        key = _key(x)  # what a tensor may be wanted in besides what it is in follows from its height
        if key not in self._ordered:
            whole = x if now == 1 else _reordered(x, lambda rows: rows.reshape(now, -1))
            self._ordered[key] = whole if phases == 1 else _reordered(whole, lambda rows: rows.reshape(-1, phases))
        return self._ordered[key]


def _key(output) -> tuple[int, int]:
    return output.get_node().get_instance_id(), output.get_index()


def _shape(output) -> list[int]:
    """Returns a tensor's shape, an empty one where it is only known as it runs."""
    shape = output.get_partial_shape()
    return list(shape.to_shape()) if shape.is_static else []


def _reordered(x, fold: Callable[[np.ndarray], np.ndarray]):
    """Returns a tensor with its rows in the order of the transposed matrix that `fold` makes of their numbers."""
    import openvino.opset8 as op

    height = x.get_shape()[2]
    # Slices with a step take longer. A gather takes a third less, but OpenVINO lays out what is around it anew.
    rows = op.split(x, _constant(2), height).outputs()
    return op.concat([rows[at] for at in fold(np.arange(height)).T.reshape(-1)], 2).output(0)


def _rows_together(node, least: int) -> int:
    """Returns how many rows of a convolution are computed together, 0 for a node that stays as it is."""
    kernel = _kernel(node)
    if kernel is None or kernel.shape[-2:] != (3, 3) or kernel.shape[-3] < least or not _is_plain(node, 1):
        return 0
    height = _shape(node.output(0))[2]
    return next((phases for phases in (4, 2) if height % phases == 0 and height >= 2 * phases), 0)


def _kernel(node) -> np.ndarray | None:
    """Returns the constant kernel of a convolution over images; `None` for anything else."""
    if node.get_type_name() not in ("Convolution", "GroupConvolution") or len(_shape(node.output(0))) != 4:
        return None
    source = node.input_value(1).get_node()
    return source.get_data() if source.get_type_name() == "Constant" else None


def _is_plain(node, padding: int) -> bool:
    attributes = node.get_attributes()
    wanted = {"strides": 1, "dilations": 1, "pads_begin": padding, "pads_end": padding}
    return all(list(attributes[name]) == [at, at] for name, at in wanted.items())


def _ignores_order(node) -> bool:
    """Whether the rows of a node's output are those of its inputs in whatever order, or means of them all."""
    kind, shape = node.get_type_name(), _shape(node.output(0)) if node.get_output_size() else []
    if len(shape) != 4:
        return False
    if kind in UNARY:
        return True
    if kind in BINARY:
        return all(_has_rows(each, node) or _is_one_row(each) for each in node.input_values())
    if kind == "AvgPool":
        return list(node.get_attributes()["kernel"]) == _shape(node.input_value(0))[2:] and shape[2:] == [1, 1]
    kernel = _kernel(node)
    return kernel is not None and kernel.shape[-2:] == (1, 1) and _is_plain(node, 0)


def _inputs_with_rows(node) -> list:
    """Returns the inputs whose rows are those of the output."""
    inputs = node.inputs() if node.get_type_name() in BINARY else [node.input(0)]
    return [each for each in inputs if _has_rows(each.get_source_output(), node)]


def _has_rows(output, node) -> bool:
    shape = _shape(output)
    return len(shape) == 4 and shape[2] == _shape(node.output(0))[2]


def _is_one_row(output) -> bool:
    shape = output.get_partial_shape()
    return shape.is_static and (len(shape) < 2 or shape[-2].get_length() == 1)


def _convolution(x, node, phases: int):
    """Returns a 3 x 3 convolution of a tensor in phases, in phases too."""
    import openvino.opset8 as op

    kernel = _kernel(node)
    rows = [np.ascontiguousarray(kernel[..., at, None, :]) for at in range(3)]
    convolve = op.convolution if kernel.ndim == 4 else op.group_convolution
    products = []
    for inputs, factors in zip(_sums(_neighbours(x, phases)), KERNELS[phases], strict=True):
        combined = sum(np.float32(factor) * row for factor, row in zip(factors, rows, strict=True) if factor)
        products.append(convolve(inputs, _constant(combined), [1, 1], [0, 1], [0, 1], [1, 1]))
    return op.concat(_outputs(products), 2).output(0)


def _neighbours(x, phases: int) -> list:
    """Returns the phases of a tensor, with the rows above the first before them and those below the last behind."""
    import openvino.opset8 as op

    parts = op.split(x, _constant(2), phases).outputs()
    height = x.get_shape()[2] // phases

    def cut(padded, start: int):
        return op.slice(padded, *(_constant([at]) for at in (start, start + height, 1, 2)))

    above = cut(op.pad(parts[-1], [0, 0, 1, 0], [0, 0, 0, 0], "constant"), 0)
    below = cut(op.pad(parts[0], [0, 0, 0, 0], [0, 0, 1, 0], "constant"), 1)
    return [above, *parts, below]


def _sums(d: list) -> list:
    """Returns what the kernels are convolved with."""
    import openvino.opset8 as op

    if len(d) == 4:
        return [op.subtract(d[0], d[2]), op.add(d[1], d[2]), op.subtract(d[2], d[1]), op.subtract(d[1], d[3])]
    even, odd = op.subtract(d[4], _times(4, d[2])), op.subtract(d[3], _times(4, d[1]))
    outer, inner = op.subtract(d[4], d[2]), _times(2, op.subtract(d[3], d[1]))
    first = op.add(op.subtract(_times(4, d[0]), _times(5, d[2])), d[4])
    last = op.add(op.subtract(_times(4, d[1]), _times(5, d[3])), d[5])
    return [first, op.add(even, odd), op.subtract(even, odd), op.add(outer, inner), op.subtract(outer, inner), last]


def _outputs(m: list) -> list:
    """Returns the phases of the outputs from the products."""
    import openvino.opset8 as op

    sum1, difference1 = op.add(m[1], m[2]), op.subtract(m[1], m[2])
    if len(m) == 4:
        return [op.add(m[0], sum1), op.subtract(difference1, m[3])]
    sum2, difference2 = op.add(m[3], m[4]), op.subtract(m[3], m[4])
    return [
        op.add(op.add(m[0], sum1), sum2),
        op.add(difference1, _times(2, difference2)),
        op.add(sum1, _times(4, sum2)),
        op.add(op.add(m[5], difference1), _times(8, difference2)),
    ]


def _times(factor: float, x):
    import openvino.opset8 as op

    return op.multiply(x, _constant(np.float32(factor)))


def _constant(value):
    from openvino import op

    # That of the operation sets goes through a list of Python's numbers.
    return op.Constant(np.asarray(value))
