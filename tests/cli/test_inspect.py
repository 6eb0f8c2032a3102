"""`nfnet inspect`: the table, its sums, files and folders, and what it refuses."""

import json

import keras
import numpy as np
import pytest

import nfnet_keras as nfk
from nfnet_keras.cli.main import main


def inspect(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def report(capsys, *arguments):
    return json.loads(inspect(capsys, *arguments, "--json"))


def failure(capsys, *arguments):
    assert main(["inspect", *map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    return printed.err


@pytest.fixture
def saved(tmp_path):
    model = nfk.create_model("nfnet_tiny", weights=None, input_shape=(48, 48, 3), classes=2)
    model.metadata = {"class_names": ["cat", "dog\x1b[1m"], "image_size": 48, "mean_rgb": [1, 2, 3], "crop": "center"}
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_the_stages_of_f0(capsys):
    told = report(capsys, "nfnet_f0")
    assert (told["parameters"], told["multiply_adds"]) == (71489284, 12384198656)
    assert told["input_shape"] == [256, 256, 3]
    assert told["output_shape"] == [1000]
    stages = {row["name"]: row for row in told["stages"]}
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    assert [row["blocks"] for row in stages.values()] == [None, 1, 2, 6, 3, None]
    assert [row["stride"] for row in stages.values()] == [4, 4, 8, 16, 32, None]
    assert stages["stem"]["output_shape"] == [64, 64, 128]
    assert stages["stage3"]["output_shape"] == [16, 16, 1536]
    # By hand: four 3 x 3 convolutions, weights and gain and bias.
    assert stages["stem"]["parameters"] == sum(9 * a * b + 2 * b for a, b in ((3, 16), (16, 32), (32, 64), (64, 128)))
    assert stages["head"]["multiply_adds"] == 8 * 8 * 1536 * 3072 + 3072 * 1000
    for key in ("parameters", "multiply_adds"):
        assert sum(row[key] for row in stages.values()) == told[key]
        assert sum(row[f"{key}_share"] for row in stages.values()) == pytest.approx(1, abs=1e-5)
    assert "layers" not in told


def test_the_table_and_another_size(capsys):
    text = inspect(capsys, "nfnet_tiny", "--image-size=64")
    assert text.startswith("nfnet_tiny: input 64 x 64 x 3, output 1000\n")
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "526,477" in lines["total"]
    assert "16 x 16 x 32" in lines["stage1"]
    assert "100.0%" in lines["total"]
    assert "stage3_block2_conv1b" not in text
    text = inspect(capsys, "nfnet_tiny", "--layers", "--image_size", "64")
    assert "stage3_block2_conv1b" in text
    assert "stage3_block2_add" not in text


@pytest.mark.parametrize("name", ["nf_regnet_b0", "nf_resnet50"])
def test_the_other_families_have_the_same_stages(capsys, name):
    if name not in nfk.list_models():
        pytest.skip("not in this version")
    stages = report(capsys, name)["stages"]
    assert [row["name"] for row in stages] == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    assert stages[4]["stride"] == 32


def test_a_file_and_a_runs_folder(capsys, saved):
    told = report(capsys, saved, "--layers")
    assert told["metadata"]["class_names"][0] == "cat"
    assert sum(row["parameters"] for row in told["layers"]) == told["parameters"]
    assert report(capsys, saved.parent)["stages"] == told["stages"]
    text = inspect(capsys, saved.parent)
    assert "mean 1.00, 2.00, 3.00 (of pixels 0 to 255); crop center; image size 48" in text
    assert "2 classes: cat, 'dog\\x1b[1m'" in text
    assert report(capsys, saved, "--image-size=96")["multiply_adds"] > 3 * told["multiply_adds"]


def test_networks_of_other_origin_are_listed_by_layers(capsys, tmp_path):
    inner = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3), keras.layers.Conv2D(4, 1)])
    inner.trainable = False
    shared = keras.layers.Conv2D(4, 1, name="shared")
    inputs = keras.Input((None, None, 3))
    x = shared(shared(inner(inputs)))
    outputs = keras.layers.Dense(2, name="top")(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    model.save(tmp_path / "other.keras")
    assert "--image-size" in failure(capsys, tmp_path / "other.keras")
    told = report(capsys, tmp_path / "other.keras", "--image-size=10", "--layers")
    assert [row["name"] for row in told["stages"]] == [inner.name, "shared", "top"]
    assert told["stages"][0]["multiply_adds"] == 64 * (27 * 4 + 16)
    assert (told["stages"][1]["parameters"], told["stages"][1]["multiply_adds"]) == (20, 2 * 64 * 16)
    assert told["parameters"] == sum(row["parameters"] for row in told["stages"])
    text = inspect(capsys, tmp_path / "other.keras", "--image-size=10")
    assert "30 of 162 parameters are trainable" in text


def test_a_head_of_ones_own_counts_as_head(capsys, tmp_path):
    backbone = nfk.create_model("nfnet_tiny", weights=None, include_top=False, pooling="avg", input_shape=(32, 32, 3))
    model = keras.Sequential([keras.Input((32, 32, 3)), backbone, keras.layers.Dense(7, name="mine")])
    model.save(tmp_path / "model.keras")
    stages = report(capsys, tmp_path)["stages"]
    assert stages[-1]["name"] == "head"
    assert stages[-1]["multiply_adds"] == 128 * 256 + 256 * 7


def test_what_is_not_counted_is_noted(capsys, tmp_path):
    inputs = keras.Input((4, 6))
    model = keras.Model(inputs, keras.layers.Attention()([inputs, inputs]))
    model.save(tmp_path / "model.keras")
    assert main(["inspect", str(tmp_path)]) == 0
    assert "Attention" in capsys.readouterr().err
    assert "takes [(4, 6)]" in failure(capsys, tmp_path, "--image-size=10")


def test_refusals(capsys, tmp_path):
    assert "nfnet_f0" in failure(capsys, "nfnet_f00")
    assert "one MODEL" in failure(capsys)
    assert "one MODEL" in failure(capsys, "nfnet_f0", "nfnet_f1")
    assert "does not exist" in failure(capsys, "missing.keras")
    assert "does not exist" in failure(capsys, "no/such/model")
    assert "no model.keras" in failure(capsys, tmp_path)
    assert "at least 1" in failure(capsys, "nfnet_tiny", "--image-size=0")
    assert "32 x 32" in failure(capsys, "nfnet_tiny", "--image-size=8")
    (tmp_path / "model.keras").write_bytes(b"not a model")
    assert "damaged or cut short" in failure(capsys, tmp_path)
    (tmp_path / "weights.h5").write_bytes(b"")
    assert "no .keras file" in failure(capsys, tmp_path / "weights.h5")


def test_code_in_a_file_is_not_run(capsys, tmp_path):
    model = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Lambda(lambda x: x * 2)])
    model.save(tmp_path / "model.keras")
    assert "cannot be loaded" in failure(capsys, tmp_path)


def test_a_folder_does_not_hide_a_network(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nfnet_tiny").mkdir()
    assert report(capsys, "nfnet_tiny")["parameters"] == 526477


def signal(capsys, *arguments):
    return json.loads(inspect(capsys, "--signal", *arguments, "--json"))


def test_the_signal_of_a_network_by_name(capsys, tmp_path):
    picture = tmp_path / "signal.png"
    text = inspect(capsys, "--signal", "nfnet_tiny", f"--picture={picture}", "--images=3")
    assert text.startswith("nfnet_tiny: at initialisation, 3 images of noise, 32 x 32 x 3, seed 0\n")
    assert "skip gains taken for 1" in text and "branch variance" in text
    assert len(text.splitlines()) == 2 + 1 + 6
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]
    told, other = (signal(capsys, "nfnet_tiny", "--images=3", f"--seed={seed}") for seed in (0, 1))
    assert told["rows"] != other["rows"]
    assert (told["state"], told["skip_gain"], told["input_shape"]) == ("at initialisation", 1.0, [32, 32, 3])
    # With the seed, it is the network and the images that Python makes.
    keras.utils.set_random_seed(0)
    model = nfk.create_model("nfnet_tiny", weights=None)
    images = np.random.default_rng(0).standard_normal((3, 32, 32, 3), dtype="float32")
    rows = nfk.signal_propagation(model, images, skip_gain=1.0).rows
    np.testing.assert_allclose([row["variance"] for row in told["rows"]], [row.variance for row in rows], rtol=1e-4)
    closed = signal(capsys, "nfnet_tiny", "--skip-gain=0", "--image-size=64")
    assert (closed["skip_gain"], closed["input_shape"]) == (0.0, [64, 64, 3])
    assert closed["rows"][3]["variance"] == pytest.approx(closed["rows"][4]["variance"], rel=1e-5)


def test_the_signal_of_a_saved_model(capsys, saved):
    told = signal(capsys, saved)
    model = keras.models.load_model(saved)
    images = np.random.default_rng(0).standard_normal((8, 48, 48, 3), dtype="float32")
    rows = nfk.signal_propagation(model, images).rows
    np.testing.assert_allclose([row["variance"] for row in told["rows"]], [row.variance for row in rows], rtol=1e-4)
    assert (told["state"], told["skip_gain"]) == ("as saved", None)


def test_numbers_that_json_does_not_have(capsys, tmp_path):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Rescaling(1e30)(inputs))
    model.save(tmp_path / "model.keras")
    assert signal(capsys, tmp_path / "model.keras")["rows"][0]["variance"] is None


def test_what_does_not_go_with_signal(capsys, tmp_path):
    (tmp_path / "there.png").mkdir()
    for arguments, words in (
        (("nfnet_tiny", "--picture=a.png"), "--picture goes with --signal"),
        (("nfnet_tiny", "--skip-gain=1"), "--skip-gain goes with --signal"),
        (("nfnet_tiny", "--signal", "--layers"), "--layers"),
        (("nfnet_tiny", "--signal", f"--picture={tmp_path / 'a.txt'}"), "a.txt"),
        (("nfnet_tiny", "--signal", f"--picture={tmp_path / 'there.png'}"), "there.png"),
        (("nfnet_tiny", "--signal", f"--picture={tmp_path / 'no' / 'a.png'}"), "does not exist"),
    ):
        assert words in failure(capsys, *arguments)
