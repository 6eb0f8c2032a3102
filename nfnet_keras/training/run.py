"""One run: from settings to a trained model, a table of metrics and a picture."""

import dataclasses
import hashlib
import os
import platform
import signal
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import keras

from nfnet_keras import data, distribution
from nfnet_keras.training.averaging import average_pairs, averaged_weights
from nfnet_keras.training.building import compile_model, enter_phase, new_model
from nfnet_keras.training.curves import plot_curves
from nfnet_keras.training.errors import TrainingError, explained
from nfnet_keras.training.files import written_aside
from nfnet_keras.training.plan import Phase, Plan
from nfnet_keras.training.recorder import Progress, Recorder, StopEvaluation
from nfnet_keras.training.run_folder import CURVES, LOGS, METRICS, MODEL, RAW_MODEL, RunFolder
from nfnet_keras.training.settings import Settings
from nfnet_keras.training.stopping import stop_signals
from nfnet_keras.training.watching import InputClock, Watcher
from nfnet_keras.version import __version__

# Images of one step of an evaluation, on each replica.
_EVALUATED_AT_ONCE = 128


def train(config: Settings, out: str | os.PathLike, resume: bool = False, verbose: int | str = "auto") -> dict:
    """Trains a network and leaves model, metrics and picture in a folder.

    The folder holds `model.keras` (the averaged weights), `model_raw.keras` (the last ones), `metrics.json`,
    `metrics.csv`, `curves.png`, `logs/` for TensorBoard and, for resuming, `config.json` and `checkpoints/`. The run
    may be killed at any moment; `resume=True` goes on from the newest checkpoint that is whole and ends with the
    weights of a run never killed. After Ctrl-C, or SIGTERM, it stops after the step in flight and saves first.

    Args:
        config: What `settings` gives.
        out: The folder of the run. With several machines, one that all of them see.
        resume: Whether to go on with the run in the folder.
        verbose: As for `keras.Model.fit`.

    Returns:
        What `metrics.json` holds.

    Raises:
        DataError: If the images are not as they should be.
        TrainingError: If the run cannot start or go on.
        KeyboardInterrupt: If it was stopped; what was learnt is saved.

    Example:

    >>> import tempfile
    >>> from nfnet_keras.training import settings
    >>> result = train(settings(epochs=1, seed=3), tempfile.mkdtemp(), verbose=0)
    >>> sorted(result)[:2]
    ['broken_images', 'classes']
    """
    where = distribution.make(config.strategy, tpu=config.tpu)
    folder = RunFolder(out, config.keep, writes=where.is_chief)
    images = data.open_images(config.data, config.data_dir)
    plan = Plan(config.recipe, len(images.train))
    where.check_batch_size(plan.batch)
    with folder.locked(), stop_signals() as stopped, explained():
        found = _describe(images)
        if not resume:
            folder.check_free()
        elif folder.read_config().get("images") != found:
            raise TrainingError(
                f"the images of {config.data or 'the embedded set'} are not those that the run in {str(out)!r} began "
                "with; restore them, or start a new run in another folder"
            )
        _make_deterministic(config.seed)
        with where.running():
            with where.scope():
                loaded = folder.checkpoints.load() if resume else None
                model, state = loaded or (new_model(config, images.class_names), {})
            if not resume:
                # Now that the network and its weights are there: a failed start leaves no run behind.
                folder.start({**config.to_dict(), "images": found})
            verbose = verbose if where.is_chief else 0
            run = _Run(config, where, folder, images, plan, model, Progress(**state), verbose, stopped)
            if run.verbose:
                run.announce()
            with explained(run.check_images):
                run.fit()
                metrics = run.finish()
            where.wait_for_all()
            return metrics


def _describe(images: data.ImageSet) -> dict:
    """Returns what tells one set of images, and its split, from another."""
    digest = hashlib.sha256()
    for split in (images.train, images.test):
        digest.update(split.digest().encode())
    return {
        "train": len(images.train),
        "test": len(images.test),
        "class_names": list(images.class_names),
        "sha256": digest.hexdigest(),
    }


def _make_deterministic(seed: int) -> None:
    keras.utils.set_random_seed(seed)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.experimental.enable_op_determinism()
    elif keras.backend.backend() == "torch":
        import torch

        # A warning where there is no such operation: better a run that may differ than none.
        torch.use_deterministic_algorithms(True, warn_only=True)


@dataclasses.dataclass
class _Run:
    """What belongs together while a run goes on."""

    config: Settings
    where: distribution.Distribution
    folder: RunFolder
    images: data.ImageSet
    plan: Plan
    model: keras.Model
    progress: Progress
    verbose: int | str
    signals: stop_signals

    def __post_init__(self):
        # Of several machines each counts its own share of the images.
        hosts = self.where.hosts
        self.broken = data.BrokenImages(len(self.images.train) // hosts, known=self.progress.broken)
        self.broken_test = data.BrokenImages(len(self.images.test) // hosts)
        self.clock = InputClock()
        # Of several machines, one that is to go takes all along: the others could not go on without it.
        agree = self.where.agreement()
        self.stopped = lambda: agree(self.signals())
        self.held_out = self._held_out()

    def announce(self) -> None:
        """Says what is about to be done."""
        recipe, images = self.config.recipe, self.images
        clip = "no clipping" if recipe.clip_factor is None else f"clip factor {recipe.clip_factor}"
        fewer = ""
        if len(images.train) < recipe.batch_size:
            rate = f", and so much the lower a learning rate: {self.plan.peak_learning_rate:.3g}"
            fewer = f" (all there are; the recipe has {recipe.batch_size}{rate * recipe.scale_learning_rate})"
        several = "" if self.where.replicas == 1 else f" on {self.where.replicas} replicas ({self.where.name})"
        print(
            f"Training {self.config.model} ({self.model.count_params():,} parameters) on {images.name}: "
            f"{len(images.train)} images of {len(images.class_names)} classes at {recipe.image_size} x "
            f"{recipe.image_size}, {len(images.test)} held out; {recipe.epochs} epochs, batches of "
            f"{self.plan.update_images}{fewer}{several}, {clip}, seed {self.config.seed}.",
            flush=True,
        )
        if self.progress.position:
            epoch, step = divmod(self.progress.position, self.plan.steps)
            print(f"Going on after {epoch} epoch{'s' * (epoch != 1)} and {step} step{'s' * (step != 1)}.", flush=True)

    def fit(self) -> None:
        """Goes on with the run to its end.

        Raises:
            KeyboardInterrupt: If a stop was asked for; everything is saved.
        """
        rows = [row for row in self.folder.read_table() if row["epoch"] <= self.progress.position // self.plan.steps]
        watcher = Watcher(
            self.folder.path / LOGS if self.folder.writes else None,
            batch_size=self.plan.batch,
            steps_per_epoch=self.plan.steps,
            total_steps=self.plan.total_steps,
            first_step=self.progress.position,
            clock=self.clock,
        )
        recorder = Recorder(
            self.folder,
            self.progress,
            self.evaluate,
            rows,
            self.plan.steps,
            self.stopped,
            self.config.checkpoint_minutes,
            check=self.check_images,
            extra=lambda: _speed(watcher),
        )
        recorder.set_model(self.model)
        self._finish_evaluation(recorder)
        while self.progress.position < self.plan.total_steps and not recorder.interrupted:
            self._fit_phase(self.plan.phase(self.progress.position), [recorder, watcher])
        if recorder.interrupted:
            self._interrupt()

    def _interrupt(self) -> None:
        # Another machine's signal is not known here.
        raise KeyboardInterrupt(self.signals.signal or signal.SIGTERM)

    def check_images(self) -> None:
        """Raises if too many images are broken, and notes those that are for the next checkpoint."""
        self.broken.check()
        self.broken_test.check()
        if len(self.progress.broken) != self.broken.count:
            self.progress.broken = self.broken.reasons

    def _finish_evaluation(self, recorder: Recorder) -> None:
        """Records an epoch whose end was saved and whose evaluation was not."""
        if self.progress.steps < self.plan.steps:
            return
        epoch = self.progress.position // self.plan.steps
        recorder.rows[:] = [row for row in recorder.rows if row["epoch"] < epoch]
        recorder.finish_epoch()

    def _fit_phase(self, phase: Phase, callbacks: list) -> None:
        if self.progress.phase != phase.name:
            with self.where.scope():
                enter_phase(self.model, self.plan, phase)
            self.progress.phase = phase.name
        # Keras puts the moving average in place of the weights at the end of every `fit`; here that is for `finish`.
        self.model.optimizer.finalize_variable_values = lambda _: None
        recorder = callbacks[0]
        epoch, skipped = divmod(self.progress.position, self.plan.steps)
        # An epoch cut short is finished first, from the step where it was cut.
        parts = [(epoch, epoch + 1), (epoch + 1, phase.last_epoch)] if skipped else [(epoch, phase.last_epoch)]
        for first, last in parts:
            if first >= last or recorder.interrupted:
                continue
            batches = self.where.feed(self._training(self.progress.position), self.plan.batch)
            self.model.fit(
                self.clock.timed(batches) if self.where.strategy is None else batches,
                steps_per_epoch=self.plan.steps - self.progress.position % self.plan.steps,
                initial_epoch=first,
                epochs=last,
                shuffle=False,
                callbacks=callbacks,
                verbose=self.verbose,
            )
        del self.model.optimizer.finalize_variable_values

    def _training(self, position: int) -> Callable:
        """Returns the function that makes the training batches from a place of the run on, for one of several hosts."""
        recipe, images = self.config.recipe, self.images
        epoch, step = divmod(position, data.steps_per_epoch(images.train, self.plan.batch))

        def make(shard: int, shards: int):
            return data.training_batches(
                images.train,
                len(images.class_names),
                recipe.image_size,
                self.plan.batch,
                recipe.augment,
                self.config.seed,
                epoch,
                first_step=step,
                shard=shard,
                shards=shards,
                ledger=self.broken,
                cache=self.config.cache,
                antialias=recipe.antialias,
            )

        return make

    def _held_out(self):
        """Returns the batches of an evaluation, as `evaluate` takes them."""
        recipe, images = self.config.recipe, self.images
        # Without gradients to share out, small batches are as quick, and large test images need less memory.
        batch = min(self.plan.batch, _EVALUATED_AT_ONCE * self.where.replicas)

        def make(shard: int, shards: int):
            size = recipe.test_size or recipe.image_size
            return data.evaluation_batches(
                images.test,
                len(images.class_names),
                size,
                batch,
                crop=recipe.evaluation_crop,
                shard=shard,
                shards=shards,
                ledger=self.broken_test,
            )

        return self.where.feed(make, batch)

    def evaluate(self) -> dict | None:
        """Evaluates the network as it stands; `None` where a stop was asked for meanwhile."""
        stop = StopEvaluation(self.stopped)
        found = self.model.evaluate(self.held_out, callbacks=[stop], verbose=0, return_dict=True)
        return None if stop.stopped else found

    def finish(self) -> dict:
        """Evaluates and saves the end of the run; returns what `metrics.json` holds.

        Raises:
            KeyboardInterrupt: If a stop was asked for; `finish` begins anew the next time.
        """
        model = self.model
        # Both before the network is compiled without its optimizer: TensorFlow would trace the evaluation anew.
        raw = self._evaluated()
        with averaged_weights(model):
            held_out = self._evaluated()
        pairs = average_pairs(model.optimizer)
        averages = [keras.ops.convert_to_numpy(average) for _, average in pairs]
        variables = [variable for variable, _ in pairs]
        # Without the optimizer: its momentum and average would triple the file and serve nothing any more.
        with self.where.scope():
            compile_model(model, self.config.recipe)
        with self.folder.reporting("make room and --resume"):
            self.folder.save_model(RAW_MODEL, model)
            for variable, average in zip(variables, averages, strict=True):
                variable.assign(average)
            self.folder.save_model(MODEL, model)
            rows = self.folder.read_table()
            metrics = self._metrics(rows, raw, held_out)
            if self.folder.writes:
                accuracy = f"{100 * metrics['test_accuracy']:.2f} % of held-out images right"
                with written_aside(self.folder.path / CURVES) as aside:
                    plot_curves(rows, aside, f"{self.config.model} on {self.images.name}: {accuracy}")
            # Last, because its presence says that the run is complete.
            self.folder.write_json(METRICS, metrics)
        return metrics

    def _evaluated(self) -> dict:
        found = self.evaluate()
        self.check_images()
        if found is None:
            self._interrupt()
        return found

    def _metrics(self, rows: list[dict], raw: dict, held_out: dict) -> dict:
        return {
            "test_accuracy": float(held_out["accuracy"]),
            "test_loss": float(held_out["loss"]),
            "raw_test_accuracy": float(raw["accuracy"]),
            "test_images": len(self.images.test),
            "train_images": len(self.images.train),
            "classes": len(self.images.class_names),
            "broken_images": [*self.broken.names, *self.broken_test.names],
            "data": self.images.name,
            "epochs": len(rows),
            "seconds": round(sum(row["seconds"] for row in rows), 3),
            "parameters": self.model.count_params(),
            "seed": self.config.seed,
            "replicas": self.where.replicas,
            "versions": versions(),
            "config": self.config.to_dict(),
        }


def _speed(watcher: Watcher) -> dict[str, float]:
    """Returns what the table of a run says of its speed, as far as it is known."""
    found = watcher.summary()
    columns = {name: found[name] for name in ("images_per_second", "input_waiting")}
    return {name: round(value, 4) for name, value in columns.items() if value is not None}


def versions() -> dict[str, str]:
    """Returns the versions of what a run was made with.

    Example:

    >>> versions()["keras"] == keras.version()
    True
    """
    found = {"nfnet_keras": __version__, "python": platform.python_version(), "backend": keras.backend.backend()}
    for name in ("keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def default_out(config: Settings) -> Path:
    """Returns a folder of its own for a run that was not told one: runs/MODEL-DATA-TIME.

    Example:

    >>> from nfnet_keras.training import settings
    >>> default_out(settings()).parts[0]
    'runs'
    """
    name = "digits" if config.data is None else Path(config.data).name.replace(":", "-")
    return Path("runs") / f"{config.model}-{name}-{time.strftime('%Y%m%d-%H%M%S')}"
