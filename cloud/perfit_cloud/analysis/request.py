"""What a researcher may ask an analysis for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from perfit_cloud.analysis.queries import QueryOptions
from perfit_cloud.model.placement import ONE_DEVICE, Placement
from perfit_shared.errors import InvalidInput

__all__ = ["AnalysisRequest"]

_MOST_FOLDERS = 12  # tasks on one page


@dataclass(frozen=True)
class AnalysisRequest:
    model: str  # folder or hub name
    data: tuple[Path, ...]  # a folder with one task's files each, or such a file
    out: Path
    task: str | None = None  # of every folder; else what its task.json names
    prompts: str | None = None  # of perfit_shared.prompts
    chat: str | None = None
    queries: QueryOptions = field(default_factory=QueryOptions)
    users: int | None = None  # the first N of a file
    control: bool = True  # measure random prefixes of the history's length too
    layer: int | None = None  # whose vectors are drawn; the middle block
    artefacts: tuple[Path, ...] = ()  # trained shifts, one a task, for Proposition 3
    texts: bool = True  # whether the report may hold people's texts and ids
    seed: int = 0  # of random prefixes
    threads: int = 0  # of the CPU; 0: torch's own choice
    dtype: str = "auto"
    device: str = "auto"
    placement: Placement = ONE_DEVICE  # over several devices, instead

    def __post_init__(self) -> None:
        if not 1 <= len(self.data) <= _MOST_FOLDERS:
            raise InvalidInput(f"an analysis takes 1 to {_MOST_FOLDERS} data folders")
        names = [self.name_of(path) for path in self.data]
        if len(set(names)) < len(names):
            raise InvalidInput(f"data folders need names of their own, not {', '.join(sorted(names))}")
        if self.users is not None and self.users < 2:
            raise InvalidInput("users should be at least 2: one vector has no spectrum")
        if self.layer is not None and self.layer < 0:
            raise InvalidInput("blocks are counted from 0")

    @staticmethod
    def name_of(path: Path) -> str:
        """What a folder's results are called: the folder's own name, also where a file of it is given."""
        path = path.resolve()
        return path.name if path.is_dir() else f"{path.parent.name}-{path.stem}"
