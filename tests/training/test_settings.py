"""What a run is told, and what it makes of what it is not told."""

import dataclasses
import json

import pytest

import nfnet_keras as nfk
from nfnet_keras.training import DIGITS, FOLDER, RECIPES, Settings, TrainingError, recipe, settings
from nfnet_keras.training.run import default_out
from nfnet_keras.training.settings import STRATEGIES


def test_defaults_are_the_recipes():
    assert settings() == Settings("nfnet_tiny", None, 0, DIGITS)
    assert settings(data=".").recipe == dataclasses.replace(FOLDER, image_size=64)


@pytest.mark.parametrize(
    ("told", "name", "model"),
    [
        ({}, "digits", "nfnet_tiny"),
        ({"model": "nfnet_f1"}, "digits", "nfnet_f1"),
        ({"data": "."}, "folder", "nfnet_tiny"),
        ({"data": ".", "model": "nfnet_f1"}, "folder", "nfnet_f1"),
        ({"data": ".", "weights": "imagenet"}, "finetune", "nfnet_f0"),
        ({"data": "tfds:imagenet2012", "model": "nfnet_f1"}, "nfnet_f1", "nfnet_f1"),
        ({"data": "tfrecord:a/*", "model": "nf_regnet_b2"}, "nf_regnet_b2", "nf_regnet_b2"),
        ({"data": "tfds:imagenet2012", "model": "timm_nfnet_l0"}, "folder", "timm_nfnet_l0"),
        ({"data": "tfds:beans", "model": "nfnet_f1", "weights": "imagenet"}, "finetune", "nfnet_f1"),
        ({"recipe": "nfnet_f2"}, "nfnet_f2", "nfnet_f2"),
        ({"recipe": "nfnet_f2", "model": "nfnet_tiny", "data": "."}, "nfnet_f2", "nfnet_tiny"),
    ],
)
def test_the_recipe_and_the_network_that_are_taken(told, name, model):
    config = settings(**told)
    assert (config.recipe.name, config.model) == (name, model)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_for_its_own_network_is_taken_as_it_is(name):
    weights = "imagenet" if name == "finetune" else None
    found = settings(recipe=name, data=None if name == "digits" else ".", weights=weights).recipe
    filled_in = {"folder": {"image_size": 64}, "finetune": {"image_size": 192}}.get(name, {})
    assert found == dataclasses.replace(recipe(name), **filled_in)


@pytest.mark.parametrize("model", nfk.list_models())
def test_every_network_brings_its_sizes_and_its_dropout(model):
    row = nfk.applications.registry.get_row(model)
    for name in ("digits", "folder"):
        assert settings(model, recipe=name).recipe.image_size == row.train_size
    found = settings(model, recipe="nfnet_f4").recipe
    own = (row.train_size, row.test_size, 0.5 if model == "nfnet_f4" else None)
    assert (found.image_size, found.test_size, found.dropout_rate) == own


def test_sizes_that_are_asked_for_are_taken():
    def sizes(**told):
        found = settings(**told).recipe
        return found.image_size, found.test_size

    assert sizes(recipe="nfnet_f0", image_size=96) == (96, None)
    assert sizes(recipe="nfnet_f0", image_size=96, changes={"test_size": 128}) == (96, 128)
    assert sizes(recipe="nfnet_f0", changes={"test_size": 128}) == (192, 128)
    assert sizes(recipe="nfnet_f0", model="nfnet_f1", changes={"test-size": 128}) == (224, 128)
    assert sizes(recipe="nfnet_f0", model="nfnet_tiny", data=".") == (64, 64)
    assert settings(recipe="nfnet_f0", model="nfnet_f1", changes={"dropout_rate": 0.1}).recipe.dropout_rate == 0.1
    own = dataclasses.replace(DIGITS, image_size=48, name="mine")
    assert settings("nfnet_f0", recipe=own).recipe is own


def test_paths_are_made_absolute_and_specifications_are_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.npz").write_bytes(b"")
    config = settings(data="photographs", weights="w.npz", cache="kept", data_dir="sets")
    wanted = [str(tmp_path / name) for name in ("photographs", "w.npz", "kept", "sets")]
    assert [config.data, config.weights, config.cache, config.data_dir] == wanted
    config = settings(data="tfds:beans", weights="imagenet", cache="memory", data_dir="gs://sets")
    assert [config.data, config.weights, config.cache, config.data_dir] == [
        "tfds:beans",
        "imagenet",
        "memory",
        "gs://sets",
    ]
    assert settings(data="tfrecord:a/train-*").data == "tfrecord:a/train-*"


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"weights": "no/such.npz"}, r"`weights` must be.*no/such.npz"),
        ({"weights": "no/such.npz", "epochs": 1}, r"`weights` must be.*no/such.npz"),
        ({"weights": "digits", "epochs": 1}, r"of the recipe 'finetune'.*head_epochs=0 to train everything.*=2"),
        ({"changes": {"bogus": 3}}, r"no value 'bogus'; there is: epochs, batch_size, .*mixup"),
        ({"recipe": "finetune"}, r"'finetune' goes out from trained weights \(head_epochs=2\)"),
        ({"changes": {"freeze_stages": 2}}, r"freeze_stages=2"),
        ({"recipe": "nfnet_f"}, r"Unknown recipe: 'nfnet_f'"),
        ({"strategy": "two"}, r"`strategy` must be one of one, mirrored, multi_worker, tpu, data_parallel.*'two'"),
        ({"tpu": "local"}, r"`tpu` must be left out unless"),
        ({"keep": 0}, r"`keep` must be positive.*0"),
        ({"checkpoint_minutes": 0}, r"`checkpoint_minutes` must be positive"),
        ({"changes": {"epocs": 3}}, r"no value 'epocs'; nearest: .*epochs"),
        ({"data": ""}, r"`data`"),
        ({"seed": 1.5}, r"`seed` must be in"),
    ],
)
def test_what_is_wrong_is_named(told, words):
    with pytest.raises(ValueError, match=words):
        settings(**told)


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_that_cannot_accumulate_gradients(name):
    settings(strategy=name, changes={"gradient_accumulation_steps": 1})
    parts = {"gradient_accumulation_steps": 4}
    if name in ("one", "data_parallel"):
        settings(strategy=name, changes=parts)
    else:
        with pytest.raises(ValueError, match=f"strategy .'{name}'.*gradient_accumulation_steps=4"):
            settings(strategy=name, changes=parts)


def test_image_size_is_the_networks_own():
    assert settings("nfnet_f1").recipe.image_size == 224
    assert settings("nfnet_f1", image_size=96).recipe.image_size == 96


def test_learning_rate_is_the_peak_at_this_batch_size():
    recipe = settings(learning_rate=0.05, batch_size=32).recipe
    assert recipe.peak_learning_rate == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["epochs", "batch_size", "image_size", "learning_rate", "clip_factor"])
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be positive.*{value}"):
        settings(**{name: value})


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_cannot_be_are_refused(seed):
    with pytest.raises(ValueError, match="`seed`"):
        settings(seed=seed)


def test_unknown_model_is_refused():
    with pytest.raises(ValueError, match="nfnet_f0"):
        settings("nfnet_f00")
    with pytest.raises(ValueError, match="nfnet_f0"):
        settings(recipe=dataclasses.replace(DIGITS, model="nfnet_f00"))


def test_settings_survive_json():
    config = settings(epochs=3, seed=9, clip_factor=0.5)
    assert Settings.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config = settings(recipe="nfnet_f6", data="tfds:imagenet2012", cache="memory", strategy="tpu", tpu="local", keep=5)
    assert Settings.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert json.loads(json.dumps(config.to_dict()))["recipe"]["augment"]["randaugment_layers"] == 4


def test_settings_of_the_version_before_are_understood():
    """`config.json` as it was written before recipes had names."""
    augment = {"flip": False, "min_area": 1.0, "shift": 0.1, "mixup": 0.2, "cutmix": 0.0}
    values = {"epochs": 40, "batch_size": 64, "learning_rate": 0.8, "warmup_epochs": 3, "clip_factor": 0.02}
    values |= {"image_size": 32, "augment": augment, "momentum": 0.9, "weight_decay": 2e-05, "ema_momentum": 0.99}
    values |= {"label_smoothing": 0.1, "stochastic_depth_rate": 0.1}
    config = Settings.from_dict({"model": "nfnet_tiny", "data": None, "seed": 0, "recipe": values, "images": {}})
    # That version had one floor for all.
    old = dataclasses.replace(DIGITS, name="custom", about="", clip_eps=1e-3)
    assert config == settings(recipe=old)


@pytest.mark.parametrize("change", [lambda d: d.pop("recipe"), lambda d: d["recipe"].update(unknown=1)])
def test_settings_of_another_version_are_refused(change):
    values = settings().to_dict()
    change(values)
    with pytest.raises(TrainingError, match="not this version's"):
        Settings.from_dict(values)


def test_a_run_without_a_folder_gets_one_of_its_own(tmp_path):
    assert default_out(settings()).as_posix().startswith("runs/nfnet_tiny-digits-")
    assert default_out(settings(data=tmp_path)).name.startswith(f"nfnet_tiny-{tmp_path.name}-")
