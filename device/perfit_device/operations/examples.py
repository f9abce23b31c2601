"""The examples that a shift learns from: adding, importing, finding, forgetting. All of it works offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from perfit_device import history, personal
from perfit_device.cloud_record import CloudRecord, read_record
from perfit_device.history import HistoryItem
from perfit_device.history.importers import read_history
from perfit_device.profile import Profile, check_fields, listed
from perfit_shared.errors import InvalidData, InvalidInput, NotFound
from perfit_shared.tasks import TASKS
from perfit_shared.terminal import one_line

__all__ = ["Added", "Forgotten", "add", "find", "forget", "import_file"]

_WARNINGS = 5  # about single examples


@dataclass(frozen=True)
class Added:
    task: str  # several with commas
    added: int
    duplicates: int  # that were there already


@dataclass(frozen=True)
class Forgotten:
    count: int
    is_trained: bool  # whether a shift is left, which may have learned from them


def add(
    profile: Profile, text: str, answer: str, task: str | None = None, fields: Mapping[str, str] | None = None
) -> Added:
    """One example, of now. `fields`: those that a task has besides the text's and the answer's."""
    of = profile.task(task)
    check_fields(of, fields or {})
    values = {of.text_field: text, of.gold_field: answer, **(fields or {})}
    try:
        item = HistoryItem.make(of, values, date=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
    except InvalidData as error:
        raise InvalidInput(f"an example of {of.name} cannot be made of these: {error}") from error
    with profile.vault() as vault:
        return Added(of.name, *history.add(vault, [item]))


def import_file(
    profile: Profile,
    path: Path,
    *,
    data: bytes | None = None,
    task: str | None = None,
    user: str | None = None,
) -> Added:
    """All examples of a file, or none. `data` is what it holds, where it was read already."""
    with profile.vault() as vault:
        record = read_record(vault)
        items = read_history(
            path,
            None if task is None else profile.task(task),
            default=lambda: profile.task(None),
            data=data,
            user=user,
            tasks=record.by_task,
            notify=profile.notify,
        )
        _warn_of_long_ones(profile, items, record)
        return Added(listed({item.task for item in items}), *history.add(vault, items))


def _warn_of_long_ones(profile: Profile, items: Sequence[HistoryItem], record: CloudRecord) -> None:
    """The cloud will refuse an item with more words than its last known limit of tokens."""
    limits = (record.prompt_tokens, record.new_tokens)
    if not all(limits):
        return
    long = [item for item in items if _words(item) > max(limits)]
    for item in long[:_WARNINGS]:
        profile.notify(
            f"{item.origin}: {_words(item)} words are too long for the cloud, which takes "
            f"{limits[0]} tokens; it is kept, and left out where the cloud refuses it"
        )
    if len(long) > _WARNINGS:
        profile.notify(f"{len(long) - _WARNINGS} more are too long as well")


def _words(item: HistoryItem) -> int:
    """Of the longest field."""
    return max(len(text.split()) for text in item.fields.values())


def find(profile: Profile, task: str | None = None, names: Sequence[str] = ()) -> list[HistoryItem]:
    """The examples of a task, or of an artefact's, or all; of these the ones named, by first characters."""
    with profile.vault() as vault:
        items, record = history.load(vault), read_record(vault)
    if task is not None:
        name = record.task_of(task)
        there = {item.task for item in items}
        if name not in there and task not in record.tasks and name not in TASKS:
            raise NotFound(
                f'there is no task "{one_line(task)[:64]}"; there are {listed(there | record.tasks.keys())}'
            )
        items = [item for item in items if item.task == name]
    return history.find(items, names) if names else items


def forget(profile: Profile, items: Sequence[HistoryItem]) -> Forgotten:
    """For good: their rows and keys are overwritten in the vault."""
    with profile.vault() as vault:
        return Forgotten(history.forget(vault, items), bool(personal.artefacts(vault)))
