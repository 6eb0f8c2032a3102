"""Winograd's convolution along the rows of images, or in squares, as TensorFlow trains it on a CPU.

A 3 x 3 convolution of stride 1 takes twelve products of a row of images and a row of the kernel for four rows of
outputs. Winograd's algorithm takes six, of sums of rows. Its gradients are of the same form: six products in place of
twelve for that by the inputs, and for that by the kernel. The products stay convolutions, 1 x 3 now; the sums are
passes over memory that XLA compiles.

The same along rows and then along columns leaves 36 of 144 products for a square of four by four. They are products of
matrices, and there are more sums: faster where products are slow beside memory, on processors without AVX-512.

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

# In squares, pixels of a batch and weights of a group's product, for outputs and for gradients, which gain more: oneDNN
# computes those of kernels slowly.
MIN_OF_SQUARES = ((2000, 128 * 128), (1000, 32 * 64))

# Rows that may be computed for each that is wanted, where their number is no multiple of four; pixels, in squares.
_MOST_WASTE = 1.2
_MOST_WASTE_IN_SQUARES = 1.35

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
# Those of the nine parts of a kernel, for each product of a square.
_KERNEL_IN_SQUARES = tuple(tuple(a * b for a in rows for b in columns) for rows in _KERNEL for columns in _KERNEL)


@functools.cache
def has_narrow_vectors() -> bool:
    """Whether this is an x86 processor that has AVX2 and no AVX-512.

    Returns:
        `True` or `False`; `False` as well where this NumPy does not tell.

    Example:

    >>> has_narrow_vectors() in (True, False)
    True
    """
    try:
        # Neither NumPy nor TensorFlow has a public name for this.
        from numpy._core._multiarray_umath import __cpu_features__ as features
    except ImportError:
        return False
    return bool(features.get("AVX2")) and not features.get("AVX512F")


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
    enough = _has_pixels(inputs, MIN_PIXELS) and min(kernel.shape[2:]) >= MIN_CHANNELS
    return enough and ROWS * _fours(inputs.shape[1]) <= _MOST_WASTE * inputs.shape[1]


def pays_in_squares(inputs, kernel, backwards: bool) -> bool:
    """Whether a 3 x 3 convolution of stride 1 with a border of zeros, or its gradient, is faster still in squares.

    Args:
        inputs: Tensor of shape (batch, height, width, channels).
        kernel: Tensor of shape (3, 3, inputs of a group, outputs).
        backwards: Whether it is about the gradient, which gains more.

    Returns:
        `True` or `False`; `False` where another size than the batch's is not known.

    Example:

    >>> images, kernel = tf.ones((8, 12, 12, 128)), tf.ones((3, 3, 128, 128))
    >>> pays_in_squares(images, kernel, backwards=True) == has_narrow_vectors()
    True
    """
    pixels, weights = MIN_OF_SQUARES[backwards]
    _, height, width, channels = inputs.shape
    enough = _has_pixels(inputs, pixels) and kernel.shape[2] ** 2 * kernel.shape[3] >= weights * channels
    if not enough or not has_narrow_vectors():
        return False
    return ROWS**2 * _fours(height) * _fours(width) <= _MOST_WASTE_IN_SQUARES * height * width


def _has_pixels(inputs, least: int) -> bool:
    """Whether a batch is of several images that have as many pixels at least, in float32."""
    images, (_, height, width, _) = likely_batch(inputs), inputs.shape
    if None in (height, width) or inputs.dtype != tf.float32:
        return False
    # A step with one image is one of kernels: there, memory is what they take.
    return images > 1 and images * height * width >= least


def _fours(size: int) -> int:
    return math.ceil(size / ROWS)


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


def in_squares(groups: int) -> tuple[Callable, Callable]:
    """Returns a 3 x 3 convolution of stride 1 with a border of zeros in squares of four by four, and its gradient.

    Args:
        groups: Of the convolution.

    Returns:
        Function of inputs, kernel and bias (`None` without) to outputs, and one of inputs, kernel and the gradient of
        the outputs to the gradients of inputs and kernel.

    Example:

    >>> forward, gradient = in_squares(1)
    >>> tf.round(forward(tf.ones((1, 4, 3, 1)), tf.ones((3, 3, 1, 1)), None))[0, :, :, 0].numpy().astype(int).tolist()
    [[4, 6, 4], [6, 9, 6], [6, 9, 6], [4, 6, 4]]
    """

    def forward(inputs, kernel, bias):
        pairs = zip(_squares(_sums_of_images(inputs), _IMAGES, groups), _squares_of_kernel(kernel, groups), strict=True)
        rows = _from_squares([tf.matmul(*pair) for pair in pairs], _PRODUCTS, inputs.shape)
        return _outputs(inputs.shape[1])(*rows, *([] if bias is None else [bias]))

    def gradient(inputs, kernel, upstream):
        images = _squares(_sums_of_images(inputs), _IMAGES, groups)
        products = _squares(_of_products(upstream), _transposed(_PRODUCTS), groups)
        pairs = zip(products, _squares_of_kernel(kernel, groups), strict=True)
        of_images = [tf.matmul(*pair, transpose_b=True) for pair in pairs]
        rows = _from_squares(of_images, _transposed(_IMAGES), inputs.shape)
        of_kernel = [tf.matmul(*pair, transpose_a=True) for pair in zip(images, products, strict=True)]
        return _of_images(inputs.shape[1])(*rows), _of_squares_of_kernel(of_kernel)

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


def _transposed(factors: _Factors) -> _Factors:
    return tuple(zip(*factors, strict=True))


def _sums(images, factors: _Factors, axis: int) -> list:
    """Returns sums of rows (`axis=1`) or columns (`axis=2`), every fourth of them together, one for each product."""
    rows = _in_fours(images, axis)
    if len(factors[0]) > ROWS:
        rows = _with_neighbours(rows, axis)
    return [_combined(each, rows) for each in factors]


def _joined(products: Sequence, factors: _Factors, size: int, axis: int):
    """Returns images of a height (width) from sums of products."""
    rows = [_combined(each, products) for each in factors]
    return _from_fours(rows if len(rows) == ROWS else _without_neighbours(rows, axis), size, axis)


def _in_fours(images, axis: int) -> list:
    """Returns every fourth row (column) together, from the first, second, third and fourth; zeros for missing ones."""
    before, size, behind = images.shape[1:axis], images.shape[axis], images.shape[axis + 1 :]
    around = [[0, 0] for _ in images.shape]
    around[axis][1] = ROWS * _fours(size) - size
    images = tf.reshape(tf.pad(images, around), (-1, *before, _fours(size), ROWS, *behind))
    return tf.unstack(images, axis=axis + 1)


def _from_fours(rows: Sequence, size: int, axis: int):
    """Returns images of a height (width); the other way round."""
    shape = rows[0].shape
    images = tf.stack(rows, axis + 1)
    images = tf.reshape(images, (-1, *shape[1:axis], shape[axis] * ROWS, *shape[axis + 1 :]))
    return images[:, :size] if axis == 1 else images[:, :, :size]


def _moved(rows, by: int, axis: int):
    """Returns rows (columns) moved to the next (`by=1`) or the last (`by=-1`) group of four."""
    around = [[0, 0] for _ in rows.shape]
    around[axis] = [1, 0] if by == 1 else [0, 1]
    part = slice(-1) if by == 1 else slice(1, None)
    return tf.pad(rows[:, part] if axis == 1 else rows[:, :, part], around)


def _with_neighbours(rows: list, axis: int) -> list:
    """Returns the row (column) above each four, the four, and the one below."""
    return [_moved(rows[-1], 1, axis), *rows, _moved(rows[0], -1, axis)]


def _without_neighbours(rows: Sequence, axis: int) -> list:
    """The transpose of `_with_neighbours`."""
    above, *rows, below = rows
    rows[-1] += _moved(above, -1, axis)
    rows[0] += _moved(below, 1, axis)
    return rows


@compiled
def _sums_of_images(images):
    return _sums(images, _IMAGES, 1)


@functools.cache
def _of_images(height: int) -> Callable:
    """Returns the transpose of `_sums_of_images`, for images of a height."""
    return compiled(lambda *of_sums: _joined(of_sums, _transposed(_IMAGES), height, 1))


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
        return _from_fours([row + bias[0] for row in rows] if bias else rows, height, 1)

    return compiled(join)


@compiled
def _of_products(upstream):
    """The transpose of `_outputs`."""
    return _sums(upstream, _transposed(_PRODUCTS), 1)


def _squares(rows: Sequence, factors: _Factors, groups: int) -> list:
    """Returns sums of columns of sums of rows, as matrices of pixels and channels, one for each group."""
    sums = _sums_of_columns(factors, groups)
    return [each for sum_of_rows in rows for each in sums(sum_of_rows)]


@functools.cache
def _sums_of_columns(factors: _Factors, groups: int) -> Callable:
    def split(rows):
        shape = (-1, groups, rows.shape[-1] // groups)
        return [tf.transpose(tf.reshape(each, shape), (1, 0, 2)) for each in _sums(rows, factors, 2)]

    return compiled(split)


def _from_squares(products: Sequence, factors: _Factors, shape) -> list:
    """Returns sums of rows of images of a shape from products in squares."""
    groups, (height, width) = products[0].shape[0], shape[1:3]
    join = _columns(factors, groups, _fours(height), width)
    return [join(*products[at : at + ROWS + 2]) for at in range(0, len(products), ROWS + 2)]


@functools.cache
def _columns(factors: _Factors, groups: int, height: int, width: int) -> Callable:
    """Returns a function of products to images, joined along columns."""

    def join(*products):
        shape = (-1, height, _fours(width), groups * products[0].shape[-1])
        return _joined([tf.reshape(tf.transpose(each, (1, 0, 2)), shape) for each in products], factors, width, 2)

    return compiled(join)


def _squares_of_kernel(kernel, groups: int) -> list:
    """Returns sums of the nine parts of a kernel, as matrices of inputs and outputs, one for each group."""
    _, _, channels, filters = kernel.shape
    parts = tf.transpose(tf.reshape(kernel, (9, channels, groups, filters // groups)), (0, 2, 1, 3))
    sums = tf.matmul(shared_constant(_KERNEL_IN_SQUARES, kernel.dtype), tf.reshape(parts, (9, -1)))
    return [tf.reshape(each, parts.shape[1:]) for each in tf.split(sums, (ROWS + 2) ** 2)]


def _of_squares_of_kernel(of_sums: Sequence):
    """The transpose of `_squares_of_kernel`."""
    groups, channels, filters = of_sums[0].shape
    sums = tf.reshape(tf.stack(of_sums), ((ROWS + 2) ** 2, -1))
    of_parts = tf.matmul(shared_constant(_KERNEL_IN_SQUARES, sums.dtype), sums, transpose_a=True)
    of_parts = tf.transpose(tf.reshape(of_parts, (9, groups, channels, filters)), (0, 2, 1, 3))
    return tf.reshape(of_parts, (3, 3, channels, groups * filters))
