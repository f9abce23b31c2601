"""What the vault knows of a personal shift's versions: plain values, and the bytes that they are kept as."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from perfit_shared.errors import VaultDamaged

if TYPE_CHECKING:
    from perfit_shared.shifts import ShiftTensors

__all__ = ["PersonalShift", "TrainingSummary", "Version", "Versions"]


@dataclass(frozen=True)
class TrainingSummary:
    """What a version was made of. None where unknown: vaults of format 1 did not record it.

    `examples` counts those that trained, the oldest of the history. Losses are in nats a token. Those of
    training are means over the first and the last epoch's steps; the gate's are of what training began
    with, and of this version.
    """

    examples: int | None = None
    train_before: float | None = None
    train_after: float | None = None
    gate_before: float | None = None
    gate_after: float | None = None


@dataclass(frozen=True)
class PersonalShift:
    """The current version of a user's shift, and how many updates made it."""

    tensors: ShiftTensors
    updates: int
    # The value of `history.forgotten` when this shift, or the one that it continues, began at the seed.
    # It may remember what was forgotten since.
    forgotten: int = 0
    learned: TrainingSummary = field(default_factory=TrainingSummary)
    # Names of all examples that trained or judged it, or what it continues; None where unknown.
    trained: frozenset[bytes] | None = None
    behind: int = 0  # own examples, at most, before each of those that trained it: questions want as many


@dataclass(frozen=True)
class Version:
    """What is known of one version, beside its tensors."""

    number: int  # from 1
    artefact_version: str
    updates: int
    forgotten: int = 0  # as of PersonalShift
    date: str = ""  # ISO 8601, UTC; "" where unknown
    learned: TrainingSummary = field(default_factory=TrainingSummary)
    follows: int = 0  # the version that was current when it was made; 0 where there was none
    origin: str = ""  # "" for an update's; "imported" or "restored"
    behind: int = 0  # as of PersonalShift


@dataclass(frozen=True)
class Versions:
    """The kept versions of one shift, by their numbers, and the number of the current one."""

    task: str  # name of the artefact's task
    current: int
    kept: tuple[Version, ...]

    def find(self, number: int) -> Version | None:
        return next((version for version in self.kept if version.number == number), None)

    @property
    def now(self) -> Version:
        """The current version."""
        return next(version for version in self.kept if version.number == self.current)

    @property
    def before(self) -> Version | None:
        """The version that `undo` makes current."""
        followed = self.find(self.now.follows)
        earlier = [version for version in self.kept if version.number < self.current]
        return followed or (earlier[-1] if earlier else None)

    def to_bytes(self) -> bytes:
        values = asdict(self)
        for each, usual in zip(values["kept"], _usually_followed(values["kept"]), strict=True):
            # An earlier perfit knows none of them, and reads what lacks them.
            for key, default in (("follows", usual), ("origin", ""), ("behind", 0)):
                if each[key] == default:
                    del each[key]
        return json.dumps(values).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Versions:
        """Raises VaultDamaged."""
        try:
            values = json.loads(data)
            kept = [
                Version(**{"follows": usual} | each | {"learned": TrainingSummary(**each["learned"])})
                for each, usual in zip(values["kept"], _usually_followed(values["kept"]), strict=True)
            ]
            versions = cls(values["task"], values["current"], tuple(kept))
            if versions.find(versions.current) is None:
                raise ValueError("the current version is not kept")
            return versions
        except (ValueError, KeyError, TypeError) as error:
            raise VaultDamaged("the vault holds a list of versions that cannot be read") from error


def _usually_followed(kept: Sequence[Mapping[str, Any]]) -> list[int]:
    """Of each version, the one before it in the list; 0 where there is none."""
    return [0, *(each["number"] for each in kept[:-1])] if kept else []
