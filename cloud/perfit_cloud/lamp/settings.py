"""What decides a run's figures whatever its method, and whether OUT holds a run of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import TaskData
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import completed
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.prompts import prompts_of
from perfit_shared.tasks import Task

__all__ = ["check_out", "settings_of_all"]


def settings_of_all(request: LampRequest, data: TaskData) -> dict[str, Any]:
    """What decides the figures of every method, plain JSON values."""
    task, base, people = data.task, data.base, data.people
    return {
        "task": task.name,
        "model": base.name,
        "fingerprint": base.fingerprint,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "data": people.digest,
        "method": METHODS[request.method].name,
        "seed": request.seed,
        "users": len(people.people),
        "examples": request.examples,
        "queries": request.queries,
        "users_together": request.users_together,
        "histories": request.histories,
        "prompts": prompts_of(task),
        "chat": task.chat,
        "decoding": asdict(request.decoding),
        "answer_tokens": task.answer_tokens,
        "stop": list(task.stop),
        "frequency_penalty": task.frequency_penalty,
        "presence_penalty": task.presence_penalty,
    }


def check_out(out: Path, task: Task, settings: Mapping[str, Any]) -> bool:
    """Whether OUT holds a run, finished or not. Raises InvalidInput when one of these differs there."""
    path = out / "settings.json"
    if not path.is_file():
        return False
    try:
        theirs = completed(json.loads(path.read_text("utf-8")), task)
    except (ValueError, TypeError, AttributeError) as error:
        raise InvalidData(f"{path} is damaged; use another --out") from error
    ours = json.loads(json.dumps(settings))
    if changed := sorted(name for name, value in ours.items() if theirs.get(name) != value):
        names = ", ".join(name.replace("_", " ") for name in changed)
        raise InvalidInput(f"{out} holds a run with other {names}; use another --out")
    return True
