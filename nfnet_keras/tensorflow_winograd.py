"""Winograd's convolution along the rows of images, as TensorFlow trains it on a CPU.

A 3 x 3 convolution of stride 1 takes twelve products of a row of images and a row of the kernel for four rows of
outputs. Winograd's algorithm takes six, of sums of rows. Its gradients are of the same form: six products in place of
twelve for that by the inputs, and for that by the kernel. The products stay convolutions, 1 x 3 now; the sums are
passes over memory that XLA compiles.

Source: Lavin & Gray 2016, "Fast Algorithms for Convolutional Neural Networks", <https://arxiv.org/abs/1509.09308>; the
points: Barabasz et al. 2020, "Error analysis and improving the accuracy of Winograd convolution for deep neural
networks", <https://arxiv.org/abs/1803.10986>, who show that others than small integers lose less to rounding.
"""

import functools
import math
from collections.abc import Callable, Sequence

import tensorflow as tf

from nfnet_keras.tensorflow_ahead import compiled
from nfnet_keras.tensorflow_step import likely_batch, shared_constant

# Rows of outputs that are computed together.
ROWS = 4

# Pixels of a batch from which on the products save more than the sums of the kernel take.
MIN_PIXELS = 1000

# Inputs of a group and outputs from which on the products save more than the sums of images take.
MIN_CHANNELS = 64

# Rows that may be computed for each that is wanted, where their number is no multiple of four.
_MOST_WASTE = 1.2

_Factors = tuple[tuple[float, ...], ...]


def _factors(points: Sequence[float]) -> tuple[_Factors, _Factors, _Factors]:
    """Returns the factors of rows of images, of rows of the kernel and of the products (Toom and Cook's algorithm).

    Three rows of a kernel and four others are coefficients of two polynomials, whose product is known by its values at
    six points, infinity for one. A convolution with these three that gives four rows is the transpose of that product.

    Args:
        points: Five different numbers.

    Returns:
        For each product the factors of six rows of images, and of three rows of the kernel; for each row of outputs
        the factors of six products.
    """
    of_images, of_kernel = [], []
    for point in points:
        others = [other for other in points if other != point]
        of_images.append([*_coefficients(others), 0.0])
        of_kernel.append([point**power / math.prod(point - other for other in others) for power in range(3)])
    of_images.append(_coefficients(points))
    of_kernel.append([0.0, 0.0, 1.0])
    of_products = [[*(point**power for point in points), float(power == ROWS - 1)] for power in range(ROWS)]
    return tuple(tuple(map(tuple, factors)) for factors in (of_images, of_kernel, of_products))


def _coefficients(roots: Sequence[float]) -> list[float]:
    """Returns the coefficients of the polynomial with these roots, the constant first."""
    found = [1.0]
    for root in roots:
        found = [above - root * here for above, here in zip([0.0, *found], [*found, 0.0], strict=True)]
    return found


# Exact in binary. The sums round 2.3 times as much as a direct convolution in float32; with 0, 1, -1, 2, -2 3.2 times.
_IMAGES, _KERNEL, _PRODUCTS = _factors((0.0, 0.75, -0.75, 1.5, -1.5))


def pays(inputs, kernel) -> bool:
    """Whether a 3 x 3 convolution of stride 1 with a border of zeros is faster along rows.

    Args:
        inputs: Tensor of shape (batch, height, width, channels).
        kernel: Tensor of shape (3, 3, inputs of a group, outputs).

    Returns:
        `True` or `False`; `False` where another size than the batch's is not known.

    Example:

    >>> kernel = tf.ones((3, 3, 128, 128))
    >>> pays(tf.ones((8, 12, 12, 128)), kernel), pays(tf.ones((1, 8, 8, 128)), kernel)
    (True, False)
    """
    images, (_, height, width, _) = likely_batch(inputs), inputs.shape
    if None in (height, width) or inputs.dtype != tf.float32:
        return False
    few_wasted = ROWS * math.ceil(height / ROWS) <= _MOST_WASTE * height
    # A step with one image is one of kernels: there, memory is what they take.
    several = images > 1 and images * height * width >= MIN_PIXELS
    return few_wasted and several and min(kernel.shape[2:]) >= MIN_CHANNELS


def along_rows(convolve: Callable, derive: Callable) -> tuple[Callable, Callable]:
    """Returns a 3 x 3 convolution of stride 1 with a border of zeros, and its gradient.

    Args:
        convolve: Function of inputs, kernel and `None` to a convolution of stride 1 with a border of zeros.
        derive: Function of inputs, kernel and the gradient of the outputs to the gradients of inputs and kernel.

    Returns:
        Function of inputs, kernel and bias (`None` without) to outputs, and one of inputs, kernel and the gradient of
        the outputs to the gradients of inputs and kernel.

    Example:

    >>> def convolve(x, kernel, bias):
    ...     return tf.nn.conv2d(x, kernel, 1, "SAME")
    >>> forward, gradient = along_rows(convolve, None)
    >>> tf.round(forward(tf.ones((1, 4, 3, 1)), tf.ones((3, 3, 1, 1)), None))[0, :, :, 0].numpy().astype(int).tolist()
    [[4, 6, 4], [6, 9, 6], [6, 9, 6], [4, 6, 4]]
    """

    def forward(inputs, kernel, bias):
        pairs = zip(_sums_of_images(inputs), _sums_of_kernel(kernel), strict=True)
        products = [convolve(rows, part, None) for rows, part in pairs]
        return _outputs(inputs.shape[1])(*products, *([] if bias is None else [bias]))

    def gradient(inputs, kernel, upstream):
        each = zip(_sums_of_images(inputs), _sums_of_kernel(kernel), _of_products(upstream), strict=True)
        of_images, of_kernel = zip(*(_gradients_of_product(derive, *tensors) for tensors in each), strict=True)
        return _of_images(inputs.shape[1])(*of_images), _of_kernel(of_kernel)

    return forward, gradient


def _gradients_of_product(derive: Callable, rows, kernel, upstream) -> tuple:
    if rows.shape[-1] != kernel.shape[2]:
        return derive(rows, kernel, upstream)
    # With one group, oneDNN computes the kernel's gradient up to a sixth faster for many images of one row.
    images, of_outputs = (tf.reshape(each, (-1, 1, *each.shape[2:])) for each in (rows, upstream))
    of_images, of_kernel = derive(images, kernel, of_outputs)
    return tf.reshape(of_images, (-1, *rows.shape[1:])), of_kernel


def _combined(factors: Sequence[float], tensors: Sequence):
    terms = [tensor * factor for factor, tensor in zip(factors, tensors, strict=True) if factor]
    return functools.reduce(tf.add, terms)


def _transposed(factors: _Factors) -> list:
    return [list(column) for column in zip(*factors, strict=True)]


def _in_fours(images):
    """Returns every fourth row together, from the first, second, third and fourth; zeros for those that are missing."""
    _, height, width, channels = images.shape
    fours = math.ceil(height / ROWS)
    images = tf.pad(images, ((0, 0), (0, fours * ROWS - height), (0, 0), (0, 0)))
    return tf.unstack(tf.reshape(images, (-1, fours, ROWS, width, channels)), axis=2)


def _from_fours(rows: Sequence, height: int):
    """Returns images of a height; the other way round."""
    _, fours, width, channels = rows[0].shape
    return tf.reshape(tf.stack(rows, 2), (-1, fours * ROWS, width, channels))[:, :height]


def _moved(rows, by: int):
    """Returns rows moved to the next (`by=1`) or the last (`by=-1`) group of four."""
    before, behind = ((0, 0), (1, 0), (0, 0), (0, 0)), ((0, 0), (0, 1), (0, 0), (0, 0))
    return tf.pad(rows[:, :-1], before) if by == 1 else tf.pad(rows[:, 1:], behind)


@compiled
def _sums_of_images(images):
    rows = _in_fours(images)
    # The row above each four, the four, and the row below.
    rows = [_moved(rows[-1], 1), *rows, _moved(rows[0], -1)]
    return [_combined(factors, rows) for factors in _IMAGES]


@functools.cache
def _of_images(height: int) -> Callable:
    """Returns the transpose of `_sums_of_images`, for images of a height."""

    def join(*of_sums):
        above, *rows, below = (_combined(factors, of_sums) for factors in _transposed(_IMAGES))
        rows[-1] += _moved(above, -1)
        rows[0] += _moved(below, 1)
        return _from_fours(rows, height)

    return compiled(join)


def _sums_of_kernel(kernel) -> list:
    # A matrix product takes as long as what XLA makes of it, and XLA a tenth of a second to make it.
    sums = tf.matmul(shared_constant(_KERNEL, kernel.dtype), tf.reshape(kernel, (3, -1)))
    return [tf.reshape(each, (1, *kernel.shape[1:])) for each in tf.split(sums, ROWS + 2)]


def _of_kernel(of_sums: Sequence):
    """The transpose of `_sums_of_kernel`."""
    rows = tf.reshape(tf.concat(of_sums, 0), (ROWS + 2, -1))
    of_kernel = tf.matmul(shared_constant(_KERNEL, rows.dtype), rows, transpose_a=True)
    return tf.reshape(of_kernel, (3, *of_sums[0].shape[1:]))


@functools.cache
def _outputs(height: int) -> Callable:
    """Returns a function of products and of a bias, if there is one, to images of a height."""

    def join(*tensors):
        products, bias = tensors[: ROWS + 2], tensors[ROWS + 2 :]
        rows = [_combined(factors, products) for factors in _PRODUCTS]
        return _from_fours([row + bias[0] for row in rows] if bias else rows, height)

    return compiled(join)


@compiled
def _of_products(upstream):
    """The transpose of `_outputs`."""
    rows = _in_fours(upstream)
    return [_combined(factors, rows) for factors in _transposed(_PRODUCTS)]
