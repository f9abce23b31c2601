"""What can be asked of an agent itself, locked or not."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from perfit_device.operations.operation import Emit, Operation

if TYPE_CHECKING:
    from perfit_device.agent.server import AgentServer
    from perfit_device.profile import Profile

__all__ = ["AgentState", "Control", "Lock", "State", "Stop", "Unlock"]

Result = TypeVar("Result")


@dataclass(frozen=True)
class AgentState:
    pid: int
    is_locked: bool
    running: int  # operations
    idle_seconds: float  # after which it locks itself; 0: never


class Control(Operation[Result]):
    @abstractmethod
    def apply(self, server: AgentServer) -> Result:
        """Raises PerfitError."""

    def run(self, profile: Profile, emit: Emit) -> Result:
        raise NotImplementedError("a control is for an agent")


@dataclass(frozen=True)
class State(Control[AgentState]):
    def apply(self, server: AgentServer) -> AgentState:
        return server.state()


@dataclass(frozen=True)
class Lock(Control[AgentState]):
    """What runs goes on to its end, and then the vault closes; `now` stops it, updates with a checkpoint."""

    now: bool = False

    def apply(self, server: AgentServer) -> AgentState:
        server.lock(now=self.now)
        return server.state()


@dataclass(frozen=True)
class Unlock(Control[AgentState]):
    """`passphrase` is UTF-8; None where the keyring locks the vault. Raises WrongPassphrase."""

    passphrase: bytes | None = None

    def apply(self, server: AgentServer) -> AgentState:
        server.unlock(self.passphrase)
        return server.state()


@dataclass(frozen=True)
class Stop(Control[None]):
    def apply(self, server: AgentServer) -> None:
        server.stop()
