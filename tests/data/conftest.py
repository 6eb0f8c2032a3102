"""Fixtures of the data tests."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfnet_keras.data import Split


def _picture(seed: int, height: int = 20, width: int = 26) -> Image.Image:
    """A smooth random picture, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def picture() -> Callable[..., Image.Image]:
    return _picture


@pytest.fixture
def encoded() -> Callable[[Image.Image, str], bytes]:
    return _encoded


@pytest.fixture
def write() -> Callable[..., Path]:
    """Write a picture (or the given bytes) to a path, with its folders."""

    def _write(path: Path, seed: int = 0, data: bytes | None = None) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = "PNG" if path.suffix.lower() == ".png" else "JPEG"
        path.write_bytes(_encoded(_picture(seed), kind) if data is None else data)
        return path

    return _write


@pytest.fixture
def tree(tmp_path: Path, write: Callable[..., Path]) -> Path:
    """A folder of two classes with five PNG files each."""
    root = tmp_path / "pets"
    for c, name in enumerate(("cat", "dog")):
        for i in range(5):
            write(root / name / f"{i}.png", seed=10 * c + i)
    return root


@pytest.fixture
def numbered() -> Split:
    """23 constant images: image i has the value 10 * i everywhere, and the label i % 4."""
    values = (np.arange(23) * 10).astype(np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (23, 6, 6, 3)).copy()
    return Split(np.arange(23) % 4, images=images)


@pytest.fixture
def noise() -> Split:
    """12 images of noise, 8 x 8, in three classes."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    return Split(np.arange(12) % 3, images=images)
