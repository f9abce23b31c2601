"""A run's answers in LaMP's schema, for LaMP's and OPPU's scripts.

    OUT/predictions.json           personal answers: {"task", "golds": [{"id", "output"}], "model"}
    OUT/predictions/{mode}.json    every mode's
    OUT/golds.json                 the golds of the same queries, {"task", "golds"}

Those scripts accept only the label file's task name and ids, types included. So where there is a label
file, both are written as it has them.
"""

from __future__ import annotations

from collections.abc import Mapping

from perfit_cloud.lamp.people import People
from perfit_cloud.lamp.results import Run, write_json

__all__ = ["write_predictions"]

_FIRST = ("personal", "collective", "base", "seed", "other")  # predictions.json has the first of these


def write_predictions(run: Run, people: People, *, model: str) -> None:
    """Answers and golds of every query. One with an empty field gets an empty answer: LaMP's
    script wants an answer to every gold."""
    task = people.labels.task or run.task.lamp or run.task.name
    queries = [query for user in run.users for query in user.queries]
    unanswered = people.empty_queries
    for mode in run.modes:
        answers = {query.id: query.answers[mode] for query in queries} | {e.id: "" for e in unanswered}
        data = {"task": task, "golds": _rows(people, answers), "model": model}
        write_json(run.folder / "predictions" / f"{mode}.json", data)
        if mode == next(mode for mode in _FIRST if mode in run.modes):
            write_json(run.folder / "predictions.json", data)
    golds = {query.id: query.gold for query in queries}
    golds |= {entry.id: entry.item[run.task.gold_field] for entry in unanswered}
    write_json(run.folder / "golds.json", {"task": task, "golds": _rows(people, golds)})


def _rows(people: People, outputs: Mapping[str, str]) -> list[dict[str, str | int]]:
    return [{"id": people.raw_id(name), "output": output} for name, output in outputs.items()]
