import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from nfnet_keras.data import MEAN_RGB, STDDEV_RGB, DataError, load_image, normalize
from nfnet_keras.data.images import decode, resize_arrays


def test_normalize_is_the_formula():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    wanted = (pixels - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    assert np.allclose(MEAN_RGB, [123.675, 116.28, 103.53])
    assert np.allclose(STDDEV_RGB, [58.395, 57.12, 57.375])
    assert normalize(pixels).dtype == np.float32
    np.testing.assert_allclose(normalize(pixels), wanted, atol=1e-6)


def test_normalize_is_the_same_for_arrays_tensors_and_graphs():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 4, 3), dtype=np.uint8)
    array = normalize(pixels)
    graph = next(iter(tf.data.Dataset.from_tensors(pixels).map(normalize))).numpy()
    assert np.array_equal(array, normalize(tf.constant(pixels)).numpy())
    assert np.array_equal(array, graph)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1"])
def test_png_modes_decode_as_pillow_reads_them(tmp_path, mode, picture, encoded):
    image = picture(1).convert(mode)
    path = tmp_path / "image.png"
    path.write_bytes(encoded(image, "PNG"))
    # Alpha is dropped, not blended; these pictures are opaque.
    assert np.array_equal(decode(str(path)).numpy(), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg_modes_decode_close_to_pillow(tmp_path, mode, picture, encoded):
    image = picture(1).convert(mode)
    path = tmp_path / "image.jpg"
    path.write_bytes(encoded(image, "JPEG"))
    read = decode(str(path)).numpy().astype(float)
    with Image.open(path) as reference:
        wanted = np.asarray(reference.convert("RGB")).astype(float)
    assert read.shape == wanted.shape
    assert np.abs(read - wanted).mean() < 4


def test_sixteen_bit_png_keeps_its_high_byte(tmp_path, encoded):
    values = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)
    path = tmp_path / "deep.png"
    path.write_bytes(encoded(Image.fromarray(values), "PNG"))
    read = decode(str(path)).numpy()
    assert read.dtype == np.uint8
    assert np.abs(read[..., 0].astype(int) - values // 256).max() <= 1


def test_load_image_is_resize_then_central_square(tmp_path, picture, encoded):
    path = tmp_path / "image.png"
    path.write_bytes(encoded(picture(2, height=60, width=90), "PNG"))
    pixels = np.asarray(Image.open(path))
    outer = tf.image.resize(pixels, (32, 48), method="bicubic", antialias=True).numpy()
    wanted = normalize(np.clip(outer[2:30, 10:38], 0, 255))
    found = load_image(path, 28)
    assert found.shape == (28, 28, 3)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, atol=1e-3)


def test_load_image_takes_a_very_long_image(tmp_path, encoded):
    path = tmp_path / "long.png"
    path.write_bytes(encoded(Image.new("RGB", (20000, 2), (10, 20, 30)), "PNG"))
    wanted = normalize(np.array([[[10, 20, 30]]], np.uint8))
    np.testing.assert_allclose(load_image(path, 64), np.broadcast_to(wanted, (64, 64, 3)), atol=1e-4)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "empty", "truncated"])
def test_load_image_refuses(tmp_path, kind, picture, encoded):
    path = tmp_path / "bad image.jpg"
    whole = encoded(picture(0), "JPEG")
    content = {"text": b"no image", "empty": b"", "truncated": whole[: len(whole) // 2]}
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(content[kind])
    with pytest.raises(DataError) as caught:
        load_image(path, 16)
    message = str(caught.value)
    assert "bad image.jpg" in message
    assert "\n" not in message
    assert {"missing": "does not exist", "folder": "is a folder"}.get(kind, "cannot read") in message


def test_resize_arrays_leaves_the_right_size_alone_and_stays_in_range():
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[:, 2:6, 2:6] = 255
    assert resize_arrays(images, 8) is images
    large = resize_arrays(images, 32)
    assert large.shape == (3, 32, 32, 3)
    assert large.dtype == np.uint8
    # A bicubic filter overshoots here; wrapped around it would leave 0s in the white square.
    assert large[:, 12:20, 12:20].min() > 200
    assert large[:, :4, :4].max() < 50


def test_resize_arrays_in_chunks_is_resize_of_all(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    whole = resize_arrays(images, 12)
    monkeypatch.setattr("nfnet_keras.data.images._CHUNK", 3)
    assert np.array_equal(resize_arrays(images, 12), whole)
