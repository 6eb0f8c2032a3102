"""Convolution with scaled weight standardization as TensorFlow trains it fastest on a CPU, with its gradient."""

import dataclasses
import functools
import math
from collections.abc import Callable

import tensorflow as tf

from nfnet_keras.layers.grouped_conv2d import CPUConvolution
from nfnet_keras.tensorflow_ahead import compiled
from nfnet_keras.tensorflow_calls import TracedOnce, gradient_of
from nfnet_keras.tensorflow_convolution import convolution_for, uses_onednn
from nfnet_keras.tensorflow_fusion import is_large
from nfnet_keras.tensorflow_replicas import shares_processor
from nfnet_keras.tensorflow_sharing import computed_once
from nfnet_keras.tensorflow_step import likely_batch
from nfnet_keras.tensorflow_winograd import has_narrow_vectors

# Added to the variance where a floor takes the place of it: too little to change a number above any floor.
_TINY = 1e-30

# Elements of a kernel from which on the order of its gradients matters for what a step holds at its peak.
_HUGE = 2**22

# Pixels of the images that oneDNN's batch normalisation takes a kernel for.
_PIXELS = 16

# Elements of a kernel for each of its inputs from which on a step with so few images is one of kernels.
_FEW = 4


@dataclasses.dataclass(frozen=True)
class Standardization:
    """Standardization of kernels, of which a training step also needs the gradient.

    Args:
        forward: Function of kernel (height, width, inputs, outputs) and gain (outputs,) to the standardised kernel and
            a list of small tensors, which are kept.
        again: Function of kernel, gain and what was kept to the standardised kernel.
        gradient: Function of kernel, gain, what was kept, and the gradient of the standardised kernel, to the
            gradients of kernel and gain.
        plain: Function of kernel and gain to the standardised kernel that TensorFlow can derive.

    Example:

    >>> found = by_operations(tf.multiply, 2.0)
    >>> float(tf.reduce_max(found.again(tf.ones((1, 1, 2, 3)), tf.ones(3), [])))
    2.0
    """

    forward: Callable
    again: Callable
    gradient: Callable
    plain: Callable


def convolve_standardized(standardization: Standardization, settings: CPUConvolution, inputs, kernel, gain, bias=None):
    """Convolves with a kernel that is standardised first, and keeps little but inputs and kernel for the gradient.

    The standardised kernel is computed again on the way back, right before it is used: kept, those of all layers are a
    second copy of the network. It is kept where the inputs, which are kept in any case, are of several images and no
    smaller. Replicas that share a processor standardise the kernel of a variable once for all of them; what takes a
    variable's place each standardises itself, and keeps.

    Args:
        standardization: Of the kernel.
        settings: Of the convolution.
        inputs: Tensor of rank 4.
        kernel: Tensor or variable of shape (height, width, inputs of a group, outputs).
        gain: Tensor or variable of shape (outputs,).
        bias: Tensor or variable of shape (outputs,), or `None`.

    Returns:
        Tensor of rank 4, in the dtype of `inputs`.

    Example:

    >>> settings = CPUConvolution((1, 1), (1, 1), "same", (1, 1), 1, "channels_last", (0, 0))
    >>> standardization = by_operations(tf.multiply, 1.0)
    >>> @tf.function
    ... def compute(x):
    ...     return convolve_standardized(standardization, settings, x, tf.ones((1, 1, 2, 3)), tf.ones(3))
    >>> compute(tf.ones((1, 4, 4, 2))).shape
    TensorShape([1, 4, 4, 3])
    """
    order, biases = _order(inputs, kernel), [] if bias is None else [bias]
    shared = computed_once(_standardizing(standardization), kernel, gain)
    if shared is not None:
        return _convolving(settings, order)(inputs, *shared, *biases)[0]
    convolve = _standardized(standardization, settings, _keeps(inputs, kernel), order)
    return convolve(inputs, kernel, gain, *biases)[0]


def _keeps(inputs, kernel) -> bool:
    """Whether the standardised kernel is kept for the gradient."""
    if shares_processor():
        return True
    # Without AVX-512, computing it again takes next to nothing beside the products.
    if None in inputs.shape[1:] or (uses_onednn() and has_narrow_vectors()):
        return False
    images = likely_batch(inputs)
    # A step with one image is one of kernels: there, memory is what they take.
    return images > 1 and images * math.prod(inputs.shape[1:]) >= math.prod(kernel.shape)


def _order(inputs, kernel) -> str:
    """Returns how the gradients by inputs and kernel are ordered."""
    count = math.prod(kernel.shape)
    if count >= _HUGE:
        # Then the standardised kernel is free again when the others are computed: with it, its gradient and the
        # kernel's are half of what a step with one image holds at its peak.
        return "in turn"
    # Kernels take the memory, and those of the layers below would be there with this one's gradient.
    few = inputs.shape.is_fully_defined() and count > _FEW * inputs.shape.num_elements()
    return "together" if few else "apart"


@functools.cache
def _standardized(standardization: Standardization, settings: CPUConvolution, keeps: bool, order: str) -> TracedOnce:
    convolution = convolution_for(settings)

    def forward(inputs, kernel, gain, bias=None):
        weights, kept = standardization.forward(kernel, gain)
        return [convolution.forward(inputs, weights, bias)], [*kept, weights] if keeps else kept

    def backward(arguments, kept, upstream, skipped):
        inputs, kernel, gain, *bias = arguments
        if keeps:
            *kept, weights = kept
        else:
            # By a kernel, a convolution has the same gradient whatever is in the kernel.
            weights = kernel if 0 in skipped else standardization.again(kernel, gain, kept)
        of_inputs, of_weights = convolution.gradient(inputs, weights, *upstream)
        if skipped == tuple(range(1, len(arguments))):
            return [of_inputs]
        of_bias = [convolution.gradient_of_bias(*upstream)] if bias else []
        return [of_inputs, *standardization.gradient(kernel, gain, kept, of_weights), *of_bias]

    def plain(inputs, kernel, gain, bias=None):
        return _plain(settings, inputs, standardization.plain(kernel, gain), bias)

    # TensorFlow makes one operation of a matrix product and the bias behind it.
    return TracedOnce(forward, backward, plain, optimized=settings.is_matrix_product, gradients=order)


@functools.cache
def _standardizing(standardization: Standardization) -> TracedOnce:
    def forward(kernel, gain):
        weights, kept = standardization.forward(kernel, gain)
        return [weights], kept

    def backward(arguments, kept, upstream, skipped):
        return standardization.gradient(*arguments, kept, *upstream)

    return TracedOnce(forward, backward, lambda kernel, gain: [standardization.plain(kernel, gain)])


@functools.cache
def _convolving(settings: CPUConvolution, order: str) -> TracedOnce:
    convolution = convolution_for(settings)

    def forward(inputs, weights, bias=None):
        return [convolution.forward(inputs, weights, bias)], []

    def backward(arguments, kept, upstream, skipped):
        inputs, weights, *bias = arguments
        of_bias = [convolution.gradient_of_bias(*upstream)] if bias else []
        return [*convolution.gradient(inputs, weights, *upstream), *of_bias]

    def plain(inputs, weights, bias=None):
        return _plain(settings, inputs, weights, bias)

    return TracedOnce(forward, backward, plain, optimized=settings.is_matrix_product, gradients=order)


def _plain(settings: CPUConvolution, inputs, weights, bias) -> list:
    outputs = settings(inputs, tf.cast(weights, inputs.dtype))
    rows = bias if bias is None or settings.data_format == "channels_last" else bias[:, None, None]
    return [outputs if bias is None else outputs + rows]


def standardization_for(plain: Callable, kernel, floor: float, added: float, scale: float) -> Standardization:
    """Returns the fastest standardization for a kernel.

    Args:
        plain: Function of kernel and gain to the standardised kernel. One and the same object at every call: it is
            compiled once for each.
        kernel: Tensor or variable.
        floor: What fan-in times variance is at least, 0 for no floor.
        added: What is added to fan-in times variance.
        scale: Constant factor on the gain.

    Returns:
        The `Standardization`.

    Example:

    >>> isinstance(standardization_for(tf.multiply, tf.ones((1, 1, 2, 3)), 0.0, 1e-5, 1.0), Standardization)
    True
    """
    if uses_onednn() and tf.as_dtype(kernel.dtype) == tf.float32:
        return by_batch_norm(plain, math.prod(kernel.shape[:-1]), floor, added, scale)
    # A small kernel stays in the cache: compiling for its shape costs more than it ever saves.
    return by_xla(plain, scale) if is_large(kernel) else by_operations(plain, scale)


@functools.cache
def by_operations(plain: Callable, scale: float) -> Standardization:
    """Returns a standardization operation by operation.

    Args:
        plain: As in `standardization_for`.
        scale: As in `standardization_for`.

    Returns:
        The `Standardization`.

    Example:

    >>> by_operations(tf.multiply, 1.0).forward(tf.ones((1, 1, 2, 3)), tf.ones(3))[0].shape
    TensorShape([1, 1, 2, 3])
    """
    derive = gradient_of(plain, 2)
    return _of_two(plain, plain, lambda kernel, gain, upstream: derive(upstream, kernel, gain), scale)


@functools.cache
def by_xla(plain: Callable, scale: float) -> Standardization:
    """Returns a standardization whose passes over memory XLA compiles.

    Args:
        plain: As in `standardization_for`.
        scale: As in `standardization_for`.

    Returns:
        The `Standardization`.

    Example:

    >>> by_xla(tf.multiply, 1.0).forward(tf.ones((1, 1, 2, 3)), tf.ones(3))[0].shape
    TensorShape([1, 1, 2, 3])
    """
    forward, backward = compiled(plain), compiled(gradient_of(plain, 2))

    def rows(kernel):
        # XLA sums the columns of a matrix several times as fast as the channels of a kernel.
        return tf.reshape(kernel, (math.prod(kernel.shape[:-1]), kernel.shape[-1]))

    def gradient(kernel, gain, upstream):
        of_kernel, of_gain = backward(rows(upstream), rows(kernel), gain)
        return tf.reshape(of_kernel, kernel.shape), of_gain

    return _of_two(plain, lambda kernel, gain: tf.reshape(forward(rows(kernel), gain), kernel.shape), gradient, scale)


def _of_two(function: Callable, forward: Callable, backward: Callable, scale: float) -> Standardization:
    """Makes a `Standardization` that keeps nothing."""

    def again(kernel, gain, kept):
        return forward(kernel, gain * scale)

    def gradient(kernel, gain, kept, upstream):
        of_kernel, of_gain = backward(kernel, gain * scale, upstream)
        return of_kernel, of_gain * scale

    def plain(kernel, gain):
        return function(kernel, gain * scale)

    return Standardization(lambda kernel, gain: (again(kernel, gain, []), []), again, gradient, plain)


@functools.cache
def by_batch_norm(plain: Callable, fan_in: int, floor: float, added: float, scale: float) -> Standardization:
    """Returns a standardization that is oneDNN's batch normalisation, with the output units for channels.

    It takes mean and variance and scales in one operation, in 0.6 of the time of XLA's passes, and its gradient is one
    operation too, in half of the time. It knows no floor: where a unit is at it, some operations more are computed.

    Args:
        plain: As in `standardization_for`.
        fan_in: Number of weights of a unit.
        floor: As in `standardization_for`.
        added: As in `standardization_for`.
        scale: As in `standardization_for`.

    Returns:
        The `Standardization`.

    Example:

    >>> found = by_batch_norm(tf.multiply, 2, 0.0, 1e-5, 1.0)
    >>> round(float(found.forward(tf.constant([[[[1.0], [3.0]]]]), tf.ones(1))[0][0, 0, 1, 0]), 2)
    0.71
    """
    options = {"epsilon": added / fan_in if added else _TINY}
    least, factor = floor / fan_in, scale / math.sqrt(fan_in)

    def forward(kernel, gain):
        found = _normalise_in_images(kernel, gain * factor, tf.zeros(0), tf.zeros(0), True, **options)
        weights, kept = found.y, [found.reserve_space_1, found.reserve_space_2]
        if floor:
            weights = _weights_at_floor(weights, kernel, gain * factor, *kept, least)
        return weights, kept

    def again(kernel, gain, kept):
        mean, variance = kept
        variance = tf.maximum(variance, least) if floor else variance
        return _normalise_in_images(kernel, gain * factor, mean, variance, False, **options).y

    def gradient(kernel, gain, kept, upstream):
        found = tf.raw_ops.FusedBatchNormGradV3(
            y_backprop=upstream,
            x=kernel,
            scale=gain * factor,
            reserve_space_1=kept[0],
            reserve_space_2=kept[1],
            reserve_space_3=tf.zeros(0),
            is_training=True,
            **options,
        )
        of_kernel, of_scale = found.x_backprop, found.scale_backprop
        if floor:
            arguments = of_kernel, of_scale, kernel, gain * factor, *kept, upstream, least
            of_kernel, of_scale = _gradients_at_floor(*arguments)
        return of_kernel, of_scale * factor

    return Standardization(forward, again, gradient, lambda kernel, gain: plain(kernel, gain * scale))


def _normalise_in_images(kernel, *arguments, **options):
    """Normalises a kernel as images of sixteen pixels, or of the most that come out even.

    oneDNN goes through a batch image by image: what it has read of a large one is no longer in the cache when it reads
    that again, and a 3 x 3 kernel's three are not shared evenly by two cores. For each image it takes memory, too.
    """
    pixels = math.gcd(math.prod(kernel.shape[:-1]), _PIXELS)
    found = _normalise(tf.reshape(kernel, (-1, pixels, 1, kernel.shape[-1])), *arguments, **options)
    return found._replace(y=tf.reshape(found.y, kernel.shape))


def _normalise(kernel, scale, mean, variance, training: bool, epsilon: float):
    return tf.raw_ops.FusedBatchNormV3(
        x=kernel,
        scale=scale,
        offset=tf.zeros_like(scale),
        mean=mean,
        variance=variance,
        is_training=training,
        epsilon=epsilon,
    )


def _weights_at_floor(weights, kernel, scale, mean, variance, least):
    """Returns standardised kernels, computed again where the variance of a unit is below the least."""
    tensors = [weights, kernel, scale, mean, variance, tf.convert_to_tensor(least)]
    return _if(tf.reduce_all(variance > least), tensors, *_weights_branches(), 1)[0]


def _gradients_at_floor(of_kernel, of_scale, kernel, scale, mean, variance, upstream, least):
    """Returns the gradients by kernel and scale, with those of units whose variance is below the least corrected."""
    tensors = [of_kernel, of_scale, kernel, scale, mean, variance, upstream, tf.convert_to_tensor(least)]
    return _if(tf.reduce_all(variance > least), tensors, *_gradient_branches(), 2)


def _if(condition, tensors: list, usual, otherwise, count: int) -> list:
    # `tf.cond` would trace both branches for each kernel, and have each optimized.
    return tf.raw_ops.StatelessIf(
        cond=condition,
        input=tensors,
        Tout=[tensor.dtype for tensor in tensors[:count]],
        then_branch=usual,
        else_branch=otherwise,
        output_shapes=[tensor.shape for tensor in tensors[:count]],
    )


@functools.cache
def _weights_branches() -> tuple:
    kernel, units, number = tf.TensorSpec([None] * 4), tf.TensorSpec([None]), tf.TensorSpec([])

    def otherwise(weights, kernel, scale, mean, variance, least):
        return _normalise(kernel, scale, mean, tf.maximum(variance, least), False, _TINY).y

    specs = [kernel, kernel, units, units, units, number]
    return _traced(lambda weights, *others: weights, specs), _traced(otherwise, specs)


@functools.cache
def _gradient_branches() -> tuple:
    kernel, units, number = tf.TensorSpec([None] * 4), tf.TensorSpec([None]), tf.TensorSpec([])

    def otherwise(of_kernel, of_scale, kernel, scale, mean, variance, upstream, least):
        # At the floor the variance is a constant, and has no part in the gradient.
        root, over = tf.math.rsqrt(tf.maximum(variance, least)), variance > least
        by_kernel = (upstream - tf.reduce_mean(upstream, (0, 1, 2))) * (scale * root)
        by_scale = tf.reduce_sum(upstream * (kernel - mean), (0, 1, 2)) * root
        return tf.where(over, of_kernel, by_kernel), tf.where(over, of_scale, by_scale)

    specs = [kernel, units, kernel, units, units, units, kernel, number]
    return _traced(lambda of_kernel, of_scale, *others: (of_kernel, of_scale), specs), _traced(otherwise, specs)


def _traced(function: Callable, specs: list):
    return tf.function(function, autograph=False).get_concrete_function(*specs)
