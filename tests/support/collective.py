"""A small stage 1: its users, and when to stop it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from perfit_cloud.collective.run import CollectiveRequest

WORDS = ("cat", "dog", "mat", "door")


def write_toy(folder: Path, users: int = 12, items: int = 16) -> Path:
    """OPPU users whose headline is always the same few words: a shift can learn that."""
    rng = random.Random(0)
    data = []
    for user in range(users):
        texts = [" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(items)]
        dates = [f"2020-01-{i + 1:02d}" for i in range(items)]
        profile = [
            {"id": f"{user}-{i}", "date": dates[i], "text": text, "title": "the cat sat"}
            for i, text in enumerate(texts)
        ]
        data.append({"user_id": user, "profile": profile, "query": []})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "user_others.json").write_text(json.dumps(data))
    (folder / "task.json").write_text(json.dumps({"template": "{text} so", "answer": " {title}"}))
    return folder


def small_request(data: Path, model: str, out: Path, **changes: Any) -> CollectiveRequest:
    """A stage 1 of a second or so, with rates that are not tried."""
    given = {
        "task": "news_headline",
        "layers": (1, 2),
        "positions": "f2+l2",
        "collective_rank": 4,
        "personal_rank": 4,
        "epochs": 2,
        "device_epochs": 1,
        "learning_rate": 1e-2,
        "device_learning_rate": 1e-2,
    }
    return CollectiveRequest(data=data, model=model, out=out, **{**given, **changes})


class StopAfter:
    """Says stop when asked for the n-th time, which is after the n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0
