"""Leaving a cloud: it withdraws the identity. Who asks for it wipes the profile behind that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import NotFound, PerfitError

if TYPE_CHECKING:
    from perfit_device.profile import Profile

__all__ = ["Unenroll", "Unenrolled"]

_HISTORY = ("example", "import", "counter")  # kinds of rows that --keep-history keeps


@dataclass(frozen=True)
class Unenrolled:
    profile: str
    is_withdrawn: bool  # the cloud refuses the certificate from now on
    examples: int  # that were kept


@dataclass(frozen=True)
class Unenroll(Operation[Unenrolled]):
    """Raises where the cloud cannot be told, unless `offline`: then nothing should be wiped.

    `keep_history` leaves the examples in the vault, and nothing else.
    """

    offline: bool = False
    keep_history: bool = False

    def run(self, profile: Profile, emit: Emit) -> Unenrolled:
        from perfit_device.cloud_record import read_enrolment

        with profile.vault() as vault:
            enrolment, examples = read_enrolment(vault), vault.count("example")
        if enrolment is None and not self.offline:
            raise NotFound(
                f'the profile "{profile.settings.profile}" is not enrolled; `perfit profiles remove` wipes it'
            )
        if enrolment is not None and not self.offline:
            self._leave(profile)
        if not self.keep_history:
            return Unenrolled(profile.settings.profile, not self.offline, 0)
        profile.disconnect()
        with profile.vault() as vault, vault.transaction():
            for kind in vault.kinds() - set(_HISTORY):
                for name in vault.names(kind):
                    vault.delete(kind, name)
        return Unenrolled(profile.settings.profile, not self.offline, examples)

    def _leave(self, profile: Profile) -> None:
        from perfit_device.cloud import enrolment as enrolments
        from perfit_device.cloud_record import read_enrolment

        def leave() -> None:
            with profile.vault() as vault:
                enrolment = read_enrolment(vault)
            if enrolment is not None:
                enrolments.leave(enrolment, profile.settings.sealing())

        try:
            profile.while_opening().call(leave)
        except PerfitError as error:
            raise type(error)(
                f"{error}; nothing was wiped, and --offline wipes without telling the cloud"
            ) from error
