"""Responses that an app asked to keep, sealed in the vault like every answer that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device import answers
from perfit_device.answers import Answer
from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import NotFound

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["Done", "DropResponse", "KeepResponse", "ReadResponse"]


@dataclass(frozen=True)
class Done:
    """There is nothing to say."""


@dataclass(frozen=True)
class KeepResponse(Operation[Done]):
    response: Answer

    def run(self, profile: Profile, emit: Emit) -> Done:
        with profile.vault() as vault:
            answers.put(vault, self.response)
        return Done()


@dataclass(frozen=True)
class ReadResponse(Operation[Answer]):
    """Raises NotFound where no app asked to keep it, or where it was forgotten."""

    name: str

    def run(self, profile: Profile, emit: Emit) -> Answer:
        with profile.vault() as vault:
            answer = answers.get(vault, self.name)
        if answer is None or not answer.is_response:
            raise NotFound("there is no such response; those are kept that were asked for with store: true")
        return answer


@dataclass(frozen=True)
class DropResponse(Operation[Done]):
    """Raises as `ReadResponse`."""

    name: str

    def run(self, profile: Profile, emit: Emit) -> Done:
        with profile.vault() as vault, vault.transaction():
            ReadResponse(self.name).run(profile, emit)
            answers.delete(vault, self.name)
        return Done()
