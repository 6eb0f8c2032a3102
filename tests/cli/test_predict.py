"""`nfnet predict`: what it prints, and what it does with images and models that are wrong."""

import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

import nfnet_keras as nfk
from nfnet_keras.cli.main import main
from nfnet_keras.data import MEAN_RGB, STDDEV_RGB
from nfnet_keras.data.evaluation import Preprocessing, load_for

METADATA = {
    "model": "nfnet_tiny",
    "class_names": ["red", "green", "blue"],
    "image_size": 32,
    "mean_rgb": list(MEAN_RGB),
    "stddev_rgb": list(STDDEV_RGB),
}


def small_model(**options):
    """A network that tells colours apart without training: one number a colour channel."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    outputs = keras.layers.Dense(3, kernel_initializer="identity", name="predictions", **options)(x)
    return nfk.NormalizerFreeModel(inputs, outputs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(**metadata): the path of a saved network for colours."""
    folder = tmp_path_factory.mktemp("models")
    paths = {}

    def save(activation="softmax", **metadata):
        key = json.dumps([activation, metadata])
        if key not in paths:
            model = small_model(activation=activation)
            model.metadata = {name: value for name, value in {**METADATA, **metadata}.items() if value is not None}
            paths[key] = folder / f"{len(paths)}.keras"
            model.save(paths[key])
        return str(paths[key])

    return save


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of five pictures in two folders, and files that are none."""
    root = tmp_path_factory.mktemp("pictures")
    (root / "more").mkdir()
    (root / ".hidden").mkdir()
    (root / "notes.txt").write_text("no image")
    colours = {"a.png": 0, "b.JPG": 1, "more/c.gif": 2, "more/d.bmp": 0, "z.webp": 1, ".hidden/e.png": 2}
    for name, channel in colours.items():
        pixels = np.full((40, 50, 3), 20, np.uint8)
        pixels[..., channel] = 220
        Image.fromarray(pixels).save(root / name)
    return root


def failure(capsys, *arguments, out=""):
    """Runs a command that must fail and returns the one line that it says."""
    status = main(["predict", *map(str, arguments)])
    printed = capsys.readouterr()
    assert status != 0
    assert printed.out == out
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    return lines[0]


def test_help_and_flags(capsys):
    assert main(["predict", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: nfnet predict IMAGE... [--flag=value ...]")
    for flag in ("model", "weights", "top", "json", "batch-size", "image-size"):
        assert f"--{flag}\n" in text


def test_a_table(capsys, saved, pictures):
    assert main(["predict", str(pictures / "a.png"), f"--model={saved()}", "--top=2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(pictures / "a.png")
    assert lines[1].split()[::3] == ["1", "red"]
    assert len(lines) == 3
    assert float(lines[1].split()[1]) > 90


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_json_of_a_folder(capsys, saved, pictures, batch_size):
    path = saved(class_ids=["n1", "n2", "n3"])
    arguments = ["--json", "--top=9", f"--batch-size={batch_size}", f"--model={path}"]
    assert main(["predict", str(pictures), *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    names = ["a.png", "b.JPG", "more/c.gif", "more/d.bmp", "z.webp"]
    assert [entry["file"] for entry in found] == [str(pictures / name) for name in names]
    assert [entry["predictions"][0]["name"] for entry in found] == ["red", "green", "blue", "red", "green"]
    model = keras.models.load_model(path, compile=False)
    preprocessing = Preprocessing.from_metadata(METADATA)
    for entry in found:
        best = entry["predictions"]
        wanted = keras.ops.convert_to_numpy(model(load_for(entry["file"], preprocessing)[None]))[0]
        assert [p["class"] for p in best] == np.argsort(-wanted).tolist()
        assert [p["id"] for p in best] == [f"n{p['class'] + 1}" for p in best]
        np.testing.assert_allclose([p["probability"] for p in best], sorted(wanted)[::-1], rtol=1e-4)


def test_logits_become_probabilities(capsys, saved, pictures):
    found = []
    for activation in ("softmax", None):
        assert main(["predict", str(pictures / "b.JPG"), "--json", f"--model={saved(activation)}"]) == 0
        found.append([p["probability"] for p in json.loads(capsys.readouterr().out)[0]["predictions"]])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_the_folder_of_a_run(capsys, saved, pictures, tmp_path):
    shutil.copy(saved(class_names=None), tmp_path / "model.keras")
    assert main(["predict", str(pictures / "a.png"), f"--model={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines()[1].endswith("class 0")


def test_damaged_images_are_named_and_passed_over(capsys, saved, pictures, tmp_path):
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((pictures / "a.png").read_bytes()[:60])
    files = [pictures / "a.png", damaged, tmp_path / "missing.png", pictures / "b.JPG"]
    for arguments in ([], ["--batch-size=1"]):
        assert main(["predict", *map(str, files), "--json", f"--model={saved()}", *arguments]) == 1
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert [entry["file"] for entry in found] == [str(files[0]), str(files[3])]
        assert [entry["predictions"][0]["name"] for entry in found] == ["red", "green"]
        lines = printed.err.strip().splitlines()
        assert "damaged.png" in lines[0]
        assert "missing.png" in lines[1]
        assert "2 of 4 images" in lines[2]
    assert "damaged.png" in failure(capsys, damaged, f"--model={saved()}")


def test_another_image_size(capsys, saved, pictures, tmp_path):
    image = str(pictures / "a.png")
    assert main(["predict", image, "--image-size=48", f"--model={saved()}"]) == 0
    assert "red" in capsys.readouterr().out.splitlines()[1]
    assert "image-size" in failure(capsys, image, "--image-size=0", f"--model={saved()}")
    trained = nfk.create_model("nfnet_tiny", weights=None, classes=3)
    trained.metadata = METADATA
    trained.save(tmp_path / "model.keras")
    larger = nfk.create_model("nfnet_tiny", weights=None, classes=3, input_shape=(64, 64, 3))
    larger.set_weights(trained.get_weights())
    wanted = larger.predict_on_batch(load_for(image, Preprocessing.from_metadata({**METADATA, "image_size": 64}))[None])
    assert main(["predict", image, "--image-size=64", f"--model={tmp_path}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)[0]["predictions"]
    wanted = sorted(keras.ops.convert_to_numpy(wanted)[0])[::-1]
    np.testing.assert_allclose([p["probability"] for p in found], wanted, rtol=1e-3)


def test_a_network_by_name(capsys, pictures, tmp_path):
    model = nfk.create_model("nfnet_tiny", weights=None, classes=1000)
    path = tmp_path / "tiny.weights.h5"
    model.save_weights(path)
    arguments = ["--model=nfnet_tiny", f"--weights={path}", "--json", "--top=3"]
    assert main(["predict", str(pictures / "a.png"), *arguments]) == 0
    best = json.loads(capsys.readouterr().out)[0]["predictions"]
    preprocessing = Preprocessing.from_metadata({**METADATA, **model.metadata, "image_size": 32})
    wanted = keras.ops.convert_to_numpy(model.predict_on_batch(load_for(pictures / "a.png", preprocessing)[None]))[0]
    np.testing.assert_allclose([p["probability"] for p in best], sorted(wanted)[::-1][:3], rtol=1e-3)
    assert main(["predict", str(pictures / "a.png"), *arguments[:2], "--image-size=64"]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no image is given"),
        (["no/such.png"], "no/such.png"),
        (["."], "no images in '.'"),
        (["{image}", "--top=0"], "top"),
        (["{image}", "--batch-size=0"], "batch_size"),
        (["{image}", "--model=nfnet_f00"], "nfnet_f0"),
        (["{image}", "--model=no/such.keras"], "does not exist"),
        (["{image}", "--model=."], "holds no model.keras"),
        (["{image}", "--model={image}"], "no .keras file"),
        (["{image}", "--model={model}", "--weights=imagenet"], "--weights"),
        (["{image}", "--modle=x"], "modle"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, saved, pictures, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    arguments = [text.format(image=pictures / "a.png", model=saved()) for text in arguments]
    assert words in failure(capsys, *arguments)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"class_names": ["red"]}, "3 outputs"),
        ({"mean_rgb": None}, "lacks mean_rgb"),
        ({"crop": "somehow"}, "somehow"),
    ],
)
def test_metadata_that_is_wrong(capsys, saved, pictures, metadata, words):
    assert words in failure(capsys, pictures / "a.png", f"--model={saved(**metadata)}")


def test_models_that_do_not_classify_images(capsys, pictures, tmp_path):
    for i, shape in enumerate(((4,), (32, 32, 1))):
        inputs = keras.Input(shape)
        model = keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs)))
        model.save(tmp_path / f"{i}.keras")
        assert "does not classify colour images" in failure(
            capsys, pictures / "a.png", f"--model={tmp_path / f'{i}.keras'}"
        )


def test_outputs_that_are_no_numbers(capsys, pictures, tmp_path):
    model = small_model(activation="softmax")
    model.metadata = METADATA
    model.set_weights([np.full(w.shape, np.nan) for w in model.get_weights()])
    model.save(tmp_path / "model.keras")
    assert "NaN" in failure(capsys, pictures / "a.png", f"--model={tmp_path}")


def test_a_models_own_code_is_not_run(capsys, pictures, tmp_path):
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Lambda(lambda x: x * 2.0)(keras.layers.GlobalAveragePooling2D()(inputs))
    keras.Model(inputs, keras.layers.Dense(3)(x)).save(tmp_path / "model.keras")
    assert "cannot be loaded" in failure(capsys, pictures / "a.png", f"--model={tmp_path}")


def test_the_command_itself_prints_nothing_else(saved, pictures):
    command = [sys.executable, "-m", "nfnet_keras", "predict", str(pictures / "a.png"), "--json", f"--model={saved()}"]
    # As a user's: the level that the tests set is one at which TensorFlow does report its start.
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["predictions"][0]["name"] == "red"
    assert done.stderr == ""


def test_a_model_for_any_size_is_told_one(capsys, pictures, tmp_path):
    """One of a user's own head, its inputs given as a list."""
    body = nfk.create_model("nfnet_tiny", weights=None, include_top=False, pooling="avg")
    model = nfk.NormalizerFreeModel(body.inputs, keras.layers.Dense(3, "softmax", name="predictions")(body.output))
    model.metadata = {name: value for name, value in METADATA.items() if name != "image_size"}
    model.save(tmp_path / "any.keras")
    assert "any size" in failure(capsys, pictures / "a.png", f"--model={tmp_path / 'any.keras'}")
    assert main(["predict", str(pictures / "a.png"), f"--model={tmp_path / 'any.keras'}", "--image-size=48"]) == 0


def test_a_file_of_weights_is_no_model(capsys, pictures, tmp_path):
    nfk.create_model("nfnet_tiny", weights=None, classes=3).save_weights(tmp_path / "tiny.weights.h5")
    said = failure(capsys, pictures / "a.png", f"--model={tmp_path / 'tiny.weights.h5'}")
    assert "--model=NAME --weights=" in said


@pytest.fixture(scope="module")
def explained(tmp_path_factory):
    """A saved network of two classes, for what is bright in the middle and what is not, with a map of 8 x 8."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.AveragePooling2D(4, name="map")(inputs)
    outputs = keras.layers.Dense(2, "softmax", name="predictions")(keras.layers.GlobalAveragePooling2D()(x))
    model = nfk.NormalizerFreeModel(inputs, outputs)
    model.layers[-1].set_weights([np.array([[1.0, -1.0]] * 3), np.array([0.0, 0.0])])
    model.metadata = {**METADATA, "class_names": ["$\\frac{bright}$", "dark"], "crop": "squash_1.0"}
    path = tmp_path_factory.mktemp("explained") / "model.keras"
    model.save(path)
    return model, str(path)


def test_an_explanation_in_a_picture(capsys, explained, tmp_path, monkeypatch):
    model, path = explained
    drawn = {}
    monkeypatch.setattr("nfnet_keras.cli.predict.write_picture", lambda figure, path: drawn.update({path: figure}))
    pixels = np.full((32, 32, 3), 124, np.uint8)
    pixels[:8, 24:] = 250
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert main(["predict", str(tmp_path / "a.png"), f"--model={path}", f"--explain={tmp_path / 'why.png'}"]) == 0
    assert "bright" in capsys.readouterr().out.splitlines()[1]
    (figure,) = drawn.values()
    seen, covered = (axes.images[0].get_array() for axes in figure.axes)
    # The picture as it is, and the colour of the hottest over the bright corner alone.
    np.testing.assert_array_equal(seen, pixels)
    assert (np.abs(covered[4, 28].astype(int) - [125 + 64, 125, 125]) <= 1).all()
    assert (np.abs(covered[16:, :16].astype(int) - 124) <= 8).all()
    image = load_for(tmp_path / "a.png", Preprocessing.from_metadata(model.metadata))
    probability = float(np.max(keras.ops.convert_to_numpy(model(image[None]))))
    assert figure.axes[0].get_title(loc="left") == f"$\\frac{{bright}}$: {100 * probability:.1f} %"


def test_explanations_of_many_images(capsys, explained, pictures, tmp_path):
    picture = tmp_path / "why.png"
    picture.write_bytes(b"old")
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes((pictures / "a.png").read_bytes()[:60])
    arguments = ["predict", str(pictures), f"--model={explained[1]}", f"--explain={picture}", "--json"]
    assert main([*arguments, "--batch-size=2"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 5
    written = picture.read_bytes()
    assert written.startswith(b"\x89PNG")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["damaged.png", "why.png"]
    assert main([*arguments, str(damaged)]) == 1
    assert len(json.loads(capsys.readouterr().out)) == 5


def test_a_picture_that_cannot_be_written_leaves_the_old_one(capsys, explained, pictures, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def full(self, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    picture = tmp_path / "why.png"
    picture.write_bytes(b"old")
    assert main(["predict", str(pictures / "a.png"), f"--model={explained[1]}", f"--explain={picture}"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert picture.read_bytes() == b"old" and list(tmp_path.iterdir()) == [picture]


def test_explanations_that_are_refused(capsys, saved, explained, pictures, tmp_path):
    copied = tmp_path / "a.png"
    shutil.copy(pictures / "a.png", copied)
    before = copied.read_bytes()
    for out, words in ((copied, "one of the images"), (tmp_path / "a.txt", "a.txt"), (tmp_path / "no/a.png", "exist")):
        assert words in failure(capsys, copied, f"--model={explained[1]}", f"--explain={out}")
    assert words in failure(capsys, tmp_path, f"--model={explained[1]}", f"--explain={tmp_path / 'no/a.png'}")
    assert "one of the images" in failure(capsys, tmp_path, f"--model={explained[1]}", f"--explain={copied}")
    assert copied.read_bytes() == before
    many = [str(copied)] * 31
    assert "30 images at most" in failure(capsys, *many, f"--model={explained[1]}", f"--explain={tmp_path / 'b.png'}")
    # Nothing but an average over the image: there is no map.
    assert main(["predict", str(copied), f"--model={saved()}", f"--explain={tmp_path / 'b.png'}"]) == 1
    assert "larger than 1 x 1" in capsys.readouterr().err
