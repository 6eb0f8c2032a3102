"""What TensorFlow needs around a training step."""

import contextlib
import ctypes
import itertools
from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from nfnet_keras import sam as sam_lib
from nfnet_keras.tensorflow_calls import kept_in_graph
from nfnet_keras.tensorflow_replicas import has_one_replica, is_alone, shares_processor
from nfnet_keras.tensorflow_sharing import on_the_sum


def building_ahead(model: keras.Model, train_function: Callable) -> Callable:
    """Makes a Keras training function create the optimizer's and the metrics' variables before it is traced.

    A `tf.function` that creates variables while it is traced is traced a second time, and each variable takes it
    several times as long to create. For NFNet-F0 that is half of the time to the first step. After the first steps,
    the memory that tracing and compiling needed goes back to the system.

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
    ran = False

    def function(iterator):
        nonlocal ran
        if isinstance(iterator, tf.data.Iterator):
            _build(model, iterator.element_spec)
        elif not isinstance(iterator, tf.distribute.DistributedIterator):
            first = next(iterator)
            _build(model, first)
            iterator = itertools.chain([first], iterator)
        results = train_function(iterator)
        if not ran:
            ran = True
            _give_back_memory()
        return results

    return function


def _give_back_memory() -> None:
    # The C library would keep it: 30 MiB for NFNet-F0, 110 for F3. Only glibc has this function.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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


def shared_constant(value, dtype=tf.int32):
    """Returns a constant; a graph has each but once.

    A third of the operations of a training step would be constants otherwise, and each takes its time to trace.

    Args:
        value: Number, or tuple of numbers.
        dtype: Of the tensor. Defaults to `tf.int32`.

    Returns:
        Tensor.

    Example:

    >>> shared_constant((1, 2)).numpy().tolist()
    [1, 2]
    """
    dtype = tf.as_dtype(dtype)
    if tf.executing_eagerly() or not has_one_replica():
        # Each device should have its own.
        return tf.constant(value, dtype)
    constants = kept_in_graph("constants")
    if (value, dtype) not in constants:
        # Nothing that it is asked for behind is behind it for all others, too.
        with tf.control_dependencies(None):
            constants[value, dtype] = tf.constant(value, dtype)
    return constants[value, dtype]


def likely_batch(images) -> int:
    """Returns the number of images of a batch, or what it is likely to be where the graph does not tell.

    Args:
        images: Tensor, the images along its first axis.

    Returns:
        The number; 8 where it is not known.

    Example:

    >>> likely_batch(tf.ones((2, 4, 4, 3))), likely_batch(tf.TensorSpec((None, 4, 4, 3)))
    (2, 8)
    """
    return 8 if images.shape[0] is None else images.shape[0]


def euclidean_norm(x, axes: Sequence[int]):
    """Euclidean norm over some axes, as one operation that does not write the squares to memory.

    Args:
        x: Tensor.
        axes: The axes to sum over.

    Returns:
        Tensor without these axes.

    Example:

    >>> euclidean_norm(tf.constant([[3.0], [4.0]]), (0,)).numpy().tolist()
    [5.0]
    """
    return tf.raw_ops.EuclideanNorm(input=x, axis=shared_constant(tuple(axes)))


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
        momentum=shared_constant(momentum, variable.dtype),
        use_nesterov=nesterov,
    )


def sharpness_aware_step(model: keras.Model, sam: sam_lib.SAM, data) -> dict:
    """One training step with SAM, in a replica of a `tf.distribute` strategy or without one.

    No variable is assigned before the optimizer does: the moved weights are tensors that the model is called with. So
    there is nothing to put back and no order of assignments to keep inside a `tf.function`.

    Args:
        model: A compiled, built model with trainable variables.
        sam: Settings.
        data: The batch of this replica.

    Returns:
        The logs.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
    variables = model.trainable_variables
    weights = [tf.convert_to_tensor(v.value) for v in variables]
    with tf.GradientTape() as tape:
        tape.watch(weights)
        loss, _, _ = sam_lib.loss_at(model, weights, *sam_lib.first_share((x, y, sample_weight), sam.fraction))
        loss = model.optimizer.scale_loss(loss)
    ascent = _sum_over_replicas([densify(g) for g in tape.gradient(loss, weights)])
    moved, finite = sam_lib.climb(weights, ascent, sam.rho)

    with tf.GradientTape() as tape:
        tape.watch(moved)
        loss, y_pred, scope = sam_lib.loss_at(model, moved, x, y, sample_weight)
        scaled = sam_lib.spoil(model.optimizer.scale_loss(loss), finite)
    gradients = tape.gradient(scaled, moved)
    for variable in (*model.non_trainable_variables, *model.metrics_variables):
        value = scope.get_current_value(variable)
        if value is not None:
            variable.assign(value)
    size = tf.shape(next(t for t in keras.tree.flatten(x) if t is not None))[0]
    # Keras divides losses by the number of replicas, so that gradients can be summed.
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    model._loss_tracker.update_state(loss * tf.cast(replicas, loss.dtype), sample_weight=size)
    model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
    return model.compute_metrics(x, y, y_pred, sample_weight=sample_weight)


def _sum_over_replicas(gradients: list) -> list:
    known = [g for g in gradients if g is not None]
    if is_alone() or not known:
        return gradients
    if shares_processor():
        summed = iter(on_the_sum(known, list))
    else:
        summed = iter(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, known))
    return [None if g is None else next(summed) for g in gradients]
