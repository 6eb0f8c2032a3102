"""What a run is told, and what it makes of what it is not told."""

import dataclasses
import json

import pytest

from nfnet_keras.training import DIGITS, FOLDER, Settings, TrainingError, settings
from nfnet_keras.training.run import default_out


def test_defaults_are_the_recipes():
    assert settings() == Settings("nfnet_tiny", None, 0, DIGITS)
    assert settings(data=".").recipe == dataclasses.replace(FOLDER, image_size=64)


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


def test_settings_survive_json():
    config = settings(epochs=3, seed=9, clip_factor=0.5)
    assert Settings.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("change", [lambda d: d.pop("recipe"), lambda d: d["recipe"].update(unknown=1)])
def test_settings_of_another_version_are_refused(change):
    values = settings().to_dict()
    change(values)
    with pytest.raises(TrainingError, match="not this version's"):
        Settings.from_dict(values)


def test_a_run_without_a_folder_gets_one_of_its_own(tmp_path):
    assert default_out(settings()).as_posix().startswith("runs/nfnet_tiny-digits-")
    assert default_out(settings(data=tmp_path)).name.startswith(f"nfnet_tiny-{tmp_path.name}-")
