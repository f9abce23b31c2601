"""Imports of whole histories, and taking them back; exports that come back equal.

Whoever asks reads the source itself: relative paths, git and hostile files are none of the agent's business.
A request holds finished examples. Only the question which of them are too long goes to the cloud.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from perfit_device import history
from perfit_device.history import HistoryItem
from perfit_device.history.imports import Import, add_import, list_imports, undo_import
from perfit_device.operations.examples import FindExamples
from perfit_device.operations.operation import Emit, Event, Operation
from perfit_shared.errors import InvalidData, NotAuthenticated, NotFound, PerfitError
from perfit_shared.tasks import TASKS, Task

if TYPE_CHECKING:
    from perfit_device.cloud_record import CloudRecord
    from perfit_device.profile import Profile

__all__ = [
    "DescribeTasks",
    "ExportExamples",
    "Exported",
    "ImportExamples",
    "Imported",
    "KnownTasks",
    "ListImports",
    "UndoImport",
    "Undone",
]

_CALLS = 200  # to the cloud, for each artefact
_AT_ONCE = 500  # examples of one event
_PLACES = 5  # of examples that are too long


@dataclass(frozen=True)
class KnownTasks:
    """What examples may be of; tasks as JSON."""

    chosen: str = ""  # the one that is asked for, or the default
    why_none: str = ""  # why there is no default
    served: Mapping[str, str] = field(default_factory=dict)  # by the cloud, by the artefacts' names

    @property
    def by_task(self) -> dict[str, Task]:
        """The served ones, by their own names."""
        return {task.name: task for task in map(Task.from_json, self.served.values())}

    def suiting(self, names: Sequence[str]) -> Task:
        """The first of `names` that the cloud serves; without a cloud the first, without names the default.

        Raises NotFound.
        """
        if not names:
            if not self.chosen:
                raise NotFound(self.why_none)
            return Task.from_json(self.chosen)
        there = self.by_task or TASKS
        for name in names:
            if name in there:
                return there[name]
        raise NotFound(
            f"the cloud has no task {' or '.join(names)}; it has {', '.join(sorted(self.served))}, "
            "and --task makes the examples ones of such a task"
        )


@dataclass(frozen=True)
class DescribeTasks(Operation[KnownTasks]):
    """Raises NotFound where there is no task of the name `task`. Works offline."""

    task: str | None = None

    def run(self, profile: Profile, emit: Emit) -> KnownTasks:
        from perfit_device.cloud_record import read_record

        with profile.vault() as vault:
            record = read_record(vault)
            try:
                chosen, why = profile.task(self.task).to_json(), ""
            except NotFound as error:
                if self.task is not None:
                    raise
                chosen, why = "", str(error)
        return KnownTasks(chosen, why, dict(record.tasks))


@dataclass(frozen=True)
class Imported:
    task: str  # several with commas
    added: int  # in a dry run, how many would be
    duplicates: int
    too_long: int  # for the cloud; they are kept, and updates leave them out
    too_long_places: Sequence[str] = ()  # of the first few
    number: int = 0  # of the import; 0 in a dry run


@dataclass(frozen=True)
class ImportExamples(Operation[Imported]):
    """All of them or none."""

    items: list[HistoryItem]
    format: str = ""
    file: str = ""  # name without folder
    skipped: int = 0  # that the source holds besides
    dry_run: bool = False
    offline: bool = False  # do not ask the cloud which are too long

    def run(self, profile: Profile, emit: Emit) -> Imported:
        from perfit_device.profile import listed

        with profile.vault() as vault:
            new = {item.name: item for item in self.items if not vault.has("example", item.name)}
        too_long = self._too_long(profile, list(new.values()))
        places = [item.origin or item.short for item in too_long[:_PLACES]]
        task = listed({item.task for item in self.items})
        known = len(self.items) - len(new)
        if self.dry_run:
            return Imported(task, len(new), known, len(too_long), places)
        about = Import(0, "", self.format, self.file, task, 0, 0, self.skipped)
        with profile.vault() as vault:
            done = add_import(vault, self.items, about)
        return Imported(task, done.added, done.known, len(too_long), places, done.number)

    def _too_long(self, profile: Profile, items: Sequence[HistoryItem]) -> list[HistoryItem]:
        """In their order. Without the cloud, those with more words than it took tokens at last."""
        from perfit_device.cloud_record import read_record

        if not self.offline:
            try:
                names = self._refused(profile, items)
                return [item for item in items if item.name in names]
            except NotAuthenticated:
                pass  # there is no cloud yet, or one that will not talk
            except PerfitError as error:
                profile.notify(f"the cloud cannot say which examples are too long now ({error})")
        with profile.vault() as vault:
            record = read_record(vault)
        return [item for item in items if _has_more_words(item, record)]

    def _refused(self, profile: Profile, items: Sequence[HistoryItem]) -> set[str]:
        """Names of those that the cloud refuses, recorded as an update records them."""
        from perfit_device.cloud.retry import NO_RETRIES
        from perfit_device.evaluation import TaskClient
        from perfit_device.refusals import Refusals

        if not items:
            return set()
        cloud, info = profile.connect(NO_RETRIES)
        found: set[str] = set()
        for artefact in info.artefacts:
            of_task = [item for item in items if item.task == artefact.task.name]
            client = TaskClient(cloud, artefact.task, info.limits, NO_RETRIES)
            names = {i.name for i in client.refused_among(history.usable(of_task, artefact.task), _CALLS)}
            if names and not self.dry_run:
                with profile.vault() as vault:
                    Refusals.read(vault, info, artefact).with_names(vault, names)
            found |= names
        return found


def _has_more_words(item: HistoryItem, record: CloudRecord) -> bool:
    """Whether it has, cut as updates cut it, more words than the cloud takes tokens."""
    task = record.by_task.get(item.task)
    if task is None or not record.prompt_tokens:
        return False
    try:
        example = task.example(item.fields)
    except InvalidData:
        return False
    asked, answered = len(example.prompt.split()), len(example.target.split())
    return asked > record.prompt_tokens or answered > record.prompt_tokens + record.new_tokens


@dataclass(frozen=True)
class ListImports(Operation[list[Import]]):
    """Oldest first."""

    def run(self, profile: Profile, emit: Emit) -> list[Import]:
        with profile.vault() as vault:
            return list_imports(vault)


@dataclass(frozen=True)
class Undone:
    number: int
    forgotten: int
    kept: int  # that another import brought too
    is_trained: bool  # whether a shift is left, which may have learned from them


@dataclass(frozen=True)
class UndoImport(Operation[Undone]):
    """Forget what this import brought, and no other one. Raises NotFound."""

    number: int

    def run(self, profile: Profile, emit: Emit) -> Undone:
        from perfit_device import personal

        with profile.vault() as vault:
            gone, kept = undo_import(vault, self.number)
            return Undone(self.number, len(gone), kept, bool(personal.artefacts(vault)))


@dataclass(frozen=True)
class Exported(Event):
    """The next examples."""

    items: Sequence[HistoryItem]


@dataclass(frozen=True)
class ExportExamples(Operation[int]):
    """All of a task, or all, by time, as events; how many."""

    task: str | None = None

    def run(self, profile: Profile, emit: Emit) -> int:
        items = FindExamples(self.task).run(profile, emit)
        for start in range(0, len(items), _AT_ONCE):
            emit(Exported(items[start : start + _AT_ONCE]))
        return len(items)
