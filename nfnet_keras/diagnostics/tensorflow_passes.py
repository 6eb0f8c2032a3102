"""What `passes.py` promises, on TensorFlow."""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf


def forward(function: Callable, variables: Sequence, changed: Sequence) -> Callable:
    """As in `passes.py`."""

    def run(*tensors):
        with keras.StatelessScope(state_mapping=list(changed)):
            return function(*tensors)

    return run


def backward(function: Callable, variables: Sequence) -> Callable:
    """As in `passes.py`."""

    def run(*tensors):
        kept = []
        with tf.GradientTape(watch_accessed_variables=False) as tape:

            def at(value):
                tape.watch(value)
                kept.append(value)
                return value

            with keras.StatelessScope():
                number = function(at, *tensors)
        return kept[0], tape.gradient(number, kept[0])

    return run
