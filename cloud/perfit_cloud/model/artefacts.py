"""An artefact: a folder with one task's collective shift, its seed, its spec and a card.

collective.safetensors   φ₁ (collective rank), fp32
seed.safetensors         φ₂ learned with it (personal rank), fp32, public
community-N.safetensors  seeds of communities 1, 2, …, refined from the seed, where there are any
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
from perfit_shared.starts import MOST_STARTS
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
    communities: tuple[ShiftTensors, ...] = ()  # other seeds that a person may start from

    def __post_init__(self) -> None:
        if len(self.starts) > MOST_STARTS:
            raise InvalidData(f"it has more than {MOST_STARTS - 1} communities")
        if self.task.chat == "auto":
            raise InvalidData("its task's chat should be true or false, as its model reads it")

    @property
    def starts(self) -> tuple[ShiftTensors, ...]:
        """Where a person may start: the seed, then those of communities."""
        return (self.seed, *self.communities)

    @property
    def version(self) -> str:
        """16 hex digits that change with φ₁, seed, spec or base model.

        Communities change none of these, so shifts stay valid where an operator adds some.
        """
        text = json.dumps(
            [self.name, self.spec.to_json(), self.fingerprint, self.collective.digest(), self.seed.digest()]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the files; artefact.json last, so a half-written folder is none."""
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "collective.safetensors", self.collective.to_bytes())
        write_whole(folder / "seed.safetensors", self.seed.to_bytes())
        for number, seed in enumerate(self.communities, start=1):
            write_whole(_community_file(folder, number), seed.to_bytes())
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
        if self.communities:
            data["communities"] = [seed.digest() for seed in self.communities]
        write_whole(folder / "artefact.json", json.dumps(data, indent=1, ensure_ascii=False).encode())
        for number in range(len(self.communities) + 1, MOST_STARTS):  # of an artefact that was replaced
            _community_file(folder, number).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: Path) -> Artefact:
        """Raises InvalidData naming the folder when a file is missing, malformed or altered."""
        try:
            data = json.loads((folder / "artefact.json").read_text("utf-8"))
            if data["format"] != _FORMAT:
                raise InvalidData(f"format {data['format']} is not known to this version")
            spec = ShiftSpec.from_json(data["spec"])
            digests = data.get("communities", [])
            if len(digests) >= MOST_STARTS:  # before any is read
                raise InvalidData(f"it has more than {MOST_STARTS - 1} communities")
            files = [_community_file(folder, number) for number, _ in enumerate(digests, start=1)]
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
                communities=tuple(
                    ShiftTensors.from_bytes(file.read_bytes(), spec, spec.personal_rank) for file in files
                ),
            )
            if [seed.digest() for seed in artefact.communities] != digests:
                raise InvalidData("its communities are not the ones it was saved with")
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


def _community_file(folder: Path, number: int) -> Path:
    return folder / f"community-{number}.safetensors"
