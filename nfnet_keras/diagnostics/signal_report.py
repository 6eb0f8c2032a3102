"""What was measured of a network's signals: the table, the authors' names for its numbers, the picture."""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np

_COLUMNS = ("depth", "at", "stage", "block", "output", "squared mean", "variance", "branch variance")


@dataclasses.dataclass(frozen=True)
class SignalRow:
    """What was measured at one depth.

    Args:
        name: Layer whose output is measured; inside of a nested model, behind the model's name and a slash.
        stage: Name of the stage; `None` for the input of the first block, and in networks without residual blocks.
        block: Number of the block in its stage, from 1; `None` where `stage` is.
        shape: Shape of the output without the batch.
        squared_mean: Average over channels of the squared mean of a channel over images and positions.
        variance: Average over channels of the variance of a channel over images and positions.
        branch_variance: The same variance at the end of the block's residual branch, before stochastic depth, the skip
            gain and alpha; `None` where no residual branch ends.

    Example:

    >>> SignalRow("stem", None, None, (8, 8, 4), squared_mean=0.25, variance=1.0, branch_variance=None).variance
    1.0
    """

    name: str
    stage: str | None
    block: int | None
    shape: tuple[int, ...]
    squared_mean: float
    variance: float
    branch_variance: float | None


@dataclasses.dataclass(frozen=True)
class SignalPropagation:
    """A network's signals by depth: what `signal_propagation` returns. Printed, it is a table.

    Args:
        network: Name of the model.
        rows: The rows, by depth. In a network with residual blocks the first is the input of the first block, and each
            other one the output of a block.
        note: How the network was changed for the measurement; empty if it was not.

    Example:

    >>> rows = (SignalRow("stem", None, None, (8, 8, 4), 0.25, 1.0, None),)
    >>> SignalPropagation("small", rows).metrics()
    {'avg_sq_mean_0': 0.25, 'avg_var_0': 1.0}
    """

    network: str
    rows: tuple[SignalRow, ...]
    note: str = ""

    def metrics(self) -> dict[str, float]:
        """The numbers under the names that they have in the authors' program (`return_metrics=True`).

        Returns:
            `avg_sq_mean_0` and `avg_var_0` for the first row, and so on; `res_avg_var_0` for the first residual branch,
            which is that of the second row, and so on.

        Example:

        >>> import nfnet_keras as nfk
        >>> model = nfk.create_model("nfnet_tiny", weights=None)
        >>> images = np.random.default_rng(0).standard_normal((4, 32, 32, 3))
        >>> list(nfk.signal_propagation(model, images).metrics())[:5]
        ['avg_sq_mean_0', 'avg_var_0', 'avg_sq_mean_1', 'avg_var_1', 'res_avg_var_0']
        """
        found = {}
        for i, row in enumerate(self.rows):
            found |= {f"avg_sq_mean_{i}": row.squared_mean, f"avg_var_{i}": row.variance}
            if row.branch_variance is not None:
                found[f"res_avg_var_{i - 1}"] = row.branch_variance
        return found

    def plot(self, path: str | os.PathLike | None = None, title: str | None = None):
        """Draws the three numbers by depth.

        Args:
            path: The file to write, its format by its suffix, or `None` to write none. Defaults to `None`.
            title: Title of the picture. Defaults to the network's name and what was changed for the measurement.

        Returns:
            The `matplotlib.figure.Figure`.

        Example:

        >>> import nfnet_keras as nfk
        >>> model = nfk.create_model("nfnet_tiny", weights=None)
        >>> report = nfk.signal_propagation(model, np.ones((1, 32, 32, 3)))
        >>> report.plot("signals.png").get_suptitle()
        'nfnet_tiny'
        """
        described = f"{self.network} ({self.note})" if self.note else self.network
        return plot_signals({self.network: self}, path, described if title is None else title)

    def __str__(self) -> str:
        table = [_COLUMNS]
        for depth, row in enumerate(self.rows):
            end = "" if row.branch_variance is None else f"{row.branch_variance:.4g}"
            place = (row.stage or "", str(row.block or ""), " x ".join(map(str, row.shape)))
            table.append((str(depth), row.name, *place, f"{row.squared_mean:.4g}", f"{row.variance:.4g}", end))
        keep = [i for i in range(len(_COLUMNS)) if any(line[i] for line in table[1:])]
        widths = [max(len(line[i]) for line in table) for i in keep]
        left = {"at", "stage"}
        lines = [
            "  ".join(
                line[i].ljust(width) if _COLUMNS[i] in left else line[i].rjust(width)
                for i, width in zip(keep, widths, strict=True)
            ).rstrip()
            for line in table
        ]
        return "\n".join([f"{self.network}: {self.note}"] * bool(self.note) + lines)


def plot_signals(
    reports: Mapping[str, SignalPropagation], path: str | os.PathLike | None = None, title: str | None = None
):
    """Draws the signals of networks in one picture: branch variance, variance and squared mean by depth.

    Dotted lines stand at the first block of each stage of the first network. An axis is logarithmic where its values
    span more than a factor of a hundred.

    Args:
        reports: What `signal_propagation` returned, by the name of each line.
        path: The file to write, its format by its suffix, or `None` to write none. Defaults to `None`.
        title: Title of the picture. Defaults to none.

    Returns:
        The `matplotlib.figure.Figure`.

    Raises:
        ValueError: If there is no report.

    Example:

    >>> import nfnet_keras as nfk
    >>> models = [nfk.create_model(name, weights=None) for name in ("nfnet_tiny", "timm_test_nfnet")]
    >>> reports = {m.name: nfk.signal_propagation(m, np.ones((1, *m.input_shape[1:]))) for m in models}
    >>> len(plot_signals(reports, "both.png").axes)
    3
    """
    # Without pyplot: no window system and no state shared with the user's own pictures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not reports:
        raise ValueError("`plot_signals` needs at least one report.")
    first = next(iter(reports.values()))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11)
    residual = any(row.branch_variance is not None for row in first.rows)
    panels = (
        ("variance at the end of the branch", "branch_variance"),
        ("average channel variance", "variance"),
        ("average channel squared mean", "squared_mean"),
    )
    for axes, (about, name) in zip(figure.subplots(1, 3), panels, strict=True):
        seen = []
        for label, report in reports.items():
            points = [(i, getattr(row, name)) for i, row in enumerate(report.rows) if getattr(row, name) is not None]
            axes.plot([i for i, _ in points], [value for _, value in points], marker="o", markersize=3, label=label)
            seen += [value for _, value in points if np.isfinite(value) and value > 0]
        if seen and max(seen) > 100 * min(seen):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        for depth, row in enumerate(first.rows):
            if row.block == 1:
                axes.axvline(depth, color="grey", linestyle=":", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(about, fontsize=10)
        axes.set_xlabel("block (dotted: the first of a stage)" if residual else "layer")
        axes.grid(alpha=0.3)
    if len(reports) > 1:
        figure.axes[1].legend(fontsize=8)
    if path is not None:
        figure.savefig(path, dpi=100)
    return figure
