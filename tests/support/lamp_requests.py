"""What LaMP runs of tests are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from perfit_cloud.lamp.methods.interface import TaskData
from perfit_cloud.lamp.people import read_people
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.model.base import BaseModel
from perfit_shared.tasks import load_task
from tests.support.lamp_files import TASK

__all__ = ["small_request", "task_data"]


def task_data(folder: Path, base: BaseModel) -> TaskData:
    """Of the task and the people in a folder of `write_files`."""
    task = load_task(folder, TASK).resolved(False)
    return TaskData(task, base, read_people(folder, task, base))


def small_request(model: Path, **changes: Any) -> LampRequest:
    """A run of both stages that takes seconds on a tiny model, and learns.

    `changes` have `data` and `out`.
    """
    values: dict[str, Any] = {
        "task": TASK,
        "model": str(model),
        "layers": (1, 2),
        "positions": "f2+l3",
        "collective_rank": 4,
        "personal_rank": 2,
        "batch_size": 4,
        "collective_epochs": 1,
        "collective_learning_rate": 5e-3,
        "epochs": 4,
        "learning_rate": 2e-2,
        "users_together": 2,
    }
    return LampRequest(**(values | changes))
