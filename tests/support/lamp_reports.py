"""Reports of invented runs, and their tables' rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perfit_cloud.lamp.report import write_report
from tests.support.lamp_runs import LABELS, save_run, simple_users

LOSSES = {"base": 3.0, "collective": 2.0, "personal": 1.0, "other": 3.5}
_ALL = LOSSES | {"seed": 1.8}


class Runs:
    """Writes runs of four users; `loss` of the personal mode, or of the collective one without."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: list[Path] = []

    def add(self, name: str, loss: float = 1.0, *, modes: str = "", **settings: Any) -> None:
        losses = {m: _ALL[m] for m in (modes.split() or LOSSES)}
        losses["personal" if "personal" in losses else "collective"] = loss
        users = simple_users(losses, users=4)
        save_run(self.root / name, settings.pop("task", LABELS), users, **{"users": 4} | settings)
        self.folders.append(self.root / name)

    def report(self) -> str:
        return write_report(self.folders, self.root / "report").read_text("utf-8")


def rows_of(text: str, title: str) -> list[dict[str, str]]:
    """Every table row of a section, by its column."""
    part = text.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    rows: list[dict[str, str]] = []
    head: list[str] = []
    for line in part.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            head = []
        elif not head:
            head = cells
        elif set(line) - set("|- "):
            rows.append(dict(zip(head, cells, strict=True)))
    return rows


def one_of(rows: list[dict[str, str]], **wanted: str) -> Mapping[str, str]:
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    assert len(found) == 1, (wanted, rows)
    return found[0]
