"""Rematerialization: residual blocks whose tensors are computed again in the backward pass instead of being kept.

Keras's `RematScope` recomputes layer by layer and keeps every layer's input, which is most of what there is to keep.
Here a whole residual block is one unit, of which only the input stays. The layers and variables of the model are those
of the model without; only the order of its training step is another.
"""

import dataclasses
import re
from collections.abc import Sequence

import keras

# The layers of the stem and of each block, by the names that checkpoints know them by.
_UNIT = re.compile(r"(stem|stage\d+_block\d+)_")


@dataclasses.dataclass(frozen=True)
class Segment:
    """Nodes of a functional graph that are computed as one, and again in the backward pass.

    Args:
        nodes: The nodes, in the order of their computation.
        inputs: Keras tensors that they take from outside.
        outputs: Keras tensors that are used outside.
    """

    nodes: tuple
    inputs: tuple
    outputs: tuple

    def variables(self) -> tuple[list, list]:
        """Returns the variables of the nodes' layers: those that are trained, and all others (random state)."""
        layers = [node.operation for node in self.nodes if isinstance(node.operation, keras.layers.Layer)]
        trained = {id(v): v for layer in layers for v in layer.trainable_variables}
        others = {id(v): v for layer in layers for v in layer.non_trainable_variables}
        return list(trained.values()), list(others.values())


class Rematerialization:
    """Mixed into a functional `keras.Model`, in front of it: the attribute `remat`, which its configuration keeps.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=2, remat=True)
    >>> model.remat
    True
    """

    _remat = False

    @property
    def remat(self) -> bool:
        """Whether training computes the tensors inside the stem and the residual blocks twice instead of keeping them.

        A step then needs much less memory above parameters, gradients and the optimizer's state, and about a third more
        time. Loss, gradients and random numbers are the same. It can be set at any time; inference is not concerned.
        A model that you make of a backbone's tensors starts without, and so does one of `keras.models.clone_model`: set
        it there too. Blocks are told by the names of their layers, as this package gives them; other layers of the
        model are computed once.

        Source: Chen et al. 2016, <https://arxiv.org/abs/1604.06174>.

        Raises:
            TypeError: When it is set to something else than a boolean.

        Example:

        >>> import nfnet_keras as nfk
        >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=2)
        >>> model.remat = True
        >>> model.get_config()["remat"]
        True
        """
        return self._remat

    @remat.setter
    def remat(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise TypeError(f"`remat` must be True or False. Received: remat={value!r}")
        if value != self._remat:
            # A step that was traced the other way is traced anew.
            self.train_function = None
        self._remat = value

    def get_config(self) -> dict:
        config = super().get_config()
        return {**config, "remat": True} if self.remat else config

    @classmethod
    def from_config(cls, config: dict, custom_objects: dict | None = None):
        config = dict(config)
        remat = config.pop("remat", False)
        model = super().from_config(config, custom_objects=custom_objects)
        model.remat = remat
        return model

    def call(self, inputs, training=None, mask=None, **kwargs):
        # Masks travel on tensors, past what a segment takes and gives.
        if not (self.remat and training) or mask is not None:
            return super().call(inputs, training=training, mask=mask, **kwargs)
        values = {
            id(tensor): value for tensor, value in zip(self.inputs, self._standardize_inputs(inputs), strict=True)
        }
        barrier = bool(getattr(self, "jit_compile", False))
        for step in plan(self):
            if isinstance(step, Segment):
                _run_again(step, values, barrier)
            else:
                _run(step, values)
        outputs = [values[id(tensor)] for tensor in self.outputs]
        return outputs[0] if len(outputs) == 1 else keras.tree.pack_sequence_as(self._outputs_struct, outputs)


def plan(model: keras.Model) -> list:
    """Returns what a functional model computes in its order: segments, and the nodes in none.

    The last block is left out: it would be computed again the moment it was done.

    Args:
        model: A functional model.

    Returns:
        `Segment`s and nodes.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None)
    >>> sum(isinstance(step, Segment) for step in plan(model))
    5
    """
    layered = model._nodes_by_depth
    order = [n for depth in sorted(layered, reverse=True) for n in layered[depth] if n.operation and not n.is_input]
    units: dict[str, list] = {}
    for node in order:
        match = _UNIT.match(node.operation.name)
        if match and getattr(node.operation, "activity_regularizer", None) is None:
            units.setdefault(match[1], []).append(node)
    units.pop(next(reversed(units), None), None)
    starts = {}
    made = {id(tensor): position for position, node in enumerate(order) for tensor in node.outputs}
    for nodes in units.values():
        segment, first = _segment(nodes, order, model.outputs), order.index(nodes[0])
        # Other layers between those of a block, which a model of one's own may have, may have to come first.
        if all(made.get(id(tensor), -1) < first for tensor in segment.inputs):
            starts[id(nodes[0])] = segment
    inside = {id(node) for segment in starts.values() for node in segment.nodes}
    steps = (starts.get(id(node), None if id(node) in inside else node) for node in order)
    return [step for step in steps if step is not None]


def _segment(nodes: list, order: list, results: Sequence) -> Segment:
    own = {id(node) for node in nodes}
    made = {id(tensor): tensor for node in nodes for tensor in node.outputs}
    taken = {id(tensor): tensor for node in nodes for tensor in node.input_tensors if id(tensor) not in made}
    used = {id(tensor) for node in order if id(node) not in own for tensor in node.input_tensors}
    used |= {id(tensor) for tensor in results}
    return Segment(tuple(nodes), tuple(taken.values()), tuple(t for key, t in made.items() if key in used))


def _run(node, values: dict) -> None:
    args, kwargs = node.arguments.fill_in(values)
    if getattr(node.operation, "_call_has_training_arg", False):
        # In the backward pass there is no call of the model around it that would say so.
        kwargs["training"] = True
    outputs = node.operation(*args, **kwargs)
    for tensor, value in zip(node.outputs, keras.tree.flatten(outputs), strict=True):
        values[id(tensor)] = value


def _run_again(segment: Segment, values: dict, barrier: bool) -> None:
    """Computes a segment so that it is computed again for its gradient; its results go to `values`."""
    trained, others = segment.variables()
    taken = [values[id(tensor)] for tensor in segment.inputs]

    def compute(inputs, weights, states):
        """A pure function: random state goes in and out, so that the second time draws the same numbers."""
        mapping = [*zip(trained, weights, strict=True), *zip(others, states, strict=True)]
        with keras.StatelessScope(state_mapping=mapping) as scope:
            inner = dict(zip(map(id, segment.inputs), inputs, strict=True))
            for node in segment.nodes:
                _run(node, inner)
        return [inner[id(tensor)] for tensor in segment.outputs], [scope.get_current_value(v) for v in others]

    weights, before = _read(trained), _read(others)
    if keras.backend.backend() == "tensorflow":
        from nfnet_keras.tensorflow_remat import recomputed

        outputs, after = recomputed(compute, taken, weights, before, barrier)
    else:
        outputs, after = keras.remat(compute)(taken, weights, before)
    values.update(zip(map(id, segment.outputs), outputs, strict=True))
    for variable, old, new in zip(others, before, after, strict=True):
        if new is not old:
            variable.assign(new)


def _read(variables: list) -> list:
    """Returns what variables hold now, as they store it, under mixed precision too."""
    from keras.src.backend.common.variables import AutocastScope

    with AutocastScope(None):
        held = [v.value for v in variables]
    if keras.backend.backend() == "tensorflow":
        from nfnet_keras.tensorflow_remat import read

        return read(held)
    if keras.backend.backend() == "torch":
        # It assigns in place. What steps change besides weights is random state, which is of whole numbers.
        return [value if value.is_floating_point() else value.clone() for value in held]
    return held
