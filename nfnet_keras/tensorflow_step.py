"""What TensorFlow needs around a training step."""

import itertools
from collections.abc import Callable

import keras
import tensorflow as tf


def building_ahead(model: keras.Model, train_function: Callable) -> Callable:
    """Makes a Keras training function create the optimizer's and the metrics' variables before it is traced.

    A `tf.function` that creates variables while it is traced is traced a second time, and each variable takes it
    several times as long to create. For NFNet-F0 that is half of the time to the first step.

    Args:
        model: A compiled, built model.
        train_function: The function that Keras made of the model's `train_step`; it takes an iterator over batches.

    Returns:
        A function to use in its place.

    Example:

    >>> import nfnet_keras as nfk
    >>> model = nfk.create_model("nfnet_tiny", weights=None, classes=10)
    >>> model.compile("sgd", "categorical_crossentropy")
    >>> callable(building_ahead(model, model.make_train_function()))
    True
    """

    def function(iterator):
        if isinstance(iterator, tf.data.Iterator):
            _build(model, iterator.element_spec)
        elif not isinstance(iterator, tf.distribute.DistributedIterator):
            first = next(iterator)
            _build(model, first)
            iterator = itertools.chain([first], iterator)
        return train_function(iterator)

    return function


def _build(model: keras.Model, batch) -> None:
    if not model.built:
        return
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    outputs = getattr(model, "_outputs_struct", None)
    _, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
    targets = [target for target in keras.tree.flatten(y) if target is not None]
    if outputs is None or not targets or any(tf.TensorShape(target.shape).rank is None for target in targets):
        return

    def describe(tensor):
        if tensor is None:
            return None
        return keras.KerasTensor(tuple(tensor.shape), keras.backend.standardize_dtype(tensor.dtype))

    y_true, y_pred = (keras.tree.map_structure(describe, part) for part in (y, outputs))
    for part in (model._compile_loss, model._compile_metrics):
        if part is not None and not part.built:
            part.build(y_true, y_pred)


def densify(gradient):
    """Returns a gradient as a tensor: an embedding's comes as the rows that were looked up.

    Args:
        gradient: Tensor, `tf.IndexedSlices` or `None`.

    Returns:
        Tensor of the variable's shape, or `None`.

    Example:

    >>> densify(tf.IndexedSlices(tf.ones((1, 2)), tf.constant([1]), tf.constant([3, 2]))).shape
    TensorShape([3, 2])
    """
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def apply_momentum(variable, velocity, gradient, learning_rate, momentum: float, nesterov: bool) -> None:
    """One step of SGD with momentum, as one operation: a graph of NFNet-F0 is a tenth smaller for it.

    `m = momentum * m + g`, then `w -= learning_rate * (g + momentum * m)` with Nesterov momentum, else
    `w -= learning_rate * m`.

    Args:
        variable: `tf.Variable` w.
        velocity: `tf.Variable` m of the same shape.
        gradient: Tensor g of the same shape.
        learning_rate: Scalar tensor of the variable's dtype.
        momentum: Decay of the velocity.
        nesterov: Whether to use Nesterov momentum.

    Example:

    >>> w, m = tf.Variable([1.0]), tf.Variable([0.0])
    >>> apply_momentum(w, m, tf.constant([1.0]), tf.constant(0.1), 0.5, nesterov=False)
    >>> float(w[0]) < 0.91
    True
    """
    tf.raw_ops.ResourceApplyMomentum(
        var=variable.handle,
        accum=velocity.handle,
        lr=learning_rate,
        grad=densify(gradient),
        momentum=tf.constant(momentum, variable.dtype),
        use_nesterov=nesterov,
    )
