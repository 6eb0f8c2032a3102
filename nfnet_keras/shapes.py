"""Shapes of arrays beside shapes with sizes left open."""

from collections.abc import Sequence


def fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    """Whether an array can be given where a shape is asked for.

    Args:
        shape: Shape of the array.
        wanted: Shape that is asked for; `None` stands for any size.

    Returns:
        `True` or `False`.

    Example:

    >>> fits((8, 32, 32, 3), (None, 32, 32, 3)), fits((32, 32, 3), (None, 32, 32, 3))
    (True, False)
    """
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))
