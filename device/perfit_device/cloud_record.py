"""What a vault records of its cloud: the enrolment, and the last description of what it serves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from perfit_shared.tasks import Task

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact, CloudInfo
    from perfit_device.cloud.identity import Enrolment
    from perfit_device.vault.store import Vault

__all__ = [
    "CloudRecord",
    "read_artefacts",
    "read_enrolment",
    "read_record",
    "write_enrolment",
    "write_record",
]

_INFO_ROW = ("cloud", "describe")
_ARTEFACTS_ROW = ("cloud", "artefacts")  # name → version, spec, task: what a shift from a file must fit
_ENROLMENT_ROW = ("identity", "current")


@dataclass(frozen=True)
class CloudRecord:
    """The cloud's last description of what it serves, for offline use; empty before the first."""

    cloud_id: str = ""
    tasks: Mapping[str, str] = field(default_factory=dict)  # artefact name → task JSON
    versions: Mapping[str, str] = field(default_factory=dict)  # artefact name → its version
    prompt_tokens: int = 0  # longest prompt; 0: not known
    new_tokens: int = 0  # longest answer

    def task_of(self, name: str) -> str:
        """The task of an artefact, else the name itself."""
        return str(json.loads(self.tasks[name])["name"]) if name in self.tasks else name

    @property
    def by_task(self) -> dict[str, Task]:
        """The tasks of the artefacts, by their own names."""
        return {task.name: task for task in map(Task.from_json, self.tasks.values())}


def write_record(vault: Vault, info: CloudInfo) -> None:
    """Record what the cloud serves."""
    values = {
        "cloud_id": info.cloud_id,
        "base_model": info.base_model,
        "tasks": {artefact.name: artefact.task.to_json() for artefact in info.artefacts},
        "versions": {artefact.name: artefact.version for artefact in info.artefacts},
        "prompt_tokens": info.limits.prompt_tokens,
        "new_tokens": info.limits.new_tokens,
    }
    artefacts = {
        artefact.name: [artefact.version, artefact.spec.to_json(), artefact.task.to_json()]
        for artefact in info.artefacts
    }
    for row, of in ((_INFO_ROW, values), (_ARTEFACTS_ROW, artefacts)):
        data = json.dumps(of).encode()
        if vault.get(*row) != data:
            vault.put(*row, data)


def read_record(vault: Vault) -> CloudRecord:
    data = vault.get(*_INFO_ROW)
    if data is None:
        return CloudRecord()
    values = json.loads(data)
    del values["base_model"]
    return CloudRecord(**values)


def read_artefacts(vault: Vault) -> dict[str, Artefact]:
    """What the cloud last served, by name, without how it trains; empty before the first description."""
    from perfit_device.cloud.codec import Artefact
    from perfit_shared.shifts import ShiftSpec

    values = json.loads(vault.get(*_ARTEFACTS_ROW) or b"{}")
    return {
        name: Artefact(name, version, ShiftSpec.from_json(spec), Task.from_json(task), 0.0, 0, 0)
        for name, (version, spec, task) in values.items()
    }


def read_enrolment(vault: Vault) -> Enrolment | None:
    from perfit_device.cloud.identity import Enrolment

    data = vault.get(*_ENROLMENT_ROW)
    return None if data is None else Enrolment.from_bytes(data)


def write_enrolment(vault: Vault, enrolment: Enrolment) -> None:
    vault.put(*_ENROLMENT_ROW, enrolment.to_bytes())
