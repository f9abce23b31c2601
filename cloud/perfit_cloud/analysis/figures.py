"""PNGs of an analysis: users along principal directions, ranks by block, the control, a map of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from perfit_cloud.analysis.spectrum import BlockStatistics, Doubles
from perfit_cloud.plots import DPI, panel_grid, verbatim

__all__ = ["draw_blocks", "draw_control", "draw_tasks", "draw_users"]

_HEIGHT = 3.4  # of a panel, inches
_MOST_POINTS = 3000  # more only blacken a figure
_ALPHA = 0.5


def draw_users(path: Path, coordinates: Doubles, *, block: int) -> None:
    """Figures 2, 7 and 8: users on the first two directions, and violins of the first five coordinates."""
    figure, axes = panel_grid(1, 2, height=_HEIGHT)
    points, violins = axes[0]
    _scatter(points, coordinates, "users", "C0")
    _mark_mean(points, coordinates, "mean", "C3")
    _plane(points, f"users' δ, block {block}")
    shown = _thinned(coordinates)
    parts = violins.violinplot([*shown.T], positions=range(shown.shape[1]), showmeans=True)
    parts["cmeans"].set_color("C3")
    violins.axhline(0, color="gray", linewidth=0.8)
    violins.set_xticks(range(shown.shape[1]))
    violins.set_xlabel("direction (red: mean)")
    violins.set_ylabel("coordinate")
    violins.set_title(f"coordinates, block {block}", fontsize="medium")
    figure.savefig(path, dpi=DPI)


def draw_blocks(path: Path, blocks: Sequence[BlockStatistics], *, layers: Sequence[int]) -> None:
    """Figure 15: ranks at 0.85 and 0.95, and the first coordinate's |mean| ± deviation; `layers` marked."""
    figure, axes = panel_grid(1, 2, height=_HEIGHT)
    ranks, first = axes[0]
    at = [b.block for b in blocks]
    for number, share in enumerate(("0.85", "0.95")):
        ranks.plot(at, [b.ranks[share] for b in blocks], f"C{number}o-", label=share, markersize=4)
    ranks.set_ylabel("smallest rank that explains the share")
    ranks.set_title("rank by block", fontsize="medium")
    means = np.array([abs(b.first_mean) for b in blocks])
    spread = [b.first_deviation for b in blocks]
    first.errorbar(at, means, yerr=spread, fmt="C2s", capsize=2, markersize=4, label="|mean| ± deviation")
    first.set_ylabel("first coordinate")
    first.set_title("first coordinate by block", fontsize="medium")
    for panel in (ranks, first):
        for number, layer in enumerate(layers):
            panel.axvline(layer, color="gray", linestyle=":", label=None if number else "recommended")
        panel.set_xlabel("block")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", alpha=0.3)
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def draw_control(
    path: Path, blocks: Sequence[BlockStatistics], own: Doubles, control: Doubles, *, block: int
) -> None:
    """Figure 9: random prefixes of the same length beside histories, on the same directions."""
    figure, axes = panel_grid(1, 2, height=_HEIGHT)
    norms, points = axes[0]
    at = [b.block for b in blocks]
    norms.plot(at, [b.norm for b in blocks], "C0o-", label="own history", markersize=4)
    norms.plot(at, [b.control_norm for b in blocks], "C1s-", label="random prefix", markersize=4)
    norms.set_yscale("log")
    norms.set_xlabel("block")
    norms.set_ylabel("mean length of δ")
    norms.set_title("length by block", fontsize="medium")
    norms.xaxis.set_major_locator(MaxNLocator(integer=True))
    norms.grid(axis="y", alpha=0.3)
    norms.legend(fontsize="small")
    for number, (name, coordinates) in enumerate({"own history": own, "random prefix": control}.items()):
        _scatter(points, coordinates, name, f"C{number}")
        _mark_mean(points, coordinates, f"{name}, mean", f"C{number}")
    _plane(points, f"on the histories' directions, block {block}")
    figure.savefig(path, dpi=DPI)


def draw_tasks(path: Path, coordinates: Mapping[str, Doubles], *, block: int) -> None:
    """Figure 16: users of several tasks in one map."""
    figure, axes = panel_grid(1, 1, height=4.4, width=5.6)
    for number, (name, of_task) in enumerate(coordinates.items()):
        _scatter(axes[0, 0], of_task, verbatim(name), f"C{number}")
    _plane(axes[0, 0], f"δ of several tasks, block {block}")
    figure.savefig(path, dpi=DPI)


def _thinned(coordinates: Doubles) -> Doubles:
    return coordinates[:: -(-len(coordinates) // _MOST_POINTS)]


def _scatter(axes: Axes, coordinates: Doubles, name: str, color: str) -> None:
    shown = _thinned(coordinates)
    axes.scatter(shown[:, 0], shown[:, 1], s=14, alpha=_ALPHA, color=color, label=name, linewidths=0)


def _mark_mean(axes: Axes, coordinates: Doubles, name: str, color: str) -> None:
    mean = coordinates.mean(0)
    axes.scatter([mean[0]], [mean[1]], marker="X", s=90, color=color, edgecolor="black", label=name, zorder=3)


def _plane(axes: Axes, title: str) -> None:
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("first direction")
    axes.set_ylabel("second direction")
    axes.set_title(title, fontsize="medium")
    axes.legend(fontsize="small")
