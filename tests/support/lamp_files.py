"""Invented LaMP files for tests: 12 users for stage 1 and five to test on, each fond of one word."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

TASK = "news_headline"
# Of a collective LoRA that learns something in seconds.
LORA_STAGE_1 = {"collective_epochs": 2, "collective_learning_rate": 1e-2, "collective_users": 4}
WORDS = ["cat", "dog", "mat", "door", "sat", "ran", "the", "on"]


def item(rng: np.random.Generator, number: int, word: str) -> dict[str, str]:
    return {
        "id": f"{number:05}",
        "date": f"2024-01-{number % 28 + 1:02}",
        "text": " ".join(rng.choice(WORDS, 6)),
        "title": f"{word} {word} 1 {rng.choice(WORDS[:3])}",
    }


def query(entry: dict[str, str], *, gold: bool) -> dict[str, str]:
    asked = {"id": entry["id"], "input": f"Generate a headline for the following article: {entry['text']}"}
    return asked | ({"gold": entry["title"]} if gold else {})


def write_files(folder: Path) -> Path:
    """OPPU's three files and a task.json; histories of unlike length."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    others, users, golds, number = [], [], [], 0
    for user in range(17):
        word, size = WORDS[user % len(WORDS)], 4 if user < 12 else (24, 9, 16, 5, 13)[user - 12]
        entries = [item(rng, number + k, word) for k in range(size + 3)]
        number += len(entries)
        past, asked = entries[:size], entries[size:]
        if user < 12:
            others.append({"user_id": user, "profile": past, "query": [query(e, gold=True) for e in past]})
        else:
            golds += [{"id": e["id"], "output": e["title"]} for e in asked]
            users.append({"user_id": user, "profile": past, "query": [query(e, gold=False) for e in asked]})
    (folder / "user_others.json").write_text(json.dumps(others))
    (folder / "user_top_100_history.json").write_text(json.dumps(users))
    (folder / "user_top_100_history_label.json").write_text(json.dumps({"task": "LaMP_4", "golds": golds}))
    (folder / "task.json").write_text(json.dumps({"template": "{text} so", "answer_tokens": 6}))
    return folder
