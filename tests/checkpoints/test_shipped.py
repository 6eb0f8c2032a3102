"""The weights that come with the package: found wherever it was installed, checked, and as good as is written."""

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

import nfnet_keras as nfk
from nfnet_keras import data
from nfnet_keras.checkpoints import CheckpointError
from nfnet_keras.checkpoints import shipped as module
from nfnet_keras.checkpoints.manifest import models_with_shipped, shipped, shipped_words
from nfnet_keras.cli.main import main
from nfnet_keras.training import settings
from nfnet_keras.training.building import new_model
from nfnet_keras.training.evaluating import evaluate

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="files; `test_battery` loads files on every backend"
)
ROOT = Path(__file__).parents[2]
WEIGHTS = shipped("nfnet_tiny", "digits")
FILE = ROOT / "weights" / WEIGHTS.file


@pytest.fixture(scope="module")
def program():
    """weights/make_digits.py, and through it examples/transfer.py."""
    spec = importlib.util.spec_from_file_location("make_digits", ROOT / "weights" / "make_digits.py")
    found = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(found)
    sys.path[:] = path
    return found


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A package that is not in a clone: elsewhere(files) makes it, and says what its installer has recorded."""

    def install(recorded):
        monkeypatch.setattr(module, "_package", lambda: tmp_path / "site" / "nfnet_keras")

        def files(name):
            if recorded is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return recorded

        monkeypatch.setattr(importlib.metadata, "files", files)
        (tmp_path / "site").mkdir()
        return tmp_path / "site"

    return install


def recorded(folder: Path, path: str):
    """A file as `importlib.metadata` gives it: its path is seen from the folder of the packages."""
    found = importlib.metadata.PackagePath(path)
    found.dist = importlib.metadata.PathDistribution(folder / "nfnet_keras-0.dist-info")
    return found


def test_manifest_and_recipe_are_of_the_file():
    recipe = json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert WEIGHTS.checksum.value == recipe["sha256"] == digest
    assert recipe["bytes"] == FILE.stat().st_size < 3e6
    assert recipe["file"] == WEIGHTS.file
    assert 100 * recipe["accuracy"]["top1"] == WEIGHTS.top1
    page = (ROOT / "weights" / "README.md").read_text(encoding="utf-8")
    assert digest in page and recipe["command"] in page
    for way in ("fine-tuned", "from scratch"):
        assert f"{100 * recipe['transfer'][way]['mean']:.1f} %" in page
        assert recipe["transfer"][way]["mean"] == pytest.approx(np.mean(recipe["transfer"][way]["top1"]), abs=1e-4)


def test_it_is_right_as_often_as_is_written(program):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nfk.create_model("nfnet_tiny", weights="digits", classes=5)
    assert model.count_params() == WEIGHTS.parameters
    assert model.metadata["class_names"] == list("01234")
    how = data.Preprocessing.from_metadata(model.metadata)
    held_out = program.transfer.part(data.digits(), range(5)).test
    report = evaluate(model, data.evaluation_batches(held_out, 5, 32, 64, crop=how))
    recipe = json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))
    assert report.images == recipe["accuracy"]["images"]
    assert report.top1 == pytest.approx(WEIGHTS.top1 / 100, abs=1e-4)


def test_its_branches_are_open(program):
    """Skip gains start at 0; clipped too hard, they stay there, and the network is its shortcuts alone."""
    model = nfk.create_model("nfnet_tiny", weights="digits", classes=5)
    how = data.Preprocessing.from_metadata(model.metadata)
    held_out = program.transfer.part(data.digits(), range(5)).test
    images, _ = next(data.evaluation_batches(held_out, 5, 32, 256, crop=how).as_numpy_iterator())
    gains = [variable for variable in model.trainable_variables if "skip_gain" in variable.path]
    values = [abs(float(keras.ops.convert_to_numpy(variable))) for variable in gains]
    assert len(values) == 5 and max(values) > 0.1 and min(values) > 0.01, values
    whole = model.predict_on_batch(images)
    for variable in gains:
        variable.assign(keras.ops.zeros_like(variable))
    assert np.abs(model.predict_on_batch(images) - whole).max() > 0.01


def test_for_other_classes_and_channels():
    with pytest.warns(UserWarning, match="a classifier of 5 classes.*one of 3"):
        model = nfk.create_model("nfnet_tiny", weights="digits", classes=3, input_shape=(64, 64, 1))
    assert "class_names" not in model.metadata
    backbone = nfk.NFNetTiny(weights="digits", include_top=False)
    kernel = "stage1_block1_conv0"
    for got, wanted in zip(
        model.get_layer(kernel).get_weights(), backbone.get_layer(kernel).get_weights(), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)


def test_errors_point_to_it():
    with pytest.raises(ValueError, match=r"No weights were published for 'nfnet_tiny'.*weights='digits' comes with"):
        nfk.create_model("nfnet_tiny")
    with pytest.raises(ValueError, match=r"There is no file 'digit' .*weights='digits' comes with this package"):
        nfk.create_model("nfnet_tiny", weights="digit")
    with pytest.raises(ValueError, match=r"weights='digits' is for nfnet_tiny alone. Received: model 'nfnet_f0'"):
        nfk.create_model("nfnet_f0", weights="digits")
    with pytest.raises(ValueError, match=r"No weights were published for 'nfnet_f7'") as caught:
        nfk.create_model("nfnet_f7")
    assert "digits" not in str(caught.value)


def test_words():
    assert shipped_words() == shipped_words("nfnet_tiny") == ["digits"]
    assert shipped_words("nfnet_f0") == [] and models_with_shipped("digits") == ["nfnet_tiny"]
    for word in shipped_words():
        for name in models_with_shipped(word):
            assert name in nfk.list_models() and (ROOT / "weights" / shipped(name, word).file).is_file()


def test_the_word_is_no_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").write_bytes(b"something else")
    assert nfk.NFNetTiny(weights="digits", classes=5).metadata["class_names"] == list("01234")


def test_found_where_a_wheel_put_it(elsewhere, tmp_path):
    site = elsewhere([recorded(tmp_path / "site", f"../share/nfnet_keras/weights/{WEIGHTS.file}")])
    target = tmp_path / "share" / "nfnet_keras" / "weights"
    target.mkdir(parents=True)
    with pytest.raises(CheckpointError, match="come with this package, but their file"):
        module.shipped_path(WEIGHTS)
    shutil.copy(FILE, target)
    assert Path(module.shipped_path(WEIGHTS)).resolve() == target / WEIGHTS.file
    assert not (site / "weights").exists()


def test_found_where_pip_put_it_with_target(elsewhere):
    target = elsewhere(None) / "share" / "nfnet_keras" / "weights"
    target.mkdir(parents=True)
    shutil.copy(FILE, target)
    assert module.shipped_path(WEIGHTS) == str(target / WEIGHTS.file)


@pytest.mark.parametrize("files", [None, []], ids=["no distribution", "no record"])
def test_missing(elsewhere, files):
    elsewhere(files)
    with pytest.raises(CheckpointError, match=r"neither in the folder 'weights'.*pip install --force-reinstall"):
        nfk.create_model("nfnet_tiny", weights="digits", classes=5)


@pytest.mark.parametrize("damage", ["a bit", "the end", "all"])
def test_a_damaged_file_is_not_used(elsewhere, monkeypatch, damage):
    folder = elsewhere([]) / "weights"
    folder.mkdir(parents=True)
    content = bytearray(FILE.read_bytes())
    if damage == "a bit":
        content[len(content) // 2] ^= 1
    content = {"a bit": content, "the end": content[:-1], "all": b""}[damage]
    (folder / WEIGHTS.file).write_bytes(content)
    # It is known before a parser sees the file.
    monkeypatch.setattr(sys.modules["nfnet_keras.applications.weights"], "open_checkpoint", None)
    found = hashlib.sha256(content).hexdigest()
    with pytest.raises(CheckpointError, match=f"is damaged.*{found}.*{WEIGHTS.checksum.value}.*force-reinstall"):
        nfk.create_model("nfnet_tiny", weights="digits", classes=5)


def test_setup_ships_it():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    section = re.search(r"\[options\.data_files\]\n(.*?)\n\[", text, re.DOTALL)[1]
    target, *files = (line.strip() for line in section.strip().splitlines())
    assert target == f"{module._SHARED} ="
    assert f"weights/{WEIGHTS.file}" in files and all((ROOT / name).is_file() for name in files)


def test_a_run_begins_with_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = settings(model="nfnet_tiny", weights="digits", image_size=32)
    assert config.recipe.name == "finetune"
    with pytest.warns(UserWarning, match="classifier"):
        model = new_model(config, ("cat", "dog"))
    wanted = nfk.NFNetTiny(weights="digits", include_top=False).get_weights()
    # All but the classifier's kernel and bias.
    for got, value in zip(model.get_weights()[:-2], wanted, strict=True):
        np.testing.assert_array_equal(got, value)
    with pytest.raises(ValueError, match=r"'imagenet', 'digits' or the path of a file. There is no file .*numbers"):
        settings(model="nfnet_tiny", weights="numbers")


def test_predict_has_its_classes(capsys, tmp_path):
    digits = data.digits().test
    path = tmp_path / "four.png"
    keras.utils.save_img(path, digits.images[np.flatnonzero(digits.labels == 4)[0]], scale=False)
    assert main(["predict", str(path), "--model=nfnet_tiny", "--weights=digits", "--top=1"]) == 0
    assert re.search(r"1 +\d\d\.\d\d % +4$", capsys.readouterr().out.strip())


@pytest.mark.slow
def test_the_program_runs(tmp_path):
    command = [sys.executable, ROOT / "weights" / "make_digits.py", "--out", tmp_path, "--steps", "20"]
    subprocess.run(command, check=True, timeout=280, cwd=tmp_path)
    made = json.loads((tmp_path / FILE.with_suffix(".json").name).read_text(encoding="utf-8"))
    assert made["sha256"] == hashlib.sha256((tmp_path / FILE.name).read_bytes()).hexdigest()
    written = json.loads(FILE.with_suffix(".json").read_text(encoding="utf-8"))
    # From scratch nothing depends on the file.
    assert made["transfer"]["from scratch"]["mean"] == pytest.approx(
        written["transfer"]["from scratch"]["mean"], abs=0.03
    )
    assert (made["recipe"] | {"steps": 600}) == written["recipe"]
