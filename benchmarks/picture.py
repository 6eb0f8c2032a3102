"""The picture of a run: a panel for each case, a bar for each side."""

import math
import pathlib
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.results import Result, merged, times_ours

_OURS, _OTHERS = "#1b6ca8", "#b4b4b4"
_COLUMNS = 2


def panels(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Returns the cases that compare sides: {(case, unit): results}, with ours and at least one other.

    Args:
        results: Of all suites.
    """
    found: dict[tuple[str, str], list[Result]] = {}
    for each in merged(results):
        if each.values:
            found.setdefault((each.case, each.unit), []).append(each)
    return {
        key: sides
        for key, sides in found.items()
        if any(each.ours for each in sides) and not all(each.ours for each in sides)
    }


def draw(results: Sequence[Result], path: pathlib.Path, machine: str) -> bool:
    """Draws all cases that compare sides.

    Args:
        results: Of all suites.
        path: Where to write the PNG.
        machine: What it was measured on, for the title.

    Returns:
        Whether there was anything to draw.
    """
    cases = panels(results)
    if not cases:
        return False
    rows = math.ceil(len(cases) / _COLUMNS)
    heights = [
        0.9 + 0.3 * max(len(sides) for sides in list(cases.values())[_COLUMNS * row : _COLUMNS * (row + 1)])
        for row in range(rows)
    ]
    figure, axes = pyplot.subplots(
        rows,
        _COLUMNS,
        figsize=(8 * _COLUMNS, sum(heights) + 0.6),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis, ((case, unit), sides) in zip(axes.flat, cases.items(), strict=False):
        _panel(axis, case, unit, sides)
    for axis in list(axes.flat)[len(cases) :]:
        axis.set_axis_off()
    figure.suptitle(f"Medians and ranges on {machine}; in brackets: times the best of ours", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _panel(axis, case: str, unit: str, sides: list[Result]) -> None:
    ratios = times_ours(sides)
    order = sorted(range(len(sides)), key=lambda index: sides[index].median)
    for place, index in enumerate(order):
        each = sides[index]
        low, high = each.median - min(each.values), max(each.values) - each.median
        color = _OURS if each.ours else _OTHERS
        axis.barh(place, each.median, xerr=[[low], [high]], color=color, height=0.7, ecolor="#444444", capsize=2)
        ratio = f" ({ratios[index]})" if ratios[index] else ""
        axis.text(each.median + high, place, f"  {each.median:.3g}{ratio}", va="center", fontsize=8)
    axis.set_yticks(range(len(order)), [sides[index].side for index in order], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.25 * max(max(each.values) for each in sides))
    axis.set_xlabel(unit, fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.set_title(case, fontsize=9, loc="left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
