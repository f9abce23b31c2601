"""PNGs of the report: points with their spread, and heat maps. They know numbers, not runs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perfit_cloud.lamp.groups import Cell
from perfit_cloud.plots import DPI, panel_grid

__all__ = ["HeatMap", "PointPlot", "draw_heat", "draw_points"]

_UNITS: Mapping[str, str] = {
    "loss": "held-out loss\n(nats a target token)",
    "accuracy": "accuracy\n(share of queries)",
    "macro_f1": "macro-F1\n(0 to 1)",
    "mae": "MAE\n(rating points)",
    "rmse": "RMSE\n(rating points)",
    "rouge_1": "ROUGE-1\n(F-measure)",
    "rouge_l": "ROUGE-L\n(F-measure)",
}
_Panel = TypeVar("_Panel", "PointPlot", "HeatMap")
_TITLE_LETTERS = 44  # of a line above one panel
_MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class PointPlot:
    """One panel: for each series a cell a tick; None is left out."""

    title: str
    x_label: str
    measure: str
    ticks: Sequence[str]
    series: Mapping[str, Sequence[Cell | None]]
    joined: int = 0  # a line joins this many first ticks, which form a scale


@dataclass(frozen=True)
class HeatMap:
    """One panel: `cells[row][column]`, None where there was no run."""

    title: str
    x_label: str
    y_label: str
    measure: str
    columns: Sequence[int]  # ticks
    rows: Sequence[int]
    cells: Sequence[Sequence[Cell | None]]


def draw_points(path: Path, panels: Sequence[Sequence[PointPlot]]) -> None:
    """A grid of panels, one row each."""
    figure, grid = _grid(panels, height=2.8)
    for axes, panel in grid:
        for number, (name, cells) in enumerate(panel.series.items()):
            # Series side by side, so that error bars do not cover each other.
            shift = 0.12 * (number - (len(panel.series) - 1) / 2)
            drawn = [(at + shift, cell) for at, cell in enumerate(cells) if cell is not None]
            x, y = [at for at, _ in drawn], [cell.value for _, cell in drawn]
            below = [0.0 if cell.low is None else cell.value - cell.low for _, cell in drawn]
            above = [0.0 if cell.high is None else cell.high - cell.value for _, cell in drawn]
            axes.errorbar(
                x,
                y,
                yerr=np.maximum([below, above], 0.0),
                label=name,
                color=f"C{number}",
                capsize=3,
                marker=_MARKERS[number % len(_MARKERS)],
                linestyle="none",
                markersize=5,
            )
            line = [(at, value) for at, value in zip(x, y, strict=True) if at < panel.joined - 0.5]
            if line:
                axes.plot(*zip(*line, strict=True), color=f"C{number}", linewidth=1)
        axes.set_xticks(range(len(panel.ticks)), panel.ticks)
        axes.set_xlim(-0.5, len(panel.ticks) - 0.5)
        axes.grid(axis="y", alpha=0.3)
        _name(axes, panel, _UNITS[panel.measure])
    several = {
        label: handle
        for axes, panel in grid
        if len(panel.series) > 1
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    if several:  # below all panels, where it covers no point
        figure.legend(several.values(), several.keys(), loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=DPI)


def draw_heat(path: Path, panels: Sequence[HeatMap]) -> None:
    """Heat maps side by side, each cell with its number."""
    figure, grid = _grid([panels], height=3.4)
    for axes, panel in grid:
        table = np.array([[np.nan if c is None else c.value for c in row] for row in panel.cells], float)
        image = axes.imshow(table, cmap="viridis", aspect="auto")
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for (row, column), value in np.ndenumerate(table):
            if not np.isnan(value):
                ink = "white" if value < middle else "black"  # viridis is dark below its middle
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(panel.columns)), map(str, panel.columns))
        axes.set_yticks(range(len(panel.rows)), map(str, panel.rows))
        _name(axes, panel, panel.y_label)
        figure.colorbar(image, ax=axes, label=_UNITS[panel.measure].replace("\n", " "))
    figure.savefig(path, dpi=DPI)


def _name(axes: Axes, panel: PointPlot | HeatMap, y_label: str) -> None:
    lines = (part for line in panel.title.splitlines() for part in textwrap.wrap(line, _TITLE_LETTERS))
    axes.set_title("\n".join(lines), fontsize="medium")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(y_label)


def _grid(panels: Sequence[Sequence[_Panel]], height: float) -> tuple[Figure, list[tuple[Axes, _Panel]]]:
    """A figure and its axes with their panels; `height` of a row in inches."""
    columns = max(len(row) for row in panels)
    figure, grid = panel_grid(len(panels), columns, height=height)
    placed = []
    for row, row_panels in enumerate(panels):
        for column in range(columns):
            if column < len(row_panels):
                placed.append((grid[row][column], row_panels[column]))
            else:
                grid[row][column].set_visible(False)
    return figure, placed
