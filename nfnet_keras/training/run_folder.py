"""The folder of a run: what is in it, and how it is written so that nothing is lost."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import filelock
import keras

from nfnet_keras.training.checkpoints import Checkpoints
from nfnet_keras.training.errors import TrainingError
from nfnet_keras.training.files import remove_leftovers, written_aside

CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
MODEL = "model.keras"
RAW_MODEL = "model_raw.keras"
METRICS = "metrics.json"
TABLE = "metrics.csv"
CURVES = "curves.png"
LOGS = "logs"
LOCK = "run.lock"


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made by `start`.
        keep: How many checkpoints are kept.
        writes: Whether this process writes into it. Of the processes of one run only one does; for the others all
            that writes does nothing.

    Example:

    >>> import tempfile
    >>> folder = RunFolder(tempfile.mkdtemp())
    >>> folder.start({"seed": 1})
    >>> folder.read_config()
    {'seed': 1}
    """

    def __init__(self, path: str | os.PathLike, keep: int = 3, writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep)
        self._made = False

    @contextlib.contextmanager
    def reporting(self, advice: str = "name another folder with --out, or make room") -> Iterator[None]:
        """Says of a file that cannot be written which folder it is about, and what to do."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise TrainingError(f"cannot write to {str(self.path)!r} ({reason}); {advice}") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps every other run out of the folder for as long as this process lives, however it ends.

        Raises:
            TrainingError: If another process trains in it, or it cannot be written.
        """
        if not self.writes:
            yield
            return
        with self.reporting():
            self._made = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self.path / LOCK)
            try:
                lock.acquire(timeout=0)
            except filelock.Timeout:
                raise TrainingError(
                    f"another run is going on in {str(self.path)!r}; wait until it ends, or name another folder "
                    "with --out"
                ) from None
        try:
            if (self.path / CONFIG).exists():
                remove_leftovers(self.path)
                remove_leftovers(self.checkpoints.path)
            yield
        finally:
            self._unlock(lock)

    def _unlock(self, lock: filelock.FileLock) -> None:
        """Releases the lock; a folder in which no run began is as it was before."""
        begun = not self.path.is_dir() or (self.path / CONFIG).exists()
        lock.release()
        if begun:
            return
        with contextlib.suppress(OSError):
            (self.path / LOCK).unlink()
            if self._made:
                self.path.rmdir()

    def check_free(self) -> None:
        """Makes sure that the folder holds no run.

        Raises:
            TrainingError: If it does.
        """
        if not self.writes:
            return
        held = [name for name in (METRICS, MODEL) if (self.path / name).exists()]
        held += [f"{CHECKPOINTS}/{file.name}" for file in self.checkpoints.files()]
        if held:
            raise TrainingError(
                f"{str(self.path)!r} holds a run already ({held[0]}); go on with it by --resume, "
                "or name another folder with --out"
            )

    def start(self, config: dict) -> None:
        """Makes the folder for a new run and writes the run's settings into it; `check_free` comes first.

        Raises:
            TrainingError: If it cannot be written.
        """
        if self.writes:
            with self.reporting():
                self.path.mkdir(parents=True, exist_ok=True)
                self.write_json(CONFIG, config)

    def read_config(self) -> dict:
        """Returns the settings of the run in the folder.

        Raises:
            TrainingError: If there is no run, or its settings cannot be read.
        """
        path = self.path / CONFIG
        if not path.is_file():
            raise TrainingError(f"there is no run to resume in {str(self.path)!r}; start one without --resume")
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise TrainingError(f"the settings of the run, {str(path)!r}, cannot be read ({error})") from error

    def write_json(self, name: str, value: dict) -> None:
        """Writes a JSON file."""
        if self.writes:
            with written_aside(self.path / name) as aside:
                aside.write_text(json.dumps(value, indent=2) + "\n")

    def save_model(self, name: str, model: keras.Model) -> None:
        """Saves a model.

        Raises:
            TrainingError: If the folder cannot be written, or the disk is full; the file of before is kept.
        """
        if self.writes:
            with self.reporting(), written_aside(self.path / name) as aside:
                model.save(aside)

    def save_checkpoint(self, model: keras.Model, state: dict) -> None:
        """Saves all that a run needs to go on, as `Checkpoints.save`.

        Raises:
            TrainingError: As `save_model`.
        """
        if self.writes:
            with self.reporting("make room, or bring the folder back, and go on with --resume"):
                self.checkpoints.save(model, state)

    def write_table(self, rows: Sequence[dict]) -> None:
        """Writes the table of metrics, a row an epoch.

        Raises:
            TrainingError: If the folder cannot be written, or the disk is full.
        """
        if not self.writes:
            return
        with (
            self.reporting(),
            written_aside(self.path / TABLE) as aside,
            open(aside, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)))
            writer.writeheader()
            writer.writerows(rows)

    def read_table(self) -> list[dict]:
        """Returns the rows of the table of metrics, numbers as floats; none where there is no table."""
        path = self.path / TABLE
        if not path.exists():
            return []
        with open(path, newline="") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        return [{**row, "epoch": int(row["epoch"])} for row in rows]
