"""Chats as files of fine-tuning have them: {"messages": [{"role": "user", "content": "…"}, …]}.

There the assistant's turns are what the person would write, and each is an example with the turn that it
answers. In a record of talks with a model the person's own words are the user's turns: `--role user`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from perfit_device.history.importers.jsonl import rows
from perfit_device.history.importers.rows import check_pairs, date_and_part, of_pair
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_text, parse_json
from perfit_shared.tasks import Task

__all__ = ["FORMAT"]

_ROLES = ("user", "assistant")


def fits(source: Source) -> bool:
    """Whether the first object has messages."""
    records = source.records
    if records is None:
        try:
            records = [parse_json(source.text.lstrip().partition("\n")[0])]
        except InvalidData:
            return False
    first = records[0] if isinstance(records, list) and records else None
    return isinstance(first, dict) and isinstance(first.get("messages"), list)


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    check_pairs(task, FORMAT.kind)
    person = source.choices.role or "assistant"
    if person not in _ROLES:
        raise InvalidData("--role should be user or assistant")
    for origin, record in rows(source):
        with error_context(origin):
            if isinstance(record, InvalidData):
                raise record
            yield from _of_chat(record, task, person, origin, source)


def _of_chat(record: Any, task: Task, person: str, origin: str, source: Source) -> Iterator[HistoryItem]:
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidData('it should have "messages", a list of objects')
    date, part, problems = date_and_part(record)
    if problems:
        raise InvalidData("; ".join(problems))
    heard = ""
    for number, message in enumerate(messages):
        place = f"{origin}, message {number}"
        role, content = message.get("role"), _text_of(message.get("content"))
        if not isinstance(role, str):
            raise InvalidData(f'message {number}: field "role" should be text')
        if content is None:
            raise InvalidData(f'message {number}: field "content" should be text, or a list of parts')
        if role not in _ROLES:
            continue
        if role != person:
            heard = content
        elif reason := _no_example(message, heard, content):
            source.report.skip(reason, place)
        else:
            yield of_pair(task, heard, content, date=date, part=part, origin=place)


def _no_example(message: dict[str, Any], heard: str, content: str) -> str:
    if message.get("weight") == 0:
        return "marked with weight 0"
    if not content:
        return "without text (a call of a tool, or an image)"
    return "" if heard else "answering nothing, since they open a chat"


def _text_of(content: Any) -> str | None:
    """The text of a turn, whose content may be a list of parts; None for what is no turn's content."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = [part.get("text", "") for part in content if isinstance(part, dict)]
        content = "\n".join(part for part in parts if isinstance(part, str))
    return content.strip() if is_text(content) else None


FORMAT = Format("messages", "chats", fits, read, tasks=("chat", "reply"), reads=("role",))
