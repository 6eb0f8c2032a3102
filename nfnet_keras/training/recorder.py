"""The callback that evaluates, records and saves a run as it goes."""

import math
import time
from collections.abc import Callable

import keras

from nfnet_keras.training.averaging import averaged_weights
from nfnet_keras.training.errors import TrainingError
from nfnet_keras.training.run_folder import RunFolder


class Recorder(keras.callbacks.Callback):
    """Evaluates the averaged weights after each epoch, adds a row to the table and saves a checkpoint.

    Args:
        folder: Where to.
        evaluation: Data set of the held-out images.
        rows: The rows of the epochs already done.
        steps: Steps of an epoch.
        stopped: Function that tells whether the user wants the run to stop; then it stops after the step in flight
            and saves what was learnt up to it.
        partial: What the first epoch has seen of its metrics before it was cut short, or `None`.

    Raises:
        TrainingError: If the loss is not finite, or the folder cannot be written.

    Example:

    >>> from nfnet_keras.training.run_folder import RunFolder
    >>> Recorder(RunFolder("runs/example"), None, [], 1, lambda: False).interrupted
    False
    """

    def __init__(
        self,
        folder: RunFolder,
        evaluation,
        rows: list[dict],
        steps: int,
        stopped: Callable[[], bool],
        partial: dict | None = None,
    ):
        super().__init__()
        self.folder = folder
        self.evaluation = evaluation
        self.rows = rows
        self.steps = steps
        self.stopped = stopped
        self.interrupted = False
        self._partial = partial
        self._started = 0.0

    def on_epoch_begin(self, epoch, logs=None):
        self._started = time.monotonic()

    def _with_partial(self, means: dict, done: int) -> dict:
        """Joins the means of the steps after a resume with those before it; all batches have one size."""
        if self._partial is None:
            return means
        share = self._partial["steps"] / done
        return {name: share * self._partial["means"][name] + (1 - share) * value for name, value in means.items()}

    def on_train_batch_end(self, batch, logs=None):
        if self.stopped():
            self.interrupted = True
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):
            raise TrainingError(
                f"the loss became {logs['loss']} in epoch {epoch + 1}; lower --learning-rate or --clip-factor "
                "(the checkpoint of the epoch before is kept)"
            )
        done = int(keras.ops.convert_to_numpy(self.model.optimizer.iterations)) % self.steps or self.steps
        means = self._with_partial({name: float(value) for name, value in logs.items()}, done)
        if self.interrupted and done < self.steps:
            # Stopped in mid-epoch: its row is written when the epoch is whole.
            self.folder.save_checkpoint(self.model, {"steps": done, "means": means})
            return
        logs.update(means)
        self._partial = None
        with averaged_weights(self.model):
            held_out = self.model.evaluate(self.evaluation, verbose=0, return_dict=True)
        logs.update({f"val_{name}": value for name, value in held_out.items()})
        logs["learning_rate"] = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        seconds = time.monotonic() - self._started
        self.rows.append({"epoch": epoch + 1, **{k: float(v) for k, v in logs.items()}, "seconds": round(seconds, 3)})
        # The table first: a kill between the two leaves a row too many, which resuming cuts off.
        self.folder.write_table(self.rows)
        self.folder.save_checkpoint(self.model)
