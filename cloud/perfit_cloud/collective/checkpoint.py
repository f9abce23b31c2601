"""The state of an unfinished stage-1 run, in `training.pt` of its output folder.

`save` writes a temporary file and then replaces the old one, so a kill at any moment leaves one of them
whole.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.files import written_whole

__all__ = ["FILE", "Record", "Snapshot", "load", "save"]

FILE = "training.pt"


@dataclass
class Record:
    """What a run has measured so far; plain values that go into the card."""

    trials: list[dict[str, float]] = field(default_factory=list)  # learning_rate, validation_loss, steps
    learning_rate: float = 0.0  # of stage 1; 0: not chosen yet
    step: int = 0  # steps done
    train: list[float] = field(default_factory=list)  # loss of every step, nats a token
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps done, loss)
    stopped: bool = False  # before its last step, since validation no longer fell
    tokens: int = 0  # prompt and target tokens of all steps
    step_seconds: float = 0.0  # spent in steps
    device_trials: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0  # all of it

    @property
    def best_step(self) -> int:
        """Steps done when the validation loss was lowest; of equal ones the earliest."""
        return min(self.validation, key=lambda point: point[1])[0] if self.validation else 0


@dataclass(frozen=True)
class Snapshot:
    """A record with the tensors and moments that belong to its step, and the best step's tensors."""

    record: Record
    tensors: list[Tensor]
    optimizer: dict[str, Any]
    best: list[Tensor]


def save(folder: Path, arguments: Mapping[str, Any], snapshot: Snapshot) -> None:
    """Write training.pt; `arguments` are what a later run must share."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "arguments": json.dumps(arguments, sort_keys=True),
        "record": json.dumps(asdict(snapshot.record)),
        "tensors": [t.detach() for t in snapshot.tensors],
        "optimizer": snapshot.optimizer,
        "best": snapshot.best,
    }
    with written_whole(folder / FILE) as file:
        torch.save(data, file)


def load(folder: Path, arguments: Mapping[str, Any]) -> Snapshot | None:
    """The snapshot to go on from, its tensors on the CPU; None when there is none.

    Raises InvalidInput when it was made with other arguments, InvalidData when it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    advice = f"remove {FILE} to start anew, or use another --out"
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        theirs = json.loads(data["arguments"])
        record = Record(**json.loads(data["record"]))
        snapshot = Snapshot(record, data["tensors"], data["optimizer"], data["best"])
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise InvalidData(f"{path} is damaged; {advice}") from error
    ours = json.loads(json.dumps(arguments))
    changed = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
    if changed:
        raise InvalidInput(
            f"{folder} holds an unfinished run with other {', '.join(changed)}; "
            f"repeat its own command to finish it, {advice}"
        )
    record.validation = [(int(step), float(loss)) for step, loss in record.validation]
    return snapshot
