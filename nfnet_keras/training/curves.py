"""The picture of a run."""

from collections.abc import Sequence
from pathlib import Path


def plot_curves(rows: Sequence[dict], path: Path, title: str) -> None:
    """Draws loss, accuracy, clipping and learning rate of a run by epoch.

    Args:
        rows: The table of metrics, a row an epoch, as `RunFolder.read_table` gives it.
        path: The PNG file to write.
        title: Title of the picture.

    Example:

    >>> import pathlib, tempfile
    >>> row = {"epoch": 1, "loss": 1.0, "accuracy": 0.5, "agc_clipped": 0.1, "learning_rate": 0.1}
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "curves.png"
    >>> plot_curves([{**row, "val_loss": 1.1, "val_accuracy": 0.4}], path, "a run")
    >>> path.stat().st_size > 1000
    True
    """
    # Without pyplot: no window system and no state shared with the user's own pictures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    epochs = [row["epoch"] for row in rows]
    marker = "o" if len(rows) < 3 else None
    panels = (
        ("loss", (("loss", "training"), ("val_loss", "held out"))),
        ("accuracy", (("accuracy", "training, as augmented"), ("val_accuracy", "held out"))),
        ("share of units clipped by AGC", (("agc_clipped", None),)),
        ("learning rate at the end of the epoch", (("learning_rate", None),)),
    )
    for axes, (name, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for key, label in lines:
            if rows and key in rows[0]:
                axes.plot(epochs, [row[key] for row in rows], label=label, marker=marker)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("epoch")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
