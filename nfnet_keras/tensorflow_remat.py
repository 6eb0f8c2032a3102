"""What rematerialization is on TensorFlow."""

from collections.abc import Callable, Sequence

import tensorflow as tf


def recomputed(
    compute: Callable, inputs: Sequence, weights: Sequence, states: Sequence, barrier: bool = False
) -> tuple[list, list]:
    """Runs a pure function and keeps nothing of it for the backward pass but its arguments.

    `tf.recompute_grad` would do it too, at the price of a copy of all arguments and without order: it lets the
    recomputation of one function start before all gradients of the one behind it are there, whose tensors then stay.

    Args:
        compute: Takes `inputs`, `weights` and `states`; returns a list of outputs, and a list of further results that
            have no gradient.
        inputs: Tensors of floats.
        weights: Tensors of floats.
        states: Tensors that no gradient is taken by.
        barrier: Whether the arguments of the second run are made to depend on numbers that only the backward pass has.
            Elsewhere an order of operations is enough to keep the two runs apart; XLA knows no such order and would see
            that the two are the same.

    Returns:
        What `compute` returned.

    Example:

    >>> x = tf.Variable(3.0)
    >>> with tf.GradientTape() as tape:
    ...     (y,), _ = recomputed(lambda inputs, weights, _: ([weights[0] ** 2], []), [], [x.read_value()], [])
    >>> float(tape.gradient(y, x))
    6.0
    """
    count, further = len(inputs), []

    @tf.custom_gradient
    def run(*arguments):
        # What needs weights alone could run at once for all the network, and its results would wait for their turn.
        with tf.control_dependencies(arguments[:count]):
            # Nothing of the first run is to be on a tape that somebody holds.
            first = [tf.stop_gradient(t) for t in arguments]
        outputs, results = compute(first[:count], first[count:], list(states))
        further.extend(results)

        def gradient(*upstream):
            with tf.control_dependencies(upstream):
                again = [tf.identity(t) for t in arguments]
            if barrier:
                again = [t + tf.cast(_zero(upstream[0]), t.dtype) for t in again]
            with tf.GradientTape() as tape:
                tape.watch(again)
                outputs, _ = compute(again[:count], again[count:], list(states))
            found = tape.gradient(outputs, again, upstream, unconnected_gradients="zero")
            # The segment before starts when all of this one is done and its tensors are free.
            with tf.control_dependencies(found[count:]):
                return [*(tf.identity(g) for g in found[:count]), *found[count:]]

        return outputs, gradient

    outputs = run(*inputs, *weights)
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs], further


def read(values: Sequence) -> list:
    """Returns tensors of what variables hold now.

    Args:
        values: `tf.Variable`s, which hold something else later, or tensors.

    Returns:
        Tensors.

    Example:

    >>> x = tf.Variable(1)
    >>> (now,) = read([x])
    >>> _ = x.assign(2)
    >>> int(now)
    1
    """
    return [tf.convert_to_tensor(value) for value in values]


def _zero(tensor):
    """Zero, but no compiler can know it before it has the tensor."""
    first = tf.reduce_max(tf.reshape(tensor, [-1])[:1])
    return tf.where(tf.equal(first, first), 0.0, float("nan"))
