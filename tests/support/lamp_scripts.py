"""What LaMP's and OPPU's own scripts accept and give, written from a description of their rules.

Both read a label file {"task", "golds": [{"id", "output"}]} and predictions of the same form (OPPU's
with "model" beside), and both are strict: the two files' tasks must be the same word, and their ids
the same set, so that 7 is not "7". What is measured follows the task's name.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rouge_score.rouge_scorer import RougeScorer

TAGS = {
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
}
CATEGORIES = {
    "food & drink",
    "sports",
    "education",
    "parents",
    "religion",
    "travel",
    "business",
    "crime",
    "science & technology",
    "culture & arts",
    "entertainment",
    "politics",
    "women",
    "style & beauty",
    "healthy living",
}
# LaMP numbers its two second tasks alike; OPPU tells them apart.
LABELS = {"LaMP_1": {"[1]", "[2]"}, "LaMP_2": TAGS, "LaMP_2M": TAGS, "LaMP_2N": CATEGORIES}


class Refused(Exception):
    """What a script says when it stops."""


def lamp_script(labels: Path, predictions: Path) -> dict[str, float]:
    """Metrics as LaMP's script names and measures them; it knows the label file's tasks alone."""
    return _measured(labels, predictions, LABELS.keys() - {"LaMP_2M", "LaMP_2N"}, ratings={"LaMP_3"})


def oppu_script(labels: Path, predictions: Path) -> dict[str, float]:
    """The same of OPPU's, which also wants to know the model."""
    if not isinstance(json.loads(predictions.read_text("utf-8")).get("model"), str):
        raise Refused("no model")
    return _measured(labels, predictions, LABELS.keys() - {"LaMP_2"}, ratings={"LaMP_3"})


def _measured(labels: Path, predictions: Path, closed: set[str], *, ratings: set[str]) -> dict[str, float]:
    golds, answers = (json.loads(path.read_text("utf-8")) for path in (labels, predictions))
    task = answers["task"]
    if task != golds["task"]:
        raise Refused(f"no golds of task {task}")
    gold_of, answer_of = _by_id(golds), _by_id(answers)
    if gold_of.keys() != answer_of.keys():
        raise Refused("the ids are not the same")
    pairs = [(gold, answer_of[name]) for name, gold in gold_of.items()]
    if task in closed:
        return _classified(pairs, LABELS[task])
    return _rated(pairs) if task in ratings else _overlap(pairs)


def _by_id(data: dict[str, Any]) -> dict[tuple[str, Any], str]:
    found = {(type(row["id"]).__name__, row["id"]): row["output"] for row in data["golds"]}
    if len(found) < len(data["golds"]):
        raise Refused("an id comes twice")
    return found


def _classified(pairs: list[tuple[str, str]], labels: set[str]) -> dict[str, float]:
    right = sum(gold.strip() == answer.strip() for gold, answer in pairs)
    f1 = []
    for label in labels:
        seen = sum((gold.strip() == label) + (answer.strip() == label) for gold, answer in pairs)
        hits = sum(gold.strip() == label == answer.strip() for gold, answer in pairs)
        f1.append(2 * hits / seen if seen else 0.0)
    return {"accuracy": right / len(pairs), "f1": sum(f1) / len(f1)}


def _rated(pairs: list[tuple[str, str]]) -> dict[str, float]:
    errors = []
    for gold_text, answer in pairs:
        gold = float(gold_text)
        try:
            errors.append(abs(float(answer) - gold))
        except ValueError:
            errors.append(max(abs(1 - gold), abs(5 - gold)))
    return {
        "MAE": sum(errors) / len(errors),
        "RMSE": math.sqrt(sum(error**2 for error in errors) / len(errors)),
    }


def _overlap(pairs: list[tuple[str, str]]) -> dict[str, float]:
    scorer = RougeScorer(["rouge1", "rougeL"])
    scores = [scorer.score(gold.strip(), answer.strip()) for gold, answer in pairs]
    return {
        name: sum(score[key].fmeasure for score in scores) / len(scores)
        for name, key in (("rouge-1", "rouge1"), ("rouge-L", "rougeL"))
    }
