"""Forgetting examples: which versions know them, and training anew without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation
from perfit_device.shift_versions import Versions
from perfit_shared.errors import InvalidData, NotFound

if TYPE_CHECKING:
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault

__all__ = ["Forget", "Forgotten", "KnowingVersion", "Known", "WhatKnows"]


@dataclass(frozen=True)
class KnowingVersion:
    """A version of a shift that was made from one of the examples."""

    artefact: str
    number: int
    is_current: bool
    is_certain: bool  # False where an earlier perfit made it, or it was imported


@dataclass(frozen=True)
class Known:
    names: Sequence[str]  # of the examples that were asked for, whole
    answers: int  # kept ones that have a text of them
    versions: Sequence[KnowingVersion]


@dataclass(frozen=True)
class WhatKnows(Operation[Known]):
    """The examples of these names, or of all names where none is given, and what would remember them."""

    names: Sequence[str] = ()  # first characters
    task: str | None = None

    def run(self, profile: Profile, emit: Emit) -> Known:
        from perfit_device import answers
        from perfit_device.operations.examples import FindExamples

        items = FindExamples(self.task, self.names).run(profile, emit)
        texts = {text.strip() for text in _texts(items)}
        with profile.vault() as vault:
            kept = sum(not texts.isdisjoint(answers.texts_of(each)) for each in answers.load(vault))
            return Known([item.name for item in items], kept, _knowing(vault, items))


def _texts(items: Sequence[HistoryItem]) -> set[str]:
    return {text for item in items for text in item.fields.values()}


def _knowing(vault: Vault, items: Sequence[HistoryItem]) -> list[KnowingVersion]:
    from perfit_device import personal

    found = personal.knowing(vault, {item.task for item in items}, [item.name for item in items])
    currents = {row: Versions.from_bytes(data).current for row, data in vault.list("shift").items()}
    return [
        KnowingVersion(row.rpartition("/")[2], version.number, version.number == currents[row], is_certain)
        for row, version, is_certain in found
    ]


@dataclass(frozen=True)
class Forgotten:
    count: int
    dropped: Sequence[KnowingVersion]  # versions that knew them, and are gone
    left: Sequence[KnowingVersion]  # current ones that still may know them
    retrained: Sequence[str] = field(default_factory=tuple)  # artefacts


@dataclass(frozen=True)
class Forget(Operation[Forgotten]):
    """For good: rows and keys of these examples, and versions and answers that know them.

    The current version stays, unless `retrain` trains anew from the seed without them first. That needs the
    cloud; until it is done nothing is forgotten, and the same request resumes it.
    """

    names: Sequence[str]  # whole
    retrain: bool = False

    def run(self, profile: Profile, emit: Emit) -> Forgotten:
        from perfit_device import history

        with profile.vault() as vault:
            items = [item for item in history.load(vault) if item.name in set(self.names)]
            knowing = _knowing(vault, items)
        if not items:
            raise NotFound("none of these examples is there; `perfit history list` shows the names")
        again = sorted({each.artefact for each in knowing if each.is_current}) if self.retrain else []
        for artefact in again:
            self._check(profile, artefact)
        try:
            for artefact in again:
                retrain(profile, artefact, emit, without=self.names)
        except BaseException:
            profile.notify("nothing is forgotten yet: first your shift has to be trained without it")
            raise
        with profile.vault() as vault:
            count = history.forget(vault, items)
        return Forgotten(
            count,
            dropped=[each for each in knowing if not each.is_current or each.artefact in again],
            left=[each for each in knowing if each.is_current and each.artefact not in again],
            retrained=again,
        )

    def _check(self, profile: Profile, name: str) -> None:
        """Raises InvalidData where too few examples would be left, Busy, and as `Profile.artefact` does."""
        from perfit_device import history
        from perfit_device.training.update import update_row

        artefact, (_, info) = profile.artefact(name), profile.connect()
        with profile.updating(update_row(info.cloud_id, artefact.name, artefact.task.name)):
            pass  # no update runs that would keep this one from training anew
        with profile.vault() as vault:
            left = [i for i in history.load(vault, artefact.task.name) if i.name not in set(self.names)]
        try:
            history.split(profile.usable(left, artefact.task))
        except InvalidData as error:
            raise InvalidData(
                f"without them {name} cannot be trained anew, so nothing was forgotten: {error}; or leave "
                "--retrain out, and `perfit versions drop --all` drops the shift"
            ) from error


def retrain(profile: Profile, artefact: str, emit: Emit, *, without: Sequence[str] = ()) -> bool:
    """Train anew from the seed, whatever the gate finds; whether the gate finds it better than the seed."""
    from perfit_device.operations.update import Update

    again = Update(task=artefact, fresh=True, anyway=True, again=True, without=tuple(without))
    done = again.run(profile, emit)
    return done.trained is not None and done.trained.gate.beats_start
