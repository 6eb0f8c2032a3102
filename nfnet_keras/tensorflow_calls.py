"""Parts of a TensorFlow training step that are traced once for each shape, with gradients of their own.

A network repeats its layers, and Python would trace each of them anew: tens of thousands of operations, which
TensorFlow then optimizes one by one. A part of a step that is a function is traced and optimized once, and every layer
only calls it. `tf.custom_gradient` would put a dozen operations around each use besides.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import tensorflow as tf

from nfnet_keras.tensorflow_ahead import compile_ahead

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Gradient:
    """What a call in a graph that gives gradients computes them from.

    Args:
        function: Of arguments, what was kept, and the gradients from upstream, in which it is linear.
        arguments: Tensors.
        kept: Tensors.
        upstream: Tensors.
    """

    function: Callable
    arguments: list
    kept: list
    upstream: Sequence


class TracedOnce:
    """A function of tensors with a gradient of its own, of which each use is one operation of a graph.

    Args:
        forward: From tensors to a list of outputs and a list of what the gradient needs besides the arguments. It is
            pure: it reads no variable, and does the same at every call.
        backward: From the list of arguments, the list of what was kept, the list of the outputs' gradients and the
            positions of the arguments whose gradients nothing asks for, to the list of the gradients by the first
            arguments; the others have none. What nothing asks for is not computed. `None` for a function of
            which no gradient is taken.
        plain: From tensors to the list of outputs, by operations that TensorFlow can derive as often as one likes.
            Second derivatives are those of this function. Defaults to what `forward` returns.
        jit_compile: Whether XLA compiles both. Defaults to `False`.
        optimized: Whether TensorFlow optimizes the graph of the forward function: some hundredths of a second, well
            spent where it makes one operation of two. Defaults to `False`.
        gradients: `"together"`: one operation gives all gradients, and what comes behind waits for all. `"apart"`: that
            by the first argument has an operation of its own, and what needs only this one goes on meanwhile. `"in
            turn"`: it is computed before the others, and handed on when they are there too, so that less memory is
            needed at a time. Defaults to `"together"`.

    Example:

    >>> square = TracedOnce(lambda x: ([x * x], []), lambda x, kept, upstream, skipped: [2 * x[0] * upstream[0]])
    >>> @tf.function
    ... def compute(x):
    ...     with tf.GradientTape() as tape:
    ...         tape.watch(x)
    ...         (y,) = square(x)
    ...     return tape.gradient(y, x)
    >>> float(compute(tf.constant(3.0)))
    6.0
    """

    def __init__(
        self,
        forward: Callable,
        backward: Callable | None,
        plain: Callable | None = None,
        jit_compile: bool = False,
        optimized: bool = False,
        gradients: Literal["together", "apart", "in turn"] = "together",
    ):
        self._forward, self._backward, self._jit, self._optimized = forward, backward, jit_compile, optimized
        self._gradients = gradients
        self._plain = plain or (lambda *arguments: forward(*arguments)[0])
        self._traced: dict[tuple, Callable] = {}
        self._derivatives: dict[tuple, TracedOnce] = {}
        self._counts = 0, 0  # of outputs, and of what is kept
        self._name = f"nfnet_keras_{next(_numbers)}" if backward else None
        if backward:
            tf.RegisterGradient(self._name)(self._gradient)

    def __call__(self, *arguments) -> list:
        """Returns the outputs for tensors of a graph."""
        arguments = [tf.convert_to_tensor(argument) for argument in arguments]
        return self.record(arguments, self.compute(arguments))

    def compute(self, arguments: Sequence) -> list:
        """Returns the outputs, and what is kept, for tensors of a graph; tapes do not see it."""
        return self._call(self._function(arguments), arguments).outputs

    def record(self, arguments: Sequence, results: Sequence) -> list:
        """Tells tapes that this function of the arguments gave the results of `compute`, and returns the outputs."""
        outputs, kept = results[: self._counts[0]], results[self._counts[0] :]
        if self._name is not None:
            # For tapes, what was kept is an argument: they would make zeros for an output without a gradient.
            tf.__internal__.record_gradient(self._name, [*arguments, *kept], (), outputs)
        return outputs

    def _function(self, arguments: Sequence):
        """Returns the forward function, traced for the shapes of the arguments, unless it was before."""
        specs = tuple(tf.TensorSpec(argument.shape, argument.dtype) for argument in arguments)
        if specs not in self._traced:

            def run(*arguments):
                outputs, kept = self._forward(*arguments)
                self._counts = len(outputs), len(kept)
                return [*outputs, *kept]

            # One that is called, not put in place of each call, is optimized once.
            attributes = None if self._jit else {"_noinline": True}
            function = tf.function(
                run, autograph=False, jit_compile=self._jit or None, experimental_attributes=attributes
            )
            self._traced[specs] = function.get_concrete_function(*specs)
            if self._jit:
                compile_ahead(self._traced[specs], specs)
        return self._traced[specs]

    def _call(self, function, arguments: Sequence) -> tf.Operation:
        graph = tf.compat.v1.get_default_graph()
        function.add_to_graph(graph)
        call = graph.create_op(
            "PartitionedCall",
            list(arguments),
            [output.dtype for output in function.outputs],
            attrs={
                "Tin": _types(arguments),
                "Tout": _types(function.outputs),
                "f": tf.compat.v1.AttrValue(func=tf.compat.v1.NameAttrList(name=function.name)),
                "config_proto": _config(self._optimized),
                **({"_XlaMustCompile": tf.compat.v1.AttrValue(b=True)} if self._jit else {}),
            },
        )
        if self._name is not None:
            # As TensorFlow's own calls have theirs. A name in the graph is what SavedModel cannot save.
            call._gradient_function = self._gradient
        for output, known in zip(call.outputs, function.outputs, strict=True):
            output.set_shape(known.shape)
        return call

    def _gradient(self, call, *upstream) -> list:
        """Returns the gradients of a call, an operation of a graph or a tape's record of it."""
        count, kept = self._counts
        if isinstance(call, tf.Operation):
            tensors, arguments = [*call.inputs, *call.outputs[count:]], len(call.inputs)
        else:
            tensors, arguments = list(call.inputs), len(call.inputs) - kept
        skipped = tuple(getattr(call, "skip_input_indices", None) or ())
        wanted = [i for i in range(arguments) if i not in skipped]
        first = 0 if self._gradients == "together" else wanted.count(0)
        in_turn, found = self._gradients == "in turn", {}
        for part in filter(None, (wanted[:first], wanted[first:])):
            derivative = self._derivative(arguments, tuple(i for i in range(arguments) if i not in part))
            with tf.control_dependencies(list(found.values()) if in_turn else []):
                results = derivative(*tensors, *upstream[:count])
            if results:
                known = Gradient(derivative, tensors[:arguments], tensors[arguments:], upstream[:count])
                results[0].op._nfnet_keras_gradient = known
            # The last arguments may be constants, which have none.
            found.update(zip(part, results, strict=False))
        if in_turn and 0 in found:
            with tf.control_dependencies(list(found.values())):
                found[0] = tf.identity(found[0])
        return [found.get(i) for i in range(len(call.inputs))]

    def _derivative(self, arguments: int, skipped: tuple[int, ...]) -> "TracedOnce":
        """Returns the function of arguments, what was kept, and upstream gradients to the gradients that are wanted."""
        if (arguments, skipped) not in self._derivatives:
            self._derivatives[arguments, skipped] = self._derive(arguments, skipped)
        return self._derivatives[arguments, skipped]

    def _derive(self, arguments: int, skipped: tuple[int, ...]) -> "TracedOnce":
        def split(tensors):
            last = arguments + self._counts[1]
            return list(tensors[:arguments]), list(tensors[arguments:last]), list(tensors[last:])

        def wanted(gradients):
            return [gradient for i, gradient in enumerate(gradients) if i not in skipped]

        def plain(*tensors):
            given, _, upstream = split(tensors)
            with tf.GradientTape() as tape:
                tape.watch(given)
                outputs = self._plain(*given)
            return wanted(tape.gradient(outputs, given, upstream, "zero"))[: derivative._counts[0]]

        def second(tensors, kept, upstream, skipped):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                gradients = plain(*tensors)
            return tape.gradient(gradients, tensors, upstream, "zero")

        def forward(*tensors):
            return wanted(self._backward(*split(tensors), skipped)), []

        derivative = TracedOnce(forward, second, plain, self._jit)
        return derivative


def gradient_behind(tensor) -> Gradient | None:
    """Returns what a tensor was computed from, if it is a gradient by a `TracedOnce` in a graph.

    Args:
        tensor: Of a graph, or not.

    Returns:
        The `Gradient`; `None` for any other tensor.

    Example:

    >>> gradient_behind(tf.constant(1.0)) is None
    True
    """
    return None if tf.executing_eagerly() else getattr(tensor.op, "_nfnet_keras_gradient", None)


def kept_in_graph(name: str) -> dict:
    """Returns a dictionary that the graph which is being traced keeps under a name, an empty one at first.

    Args:
        name: Of what is in it.

    Returns:
        One and the same dictionary for a graph and a name.

    Example:

    >>> @tf.function
    ... def compute():
    ...     kept_in_graph("numbers")[1] = "one"
    ...     return tf.constant(len(kept_in_graph("numbers")))
    >>> int(compute())
    1
    """
    graph, name = tf.compat.v1.get_default_graph(), f"_nfnet_keras_{name}"
    if not hasattr(graph, name):
        setattr(graph, name, {})
    return getattr(graph, name)


def call_once(function: Callable, *tensors) -> list:
    """Calls a pure function of tensors, in a graph as one operation, for which no gradient is taken.

    Args:
        function: From tensors to a list of tensors. One and the same object at every call: it is traced once for each.
        *tensors: Its arguments.

    Returns:
        List of tensors.

    Example:

    >>> double = lambda x: [2.0 * x]
    >>> float(tf.function(lambda x: call_once(double, x))(tf.constant(3.0))[0])
    6.0
    """
    if tf.executing_eagerly():
        return function(*tensors)
    return _without_gradient(function)(*tensors)


@functools.cache
def _without_gradient(function: Callable) -> TracedOnce:
    return TracedOnce(lambda *tensors: (function(*tensors), []), None)


def gradient_of(function: Callable, by: int) -> Callable:
    """Returns the gradient of a function, as TensorFlow derives it.

    Args:
        function: Of tensors to a tensor.
        by: The gradient is that by this many of its first arguments.

    Returns:
        Function of the upstream gradient and of all arguments to the list of gradients.

    Example:

    >>> float(gradient_of(tf.square, 1)(tf.constant(1.0), tf.constant(3.0))[0])
    6.0
    """

    def gradient(upstream, *arguments):
        with tf.GradientTape() as tape:
            tape.watch(arguments[:by])
            y = function(*arguments)
        return list(tape.gradient(y, arguments[:by], upstream))

    return gradient


def _types(tensors: Sequence) -> tf.compat.v1.AttrValue:
    types = [tensor.dtype.as_datatype_enum for tensor in tensors]
    return tf.compat.v1.AttrValue(list=tf.compat.v1.AttrValue.ListValue(type=types))


@functools.cache
def _config(optimized: bool) -> tf.compat.v1.AttrValue:
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = not optimized
    return tf.compat.v1.AttrValue(s=config.SerializeToString())
