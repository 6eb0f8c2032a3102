"""`nfnet export`: what it writes and prints, and what it says of what it cannot do."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image

import nfnet_keras as nfk
from nfnet_keras.cli.main import main
from nfnet_keras.data import MEAN_RGB, STDDEV_RGB
from nfnet_keras.data.evaluation import Preprocessing, load_for
from nfnet_keras.exporting.running import open_exported

METADATA = {
    "model": "nfnet_tiny",
    "class_names": ["red", "green", "blue"],
    "image_size": 32,
    "mean_rgb": list(MEAN_RGB),
    "stddev_rgb": list(STDDEV_RGB),
    "crop": "training",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved network that tells colours apart without training."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    outputs = keras.layers.Dense(3, kernel_initializer="identity", activation="softmax", name="predictions")(x)
    model = nfk.NormalizerFreeModel(inputs, outputs)
    model.metadata = METADATA
    path = tmp_path_factory.mktemp("model") / "colours.keras"
    model.save(path)
    return str(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Thirty pictures of three colours, and a file that is none."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(30):
        pixels = generator.integers(0, 90, (40, 50, 3)).astype(np.uint8)
        pixels[..., number % 3] += np.uint8(150)
        folder = root / METADATA["class_names"][number % 3]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (root / "broken.png").write_text("no image")
    return root


def failure(capsys, *arguments):
    """Runs a command that must fail and returns the one line that it says."""
    assert main(["export", *map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    return line


@pytest.mark.parametrize(("name", "format"), [("a.onnx", "onnx"), ("a.tflite", "litert"), ("a", "tf_saved_model")])
def test_what_is_written_and_printed(capsys, tmp_path, saved, pictures, name, format):
    out = tmp_path / name
    assert main(["export", saved, f"--out={out}", "--include-preprocessing"]) == 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["file"] == str(out)
    assert printed["format"] == format
    assert printed["input"] == "images: (any, 32, 32, 3), RGB from 0 to 255"
    assert "differ from Keras's by at most" in printed["check"]
    described = json.loads(Path(printed["description"]).read_text())
    assert described["class_names"] == METADATA["class_names"]
    assert described["input"]["made_by"] == (
        "turn upright by the EXIF orientation, drop alpha, resize the shorter side to 37 (bicubic, antialiased), "
        "cut out the central 32 x 32"
    )
    # A picture as `nfnet predict` sees it, but in pixels.
    normalised = load_for(pictures / "green/1.png", Preprocessing.from_metadata(METADATA))
    pixels = normalised * np.float32(STDDEV_RGB) + np.float32(MEAN_RGB)
    (probabilities,) = open_exported(out)(pixels[None])
    wanted = keras.models.load_model(saved).predict(normalised[None], verbose=0)
    np.testing.assert_allclose(probabilities, wanted, atol=1e-5)
    assert described["class_names"][probabilities[0].argmax()] == "green"


def test_int8(capsys, tmp_path, saved, pictures):
    out = tmp_path / "a.tflite"
    assert main(["export", saved, f"--out={out}", f"--int8={pictures}", "--io-dtype=uint8"]) == 0
    printed = capsys.readouterr()
    assert "passed over" in printed.err and "broken.png" in printed.err
    assert "100.0 % of 15 images that were not used for the ranges" in printed.out
    assert json.loads((tmp_path / "a.tflite.json").read_text())["quantization"]["weights"] == "int8"


def test_int8_of_few_pictures(capsys, tmp_path, saved, pictures):
    arguments = [saved, f"--out={tmp_path / 'a.tflite'}", f"--int8={pictures / 'red'}", "--include-preprocessing"]
    assert main(["export", *arguments]) == 0
    printed = capsys.readouterr()
    assert "images, the same that gave the ranges" in printed.out
    assert "10 images" in printed.out


def test_a_run_on_the_embedded_digits(capsys, tmp_path, saved):
    assert main(["export", saved, f"--out={tmp_path / 'a.tflite'}", "--int8=digits"]) == 0
    assert "of 360 images that were not used" in capsys.readouterr().out


def test_what_is_wrong_is_said_in_one_line(capsys, tmp_path, saved):
    out = tmp_path / "a.onnx"
    assert "--out is needed" in failure(capsys, saved)
    assert "one MODEL is needed" in failure(capsys, f"--out={out}")
    assert "tells no format" in failure(capsys, saved, f"--out={tmp_path / 'a.pb'}")
    assert "ends in .tflite" in failure(capsys, saved, f"--out={out}", "--format=litert")
    assert "--int8 is for LiteRT" in failure(capsys, saved, f"--out={out}", "--int8=digits")
    assert "takes a folder of images" in failure(capsys, saved, f"--out={tmp_path / 'a.tflite'}", "--int8=nowhere")
    assert "make it first" in failure(capsys, saved, f"--out={tmp_path / 'no/a.onnx'}")
    out.write_text("mine")
    assert "--overwrite" in failure(capsys, saved, f"--out={out}")
    assert out.read_text() == "mine"
    assert main(["export", saved, f"--out={out}", "--overwrite"]) == 0
    assert out.read_bytes()[:4] != b"mine"
    assert main(["export", saved, "--format=torchscript"]) == 2
    assert main(["export", "--help"]) == 0
