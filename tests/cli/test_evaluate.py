"""`nfnet evaluate`: what it measures, how it matches classes, what it writes, and what it refuses."""

import json
import shutil

import keras
import numpy as np
import pytest
from PIL import Image

import nfnet_keras as nfk
from nfnet_keras import data
from nfnet_keras.applications.labels import imagenet_classes
from nfnet_keras.cli.main import main
from nfnet_keras.training.evaluating import evaluate

COLOURS = ("red", "green", "blue")
METADATA = {
    "class_names": list(COLOURS),
    "image_size": 32,
    "mean_rgb": list(data.MEAN_RGB),
    "stddev_rgb": list(data.STDDEV_RGB),
}


def colour_model(units=3, activation="softmax"):
    """A network that tells colours apart without training: one number a colour channel."""
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(inputs)
    outputs = keras.layers.Dense(units, activation, kernel_initializer="identity", name="predictions")(x)
    return nfk.NormalizerFreeModel(inputs, outputs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(**metadata): the path of a saved network for colours."""
    folder = tmp_path_factory.mktemp("models")

    def save(units=3, activation="softmax", **metadata):
        model = colour_model(units, activation)
        model.metadata = {name: value for name, value in {**METADATA, **metadata}.items() if value is not None}
        path = folder / f"{len(list(folder.iterdir()))}.keras"
        model.save(path)
        return str(path)

    return save


def paint(path, channel):
    pixels = np.full((40, 50, 3), 20, np.uint8)
    pixels[..., channel] = 220
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder of class folders; one picture of seven is in the wrong one."""
    root = tmp_path_factory.mktemp("colours")
    for place, channel in (("red/1", 0), ("red/2", 0), ("red/3", 0), ("green/1", 1), ("green/2", 2)):
        paint(root / f"{place}.png", channel)
    for number in (1, 2):
        paint(root / f"blue/{number}.png", 2)
    return root


def told(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def failure(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) != 0
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1, printed.err
    return lines[0]


def test_a_folder_in_another_order(capsys, saved, colours):
    """Folders are sorted by name, the model's classes are not."""
    report, said = told(capsys, saved(), f"--data={colours}")
    assert (report["images"], report["split"], report["top5"]) == (7, "all", None)
    assert report["top1"] == pytest.approx(6 / 7)
    assert report["confusion"] == [[3, 0, 0], [0, 1, 1], [0, 0, 2]]
    assert [row["accuracy"] for row in report["per_class"]] == [1, 0.5, 1]
    assert said.count("matched by name") == 1
    report, said = told(capsys, saved(class_names=sorted(COLOURS)), f"--data={colours}")
    assert said == ""
    assert report["top1"] < 0.5


def test_the_table(capsys, saved, colours):
    assert main(["evaluate", saved(), f"--data={colours}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("7 images, 32 x 32 pixels")
    assert lines[2].split() == ["top-1", "85.71", "%"]
    assert lines[3].split()[:2] == ["top-5", "-"]
    table = [line.split() for line in lines[6:]]
    assert table[0] == ["class", "images", "right", "accuracy"]
    assert table[1] == ["green", "2", "1", "50.00", "%"]
    assert [row[0] for row in table[2:]] == ["red", "blue"]


def test_the_ten_worst_or_all(capsys, saved, tmp_path):
    names = [f"class{i:02}" for i in range(12)]
    for name in names:
        for number in (1, 2):
            paint(tmp_path / name / f"{number}.png", 0)
    path = saved(12, class_names=names)
    assert main(["evaluate", path, f"--data={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "(the 10 worst of 12 classes; --all lists all)"
    assert "top-5   41.67 %" in lines
    assert not any(line.startswith("class00 ") for line in lines)
    assert main(["evaluate", path, f"--data={tmp_path}", "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == ["class00", "2", "2", "100.00", "%"]


def test_what_is_kept(capsys, saved, colours, tmp_path):
    out = tmp_path / "kept" / "here"
    report, said = told(capsys, saved(), f"--data={colours}", f"--out={out}")
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir()) == ["confusion.png", "report.json"]
    assert str(out) in said


def test_logits_batches_and_crops_change_nothing(capsys, saved, colours):
    wanted, _ = told(capsys, saved(), f"--data={colours}")
    for arguments in ([saved(activation=None)], [saved(), "--batch-size=2"], [saved(), "--crop=center_0.9"]):
        report, _ = told(capsys, *arguments, f"--data={colours}")
        assert report["confusion"] == wanted["confusion"]
        assert report["loss"] == pytest.approx(wanted["loss"], rel=1e-3)


def test_images_are_made_ready_as_the_model_needs_them(capsys, saved, colours):
    half = [127.5] * 3
    report, _ = told(capsys, saved(activation=None, mean_rgb=half, stddev_rgb=half), f"--data={colours}")
    right, wrong = (220 - 127.5) / 127.5, (20 - 127.5) / 127.5
    losses = [np.log(np.exp(right) + 2 * np.exp(wrong)) - (right if i < 6 else wrong) for i in range(7)]
    assert report["loss"] == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run on the digits, as far as an evaluation reads it."""
    folder = tmp_path_factory.mktemp("run")
    model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(32, 32, 3), classes=10)
    model.metadata = {**METADATA, "class_names": [str(i) for i in range(10)], "crop": "training"}
    model.save(folder / "model.keras")
    (folder / "config.json").write_text(json.dumps({"model": "nfnet_tiny", "data": None, "seed": 0}))
    return folder, model


def test_a_run_is_measured_on_its_own_held_out_images(capsys, run_folder):
    folder, model = run_folder
    report, said = told(capsys, folder)
    wanted = evaluate(model, data.evaluation_batches(data.digits().test, 10, 32, 32))
    assert (report["images"], report["data"], report["split"], said) == (360, "digits", "test", "")
    assert report["top1"] == pytest.approx(wanted.top1)
    assert report["loss"] == pytest.approx(wanted.loss, rel=1e-4)


def test_the_digits_are_named(capsys, saved):
    """Ten classes of numbers; the model's names are others, and it has as many."""
    path = saved(10, class_names=[f"digit {i}" for i in range(10)])
    report, said = told(capsys, path, "--data=digits", "--split=train")
    assert (report["images"], report["data"]) == (1437, "digits")
    assert "numbers its classes" in said


def test_which_images_of_a_folder(capsys, saved, colours, tmp_path):
    for part in ("train", "val"):
        for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
            for number in range(2 if part == "val" else 3):
                paint(tmp_path / "divided" / part / name / f"{number}.png", channel)
    path = saved()
    assert told(capsys, path, f"--data={tmp_path / 'divided'}")[0]["images"] == 6
    assert told(capsys, path, f"--data={tmp_path / 'divided'}", "--split=all")[0]["images"] == 15
    (tmp_path / "run").mkdir()
    shutil.copy(path, tmp_path / "run" / "model.keras")
    (tmp_path / "run" / "config.json").write_text(json.dumps({"data": str(colours)}))
    own, _ = told(capsys, tmp_path / "run")
    assert (own["images"], own["split"]) == (3, "test")
    assert told(capsys, tmp_path / "run", f"--data={colours}")[0]["images"] == 3


def test_imagenets_classes_by_id(capsys, tmp_path):
    model = nfk.create_model("nfnet_tiny", weights=None, classes=1000)
    model.save_weights(tmp_path / "tiny.weights.h5")
    for root, names in (
        ("ids", ("n02123045", "n01440764")),
        ("names", ("tabby", "tench")),
        ("both", ("tabby", "crane")),
    ):
        for name in names:
            for number in (1, 2):
                paint(tmp_path / root / name / f"{number}.png", number)
    arguments = ["nfnet_tiny", f"--weights={tmp_path / 'tiny.weights.h5'}", "--image-size=32"]
    report, said = told(capsys, *arguments, f"--data={tmp_path / 'ids'}")
    assert "2 of the model's 1000 classes" in said
    counted = {row["name"]: row["images"] for row in report["per_class"] if row["images"]}
    assert counted == {"tench": 2, "tabby": 2}
    assert report["confusion_entries"]


def test_imagenets_classes_by_name(capsys, saved, tmp_path):
    for root, names in (("known", ("tabby", "tench")), ("both", ("tabby", "crane"))):
        for name in names:
            for number in (1, 2):
                paint(tmp_path / root / name / f"{number}.png", number)
    ids, names = map(list, zip(*imagenet_classes(), strict=True))
    path = saved(1000, class_names=names, class_ids=ids)
    report, _ = told(capsys, path, f"--data={tmp_path / 'known'}")
    # A picture's channel is the output that it is taken for.
    place = names.index("tabby"), names.index("tench")
    assert report["confusion_entries"] == [[min(place), i, 1] for i in (1, 2)] + [[max(place), i, 1] for i in (1, 2)]
    assert "name the folders by the classes' ids" in failure(capsys, path, f"--data={tmp_path / 'both'}")


def test_classes_without_names_are_taken_in_order(capsys, saved, colours):
    report, said = told(capsys, saved(class_names=None), f"--data={colours}")
    assert "does not name its classes" in said
    assert report["class_names"] == sorted(COLOURS)
    assert "5 classes without names" in failure(capsys, saved(5, class_names=None), f"--data={colours}")


def test_other_classes_are_listed(capsys, saved, colours):
    said = failure(capsys, saved(class_names=["red", "gren", "cyan"]), f"--data={colours}")
    assert "2 of the data's 3 classes are not the model's: 'blue', 'green'" in said
    assert said.endswith("these are not in the data: 'gren', 'cyan'")


def test_a_broken_image_is_named(capsys, saved, colours, tmp_path):
    shutil.copytree(colours, tmp_path / "images")
    (tmp_path / "images" / "red" / "broken.png").write_bytes((colours / "red" / "1.png").read_bytes()[:60])
    assert "broken.png" in failure(capsys, saved(), f"--data={tmp_path / 'images'}").replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "one MODEL is needed, 0"),
        (["a", "b"], "one MODEL is needed, 2"),
        (["nfnet_tiny"], "say with --data"),
        (["{model}"], "say with --data"),
        (
            ["nfnet_f00", "--data=digits"],
            "no file or folder 'nfnet_f00' here. Unknown model: 'nfnet_f00'. Nearest: nfnet_f0",
        ),
        (["nothere", "--data=digits"], "no file or folder 'nothere' here"),
        (["no/such.keras"], "does not exist"),
        (["."], "holds no model.keras"),
        (["{model}", "--data=no/such"], "no/such"),
        (["{model}", "--data={colours}", "--weights=imagenet"], "--weights"),
        (["{model}", "--data={colours}", "--crop=somehow"], "somehow"),
        (["{model}", "--data={colours}", "--image-size=0"], "image-size"),
        (["{model}", "--data={colours}", "--split=some"], "split"),
        (["{model}", "--data={colours}", "--out={model}"], "cannot write to '{model}' (File exists); name another"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, saved, colours, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    values = {"model": saved(), "colours": colours}
    assert words.format(**values) in failure(capsys, *(text.format(**values) for text in arguments))


def test_help(capsys):
    assert main(["evaluate", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: nfnet evaluate MODEL [--flag=value ...]")
    for flag in ("weights", "data", "data-dir", "split", "batch-size", "image-size", "crop", "json", "all", "out"):
        assert f"--{flag}\n" in text
