"""The folder of a run: what is in it, and how it is written so that nothing is lost."""

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras

from nfnet_keras.training.errors import TrainingError

CHECKPOINT = "checkpoint.keras"
CONFIG = "config.json"
MODEL = "model.keras"
METRICS = "metrics.json"
TABLE = "metrics.csv"
CURVES = "curves.png"
_STATE = "state_of_the_run"


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and puts the file in the place of `path` once it is whole.

    Whatever goes wrong before leaves the file that was there as it was.

    Args:
        path: Where the file belongs.

    Yields:
        A path beside it, with the same suffix.

    Example:

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with written_aside(target) as aside:
    ...     _ = aside.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    aside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made by `start`.

    Example:

    >>> import tempfile
    >>> folder = RunFolder(tempfile.mkdtemp())
    >>> folder.start({"seed": 1})
    >>> folder.read_config()
    {'seed': 1}
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @contextlib.contextmanager
    def reporting(self, advice: str = "name another folder with --out, or make room") -> Iterator[None]:
        """Says of a file that cannot be written which folder it is about, and what to do."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise TrainingError(f"cannot write to {str(self.path)!r} ({reason}); {advice}") from error

    def start(self, config: dict) -> None:
        """Makes the folder for a new run and writes the run's settings into it.

        Raises:
            TrainingError: If it cannot be written, or holds a run already.
        """
        with self.reporting():
            self.path.mkdir(parents=True, exist_ok=True)
            held = [name for name in (CHECKPOINT, METRICS, MODEL) if (self.path / name).exists()]
            if held:
                raise TrainingError(
                    f"{str(self.path)!r} holds a run already ({held[0]}); go on with it by --resume, "
                    "or name another folder with --out"
                )
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
        with written_aside(self.path / name) as aside:
            aside.write_text(json.dumps(value, indent=2) + "\n")

    def save_model(self, name: str, model: keras.Model) -> None:
        """Saves a model.

        Raises:
            TrainingError: If the folder cannot be written, or the disk is full; the file of before is kept.
        """
        with self.reporting(), written_aside(self.path / name) as aside:
            model.save(aside)

    def save_checkpoint(self, model: keras.Model, partial: dict | None = None) -> None:
        """Saves all that a run needs to go on: the model, its optimizer and the state of its random numbers.

        Args:
            model: The model in training.
            partial: What an epoch cut short has seen of its metrics, or `None` at the end of an epoch.

        Raises:
            TrainingError: As `save_model`.
        """
        own = model.metadata
        states = [keras.ops.convert_to_numpy(v).tolist() for v in _random_states(model)]
        # In the model's own file, because one file cannot disagree with itself.
        model.metadata = {**own, _STATE: {"random": states, "partial": partial}}
        try:
            self.save_model(CHECKPOINT, model)
        finally:
            model.metadata = own

    def load_checkpoint(self) -> tuple[keras.Model | None, dict | None]:
        """Returns the model as the run left it, optimizer and all, and what `save_checkpoint` got as `partial`.

        Both are `None` where the run left no checkpoint.

        Raises:
            TrainingError: If the file is damaged.
        """
        path = self.path / CHECKPOINT
        if not path.exists():
            return None, None
        try:
            model = keras.saving.load_model(path)
            metadata = model.metadata
            state = metadata.pop(_STATE)
            for variable, value in zip(_random_states(model), state["random"], strict=True):
                variable.assign(value)
            model.metadata = metadata
            return model, state["partial"]
        except Exception as error:
            raise TrainingError(
                f"the checkpoint {str(path)!r} cannot be read ({str(error).splitlines()[0][:200]}); "
                "start a new run in another folder"
            ) from error

    def write_table(self, rows: Sequence[dict]) -> None:
        """Writes the table of metrics, a row an epoch.

        Raises:
            TrainingError: If the folder cannot be written, or the disk is full.
        """
        with (
            self.reporting(),
            written_aside(self.path / TABLE) as aside,
            open(aside, "w", newline="") as file,
        ):
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["epoch"])
            writer.writeheader()
            writer.writerows(rows)

    def read_table(self) -> list[dict]:
        """Returns the rows of the table of metrics, numbers as floats; none where there is no table."""
        path = self.path / TABLE
        if not path.exists():
            return []
        with open(path, newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def _random_states(model: keras.Model) -> list[keras.Variable]:
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]
