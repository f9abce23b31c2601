"""A small stage 1: its users, and when to stop it."""

from __future__ import annotations

import json
import random
from pathlib import Path

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


class StopAfter:
    """Says stop when asked for the n-th time, which is after the n-th step."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == 0
