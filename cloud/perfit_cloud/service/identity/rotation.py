"""How both authorities are replaced while everybody stays enrolled.

    begin     the next authorities are made. Servers trust certificates of both, and whoever enrols or renews
              gets both roots, over a connection that the old one vouches for.
    switch    the next ones sign from now on, and the old keys are deleted.
    finish    the old certificates are trusted no more.

Whoever has not renewed since the last step does not know it yet. A step waits for all of them, as long as
they may still renew; servers stand on the same list, and renew every hour.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perfit_cloud.service.identity.authorities import AuthorityFiles
from perfit_cloud.service.identity.store import Device, IdentityStore
from perfit_shared.errors import ConfigError, InvalidInput
from perfit_shared.files import write_whole

__all__ = ["ROTATION", "Rotation", "RotationState"]

ROTATION = "rotation.json"
_NEXT_STEP = {"finished": "begin", "begun": "switch", "switched": "finish"}


@dataclass(frozen=True)
class RotationState:
    step: str  # begun, switched, or finished, as before the first
    at: int  # unix seconds, of that step; 0: there was none
    waits_for: tuple[Device, ...]  # who has not heard of it, and may still renew

    @property
    def next(self) -> str:
        return _NEXT_STEP[self.step]


class Rotation:
    """Of one state folder; a server that uses it sees every step at once."""

    def __init__(
        self, state: Path, authorities: Sequence[AuthorityFiles], store: IdentityStore, *, lapse_seconds: int
    ) -> None:
        """`lapse_seconds`: for which a device may still renew a certificate that lapsed."""
        self._path, self._authorities = state / ROTATION, authorities
        self._store, self._lapse = store, lapse_seconds

    def state(self) -> RotationState:
        """Raises ConfigError when its file is damaged; Busy, StoreFailed."""
        try:
            said = json.loads(self._path.read_text("utf-8"))
            step, at = str(said["step"]), int(said["at"])
            _NEXT_STEP[step]
        except FileNotFoundError:
            return RotationState("finished", 0, ())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self._path} is damaged; restore it from a backup") from error
        if step == "finished":
            return RotationState(step, at, ())
        earliest = time.time() - self._lapse
        waits_for = tuple(
            device
            for device in self._store.devices()
            if device.issued <= at and device.revoked is None and device.expires > earliest
        )
        return RotationState(step, at, waits_for)

    def take(self, step: str, *, now: bool = False) -> RotationState:
        """Take a step, and return what holds then.

        `now`: although some have not heard of the last one; they enrol anew. Raises InvalidInput when it is
        not the next one, or somebody has not heard.
        """
        state = self.state()
        if step != state.next:
            raise InvalidInput(f"the authorities are {state.step}; the next step is {state.next}")
        if state.waits_for and not now:
            last = max(device.expires for device in state.waits_for) + self._lapse
            raise InvalidInput(
                f"{len(state.waits_for)} devices or servers have not renewed since the last step, and would "
                f"have to enrol anew; all have by {time.strftime('%Y-%m-%d', time.gmtime(last + 86400))}"
            )
        for authority in self._authorities:
            {"begin": authority.begin, "switch": authority.switch, "finish": authority.finish}[step]()
        done = {"begin": "begun", "switch": "switched", "finish": "finished"}[step]
        said = json.dumps({"step": done, "at": int(time.time())})
        write_whole(self._path, said.encode(), mode=0o600)
        return self.state()
