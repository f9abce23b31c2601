"""The examples that a shift learns from: adding and finding. Both work offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from perfit_device import history
from perfit_device.history import HistoryItem
from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import InvalidData, InvalidInput, NotFound
from perfit_shared.tasks import TASKS
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["AddExample", "Added", "FindExamples"]


@dataclass(frozen=True)
class Added:
    task: str  # several with commas
    added: int
    duplicates: int  # that were there already


@dataclass(frozen=True)
class AddExample(Operation[Added]):
    """One example, of now."""

    text: str
    answer: str
    task: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)  # beside the text's and the answer's

    def run(self, profile: Profile, emit: Emit) -> Added:
        from perfit_device.profile import check_fields

        task = profile.task(self.task)
        check_fields(task, self.fields)
        values = {task.text_field: self.text, task.gold_field: self.answer, **self.fields}
        try:
            item = HistoryItem.make(task, values, date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        except InvalidData as error:
            raise InvalidInput(f"an example of {task.name} cannot be made of these: {error}") from error
        with profile.vault() as vault:
            return Added(task.name, *history.add(vault, [item]))


@dataclass(frozen=True)
class FindExamples(Operation[list[HistoryItem]]):
    """The examples of a task, or of an artefact's, or all; of these the ones named, by first characters."""

    task: str | None = None
    names: Sequence[str] = ()

    def run(self, profile: Profile, emit: Emit) -> list[HistoryItem]:
        from perfit_device.cloud_record import read_record
        from perfit_device.profile import listed

        with profile.vault() as vault:
            items, record = history.load(vault), read_record(vault)
        if self.task is not None:
            name = record.task_of(self.task)
            there = {item.task for item in items}
            if name not in there and self.task not in record.tasks and name not in TASKS:
                raise NotFound(
                    f'there is no task "{one_line(self.task)[:64]}"; '
                    f"there are {listed(there | record.tasks.keys())}"
                )
            items = [item for item in items if item.task == name]
        return history.find(items, self.names) if self.names else items
