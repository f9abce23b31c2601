"""Shifts of artefacts that the cloud has replaced, trained anew against the new ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device.operations.forgetting import retrain
from perfit_device.operations.operation import Emit, Operation

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["Migrate", "Migrated"]


@dataclass(frozen=True)
class Migrated:
    """Losses at the gates, in nats a token. They compare where model and reading are the same."""

    artefact: str
    before: int  # numbers of versions; both are kept
    after: int
    loss_before: float | None  # as its own gate recorded it: the old artefact is served no more
    loss_seed: float | None  # of the new seed, on what judged the new version
    loss_after: float | None
    is_better: bool  # than the new seed
    same_model: bool | None  # None where the old update did not record it
    same_reading: bool  # behind as many own examples
    keeps_old: bool  # False where it knew what was forgotten


@dataclass(frozen=True)
class Migrate(Operation[list[Migrated]]):
    """Every shift whose artefact changed, or that of one; none where nothing changed."""

    task: str | None = None

    def run(self, profile: Profile, emit: Emit) -> list[Migrated]:
        from perfit_device import personal
        from perfit_device.training.update import read_finished, update_row

        _, info = profile.connect()
        artefacts = [profile.artefact(self.task)] if self.task else info.artefacts
        done = []
        for artefact in artefacts:
            with profile.vault() as vault:
                old = personal.read_versions(vault, info.cloud_id, artefact.name)
                last = read_finished(vault, update_row(info.cloud_id, artefact.name, artefact.task.name))
            if old is None or old.now.artefact_version == artefact.version:
                continue
            profile.notify(f"{artefact.name}: the cloud's artefact changed; training anew from its seed")
            is_better = retrain(profile, artefact.name, emit)
            with profile.vault() as vault:
                new = personal.read_versions(vault, info.cloud_id, artefact.name)
            if new is None:
                continue
            done.append(
                Migrated(
                    artefact.name,
                    old.current,
                    new.current,
                    old.now.learned.gate_after,
                    new.now.learned.gate_before,
                    new.now.learned.gate_after,
                    is_better,
                    None if last is None else last.fingerprint == info.fingerprint,
                    new.now.behind == old.now.behind,
                    new.find(old.current) is not None,
                )
            )
        if served := {artefact.name for artefact in info.artefacts}:
            with profile.vault() as vault:
                gone = set(personal.artefacts(vault, info.cloud_id)) - served
            for name in sorted(gone if self.task is None else ()):
                profile.notify(f"the cloud serves no {name} any more; your shift for it stays as it is")
        return done
