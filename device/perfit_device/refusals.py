"""Examples that a cloud refused: later updates leave them out, or read them without others before them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from perfit_device.cloud.codec import Artefact, CloudInfo
from perfit_device.training import update as updates
from perfit_device.vault.store import Vault

__all__ = ["Refusals", "names_refused"]

_KIND = "refused"


@dataclass(frozen=True)
class Refusals:
    """The names of the examples. They hold for a model, an artefact and limits: others may take them."""

    row: str
    of: str
    names: frozenset[str] = frozenset()
    behind: Mapping[str, int] = field(default_factory=dict)  # that it refused behind so many others

    @classmethod
    def read(cls, vault: Vault, info: CloudInfo, artefact: Artefact) -> Refusals:
        row = updates.update_row(info.cloud_id, artefact.name, artefact.task.name)
        limits = info.limits
        of = f"{info.fingerprint} {artefact.version} {limits.prompt_tokens} {limits.new_tokens}"
        values = json.loads(vault.get(_KIND, row) or b"{}")
        if values.get("of") != of:
            return cls(row, of)
        return cls(row, of, frozenset(values["names"]), values.get("behind", {}))

    def with_names(
        self, vault: Vault, names: Iterable[str], *, behind: Mapping[str, int] | None = None
    ) -> Refusals:
        """These and more, written to the vault."""
        more = Refusals(self.row, self.of, self.names | set(names), {**self.behind, **(behind or {})})
        values = {"of": self.of, "names": sorted(more.names), "behind": more.behind}
        data = json.dumps(values).encode()
        vault.put(_KIND, self.row, data)
        return more


def names_refused(vault: Vault, row: str) -> frozenset[str]:
    """Those that the cloud refused last, whatever it serves now: offline nobody can say more."""
    return frozenset(json.loads(vault.get(_KIND, row) or b"{}").get("names", ()))
