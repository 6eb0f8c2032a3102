"""What replicas that share a processor compute once for all of them."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from nfnet_keras.tensorflow_calls import Gradient, TracedOnce, gradient_behind, kept_in_graph
from nfnet_keras.tensorflow_replicas import shares_processor


def computed_once(function: TracedOnce, *variables) -> list | None:
    """Calls a function of variables on one of the replicas that share a processor, and gives all of them its results.

    Each has its own copy of a variable, and the copies are equal. The gradients are each replica's own, until they are
    summed (`on_the_sum`).

    Args:
        function: Of tensors. The same object on every replica.
        *variables: `keras.Variable`.

    Returns:
        The function's outputs; `None` where there are no such replicas, or something takes a variable's place (SAM's
        moved weights, a frozen layer's).

    Example:

    >>> double = TracedOnce(lambda x: ([2.0 * x], []), None)
    >>> computed_once(double, keras.Variable(1.0)) is None
    True
    """
    if not shares_processor():
        return None
    values = [each.value if isinstance(each, keras.Variable) else each for each in variables]
    if not all(isinstance(value, tf.distribute.DistributedValues) for value in values):
        return None
    key = function, *(value.ref() for value in values)
    counts, results = kept_in_graph("once").setdefault(key, ({}, []))
    replica = int(tf.get_static_value(tf.distribute.get_replica_context().replica_id_in_sync_group))
    # A layer may be called more than once, and be updated in between: replicas have the same call in common.
    call = counts[replica] = counts.get(replica, -1) + 1
    tensors = [tf.convert_to_tensor(value) for value in values]
    if call == len(results):
        results.append(function.compute(tensors))
    return function.record(tensors, results[call])


def on_the_sum(tensors: list, function: Callable) -> list:
    """Sums tensors over replicas that share a processor, and calls a function with the sums once, not on each replica.

    Args:
        tensors: List of this replica's tensors.
        function: From the list of sums to a list of tensors.

    Returns:
        The function's result, the same on every replica.
    """

    def run(strategy, tensors):
        # Not by the strategy: its way may be one for devices that do not share their memory, and costs several copies.
        with tf.device(strategy.extended.worker_devices[0]):
            return function(add_up([strategy.experimental_local_results(each) for each in tensors]))

    return list(tf.distribute.get_replica_context().merge_call(run, args=(tensors,)))


def add_up(gradients: Sequence[Sequence]) -> list:
    """Sums gradients over replicas.

    Where replicas have the results of one call in common (`TracedOnce.record`), its gradients are the same linear
    function of what comes from upstream: that is summed, and the gradients are computed once.

    Args:
        gradients: For each variable the tensors of all replicas.

    Returns:
        For each variable the sum.

    Example:

    >>> add_up([[tf.constant(1.0), tf.constant(2.0)]])[0].numpy().item()
    3.0
    """
    of_sums: dict[tf.Operation, list] = {}
    return [_sum_of(parts, of_sums) for parts in gradients]


def _sum_of(parts: Sequence, of_sums: dict):
    found = [gradient_behind(part) for part in parts]
    if not _in_common(found):
        return tf.add_n(parts)
    call, one = parts[0].op, found[0]
    if call not in of_sums:
        upstream = map(tf.add_n, zip(*(each.upstream for each in found), strict=True))
        of_sums[call] = one.function(*one.arguments, *one.kept, *upstream)
    return of_sums[call][parts[0].value_index]


def _in_common(gradients: Sequence[Gradient | None]) -> bool:
    """Whether these are gradients of one call: then what it kept are the same tensors."""
    if None in gradients or not gradients[0].kept:
        return False
    return len({(id(each.function), *map(id, each.kept)) for each in gradients}) == 1
