"""`nfnet train`: flags, files and recipes. Most of it by dry runs; test_main.py trains."""

import json
import os

import pytest

from nfnet_keras.cli import train
from nfnet_keras.cli.main import main
from nfnet_keras.training import DIGITS, RECIPES, Settings, settings
from nfnet_keras.training import run as training


@pytest.fixture
def told(monkeypatch):
    """told(*arguments): the settings and the folder of the run that a command would start."""
    seen = {}

    def record(config, out, resume=False, verbose="auto"):
        seen.update(config=config, out=out, resume=resume)
        return {"test_accuracy": 1.0, "test_loss": 0.1, "test_images": 1, "classes": 2}

    monkeypatch.setattr(training, "train", record)

    def tell(*arguments):
        assert main(["train", *arguments]) == 0
        return seen["config"]

    tell.seen = seen
    return tell


def failure(capsys, *arguments, status=1):
    assert main(["train", *arguments]) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("accuracy", "loss", "status", "words"),
    [
        (0.9, 0.4, 0, ""),
        (0.9, 30.0, 0, ""),
        (0.5, 0.8, 0, "hardly better than chance (0.5000). More epochs"),
        (0.5, 1.4e12, 0, "loss is 1.4e+12, where guessing has 0.6931: the run diverged. Start one"),
        (0.5, float("nan"), 1, "loss is nan, where guessing has 0.6931: the run diverged. Start one"),
        (0.9, float("inf"), 1, "loss is inf, where guessing has 0.6931: the run diverged. Start one"),
    ],
)
def test_what_a_run_came_to(capsys, monkeypatch, accuracy, loss, status, words):
    metrics = {"test_accuracy": accuracy, "test_loss": loss, "test_images": 1, "classes": 2}
    monkeypatch.setattr(training, "train", lambda *_, **__: metrics)
    assert main(["train", "--out=x"]) == status
    out, err = capsys.readouterr()
    printed = out + err
    assert words in printed and ("diverged" in err) == ("diverged" in words)
    assert words or ("chance" not in printed and "diverged" not in printed)


@pytest.mark.parametrize("asked", ["--list-recipes", "--list_recipes", "--recipe=list"])
def test_recipes_are_listed(capsys, asked):
    assert main(["train", asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(line.endswith(recipe.about) for line, recipe in zip(lines, RECIPES.values(), strict=True))


def test_a_dry_run_makes_no_folder_and_trains_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("a dry run trains"))
    assert main(["train", "--dry-run", "--epochs=2", f"--out={tmp_path / 'run'}"]) == 0
    assert main(["train", "--dry_run", "--recipe", "nfnet_f0", "--data", "tfds:imagenet2012"]) == 0
    printed = capsys.readouterr().out
    assert "with the recipe digits" in printed
    assert "with the recipe nfnet_f0 (the paper)" in printed
    assert os.listdir(tmp_path) == []


def test_every_value_has_a_flag(told, tmp_path):
    (tmp_path / "w.npz").write_bytes(b"")
    values = {
        **{"model": "nfnet_f1", "data": "tfds:beans", "seed": 3, "weights": str(tmp_path / "w.npz"), "keep": 7},
        **{"data-dir": str(tmp_path), "cache": "memory", "strategy": "tpu", "tpu": "t", "checkpoint-minutes": 2.5},
    }
    config = told("--recipe=nfnet_f6", *(f"--{name}={value}" for name, value in values.items()))
    for name, value in values.items():
        assert getattr(config, name.replace("-", "_")) == value
    values = {
        **{"epochs": 9, "batch_size": 12, "warmup_epochs": 1.5, "clip_factor": 0.5, "clip_eps": 0.1, "image_size": 40},
        **{"test_size": 48, "momentum": 0.5, "weight_decay": 0.25, "ema_momentum": 0.75, "label_smoothing": 0.3},
        **{
            "stochastic_depth_rate": 0.4,
            "scale_learning_rate": False,
            "final_learning_rate": 0.01,
            "nesterov": False,
            "antialias": False,
        },
        **{"dropout_rate": 0.6, "evaluation_crop": "center_0.9", "sam_rho": 0.7, "sam_fraction": 0.8},
        **{"gradient_accumulation_steps": 1, "precision": "float32", "freeze_stages": 2, "head_epochs": 1},
        **{"layer_decay": 0.35, "learning_rate": 0.15},
    }
    inner = {"flip": False, "min_area": 0.7, "shift": 0.2, "mixup": 0.1, "cutmix": 0.3, "randaugment_layers": 1}
    inner |= {"randaugment_magnitude": 2.0, "mix_from_twice": False}
    assert set(values) == set(vars(DIGITS)) - {"name", "about", "model", "augment"}
    assert set(inner) == set(vars(DIGITS.augment))
    for style in (lambda name: name, lambda name: name.replace("_", "-")):
        flags = [f"--{style(name)}={str(value).lower()}" for name, value in (values | inner).items()]
        recipe = told("--recipe=nfnet_f6", "--weights=imagenet", *flags).recipe
        for name, value in values.items():
            assert getattr(recipe, name) == value, name
        assert vars(recipe.augment) == inner
    for name, value in inner.items():
        augment = told("--recipe=nfnet_f6", f"--augment.{name}={str(value).lower()}").recipe.augment
        assert getattr(augment, name) == value


def test_none_switches_off_and_no_denies(told):
    recipe = told("--recipe=nfnet_f6", "--clip-factor=none", "--sam_rho=none", "--nonesterov").recipe
    assert (recipe.clip_factor, recipe.sam_rho, recipe.nesterov) == (None, None, False)
    assert told("--recipe=nf_regnet_b0", "--image-size=none").recipe.image_size == 192


def test_without_flags_it_is_the_default(told):
    assert told() == settings()
    assert told.seen["resume"] is False


def test_flags_come_before_the_file_and_the_file_before_the_recipe(told, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("recipe: nfnet_f0\nseed: 5\nepochs: 90\nmixup: 0.5\nclip_factor: 0.02\nlearning_rate: 0.8\n")
    config = told(f"--config={path}", "--epochs=30", "--clip-factor=none", "--batch-size=1024")
    recipe = config.recipe
    assert (recipe.name, config.seed, recipe.epochs, recipe.augment.mixup) == ("nfnet_f0", 5, 30, 0.5)
    assert (recipe.clip_factor, recipe.weight_decay) == (None, 2e-5)
    assert recipe.peak_learning_rate == pytest.approx(0.8)
    assert told(f"--config={path}", "--recipe=nf_regnet_b0").recipe.name == "nf_regnet_b0"


@pytest.mark.parametrize(
    ("arguments", "words", "status"),
    [
        (["--recipe=nfnet_f"], "Unknown recipe: 'nfnet_f'. Nearest: nfnet_f", 1),
        (["--config=no/such.yaml"], "'no/such.yaml': it cannot be read", 1),
        (["--weight-decay=much"], "`weight_decay` must be a number. Received: weight_decay='much'", 2),
        (["--clip-factor=nan"], "`clip_factor` must be a number, or none", 2),
        (["--flip=2"], "--flip=2", 2),
        (["--mixup=-1"], "mixup must be", 1),
        (["--precision=half"], "`precision` must be one of float32, mixed_bfloat16, mixed_float16", 1),
        (["--weights=no/such.npz"], "There is no file", 1),
        (["--sam-rho=0.05", "--gradient-accumulation-steps=2"], "must be 1 with SAM", 1),
        (["--strategy=both"], "`strategy` must be one of", 1),
        (["--data="], "`data` must be a text", 2),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, arguments, words, status):
    assert words in failure(capsys, "--dry-run", *arguments, status=status)


def test_wrong_names_in_a_file_are_said_in_one_line(capsys, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epocs: 3")
    assert f"{str(path)!r}: there is no value 'epocs'; nearest: epochs" in failure(capsys, f"--config={path}")
    path.write_text("epochs: three")
    assert "`epochs` must be a whole number. Received: epochs='three'" in failure(capsys, f"--config={path}")
    path.write_text("epochs: {\n")
    assert "is no YAML" in failure(capsys, f"--config={path}")


@pytest.fixture
def run(tmp_path):
    """The folder of a run, with nothing but its settings, and these."""
    config = settings(epochs=3, learning_rate=0.05, changes={"clip_factor": None, "mixup": 0.1}, seed=4)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "images": {"train": 1437}}))
    return tmp_path, config


def test_resume_takes_the_settings_of_the_run(told, run):
    folder, config = run
    same = ["--epochs=3", "--learning-rate=0.05", "--clip-factor=none", "--mixup=0.1", "--seed=4", "--recipe=digits"]
    same += ["--model=nfnet_tiny", "--strategy=one", f"--config={folder / 'config.json'}"]
    for arguments in ([], same):
        assert told("--resume", f"--out={folder}", *arguments) == config
        assert told.seen["resume"] is True
        assert told.seen["out"] == str(folder)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--seed=3", "seed 4, not 3"),
        ("--epochs=4", "epochs 3, not 4"),
        ("--learning-rate=0.1", "learning_rate 0.05, not 0.1"),
        ("--clip-factor=0.02", "clip_factor none, not 0.02"),
        ("--sam-rho=0.05", "sam_rho none, not 0.05"),
        ("--augment.mixup=0", "mixup 0.1, not 0.0"),
        ("--flip", "flip False, not True"),
        ("--model=nfnet_f0", "model nfnet_tiny, not nfnet_f0"),
        ("--data=tfds:beans", "data none, not tfds:beans"),
        ("--weights=imagenet", "weights none, not imagenet"),
        ("--strategy=mirrored", "strategy one, not mirrored"),
        ("--recipe=nfnet_f0", "recipe digits, not nfnet_f0"),
        ("--image-size=none", "image_size 32, not none"),
    ],
)
def test_resume_refuses_what_contradicts_the_run(capsys, run, flag, words):
    assert words in failure(capsys, "--resume", f"--out={run[0]}", flag)


def test_resume_refuses_a_file_that_contradicts_the_run(capsys, run, tmp_path):
    path = tmp_path / "other.json"
    path.write_text(json.dumps({**settings(epochs=3, learning_rate=0.05, seed=4).to_dict()}))
    line = failure(capsys, "--resume", f"--out={run[0]}", f"--config={path}")
    assert "clip_factor none, not 0.02" in line


def test_resume_may_change_what_learning_does_not_depend_on(told, run):
    folder, config = run
    found = told("--resume", f"--out={folder}", "--keep=9", "--cache=memory", "--checkpoint-minutes=1", "--data-dir=/a")
    changed = {"keep": 9, "cache": "memory", "checkpoint_minutes": 1.0, "data_dir": "/a"}
    assert found == Settings(**{**vars(config), **changed})


def test_resume_takes_images_that_were_moved(told, tmp_path, capsys):
    def resume(old, *arguments):
        config = settings(data=old, model="nfnet_tiny", epochs=3)
        (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "images": {}}))
        return told("--resume", f"--out={tmp_path}", *arguments)

    folder = str(tmp_path / "photographs")
    os.mkdir(folder)
    assert resume("/gone", f"--data={folder}").data == folder
    assert resume("tfrecord:/gone/train-*", "--data=tfrecord:/new/train-*").data == "tfrecord:/new/train-*"
    assert resume(folder).data == folder


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("/gone", None, "are not in '/gone'; say where: --data=FOLDER"),
        ("/gone", "/gone/too", "are not in '/gone/too'; say where: --data=FOLDER"),
        ("tfds:beans", "tfds:cats_vs_dogs", "data tfds:beans, not tfds:cats_vs_dogs"),
        ("/gone", "tfds:beans", "data /gone, not tfds:beans"),
    ],
)
def test_resume_refuses_other_images(tmp_path, capsys, old, new, words):
    config = settings(data=old, model="nfnet_tiny", epochs=3)
    (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "images": {}}))
    assert words in failure(capsys, "--resume", f"--out={tmp_path}", *([f"--data={new}"] if new else []))


def test_help_names_every_value(capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for name in train.define_flags():
        assert (f"--{name.replace('_', '-')}\n" in text) == ("." not in name), name
    assert "Default" not in text
