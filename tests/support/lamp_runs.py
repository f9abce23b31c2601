"""Invented finished runs, written through the real save methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfit_cloud.lamp.results import QueryResult, Run, UserFolder, UserResult
from perfit_shared.tasks import Task

LABELS = Task("news_categorize", "{text} is", " {category}", "accuracy", labels=("a", "b", "c"))
RATINGS = Task("product_rating", "{text} gets", " {score}", "mae", labels=("1", "2", "3", "4", "5"))
TEXTS = Task("news_headline", "{text} so", " {title}", "rouge_1")
SETTINGS: Mapping[str, Any] = {
    "model": "tiny",
    "fingerprint": "f0",
    "blocks": 8,
    "hidden_size": 16,
    "layers": [2, 3],
    "positions": "f7+l7",
    "collective_rank": 8,
    "personal_rank": 4,
    "epochs": 2,
    "learning_rate": 1e-3,
    "schedule": "device",
    "asked_epochs": None,
    "rate_growth": 10.0,
    "queries": None,
    "communities": 0,
    "asked_batch_size": None,
    "batch_size": 4,
    "seed": 0,
    "users": 3,
    "collective_users": None,
    "collective_group": None,
    "ablation": "full",
    "artefact": "v0",
    "decoding": {"temperature": 0.1, "seed": 0},
    "histories": "own",
}


def query(
    number: int, gold: str, answers: Mapping[str, str], loss: Mapping[str, float], tokens: int = 2
) -> QueryResult:
    return QueryResult(str(number), gold, tokens, loss, answers)


def user(name: str, queries: Sequence[QueryResult]) -> UserResult:
    return UserResult(name, examples=10, steps=5, queries=tuple(queries))


def save_run(folder: Path, task: Task, users: Sequence[UserResult], /, **settings: Any) -> Run:
    """Written, and read again as a command would."""
    full = {**SETTINGS, "task": task.name, "artefact_task": task.name, **settings}
    seconds = {"stage1": 100.0, "stage2": 30.0, "evaluation": 6.0}
    for one in users:
        UserFolder(folder, one.user_id).save(one)
    Run(folder, task, full, seconds, tuple(users)).save()
    return Run.load(folder)


def simple_users(
    losses: Mapping[str, float], *, users: int = 3, wrong: Sequence[str] = ("base",), step: float = 0.1
) -> list[UserResult]:
    """Two queries a user, golds a and b; modes in `wrong` answer c. User u's losses are `step` * u higher."""
    made = []
    for index in range(users):
        by_mode = {mode: value + step * index for mode, value in losses.items()}
        made.append(
            user(
                f"u{index}",
                [
                    query(at, gold, {mode: "c" if mode in wrong else gold for mode in losses}, by_mode)
                    for at, gold in enumerate("ab")
                ],
            )
        )
    return made
