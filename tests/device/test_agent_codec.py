"""What goes over an agent's socket: every operation, every event, every error, by their types."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

import perfit_device
from perfit_device import operations
from perfit_device.agent import codec, controls
from perfit_device.history import HistoryItem
from perfit_device.operations.ask import Answer, AnswerPart, Answers, Ask, Question
from perfit_device.operations.examples import FindExamples
from perfit_device.operations.imports import ImportExamples
from perfit_device.operations.operation import Event, Operation, Progress
from perfit_device.operations.update import Update
from perfit_shared import errors
from perfit_shared.errors import Diverged, ExamplesRefused, InvalidPrompt, PerfitError
from perfit_shared.types import Chunk, Finish, Mode

MODULES = [f"perfit_device.operations.{each.name}" for each in pkgutil.iter_modules(operations.__path__)]
MODULES += ["perfit_device.openai_api.service"]
ABSTRACT = {"Operation", "Service", "Control"}


def classes(kind: type[Any]) -> list[type[Any]]:
    found = [importlib.import_module(name) for name in MODULES] + [controls]
    every = {cls for module in found for _, cls in inspect.getmembers(module, inspect.isclass)}
    return sorted((cls for cls in every if issubclass(cls, kind)), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", [c for c in classes(Operation) if c.__name__ not in ABSTRACT])
def test_requests_and_results_have_types_that_can_be_read_back(cls: type[Operation[Any]]) -> None:
    assert is_dataclass(cls) and cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    msgspec.msgpack.Decoder(cls)
    msgspec.msgpack.Decoder(codec.result_type(cls))


@pytest.mark.parametrize("cls", classes(Event))
def test_events_have_types_that_can_be_read_back(cls: type[Event]) -> None:
    msgspec.msgpack.Decoder(cls)


@pytest.mark.parametrize("name", MODULES)
def test_a_request_is_made_without_heavy_modules(name: str) -> None:
    """The command's process makes it, for whoever holds the profile."""
    heavy = "{'numpy', 'grpc', 'cryptography', 'safetensors', 'sqlite3', 'keyring', 'starlette', 'uvicorn'}"
    program = f"import sys, {name}; sys.exit(str(sorted({heavy} & set(sys.modules)) or ''))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert not done.stderr.strip(), done.stderr


def sent(message: msgspec.Struct) -> Any:
    return codec.decode(codec.encode(message), type(message))


ITEM = HistoryItem("news_headline", {"text": "Où ?", "title": "T"}, date="2024-05-31")


@pytest.mark.parametrize(
    "operation",
    [
        Ask(Question("Où ?", fields={"a": "b"}, seed=2**63), (Mode.BASE, Mode.PERSONAL)),
        ImportExamples([ITEM], "JSON lines", "mine"),
        FindExamples(names=["abcd"]),  # a Sequence comes as a list
        Update(settings={"epochs": 3, "learning_rate": 0.5}, retry_seconds=0.0),
        controls.Unlock(b"\xff"),
    ],
)
def test_requests_come_as_they_were(operation: Operation[Any]) -> None:
    assert codec.operation_from(sent(codec.call_of(operation))) == operation


def test_events_and_results_come_as_they_were() -> None:
    for event in (Progress(1, 2, float("inf")), AnswerPart(Mode.BASE, Chunk("x", Finish.END, 5, 3))):
        assert codec.event_from(sent(codec.happened(event))) == event
    answers = Answers("news", {Mode.BASE: Answer(" x", "x", Chunk("", Finish.LENGTH, 1, 2))})
    assert codec.result_from(sent(codec.result_of(answers)), Ask(Question("x"))) == answers
    assert codec.result_from(sent(codec.result_of([ITEM])), FindExamples()) == [ITEM]


def all_errors() -> list[type[PerfitError]]:
    named = [getattr(errors, name) for name in errors.__all__]
    return [cls for cls in named if isinstance(cls, type) and cls not in (ExamplesRefused, Diverged)]


def test_every_error_comes_as_it_was() -> None:
    assert len({cls.code for cls in all_errors()}) == len(all_errors()), "a code means one class"
    for cls in all_errors():
        back = codec.error_from(sent(codec.failed_by(cls("why", retry_ms=7))))
        assert type(back) is cls and str(back) == "why" and back.retry_ms == 7
    refused = codec.error_from(sent(codec.failed_by(ExamplesRefused("why", ["a", "b"]))))
    assert isinstance(refused, ExamplesRefused) and refused.names == ("a", "b")
    diverged = codec.error_from(sent(codec.failed_by(Diverged("why", 3))))
    assert isinstance(diverged, Diverged) and diverged.index == 3
    full = codec.error_from(sent(codec.failed_by(OSError(28, "No space left", "/x"))))
    assert isinstance(full, OSError) and (full.errno, full.filename) == (28, "/x")
    assert isinstance(codec.error_from(sent(codec.failed_by(KeyboardInterrupt()))), KeyboardInterrupt)


def test_a_fault_says_where_and_not_what() -> None:
    try:
        raise ValueError("SECRET text")
    except ValueError as error:
        said = codec.failed_by(error)
    assert said.code == "fault" and "SECRET" not in said.message and "test_agent_codec.py" in said.message


def test_what_a_request_checks_it_checks_at_the_agent_too() -> None:
    call = codec.call_of(Ask(Question("x")))
    with pytest.raises(InvalidPrompt):
        codec.operation_from(
            codec.Call(call.operation, msgspec.Raw(bytes(call.request).replace(b"\xa1x", b"\xa1 ")))
        )


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "operations.examples.os",  # a module
        "operations.examples.FindExamples.run",
        "operations.operation.Event",  # no operation
        "operations.examples.HistoryItem",
        "operations.nope.X",
        "agent.server.AgentServer",
        "operations.examples.__dict__",
    ],
)
def test_nothing_but_operations_can_be_called(name: str) -> None:
    with pytest.raises(codec.Malformed):
        codec.operation_from(codec.Call(name, msgspec.Raw(b"\x80")))


@pytest.mark.parametrize("request_", [b"\x81\xa4task\xa1\xff", b"\x81\xa4task" + b"\x91" * 100_000, b"\xc1"])
def test_texts_and_depths_that_cannot_be_are_no_message(request_: bytes) -> None:
    call = codec.Call("operations.examples.FindExamples", msgspec.Raw(request_))
    with pytest.raises(codec.Malformed):
        codec.operation_from(call)
    with pytest.raises(codec.Malformed):
        codec.decode(b"\x81\xa4type\xa4\xff\xff\xff\xff", codec.Call)


def test_the_agent_s_version_is_the_package_s() -> None:
    import tomllib

    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text("utf-8"))
    assert perfit_device.__version__ == project["project"]["version"]
