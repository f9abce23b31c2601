"""pyreft in its own environment and process, kept alive for a benchmark; scripts/peers/pyreft_worker.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from workload import Asked, locations

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.pyreft import write_checkpoint
from perfit_shared.shifts import ShiftTensors

__all__ = ["PyreftProcess", "PyreftServing", "pyreft_for"]

_ROOT = Path(__file__).resolve().parents[3]
_PYTHON = _ROOT / ".peers" / "pyreft" / "bin" / "python"
_WORKER = _ROOT / "scripts" / "peers" / "pyreft_worker.py"


def pyreft_for(base: BaseModel) -> PyreftProcess | None:
    """None, and a word on stderr, where its environment was not built or the model is on no CPU."""
    if base.device.type == "cpu" and _PYTHON.is_file():
        return PyreftProcess(base)
    print("going on without pyreft: `make peers` builds its environment, for a CPU", file=sys.stderr)
    return None


class PyreftProcess:
    """One model in pyreft. A context manager; the process ends with it."""

    def __init__(self, base: BaseModel) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._checkpoints = 0
        model = Path(self._folder.name) / "model"
        base.model.save_pretrained(model)
        end, theirs = os.pipe()
        self._answers = os.fdopen(end)
        self._process = subprocess.Popen(
            [
                str(_PYTHON),
                "-W",
                "ignore",
                str(_WORKER),
                "--model",
                str(model),
                "--threads",
                str(torch.get_num_threads()),
                "--answers",
                str(theirs),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs],
            text=True,
        )
        os.close(theirs)
        self._answer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()
        self._folder.cleanup()

    def checkpoint(self, shifts: Sequence[ShiftTensors]) -> str:
        """A folder of these shifts, the first applied first, as pyreft reads it."""
        self._checkpoints += 1
        folder = Path(self._folder.name) / f"checkpoint{self._checkpoints}"
        folder.mkdir()
        write_checkpoint(folder, tuple(shifts))
        return str(folder)

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Run one command of the worker. Raises RuntimeError when it died of it."""
        print(json.dumps({"do": do, **more}), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            raise RuntimeError("pyreft's process ended; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class PyreftServing:
    """Requests, each another user's, by pyreft. Called, it gives new tokens a second."""

    def __init__(self, process: PyreftProcess, artefact: Artefact, asked: Sequence[Asked]) -> None:
        self.answers: list[list[int]] = []  # token ids, of the last call
        self._process = process
        users = [[artefact.collective, use.personal] for _, use, _ in asked if use.personal is not None]
        process.ask("load", checkpoints=[process.checkpoint(shifts) for shifts in users])
        prompts = [prompt for prompt, _, _ in asked]
        self._requests = list(zip(range(len(users)), prompts, locations(artefact, prompts), strict=True))
        self._new_tokens = asked[0][2].max_new_tokens

    def __call__(self) -> float:
        done = self._process.ask("answer", requests=self._requests, new_tokens=self._new_tokens)
        self.answers = done["answers"]
        return sum(map(len, self.answers)) / float(done["seconds"])
