"""The messages between an agent and those who use it, as bytes. Types stop a message that is none of ours.

    agent                                 other side
    Hello, as soon as a connection opens
                                          Call: an operation's name and its request
    Happened, any number of times         Cancel, at any time
    Done or Failed                        the next Call

A request, an event and a result are written and read by the annotations of their classes. They are found by
module and name, such as `operations.versions.Undo`. MessagePack carries bytes, NaN and infinities, which JSON
does not.
"""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar, get_args, get_origin

import msgspec

from perfit_device.operations.operation import Event, Operation
from perfit_shared.errors import Diverged, ExamplesRefused, Fault, PerfitError

__all__ = [
    "LARGEST",
    "Call",
    "Cancel",
    "Done",
    "Failed",
    "Happened",
    "Hello",
    "Malformed",
    "call_of",
    "decode",
    "encode",
    "error_from",
    "event_from",
    "failed_by",
    "happened",
    "operation_from",
    "place_of",
    "result_from",
    "result_of",
    "result_type",
]

LARGEST = 288 << 20  # bytes of a message: a history file of 256 MiB, and what stands around it
Malformed = msgspec.DecodeError  # what this module raises on bytes that are no message of ours
_NAME = re.compile(r"(operations\.[a-z_]+|openai_api\.service|agent\.controls)\.([A-Za-z]+)")
_Kind = TypeVar("_Kind")


class Hello(msgspec.Struct, frozen=True, tag=True):
    version: str  # of the agent's perfit
    pid: int
    is_locked: bool
    lock: str  # of the vault: "passphrase" or "keyring"


class Call(msgspec.Struct, frozen=True, tag=True):
    operation: str
    request: msgspec.Raw
    task: str | None = None  # that the caller means where the request names none


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """As Ctrl-C where the operation runs. What it still says and how it ends come as ever."""


class Happened(msgspec.Struct, frozen=True, tag=True):
    event: str
    value: msgspec.Raw


class Done(msgspec.Struct, frozen=True, tag=True):
    value: msgspec.Raw


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An error of `perfit_shared.errors`, an OSError where `errno` is set, or "interrupted"."""

    code: str
    message: str = ""
    retry_ms: int = 0
    names: tuple[str, ...] = ()  # of ExamplesRefused
    index: int = 0  # of Diverged
    errno: int = 0
    filename: str = ""


_decoder = msgspec.msgpack.Decoder(Hello | Call | Cancel | Happened | Done | Failed)


def encode(message: msgspec.Struct) -> bytes:
    return msgspec.msgpack.encode(message)


def decode(data: bytes, *expected: type[Any]) -> Any:
    """Raises Malformed unless it is a message of one of these kinds."""
    message = _decoded(_decoder, data)
    if not isinstance(message, expected):
        raise Malformed(f"a {type(message).__name__} is not expected here")
    return message


def call_of(operation: Operation[Any], task: str | None = None) -> Call:
    return Call(_name_of(type(operation)), _raw(operation), task)


def operation_from(call: Call) -> Operation[Any]:
    """Raises Malformed."""
    operation: Operation[Any] = _read(call.request, _class_of(call.operation, Operation))
    return operation


def happened(event: Event) -> Happened:
    return Happened(_name_of(type(event)), _raw(event))


def event_from(message: Happened) -> Event:
    """Raises Malformed."""
    event: Event = _read(message.value, _class_of(message.event, Event))
    return event


def result_of(value: object) -> Done:
    return Done(_raw(value))


def result_from(message: Done, operation: Operation[Any]) -> Any:
    """Raises Malformed."""
    return _read(message.value, result_type(type(operation)))


# -- errors ----------------------------------------------------------------------------------------


def failed_by(error: BaseException) -> Failed:
    """What went wrong, for whoever called. A fault of ours is named by its place alone."""
    if isinstance(error, KeyboardInterrupt):
        return Failed("interrupted")
    if isinstance(error, PerfitError):
        names = error.names if isinstance(error, ExamplesRefused) else ()
        index = error.index if isinstance(error, Diverged) else 0
        return Failed(error.code, str(error), error.retry_ms, names, index)
    if isinstance(error, OSError) and error.errno is not None:
        filename = error.filename if isinstance(error.filename, str) else ""
        return Failed("system", error.strerror or "", errno=error.errno, filename=filename)
    return Failed(Fault.code, f"a fault inside perfit's agent ({place_of(error)}); please report it")


def error_from(message: Failed) -> BaseException:
    if message.code == "interrupted":
        return KeyboardInterrupt()
    if message.errno:
        return OSError(message.errno, message.message, *([message.filename] if message.filename else []))
    if message.code == ExamplesRefused.code:
        return ExamplesRefused(message.message, message.names)
    if message.code == Diverged.code:
        return Diverged(message.message, message.index)
    classes = {cls.code: cls for cls in _tree(PerfitError)}
    return classes.get(message.code, PerfitError)(message.message, retry_ms=message.retry_ms)


def place_of(error: BaseException) -> str:
    """Class, file and line: nothing of what was worked on."""
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}"


def _tree(cls: type[PerfitError]) -> Iterator[type[PerfitError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


# -- classes ---------------------------------------------------------------------------------------


def result_type(operation: type[Operation[Any]]) -> Any:
    """The `Result` of `class …(Operation[Result])`."""
    for cls in operation.__mro__:
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin = get_origin(base)
            if isinstance(origin, type) and issubclass(origin, Operation):
                return get_args(base)[0]
    raise TypeError(f"{operation.__name__} does not say what its result is")


def _name_of(cls: type[Any]) -> str:
    return f"{cls.__module__.removeprefix('perfit_device.')}.{cls.__name__}"


def _class_of(name: str, kind: type[_Kind]) -> type[_Kind]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise Malformed("not the name of an operation or event")
    try:
        module = importlib.import_module(f"perfit_device.{match[1]}")
    except ModuleNotFoundError as error:
        raise Malformed("no such module") from error
    cls = getattr(module, match[2], None)
    if not (isinstance(cls, type) and issubclass(cls, kind)):
        raise Malformed("no such operation or event")
    return cls


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.msgpack.encode(value))


def _read(raw: msgspec.Raw, cls: Any) -> Any:
    return _decoded(_reader(cls), raw)


def _decoded(decoder: msgspec.msgpack.Decoder[Any], data: bytes | msgspec.Raw) -> Any:
    try:
        return decoder.decode(data)
    except (UnicodeDecodeError, RecursionError) as error:  # text that is no UTF-8, or lists without end
        raise Malformed(f"a {type(error).__name__} in a message") from None


@functools.cache
def _reader(cls: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(cls)
