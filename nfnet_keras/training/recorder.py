"""The callback that evaluates, records and saves a run as it goes."""

import dataclasses
import math
import time
from collections.abc import Callable

import keras
import numpy as np

from nfnet_keras.training.averaging import averaged_weights
from nfnet_keras.training.errors import TrainingError
from nfnet_keras.training.run_folder import RunFolder

# Reading the loss waits for the device.
_LOOK_EVERY = 50


@dataclasses.dataclass
class Progress:
    """Where a run stands; a checkpoint holds it.

    Args:
        position: Batches taken since the run began: this is the place in the data, too.
        phase: Name of the phase that the optimizer belongs to.
        steps: Batches of the epoch that is not recorded yet; `means` and `seconds` are those of these batches.
        means: Means of the training metrics.
        seconds: Time that they took.
        broken: Names of the training images that could not be decoded, with the reasons.
    """

    position: int = 0
    phase: str = ""
    steps: int = 0
    means: dict = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    broken: dict = dataclasses.field(default_factory=dict)


class Recorder(keras.callbacks.Callback):
    """Saves checkpoints, evaluates the averaged weights after each epoch and adds a row to the table.

    The checkpoint of an epoch's end is saved before its evaluation: a run killed in the evaluation begins with it.

    Args:
        folder: Where to.
        progress: Where the run stands; kept up to date.
        evaluate: Function that evaluates the model and returns its metrics, `None` where it was stopped.
        rows: The rows of the epochs already done; rows are added.
        steps: Batches of an epoch.
        stopped: Function that tells whether the user wants the run to stop; then it stops after the step in flight
            and saves what was learnt up to it.
        checkpoint_minutes: Time after which a checkpoint is saved in mid-epoch.
        check: Function called after every step; it raises what ends the run.
        extra: Function that gives further columns of the table.

    Raises:
        TrainingError: If the loss or a weight is not finite, or the folder cannot be written.

    Example:

    >>> from nfnet_keras.training.run_folder import RunFolder
    >>> Recorder(RunFolder("runs/example"), Progress(), dict, [], 1, lambda: False).interrupted
    False
    """

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        evaluate: Callable[[], dict | None],
        rows: list[dict],
        steps: int,
        stopped: Callable[[], bool],
        checkpoint_minutes: float = 10.0,
        check: Callable[[], None] = lambda: None,
        extra: Callable[[], dict] = dict,
    ):
        super().__init__()
        self.folder = folder
        self.progress = progress
        self.evaluate = evaluate
        self.rows = rows
        self.steps = steps
        self.stopped = stopped
        self.checkpoint_seconds = 60 * checkpoint_minutes
        self.check = check
        self.extra = extra
        self.interrupted = False
        self._saved = time.monotonic()
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self._first = self.progress.position
        self._before = dataclasses.replace(self.progress)
        self._started = time.monotonic()

    def on_epoch_begin(self, epoch, logs=None):
        self._begin_epoch()

    def on_train_batch_end(self, batch, logs=None):
        progress = self.progress
        progress.position = self._first + batch + 1
        self.check()
        if self.stopped():
            self.interrupted = True
            self.model.stop_training = True
            return
        due = time.monotonic() - self._saved > self.checkpoint_seconds and batch + 1 + self._before.steps < self.steps
        if due or (batch + 1) % _LOOK_EVERY == 0:
            self._check_finite(float(logs["loss"]))
        if due:
            if hasattr(self.model, "jax_state_sync"):
                # On JAX the variables are behind while `fit` runs.
                self.model.jax_state_sync()
            self._note({name: float(value) for name, value in logs.items()})
            self._save()

    def _note(self, means: dict) -> None:
        """Joins the means of the batches since `fit` began its epoch with those before; all batches have one size."""
        progress, before = self.progress, self._before
        progress.steps = before.steps + progress.position - self._first
        share = before.steps / progress.steps if before.steps else 0.0
        progress.means = {
            name: share * before.means.get(name, value) + (1 - share) * value for name, value in means.items()
        }
        progress.seconds = before.seconds + time.monotonic() - self._started

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss became {loss} in epoch {(self.progress.position - 1) // self.steps + 1}; start a run in "
                "another folder with a lower --learning-rate or --clip-factor (the checkpoints from before are kept)"
            )

    def _check_weights(self) -> None:
        """Raises where the weights are beyond help; in half precision an evaluation may overflow with good ones."""
        for variable in self.model.trainable_variables:
            if not np.isfinite(keras.ops.convert_to_numpy(variable.value)).all():
                raise TrainingError(
                    f"the weights in {variable.path!r} became infinite or NaN in epoch "
                    f"{self.progress.position // self.steps}; start a run in another folder with a lower "
                    "--learning-rate or --clip-factor"
                )

    def _save(self) -> None:
        self.folder.save_checkpoint(self.model, dataclasses.asdict(self.progress))
        self._saved = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        self._check_finite(logs["loss"])
        self._note({name: float(value) for name, value in logs.items() if not name.startswith("val_")})
        self._save()
        logs.update(self.progress.means)
        if not self.interrupted:
            self.finish_epoch(logs)

    def finish_epoch(self, logs: dict | None = None) -> None:
        """Evaluates an epoch whose batches are all taken, and records it; a stop leaves it for the next time.

        Args:
            logs: Dictionary that gets the new values, or `None`.
        """
        progress = self.progress
        began = time.monotonic()
        with averaged_weights(self.model):
            held_out = self.evaluate()
        if held_out is None:
            self.interrupted = True
            self.model.stop_training = True
            return
        if not math.isfinite(held_out["loss"]):
            self._check_weights()
        values = {**progress.means, **{f"val_{name}": float(value) for name, value in held_out.items()}}
        values["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        values.update(self.extra())
        seconds = round(progress.seconds + time.monotonic() - began, 3)
        if logs is not None:
            logs.update(values)
        self.rows.append({"epoch": progress.position // self.steps, **values, "seconds": seconds})
        self.folder.write_table(self.rows)
        progress.steps, progress.means, progress.seconds = 0, {}, 0.0


class StopEvaluation(keras.callbacks.Callback):
    """Breaks an evaluation off when the run is to stop; `stopped` tells whether it did.

    Args:
        stopped: Function that tells whether the run is to stop.

    Example:

    >>> StopEvaluation(lambda: True).stopped
    False
    """

    def __init__(self, stopped: Callable[[], bool]):
        super().__init__()
        self._asked = stopped
        self.stopped = False

    def on_test_batch_end(self, batch, logs=None):
        if self._asked():
            self.stopped = True
            self.model.stop_evaluating = True
