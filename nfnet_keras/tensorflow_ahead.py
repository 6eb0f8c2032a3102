"""Functions that XLA compiles while the graph that calls them is still being traced."""

import collections
import concurrent.futures
import functools
import math
import threading
from collections.abc import Callable, Sequence

import tensorflow as tf

from nfnet_keras.tensorflow_replicas import has_one_replica

# Elements of the arguments of calls that run together. Compiling ahead computes once, with zeros; larger ones might not
# fit into memory.
MAX_SIZE = 2**24

# Functions of a graph, and the shapes of their arguments.
_pending: collections.deque[tuple[Callable, tuple[tf.TensorSpec, ...]]] = collections.deque()


def compiled(function: Callable) -> Callable:
    """Compiles a function with XLA, and begins to as soon as a graph that calls it is traced.

    On its own, XLA begins when the graph runs for the first time. Tracing a training step takes one core for seconds
    meanwhile, and leaves the others idle.

    Args:
        function: Of tensors, by position, to a tensor or a list of tensors. It reads no variable.

    Returns:
        A function of tensors.

    Example:

    >>> float(compiled(lambda x: 2.0 * x)(tf.constant(3.0)))
    6.0
    """
    function = tf.function(function, jit_compile=True, autograph=False)
    begun = set()

    def call(*arguments):
        specs = tuple(tf.TensorSpec(argument.shape, argument.dtype) for argument in arguments)
        if specs not in begun and not tf.executing_eagerly():
            begun.add(specs)
            # What the graph will call: another thread would trace it again where this one updates a variable.
            compile_ahead(function.get_concrete_function(*specs), specs)
        return function(*arguments)

    return call


def compile_ahead(function: Callable, specs: Sequence[tf.TensorSpec]) -> None:
    """Begins to compile a function that a graph will call, in another thread.

    Args:
        function: A traced function that XLA compiles.
        specs: Its arguments.

    Example:

    >>> specs = [tf.TensorSpec((2, 3))]
    >>> compile_ahead(tf.function(tf.negative, jit_compile=True).get_concrete_function(*specs), specs)
    """
    if _can_be_ahead(specs):
        _pending.append((function, tuple(specs)))
        _worker().submit(_run_pending)


@functools.cache
def _worker() -> concurrent.futures.Executor:
    # One: tracing needs a core for itself.
    return concurrent.futures.ThreadPoolExecutor(1, "nfnet_keras_compile_ahead")


def _size(specs: Sequence[tf.TensorSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in specs)


def _can_be_ahead(specs: Sequence[tf.TensorSpec]) -> bool:
    return has_one_replica() and all(spec.shape.is_fully_defined() for spec in specs) and _size(specs) <= MAX_SIZE


def _run_pending() -> None:
    calls, size = [], 0
    # Python waits for this thread when it ends, and what is still to be compiled would keep it.
    while _pending and threading.main_thread().is_alive():
        size += _size(_pending[0][1])
        if calls and size > MAX_SIZE:
            break
        calls.append(_pending.popleft())
    if not calls:
        return

    def run(*arguments):
        remaining = iter(arguments)
        return [function(*(next(remaining) for _ in specs)) for function, specs in calls]

    # Called from a graph: what is called eagerly is compiled under another name, and once more for a graph.
    all_specs = [spec for _, specs in calls for spec in specs]
    graph = tf.function(run, autograph=False).get_concrete_function(*all_specs)
    graph(*(tf.zeros(spec.shape, spec.dtype) for spec in all_specs))
