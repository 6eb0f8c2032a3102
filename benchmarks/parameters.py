"""Parameters and inputs from a seed, the same for all sides."""

import pathlib

import numpy as np


def draw(rng: np.random.Generator, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draws one parameter such that signals keep their size and every parameter tells in the output.

    Args:
        rng: Where the numbers come from.
        path: Path of the variable, whose last part says what it is.
        shape: Its shape, outputs last.

    Returns:
        float32 array: skip gains around 0.6, gains around 1, small biases, matrices of variance one over fan-in.
        Kernels of convolutions have variance 1/4, whatever their fan-in: weight standardization undoes it, and the
        constants that keep it from dividing by zero, in which the peers differ, then do not tell.
    """
    values = rng.standard_normal(tuple(shape), dtype=np.float32)
    kind = path.rpartition("/")[2]
    if kind == "skip_gain":
        return np.asarray(0.5 + 0.1 * np.abs(values), np.float32)
    if kind == "gain":
        return np.asarray(1 + 0.1 * values, np.float32)
    if len(shape) == 4:
        return np.float32(0.5) * values
    if len(shape) <= 1:
        return np.asarray(0.1 * values, np.float32)
    return np.asarray(values / np.sqrt(np.prod(shape[:-1])), np.float32)


def images(count: int, size: int, seed: int) -> np.ndarray:
    """Returns (count, size, size, 3) normalised images: coarse blocks of colour under noise, so that they differ."""
    rng = np.random.default_rng([seed, 7])
    coarse = rng.standard_normal((count, 4, 4, 3), dtype=np.float32)
    repeats = -(-size // 4)
    blocks = coarse.repeat(repeats, axis=1).repeat(repeats, axis=2)[:, :size, :size]
    return 1.5 * blocks + np.float32(0.5) * rng.standard_normal((count, size, size, 3), dtype=np.float32)


def write_inputs(path: pathlib.Path, count: int, size: int, classes: int, seed: int) -> pathlib.Path:
    """Writes images and labels for the sides to read, and returns the path."""
    labels = np.random.default_rng([seed, 8]).integers(0, classes, count)
    np.savez(path, images=images(count, size, seed), labels=labels)
    return path


def spread(outputs: np.ndarray) -> float:
    """How far the images are apart in their outputs: what differences of the sides are measured by.

    Args:
        outputs: (N, classes), N at least 2.

    Returns:
        The largest distance of an image's outputs from the mean of all.
    """
    return float(np.max(np.linalg.norm(outputs - outputs.mean(0), axis=-1)))
