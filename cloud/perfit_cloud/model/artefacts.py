"""An artefact: a folder with one task's collective shift, its seed, its spec and a card.

collective.safetensors   φ₁ (collective rank), fp32
seed.safetensors         φ₂ learned with it (personal rank), fp32, public
artefact.json            name, spec, task, fingerprint of the base model, device defaults, card
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfit_shared.errors import InvalidData, PerfitError
from perfit_shared.files import write_whole
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import Task

__all__ = ["Artefact"]

_FORMAT = 1


@dataclass(frozen=True)
class Artefact:
    name: str
    spec: ShiftSpec
    task: Task
    fingerprint: str  # of the base model it was trained on
    collective: ShiftTensors
    seed: ShiftTensors
    learning_rate: float  # peak rate for personal updates
    epochs: int  # default passes over a history
    batch_size: int  # default examples a step
    card: dict[str, Any] = field(default_factory=dict)  # data, hyper-parameters, losses, versions

    def __post_init__(self) -> None:
        if self.task.chat == "auto":
            raise InvalidData("its task's chat should be true or false, as its model reads it")

    @property
    def version(self) -> str:
        """16 hex digits that change with tensors, spec or base model."""
        text = json.dumps(
            [self.name, self.spec.to_json(), self.fingerprint, self.collective.digest(), self.seed.digest()]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the three files; artefact.json last, so a half-written folder is none."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "collective.safetensors", self.collective.to_bytes())
        write_whole(folder / "seed.safetensors", self.seed.to_bytes())
        data = {
            "format": _FORMAT,
            "name": self.name,
            "version": self.version,
            "spec": self.spec.to_json(),
            "task": json.loads(self.task.to_json()),
            "fingerprint": self.fingerprint,
            "learning_rate": self.learning_rate,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "card": self.card,
        }
        write_whole(folder / "artefact.json", json.dumps(data, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: Path) -> Artefact:
        """Raises InvalidData naming the folder when a file is missing, malformed or altered."""
        try:
            data = json.loads((folder / "artefact.json").read_text("utf-8"))
            if data["format"] != _FORMAT:
                raise InvalidData(f"format {data['format']} is not known to this version")
            spec = ShiftSpec.from_json(data["spec"])
            artefact = cls(
                name=data["name"],
                spec=spec,
                task=Task.from_json(json.dumps(data["task"])),
                fingerprint=data["fingerprint"],
                collective=ShiftTensors.from_bytes(
                    (folder / "collective.safetensors").read_bytes(), spec, spec.collective_rank
                ),
                seed=ShiftTensors.from_bytes(
                    (folder / "seed.safetensors").read_bytes(), spec, spec.personal_rank
                ),
                learning_rate=float(data["learning_rate"]),
                epochs=int(data["epochs"]),
                batch_size=int(data["batch_size"]),
                card=data["card"],
            )
            if artefact.version != data["version"]:
                raise InvalidData("its tensors are not the ones it was saved with")
            if not (math.isfinite(artefact.learning_rate) and artefact.learning_rate > 0):
                raise InvalidData("its learning_rate should be above 0")
            if not (0 < artefact.epochs < 2**32 and 0 < artefact.batch_size < 2**32):
                raise InvalidData("its epochs and batch_size should be 1 or more")
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            OverflowError,
            RecursionError,
            PerfitError,
        ) as error:
            raise InvalidData(f"{folder} is not a usable artefact: {error}") from error
        return artefact
