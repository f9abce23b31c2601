"""Enrolling a profile: an invite for a certificate."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import InvalidInvite, PerfitError

if TYPE_CHECKING:
    from perfit_device.cloud.identity import Enrolment
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault
    from perfit_shared.invites import Invite

__all__ = ["Enroll", "Enrolled"]

_PENDING = ("identity", "pending")


@dataclass(frozen=True)
class Enrolled:
    profile: str
    address: str
    cloud_id: str
    tasks: Sequence[str]  # the cloud's artefacts; empty where it could not be asked yet


@dataclass(frozen=True)
class Enroll(Operation[Enrolled]):
    """Raises InvalidInvite when the profile is enrolled already and `replace` is not set."""

    invite: str
    replace: bool = False

    def run(self, profile: Profile, emit: Emit) -> Enrolled:
        from perfit_device.cloud.client import Cloud
        from perfit_device.cloud_record import write_enrolment, write_record
        from perfit_shared.invites import Invite

        invite = Invite.decode(self.invite)
        with profile.vault() as vault:
            enrolment = _enrolment(profile, vault, invite, replace=self.replace)
            profile.disconnect()  # from the cloud of before
            tasks: list[str] = []
            try:
                sealing = profile.settings.sealing()
                with Cloud(
                    enrolment, on_renewed=lambda new: write_enrolment(vault, new), sealing=sealing
                ) as cloud:
                    info = cloud.describe()
                write_record(vault, info)
                tasks = [artefact.name for artefact in info.artefacts]
            except PerfitError as error:
                profile.notify(f"enrolled, but the cloud cannot be asked yet: {error}")
        return Enrolled(profile.settings.profile, enrolment.address, enrolment.cloud_id, tasks)


def _enrolment(profile: Profile, vault: Vault, invite: Invite, *, replace: bool) -> Enrolment:
    """Seal the key before the call, and keep it until the answer: when the answer gets lost, the same
    invite with the same key gets it again. The digest of an answered invite stays, so repeating the
    command is harmless: the cloud refuses an invite once its certificate was used."""
    from perfit_device.cloud import enrolment as enrolments
    from perfit_device.cloud.identity import Identity
    from perfit_device.cloud_record import read_enrolment, write_enrolment

    used = hashlib.sha256(invite.secret).digest()
    pending = vault.get(*_PENDING)
    current = read_enrolment(vault)
    same = pending is not None and hmac.compare_digest(pending[:32], used)
    if current is not None and not replace and not same:
        raise InvalidInvite(
            f'the profile "{profile.settings.profile}" is enrolled with {current.address} already; '
            "use --profile NAME for another cloud, or --replace to enrol this one anew"
        )
    if current is not None and pending == used and not replace:
        return current
    key = pending[32:] if pending is not None and same else b""
    identity = Identity.from_der(key) if key else Identity.create()
    if not key:
        vault.put(*_PENDING, used + identity.to_der())
    enrolment = profile.while_opening().call(lambda: enrolments.enroll(invite, identity))
    with vault.transaction():
        write_enrolment(vault, enrolment)
        vault.put(*_PENDING, used)
    return enrolment
