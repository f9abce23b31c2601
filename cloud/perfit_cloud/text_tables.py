"""Tables as text: Markdown for pages, aligned columns for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["aligned_table", "markdown_table"]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Its lines; a None is a dash, a float has three decimals."""
    lines = [head, ["---"] * len(head), *([_text(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def aligned_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Its lines; the first column stands left, the others right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]


def _text(cell: object) -> str:
    if cell is None:
        return "–"
    return f"{cell:.3f}" if isinstance(cell, float) else str(cell)
