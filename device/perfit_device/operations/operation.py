"""What a person can ask of a profile, as values: requests that go over a socket to an agent as well.

    @dataclass(frozen=True)
    class Undo(Operation[Undone]):
        task: str | None = None

        def run(self, profile: Profile, emit: Emit) -> Undone: …

A request, its events and its result are frozen dataclasses of plain values (text, numbers, bytes, lists,
mappings, other such dataclasses), so that msgspec can write them and read them back by their types. `run`
reports what happens meanwhile through `emit`, and prints nothing. Commands, chat and the endpoint call
`perform` of whoever holds the profile: this process, or an agent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["Emit", "Event", "Note", "Operation", "Performer", "Progress", "Service"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class Event:
    """Something that happens before the result."""


@dataclass(frozen=True)
class Note(Event):
    """A line for a person."""

    text: str


@dataclass(frozen=True)
class Progress(Event):
    done: int
    total: int
    loss: float | None = None  # nats a token, of an update's last step


Emit = Callable[[Event], None]


class Operation(ABC, Generic[Result]):
    """One thing to do with an open profile; a frozen dataclass in a module of this folder."""

    @abstractmethod
    def run(self, profile: Profile, emit: Emit) -> Result:
        """Raises PerfitError. An exception from `emit` means that the caller has left."""


class Performer(Protocol):
    """Whoever holds a profile: `Profile` in this process, or a connection to its agent."""

    def perform(self, operation: Operation[Result], emit: Emit = ...) -> Result: ...


class Service(Operation[Result]):
    """Runs until its caller leaves, and performs others' operations meanwhile: an endpoint for apps.

    It does not hold the profile: an agent that hosts it may be locked and unlocked while it runs, and
    `performer` raises Locked in between. It waits in a way that `perfit_device.cancellation` can end, such
    as `wait_until_cancelled`, which raises KeyboardInterrupt once the caller has left. Threads of its own may
    call `performer.perform`, each in the scope of a `Cancellation` of its own.
    """

    @abstractmethod
    def serve(self, performer: Performer, emit: Emit) -> Result:
        """Raises PerfitError."""

    def run(self, profile: Profile, emit: Emit) -> Result:
        return self.serve(profile, emit)
