"""A functional model as one list of steps, models inside of it resolved, and its values by number.

What looks into a network (signals, explanations) walks this list: it sees every value and keeps none longer than it is
needed.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import keras
import numpy as np

from nfnet_keras.shapes import fits

# The class of what `keras.Model(inputs, outputs)` makes, which Keras does not name in public.
_FUNCTIONAL = keras.src.models.Functional


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of one layer or operation.

    Args:
        name: The layer's name; inside of a nested model, behind the model's name and a slash.
        node: Keras's record of the call.
        inputs: Numbers of the values that it takes.
        outputs: Numbers of the values that it gives.
    """

    name: str
    node: object
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def operation(self) -> keras.Operation:
        """The layer or operation that is called."""
        return self.node.operation


class Graph:
    """The steps of a functional model in the order in which they can be taken.

    Args:
        model: A built functional or Sequential model, with such models inside or without.
        caller: Name of the function that asks, for the message of the error.

    Attributes:
        steps: The steps.
        inputs: Numbers of the model's inputs.
        outputs: Numbers of the model's outputs.

    Raises:
        ValueError: If Keras does not know the model's layers: it is a subclass with a `call` of its own, or not built.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.ReLU(name="b")])
    >>> [step.name for step in Graph(model, "f").steps]
    ['a', 'b']
    """

    def __init__(self, model: keras.Model, caller: str):
        self._model = functional(model)
        if self._model is None:
            raise ValueError(
                f"`{caller}` takes a built functional or Sequential model, whose layers Keras knows. Received: "
                f"{type(model).__name__}, which "
                + (
                    "is not built yet: give it a keras.Input, or call it on a batch first."
                    if isinstance(model, keras.Sequential)
                    else "computes in a `call` of its own. Make it of keras.Input(...) and layers, or give the "
                    "functional model inside of it."
                )
            )
        self.steps: list[Step] = []
        self._count = len(self._model.inputs)
        self.inputs = list(range(self._count))
        self.outputs = self._append(self._model, self.inputs, "")

    def _append(self, model, given: Sequence[int], prefix: str) -> list[int]:
        """Adds the steps of a model whose inputs are values that are there; returns the numbers of its outputs."""
        numbers = dict(zip((id(tensor) for tensor in model.inputs), given, strict=True))
        nodes = model._nodes_by_depth
        for node in (node for depth in sorted(nodes, reverse=True) for node in nodes[depth]):
            if not node.operation or node.is_input:
                continue
            taken = [numbers[id(tensor)] for tensor in node.input_tensors]
            inner = functional(node.operation)
            name = prefix + node.operation.name
            if inner is not None:
                made = self._append(inner, taken, f"{name}/")
            else:
                made = list(range(self._count, self._count + len(node.outputs)))
                self._count += len(made)
                self.steps.append(Step(name, node, tuple(taken), tuple(made)))
            numbers.update(zip((id(tensor) for tensor in node.outputs), made, strict=True))
        return [numbers[id(tensor)] for tensor in model.outputs]

    @functools.cached_property
    def producers(self) -> dict[int, Step]:
        """The step that gives a value, by the value's number; inputs have none."""
        return {number: step for step in self.steps for number in step.outputs}

    @functools.cached_property
    def ancestors(self) -> dict[int, int]:
        """Of each value all values that it comes from, itself included: a whole number with a bit for each."""
        found = {number: 1 << number for number in self.inputs}
        for step in self.steps:
            before = functools.reduce(lambda bits, number: bits | found[number], step.inputs, 0)
            found.update({number: before | 1 << number for number in step.outputs})
        return found

    def tensors(self, images) -> list:
        """Makes tensors of what the model takes.

        Args:
            images: Array, or a list or dictionary of arrays, as the model takes it.

        Raises:
            ValueError: If it is not of the model's shape.
        """
        flat, wanted = keras.tree.flatten(images), self._model.inputs
        shapes = [tuple(np.shape(x)) for x in flat]
        right = len(flat) == len(wanted) and all(map(fits, shapes, (tensor.shape for tensor in wanted)))
        if not right or not all(map(len, flat)):
            raise ValueError(
                f"The model {self._model.name!r} takes at least one image of shape "
                f"{', '.join(str(tuple(tensor.shape)) for tensor in wanted)}. Received: "
                f"{', '.join(map(str, shapes)) or 'nothing'}"
            )
        return [keras.ops.convert_to_tensor(x, dtype=t.dtype) for x, t in zip(flat, wanted, strict=True)]

    def run(
        self,
        tensors: Sequence,
        visit: Callable,
        training: bool = False,
        instead: Mapping[int, Callable] | None = None,
    ) -> None:
        """Takes all steps. A value is let go as soon as no later step needs it.

        Args:
            tensors: What `tensors` gives.
            visit: Called as `visit(number, value)` with each value; what it returns takes the value's place.
            training: Whether layers behave as in training. Defaults to `False`.
            instead: What is called in the place of the step that gives the value of that number. Defaults to `None`.
        """
        last = {number: position for position, step in enumerate(self.steps) for number in step.inputs}
        values = {number: visit(number, value) for number, value in zip(self.inputs, tensors, strict=True)}
        for position, step in enumerate(self.steps):
            symbols = {id(t): values[n] for t, n in zip(step.node.input_tensors, step.inputs, strict=True)}
            args, kwargs = step.node.arguments.fill_in(symbols)
            if getattr(step.operation, "_call_has_training_arg", False):
                kwargs["training"] = training
            operation = (instead or {}).get(step.outputs[0], step.operation)
            made = keras.tree.flatten(operation(*args, **kwargs))
            for number, value in zip(step.outputs, made, strict=True):
                value = visit(number, value)
                if number in last:
                    values[number] = value
            for number in step.inputs:
                if last[number] == position:
                    values.pop(number, None)
            del symbols, args, kwargs, made, value


def functional(operation) -> keras.Model | None:
    """Returns the functional model that a model is made of; `None` for a layer or a model with a `call` of its own.

    Example:

    >>> functional(keras.layers.Dense(2)) is None
    True
    """
    if isinstance(operation, keras.Sequential):
        return operation._functional if operation.built else None
    if not isinstance(operation, _FUNCTIONAL) or not operation.built:
        return None
    # NormalizerFreeModel's own `call` computes the same, with blocks computed again in training.
    call = type(operation).call
    own = call is not _FUNCTIONAL.call and not call.__module__.startswith("nfnet_keras.")
    return None if own else operation
