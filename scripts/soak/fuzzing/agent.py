"""Targets at an agent: what its codec reads, and frames for a live one, with an honest caller beside them."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import strategies as st

from perfit_device.agent import client, codec, launch
from perfit_device.agent.address import FAMILY, address_of
from perfit_device.agent.controls import State, Unlock
from perfit_device.history import HistoryItem
from perfit_device.operations.ask import Ask, Question
from perfit_device.operations.automatic import AutomaticUpdate
from perfit_device.operations.examples import AddExample, FindExamples
from perfit_device.operations.imports import ImportExamples, ListImports
from perfit_device.operations.log import ReadLog
from perfit_device.operations.operation import Operation
from perfit_device.operations.update import Update
from perfit_device.operations.versions import Undo
from perfit_device.settings import DeviceSettings
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.types import Mode
from soak.fuzzing.checking import Target, Unsound
from soak.fuzzing.mutation import edited, edited_json

__all__ = ["NAME", "offline_targets", "targets"]

NAME = "agent: frames"
_TASK = "news_headline"
_SECRETS = ("a passphrase for this run only", "Canarytext of an example", "Canarytitle")
_ITEM = HistoryItem(_TASK, {"text": _SECRETS[1], "title": _SECRETS[2]})
_CALLS: tuple[Operation[Any], ...] = (
    State(),
    FindExamples(_TASK),
    AddExample("words", "a title", _TASK),
    ListImports(),
    Ask(Question("words", task=_TASK, seed=1), (Mode.BASE, Mode.PERSONAL)),
    ImportExamples([HistoryItem(_TASK, {"text": "words", "title": "t"})], "JSON lines", "mine.jsonl"),
    Update(_TASK, {"epochs": 1, "learning_rate": 0.5}),
    AutomaticUpdate(_TASK),
    Undo(_TASK),
    ReadLog(),
    Unlock(b"a guess"),
)
_HONEST = FindExamples(_TASK, names=[_ITEM.name])
_ANSWER_SECONDS = 30.0
_LOOKS = 50  # inputs between two looks at what the log says


def offline_targets() -> list[Target]:
    said = [codec.failed_by(OSError(28, "full", "x")), codec.failed_by(KeyboardInterrupt()), codec.Cancel()]
    answers = [codec.encode(message) for message in (*said, codec.result_of([_ITEM]))]
    return [
        Target("agent: requests", 4, _frames(), _request),
        Target("agent: answers", 1, edited(answers), _answer),
    ]


def _frames() -> st.SearchStrategy[bytes]:
    """Calls with other bytes, and with other values."""
    calls = [codec.encode(codec.call_of(operation)) for operation in _CALLS]
    plain = [json.loads(msgspec.json.encode(msgspec.msgpack.decode(call))) for call in calls]
    return edited(calls) | edited_json(plain).map(_packed)


def _packed(text: str) -> bytes:
    """As MessagePack, where that has such numbers and texts."""
    try:
        return msgspec.msgpack.encode(json.loads(text))
    except (ValueError, OverflowError, RecursionError):
        return text.encode("utf-8", "surrogatepass")


def _request(data: bytes) -> str:
    try:
        message = codec.decode(data, codec.Call, codec.Cancel)
        operation = codec.operation_from(message) if isinstance(message, codec.Call) else message
    except codec.Malformed as error:
        return type(error).__name__
    if isinstance(operation, Operation):
        codec.operation_from(codec.call_of(operation))
    return type(operation).__name__


def _answer(data: bytes) -> str:
    try:
        message = codec.decode(data, codec.Done, codec.Failed)
        if isinstance(message, codec.Done):
            return type(codec.result_from(message, _HONEST)).__name__
    except codec.Malformed as error:
        return type(error).__name__
    return type(codec.error_from(message)).__name__


@contextlib.contextmanager
def targets(work: Path) -> Iterator[list[Target]]:
    """At an agent of its own, which runs as long as this lasts."""
    settings = DeviceSettings("default", work)
    kdf = KdfParams(memory_kib=32, iterations=1, lanes=1)
    Vault.create(settings.vault_path, _SECRETS[0], kdf=kdf).close()
    launch.start(settings, _SECRETS[0])
    try:
        agent = client.connect(settings)
        if agent is None:
            raise Unsound("the agent is gone")
        with agent:
            yield [Target(NAME, 2, _frames(), _Live(settings, agent).check, seconds=_ANSWER_SECONDS)]
    finally:
        launch.stop(settings)


class _Live:
    def __init__(self, settings: DeviceSettings, honest: client.AgentClient) -> None:
        self._address = address_of(settings)
        self._log = settings.vault_path.with_name("agent.log")
        self._honest, self._count = honest, itertools.count(1)
        honest.perform(ImportExamples([_ITEM], offline=True))
        self._answer = honest.perform(_HONEST)

    def check(self, data: bytes) -> str:
        with Client(self._address, FAMILY) as other:
            codec.decode(other.recv_bytes(), codec.Hello)
            outcome = self._sent(other, data)
        if self._honest.perform(_HONEST) != self._answer:
            raise Unsound("an honest caller's example changed")
        if next(self._count) % _LOOKS == 0:
            self._look()
        return outcome

    def _sent(self, other: Connection, data: bytes) -> str:
        """What the agent says to it."""
        message: Any = codec.Cancel()
        with contextlib.suppress(codec.Malformed):
            if isinstance(codec.decode(data, codec.Call, codec.Cancel), codec.Cancel):
                return "nothing to cancel"
        try:
            other.send_bytes(data)
            while not isinstance(message, codec.Done | codec.Failed):
                message = codec.decode(other.recv_bytes(), codec.Done, codec.Failed, codec.Happened)
        except (EOFError, OSError):
            return "closed"
        if isinstance(message, codec.Done):
            return "done"
        if message.code == "fault" or any(secret in message.message for secret in _SECRETS):
            raise Unsound(message.message)
        return str(message.code)

    def _look(self) -> None:
        said = self._log.read_text("utf-8")
        if "Traceback" in said or any(secret in said for secret in _SECRETS):
            raise Unsound("the agent's log has what nobody may read")
