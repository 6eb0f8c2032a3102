"""A run from beginning to end, stopped and resumed, and with things going wrong."""

import csv
import json
import os
import shutil
import signal

import keras
import numpy as np
import pytest

from nfnet_keras import create_model, data
from nfnet_keras.training import TrainingError, settings, stopping, train
from nfnet_keras.training.building import enter_phase, new_model
from nfnet_keras.training.checkpoints import Checkpoints
from nfnet_keras.training.plan import Plan
from nfnet_keras.training.recorder import Progress, Recorder, StopEvaluation
from nfnet_keras.training.run_folder import RunFolder
from nfnet_keras.training.stopping import stop_signals
from tests.training import few_layers

EPOCHS = 2
QUARTER = few_layers.digits(4)


@pytest.fixture(autouse=True)
def small_run(monkeypatch):
    few_layers.use(QUARTER, set_attribute=monkeypatch.setattr)


@pytest.fixture
def zoo(monkeypatch, small_run):
    """Runs train a network of the zoo, as they do outside of these tests."""
    few_layers.use(QUARTER, create_model, monkeypatch.setattr)


def config(**changes):
    return settings(**{"epochs": EPOCHS, "seed": 5, **changes})


def undisturbed(folder, network):
    with pytest.MonkeyPatch.context() as patch:
        few_layers.use(QUARTER, network, patch.setattr)
        return folder, train(config(), folder, verbose=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nothing disturbed: its folder and what it returned."""
    return undisturbed(tmp_path_factory.mktemp("finished"), few_layers.create_model)


@pytest.fixture(scope="module")
def finished_tiny(tmp_path_factory):
    """The same of a network of the zoo."""
    return undisturbed(tmp_path_factory.mktemp("finished_tiny"), create_model)


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
    images = data.evaluation_batches(QUARTER.test, 10, 32, 64)
    assert model.evaluate(images, verbose=0, return_dict=True)["accuracy"] == pytest.approx(result["test_accuracy"])
    assert model.metadata["class_names"] == [str(digit) for digit in range(10)]
    assert model.metadata["image_size"] == 32


def test_the_saved_model_holds_the_averaged_weights(finished):
    folder, _ = finished
    assert [file.name for file in RunFolder(folder).checkpoints.files()] == [
        "step-000000010.keras",
        "step-000000005.keras",
    ]
    last, state = RunFolder(folder).checkpoints.load()
    assert state["position"] == 10
    averages = [keras.ops.convert_to_numpy(a) for a in last.optimizer._model_variables_moving_average]
    saved = keras.saving.load_model(folder / "model.keras").trainable_variables
    for variable, average in zip(saved, averages, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), average)
    assert any(
        np.abs(keras.ops.convert_to_numpy(raw) - average).max() > 1e-4
        for raw, average in zip(last.trainable_variables, averages, strict=True)
    )
    raw_model = keras.saving.load_model(folder / "model_raw.keras")
    for variable, kept in zip(last.trainable_variables, raw_model.trainable_variables, strict=True):
        np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (variable, kept)))


@pytest.mark.slow
def test_one_seed_gives_one_run_and_another_seed_another(finished_tiny, zoo, tmp_path):
    folder, result = finished_tiny
    again = train(config(), tmp_path / "again", verbose=0)
    assert again["test_loss"] == result["test_loss"]
    assert_same_weights(folder, tmp_path / "again")
    other = train(config(seed=6), tmp_path / "other", verbose=0)
    assert other["test_loss"] != result["test_loss"]


@pytest.mark.slow
def test_a_network_of_the_zoo_is_stopped_and_resumed(finished_tiny, zoo, tmp_path):
    stop_and_resume(finished_tiny, tmp_path, 3)


@pytest.mark.parametrize("moment", [3, 5, 9])
def test_stopped_and_resumed_ends_with_the_weights_of_a_run_never_stopped(finished, tmp_path, moment):
    stop_and_resume(finished, tmp_path, moment)


def stop_and_resume(finished, tmp_path, moment):
    steps = data.steps_per_epoch(QUARTER.train, 64)
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
        for name in one.keys() - {"seconds", "images_per_second", "input_waiting", "eta_seconds"}:
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


def test_other_images_are_not_taken_for_those_of_the_run(finished, monkeypatch):
    half = data.Split(QUARTER.train.labels[::2], images=QUARTER.train.images[::2])
    monkeypatch.setattr(data, "open_images", lambda *_: data.ImageSet("x", QUARTER.class_names, half, QUARTER.test))
    with pytest.raises(TrainingError, match="not those that the run"):
        train(config(), finished[0], resume=True, verbose=0)


@pytest.mark.parametrize("epochs", [1, 2, 30])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(epochs):
    chosen = config(epochs=epochs)
    plan, model = Plan(chosen.recipe, len(QUARTER.train)), new_model(chosen, QUARTER.class_names)
    enter_phase(model, plan, plan.phases[0])
    rates = [float(model.optimizer._learning_rate(step)) for step in range(5 * epochs + 1)]
    assert int(np.argmax(rates)) <= epochs * 5 / 10
    assert max(rates) == pytest.approx(config().recipe.peak_learning_rate)
    assert rates[-1] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("scaled", "parts", "share"), [(True, 1, 48 / 512), (True, 5, 45 / 512), (False, 1, 1.0)])
def test_the_learning_rate_is_that_of_the_images_there_are(scaled, parts, share):
    changes = {"scale_learning_rate": scaled, "gradient_accumulation_steps": parts}
    chosen = config(batch_size=515 if parts == 5 else 512, changes=changes)
    plan, model = Plan(chosen.recipe, 48), new_model(chosen, QUARTER.class_names)
    enter_phase(model, plan, plan.phases[0])
    rates = [float(model.optimizer._learning_rate(step)) for step in range(plan.updates(plan.phases[0]))]
    recipe = chosen.recipe
    peak = recipe.learning_rate * (512 / 256 * share if scaled else 1.0)
    assert max(rates) == pytest.approx(peak) == pytest.approx(plan.peak_learning_rate)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_beyond_help_end_the_run(tmp_path, value):
    model = new_model(config(), QUARTER.class_names)
    plan = Plan(config().recipe, len(QUARTER.train))
    enter_phase(model, plan, plan.phases[0])
    progress = Progress(position=plan.steps)
    recorder = Recorder(RunFolder(tmp_path), progress, lambda: {"loss": value}, [], plan.steps, lambda: False)
    recorder.set_model(model)
    # An evaluation alone may overflow, in half precision.
    recorder.finish_epoch()
    variable = model.trainable_variables[-1]
    variable.assign(keras.ops.full(variable.shape, value))
    with pytest.raises(TrainingError, match=f"weights in .{variable.path}. became infinite or NaN in epoch 1; .*lower"):
        recorder.finish_epoch()


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


def copy_of(folder, target):
    """The run as it was before its end was written."""
    shutil.copytree(folder, target)
    for name in ("metrics.json", "model.keras", "model_raw.keras", "curves.png"):
        (target / name).unlink()
    return target


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(finished, tmp_path, damage, caplog):
    folder = copy_of(finished[0], tmp_path / "run")
    newest = RunFolder(folder).checkpoints.files()[0]
    content = bytearray(newest.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
    newest.write_bytes({"cut": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    train(config(), folder, resume=True, verbose=0)
    assert_same_weights(finished[0], folder)


def test_damaged_checkpoints_are_named(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path / "run")
    for file in RunFolder(folder).checkpoints.files():
        file.write_bytes(b"not a model")
    with pytest.raises(TrainingError, match=r"none of the checkpoints.*step-000000010.*step-000000005"):
        train(config(), folder, resume=True, verbose=0)


def test_only_the_last_checkpoints_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    model = create_model("nfnet_tiny", weights=None, classes=2)
    for position in (1, 20, 3_000_000_000):
        checkpoints.save(model, {"position": position})
    assert [file.name for file in checkpoints.files()] == ["step-3000000000.keras", "step-000000020.keras"]
    # A run that went on from further back: what lies ahead of it is another's.
    checkpoints.save(model, {"position": 21})
    assert [file.name for file in checkpoints.files()] == ["step-000000021.keras", "step-000000020.keras"]


def test_two_runs_in_one_folder(tmp_path):
    with RunFolder(tmp_path).locked(), pytest.raises(TrainingError, match="another run is going on in"):
        train(config(), tmp_path, verbose=0)
    assert os.listdir(tmp_path) == []


def test_a_failed_start_leaves_nothing(tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"no weights")
    (tmp_path / ".env.2").write_text("the user's")
    failing = config(weights=tmp_path / "weights.npz", changes={"head_epochs": 0})
    with pytest.raises(ValueError, match="cannot load"):
        train(failing, tmp_path / "run", verbose=0)
    with pytest.raises(ValueError, match="cannot load"):
        train(failing, tmp_path, verbose=0)
    assert sorted(os.listdir(tmp_path)) == [".env.2", "weights.npz"]


def test_leftovers_of_killed_processes_are_removed(finished, tmp_path):
    folder = copy_of(finished[0], tmp_path / "run")
    for name in (".metrics.99999.csv", "checkpoints/.step-000000011.99999.keras"):
        (folder / name).write_bytes(b"half")
    (folder / ".notes.2").write_text("the user's")
    train(config(), folder, resume=True, verbose=0)
    assert [name for name in os.listdir(folder) + os.listdir(folder / "checkpoints") if name[0] == "."] == [".notes.2"]


def test_stopped_in_an_evaluation(finished, tmp_path, monkeypatch):
    original = StopEvaluation.on_test_batch_end

    def sigterm(self, batch, logs=None):
        os.kill(os.getpid(), signal.SIGTERM)
        original(self, batch, logs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopEvaluation, "on_test_batch_end", sigterm)
        with pytest.raises(KeyboardInterrupt) as stop:
            train(config(), tmp_path, verbose=0)
    assert stop.value.args == (signal.SIGTERM,)
    assert RunFolder(tmp_path).read_table() == []
    train(config(), tmp_path, resume=True, verbose=0)
    assert_same_weights(finished[0], tmp_path)
    assert [row["epoch"] for row in RunFolder(tmp_path).read_table()] == [1, 2]


def test_a_checkpoint_in_mid_epoch(finished, tmp_path, monkeypatch):
    positions = []
    original = Checkpoints.save
    monkeypatch.setattr(
        Checkpoints,
        "save",
        lambda self, model, state: positions.append(state["position"]) or original(self, model, state),
    )
    train(config(checkpoint_minutes=1e-6, keep=20), tmp_path, verbose=0)
    assert positions == list(range(1, 11))
    assert_same_weights(finished[0], tmp_path)
    third = [file for file in RunFolder(tmp_path).checkpoints.files() if "003" in file.name]
    _, state = RunFolder(tmp_path).checkpoints.load()
    assert state["steps"] == 5
    assert len(third) == 1


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    with pytest.raises(
        TrainingError, match=r"loss became .* in epoch 1; start a run in another folder with a lower --l"
    ):
        train(config(learning_rate=1e30, clip_factor=1e30), tmp_path, verbose=0)
    assert not RunFolder(tmp_path).checkpoints.files()


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


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals() as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
        assert stopped.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_forks_of_a_run_end_when_told_to(new_process):
    # The file alone: it needs no TensorFlow, whose threads do not outlive a fork.
    code = f"""
import multiprocessing, runpy, time
stop_signals = runpy.run_path({str(stopping.__file__)!r})["stop_signals"]
def child():
    told.send("ready")  # Python forgets the signals that come while it forks
    time.sleep(60)
heard, told = multiprocessing.Pipe(duplex=False)
with stop_signals() as stopped:
    fork = multiprocessing.get_context("fork").Process(target=child)
    fork.start()
    heard.recv()
    fork.terminate()
    fork.join(30)
report([fork.exitcode, stopped()])
"""
    assert new_process(code) == [-signal.SIGTERM, False]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [0, 1])  # the README's figures are of five
def test_the_main_job_reaches_98_percent(tmp_path, monkeypatch, seed):
    monkeypatch.undo()  # all of the digits, the network that `nfnet train` trains
    result = train(settings(seed=seed), tmp_path, verbose=0)
    assert result["test_accuracy"] >= 0.98
    assert result["test_images"] == 360
    assert_branches_are_open(keras.saving.load_model(tmp_path / "model.keras"))


def assert_branches_are_open(model):
    """Skip gains start at 0; if clipping held them there, the network would be its shortcuts alone."""
    gains = [variable for variable in model.trainable_variables if "skip_gain" in variable.path]
    assert gains and max(abs(float(keras.ops.convert_to_numpy(gain))) for gain in gains) > 0.05
    test = data.digits().test
    batches = data.evaluation_batches(test, 10, 32, 360, crop=data.Preprocessing.from_metadata(model.metadata))
    images = next(batches.as_numpy_iterator())[0]
    whole = model.predict_on_batch(images)
    for gain in gains:
        gain.assign(keras.ops.zeros_like(gain))
    cut = model.predict_on_batch(images)
    assert np.abs(cut - whole).max() > 0.01
