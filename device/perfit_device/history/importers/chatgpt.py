"""ChatGPT's export: conversations.json, the folder that has it, or the zip archive as it was downloaded.

What the person writes are the user's turns, and each is an example with the assistant's turn that it
answers. A turn that opens a conversation answers nothing. What people paste is not how they write: a turn
with a block of code in it, or of more than 300 words, is left out. Of an edited turn the last form counts.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from perfit_device.history.importers.rows import check_pairs, of_pair
from perfit_device.history.importers.source import Format, Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_text
from perfit_shared.tasks import Task

__all__ = ["FORMAT", "json_elements"]

_FILES, _BYTES = 1000, 4 << 30  # of conversations in all
_ELEMENT = 16 << 20  # characters of one conversation
_STEP = 1 << 20
_BEFORE, _BETWEEN = re.compile(r"[ \t\r\n]*"), re.compile(r"[, \t\r\n]*")
_LONGEST = 300  # words of a turn that was typed


def fits(source: Source) -> bool:
    if source.is_folder:
        return bool(_files(source))
    if source.members:
        return any(map(_is_conversations, source.members))
    head = source.head.lstrip(b"\xef\xbb\xbf \r\n\t")
    return (
        head.startswith(b"[")
        and b'"mapping"' in head
        and b'"messages"' not in head.partition(b'"mapping"')[0]
    )


def _is_conversations(name: str) -> bool:
    name = PurePosixPath(name).name
    return name.startswith("conversations") and name.endswith(".json")


def _files(source: Source) -> list[str]:
    return sorted(str(path) for path in source.path.glob("conversations*.json") if path.is_file())[:_FILES]


def read(source: Source, task: Task) -> Iterator[HistoryItem]:
    check_pairs(task, FORMAT.kind)
    for file_name, stream in _streams(source):
        for number, conversation in enumerate(json_elements(stream)):
            origin = f"{file_name}, conversation {number}"
            with error_context(origin):
                yield from _of_conversation(conversation, task, origin, source)


def _streams(source: Source) -> Iterator[tuple[str, BinaryIO]]:
    """(name, content) of every file of conversations."""
    with ExitStack() as stack:
        if source.is_folder:
            for path in _files(source):
                inner = Source(source.path / path)
                yield PurePosixPath(path).name, stack.enter_context(inner.open())
        elif not source.members:
            yield source.path.name, stack.enter_context(source.open())
        else:
            try:
                archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(source.open())))
                names = sorted(filter(_is_conversations, source.members))[:_FILES]
                for name in names:
                    if archive.getinfo(name).file_size > _BYTES:
                        raise InvalidData(f"{name} unpacks to more than {_BYTES >> 30} GiB")
                    yield PurePosixPath(name).name, stack.enter_context(archive.open(name))  # type: ignore[misc]
            except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
                raise InvalidData("the archive is damaged or locked by a password") from error


def json_elements(stream: BinaryIO) -> Iterator[Any]:
    """The elements of a JSON array one after the other; no more than one of them is in memory.

    Raises InvalidData.
    """
    text = io.TextIOWrapper(stream, "utf-8-sig")
    decoder, buffer, at, opened = json.JSONDecoder(), "", 0, False
    size = 0  # that was read for the next element, spaces before it too
    try:
        while True:
            at = (_BETWEEN if opened else _BEFORE).match(buffer, at).end()  # type: ignore[union-attr]
            if not opened and buffer[at : at + 1] not in ("", "["):
                raise InvalidData("it should be a list of conversations")
            if not opened and buffer[at : at + 1] == "[":
                at, opened = at + 1, True
                continue
            if opened and buffer[at : at + 1] == "]":
                return
            try:
                element, end = decoder.raw_decode(buffer, at)
            except ValueError as error:
                buffer, at = buffer[at:], 0
                more = text.read(max(_STEP, len(buffer)))
                size += len(more)
                if not more or size > _ELEMENT:
                    what = "not whole JSON" if not more else f"not JSON, or over {_ELEMENT >> 20} MiB at once"
                    raise InvalidData(what) from error
                buffer += more
            else:
                yield element
                at, size = end, 0
    except (UnicodeError, RecursionError) as error:
        raise InvalidData("not JSON") from error


def _of_conversation(conversation: Any, task: Task, origin: str, source: Source) -> Iterator[HistoryItem]:
    mapping = conversation.get("mapping") if isinstance(conversation, dict) else None
    if not isinstance(mapping, dict):
        raise InvalidData('it should have a "mapping", as ChatGPT exports it')
    heard = ""
    for message in _thread(mapping, conversation.get("current_node")):
        role, text = _role_and_text(message)
        if role == "assistant" and text:
            heard = text
        if role != "user":
            continue
        if reason := _no_example(heard, text):
            source.report.skip(reason, origin)
        else:
            date = _date_of(message.get("create_time"))
            yield of_pair(task, heard, text, date=date, origin=origin)


def _thread(mapping: dict[str, Any], node: Any) -> list[dict[str, Any]]:
    """The messages of the branch that ends in `node`, or in the last one that was added."""
    if not isinstance(node, str) or node not in mapping:
        node = next(reversed(mapping), None)
    messages: list[dict[str, Any]] = []
    seen = set()
    while isinstance(node, str) and node in mapping and node not in seen:
        seen.add(node)  # a hostile file could go round
        entry = mapping[node]
        if not isinstance(entry, dict):
            break
        if isinstance(entry.get("message"), dict):
            messages.append(entry["message"])
        node = entry.get("parent")
    return messages[::-1]


def _role_and_text(message: dict[str, Any]) -> tuple[str, str]:
    author, content = message.get("author"), message.get("content")
    role = author.get("role") if isinstance(author, dict) else None
    parts: Any = None
    if isinstance(content, dict) and content.get("content_type") in ("text", "multimodal_text"):
        parts = content.get("parts")
    texts = [part for part in parts if is_text(part)] if isinstance(parts, list) else []
    return role if isinstance(role, str) else "", "\n".join(texts).strip()


def _no_example(heard: str, text: str) -> str:
    if not text:
        return "without text (an image, a file)"
    if not heard:
        return "answering nothing, since they open a conversation"
    if "```" in text:
        return "with a block of code, so pasted at least in part"
    return f"of more than {_LONGEST} words, so likely pasted" if len(text.split()) > _LONGEST else ""


def _date_of(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    try:
        return f"{datetime.fromtimestamp(value, UTC):%Y-%m-%dT%H:%M:%SZ}"
    except (ValueError, OverflowError, OSError):
        return ""


FORMAT = Format("chatgpt", "an export of ChatGPT", fits, read, tasks=("reply", "chat"))
