"""What the endpoint for apps needs of a profile: its token, and the models that apps may name."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import NotFound
from perfit_shared.terminal import one_line
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["EndpointToken", "ListModels", "Models", "Token", "model_names", "no_model"]

_KIND, _NAME = "endpoint", "token"


@dataclass(frozen=True)
class Token:
    text: str


@dataclass(frozen=True)
class EndpointToken(Operation[Token]):
    """The token that apps show. The vault keeps it, so that apps go on after a restart."""

    new: bool = False  # the one before is refused from now on

    def run(self, profile: Profile, emit: Emit) -> Token:
        with profile.vault() as vault, vault.transaction():
            kept = None if self.new else vault.get(_KIND, _NAME)
            token = kept.decode() if kept else f"perfit-{secrets.token_urlsafe(32)}"
            if not kept:
                vault.put(_KIND, _NAME, token.encode())
        return Token(token)


@dataclass(frozen=True)
class Models:
    names: tuple[str, ...]


@dataclass(frozen=True)
class ListModels(Operation[Models]):
    """The base model, and with artefacts the collective and personal one, then one for each task."""

    def run(self, profile: Profile, emit: Emit) -> Models:
        _, info = profile.connect()
        return Models(model_names(artefact.name for artefact in info.artefacts))


def model_names(tasks: Iterable[str]) -> tuple[str, ...]:
    tasks = sorted(tasks)
    modes = list(Mode) if tasks else [Mode.BASE]
    return (*(mode.value for mode in modes), *tasks)


def no_model(name: str, names: Iterable[str]) -> NotFound:
    return NotFound(f'there is no model "{one_line(name)[:64]}"; there are {", ".join(names)}')
