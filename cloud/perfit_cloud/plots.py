"""Figures of reports: a grid of axes in the house's size and resolution."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

__all__ = ["DPI", "panel_grid", "verbatim"]

DPI = 120


def panel_grid(rows: int, columns: int, *, height: float, width: float = 4.4) -> tuple[Figure, Any]:
    """A figure and its axes (rows, columns); width and height of one panel in inches."""
    # Figure without pyplot: no window, no process-wide state, and PNG by Agg.
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def verbatim(name: str) -> str:
    """For a label: matplotlib reads what stands between dollar signs as a formula."""
    return name.replace("$", r"\$")
