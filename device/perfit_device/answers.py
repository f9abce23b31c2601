"""Answers that the owner wants kept: a log to learn from, and responses that apps may come back to.

One sealed row each, so that they are forgotten like examples. `texts_of` is what `forget` looks through.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from perfit_shared.errors import VaultDamaged

if TYPE_CHECKING:
    from perfit_device.vault.store import Vault

__all__ = ["Answer", "Message", "delete", "forget_texts", "get", "load", "put", "read", "texts_of"]

_KIND = "answer"


@dataclass(frozen=True)
class Message:
    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Answer:
    """A question with its answer. It has `fields` for a task, `messages` for a talk."""

    text: str  # of the answer
    task: str = ""  # name of the artefact; "" for the base model alone
    mode: str = "personal"
    fields: Mapping[str, str] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()  # oldest first, without the answer
    is_response: bool = False  # kept for an app (`store: true`), not by `perfit log`
    extra: str = ""  # JSON of whoever kept it
    date: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
    name: str = field(default_factory=lambda: os.urandom(12).hex())


def put(vault: Vault, answer: Answer) -> None:
    vault.put(_KIND, answer.name, json.dumps(asdict(answer), ensure_ascii=False).encode())


def get(vault: Vault, name: str) -> Answer | None:
    """Raises VaultDamaged."""
    data = vault.get(_KIND, name)
    return None if data is None else read(data)


def load(vault: Vault) -> list[Answer]:
    """Oldest first. Raises VaultDamaged."""
    return sorted(map(read, vault.list(_KIND).values()), key=lambda answer: (answer.date, answer.name))


def delete(vault: Vault, name: str) -> bool:
    return vault.delete(_KIND, name)


def texts_of(answer: Answer) -> set[str]:
    """Every text in it, without white space at its ends."""
    said = [message.content for message in answer.messages]
    return {text.strip() for text in (answer.text, *answer.fields.values(), *said)}


def forget_texts(vault: Vault, texts: Collection[str]) -> int:
    """Delete every answer that has one of these texts in it for good; how many."""
    wanted = {text.strip() for text in texts}
    found = [answer for answer in load(vault) if not wanted.isdisjoint(texts_of(answer))]
    with vault.transaction():
        for answer in found:
            delete(vault, answer.name)
    return len(found)


def read(data: bytes) -> Answer:
    """Raises VaultDamaged."""
    try:
        values = json.loads(data)
        messages = tuple(Message(**message) for message in values.pop("messages"))
        return Answer(messages=messages, **values)
    except (ValueError, KeyError, TypeError) as error:
        raise VaultDamaged("the vault holds an answer that cannot be read") from error
