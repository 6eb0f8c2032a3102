"""A run from beginning to end, stopped and resumed, and with things going wrong."""

import csv
import json
import os
import signal

import keras
import numpy as np
import pytest

from nfnet_keras import data
from nfnet_keras.training import TrainingError, run, settings, train
from nfnet_keras.training.recorder import Recorder
from nfnet_keras.training.run_folder import RunFolder

EPOCHS = 2


def quarter_of_the_digits():
    """Enough: what is tested here does not depend on how many there are."""
    full = data.digits()
    train_split, test_split = (
        data.Split(split.labels[::4], images=split.images[::4]) for split in (full.train, full.test)
    )
    return data.ImageSet("digits", full.class_names, train_split, test_split)


QUARTER = quarter_of_the_digits()


@pytest.fixture(autouse=True)
def few_digits(monkeypatch):
    monkeypatch.setattr(data, "digits", lambda: QUARTER)


def config(**changes):
    return settings(**{"epochs": EPOCHS, "seed": 5, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed: its folder and what it returned."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "digits", lambda: QUARTER)
        result = train(config(), folder, verbose=0)
    return folder, result


def weights(folder):
    return keras.saving.load_model(folder / "model.keras").get_weights()


def assert_same_weights(one, other):
    for a, b in zip(weights(one), weights(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_folder_holds_what_is_promised(finished):
    folder, result = finished
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert result["seed"] == 5
    assert result["config"]["recipe"]["epochs"] == EPOCHS
    assert result["versions"]["keras"] == keras.version()
    assert result["seconds"] > 0
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["epoch"]) for row in rows] == [1, 2]
    assert {"loss", "accuracy", "agc_clipped", "val_accuracy", "learning_rate", "seconds"} <= set(rows[0])
    assert 0 < float(rows[0]["agc_clipped"]) < 1
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_the_saved_model_is_the_one_that_was_measured(finished):
    folder, result = finished
    model = keras.saving.load_model(folder / "model.keras")
    images = data.evaluation_batches(data.digits().test, 10, 32, 64)
    assert model.evaluate(images, verbose=0, return_dict=True)["accuracy"] == pytest.approx(result["test_accuracy"])
    assert model.metadata["class_names"] == [str(digit) for digit in range(10)]
    assert model.metadata["image_size"] == 32


def test_the_saved_model_holds_the_averaged_weights(finished):
    folder, _ = finished
    last = keras.saving.load_model(folder / "checkpoint.keras")
    averages = [keras.ops.convert_to_numpy(a) for a in last.optimizer._model_variables_moving_average]
    saved = keras.saving.load_model(folder / "model.keras").trainable_variables
    for variable, average in zip(saved, averages, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), average)
    assert any(
        np.abs(keras.ops.convert_to_numpy(raw) - average).max() > 1e-4
        for raw, average in zip(last.trainable_variables, averages, strict=True)
    )


def test_one_seed_gives_one_run_and_another_seed_another(finished, tmp_path):
    folder, result = finished
    again = train(config(), tmp_path / "again", verbose=0)
    assert again["test_loss"] == result["test_loss"]
    assert_same_weights(folder, tmp_path / "again")
    other = train(config(seed=6), tmp_path / "other", verbose=0)
    assert other["test_loss"] != result["test_loss"]


@pytest.mark.parametrize("moment", [3, 5, 9])
def test_stopped_and_resumed_ends_with_the_weights_of_a_run_never_stopped(finished, tmp_path, moment):
    steps = data.steps_per_epoch(data.digits().train, 64)
    assert steps == 5  # so that the moments are in mid-epoch, at its end, and in the second epoch
    seen = []
    original = Recorder.on_train_batch_end

    def press_ctrl_c(self, batch, logs=None):
        seen.append(batch)
        if len(seen) == moment:
            os.kill(os.getpid(), signal.SIGINT)
        original(self, batch, logs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_train_batch_end", press_ctrl_c)
        with pytest.raises(KeyboardInterrupt):
            train(config(), tmp_path, verbose=0)
    assert len(seen) == moment
    assert not (tmp_path / "metrics.json").exists()
    result = train(config(), tmp_path, resume=True, verbose=0)
    assert_same_weights(finished[0], tmp_path)
    assert result["test_loss"] == finished[1]["test_loss"]
    resumed, undisturbed = RunFolder(tmp_path).read_table(), RunFolder(finished[0]).read_table()
    for one, other in zip(resumed, undisturbed, strict=True):
        for name in one.keys() - {"seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_other_images_are_not_taken_for_those_of_the_run(finished, monkeypatch):
    half = data.Split(QUARTER.train.labels[::2], images=QUARTER.train.images[::2])
    monkeypatch.setattr(data, "digits", lambda: data.ImageSet("digits", QUARTER.class_names, half, QUARTER.test))
    with pytest.raises(TrainingError, match="not those that the run"):
        train(config(), finished[0], resume=True, verbose=0)


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(epochs):
    model = run._new_model(config(epochs=epochs), QUARTER, steps=5)
    rates = [float(model.optimizer._learning_rate(step)) for step in range(5 * epochs + 1)]
    assert int(np.argmax(rates)) <= epochs * 5 / 10
    assert max(rates) == pytest.approx(config().recipe.peak_learning_rate)
    assert rates[-1] == pytest.approx(0, abs=1e-6)


def test_a_complete_run_resumed_is_complete(finished):
    folder, result = finished
    again = train(config(), folder, resume=True, verbose=0)
    assert again["test_loss"] == result["test_loss"]


def test_a_second_run_in_one_folder_is_refused(finished):
    folder, _ = finished
    before = (folder / "metrics.json").read_bytes()
    with pytest.raises(TrainingError, match="holds a run already"):
        train(config(), folder, verbose=0)
    assert (folder / "metrics.json").read_bytes() == before


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="no run to resume"):
        RunFolder(tmp_path).read_config()


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.keras").write_bytes(b"not a model")
    with pytest.raises(TrainingError, match=r"checkpoint.keras.*cannot be read"):
        train(config(), tmp_path, resume=True, verbose=0)


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"loss became .* in epoch 1; lower --learning-rate"):
        train(config(learning_rate=1e30, clip_factor=1e30), tmp_path, verbose=0)
    assert not (tmp_path / "checkpoint.keras").exists()


def test_a_folder_that_vanishes_stops_the_run(tmp_path, monkeypatch):
    target = tmp_path / "run"
    original = Recorder.on_epoch_begin

    def pull_the_plug(self, epoch, logs=None):
        original(self, epoch, logs)
        target.rename(tmp_path / "elsewhere")
        target.write_text("a file in its place")

    monkeypatch.setattr(Recorder, "on_epoch_begin", pull_the_plug)
    with pytest.raises(TrainingError, match="cannot write to"):
        train(config(), target, verbose=0)


def test_a_failed_write_keeps_the_checkpoint_of_before(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    folder.save_model("checkpoint.keras", model)
    before = (tmp_path / "checkpoint.keras").read_bytes()

    def disk_full(path, **kwargs):
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save", disk_full)
    with pytest.raises(TrainingError, match="No space left on device"):
        folder.save_model("checkpoint.keras", model)
    assert (tmp_path / "checkpoint.keras").read_bytes() == before
    assert os.listdir(tmp_path) == ["checkpoint.keras"]


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with run.stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
        assert stopped.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_main_job_reaches_98_percent_for_five_seeds(tmp_path, monkeypatch):
    monkeypatch.undo()  # all of the digits
    found = {}
    for seed in range(5):
        result = train(settings(seed=seed), tmp_path / str(seed), verbose=0)
        found[seed] = result["test_accuracy"]
        assert result["test_images"] == 360
    assert min(found.values()) >= 0.98, found
