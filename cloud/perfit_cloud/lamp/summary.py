"""summary.json: what a run measured, with how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from perfit_cloud.lamp import scores, text_scores
from perfit_cloud.lamp.drift_results import drift_of
from perfit_cloud.lamp.measured import UserFigures
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.statistics import Paired, Statistic, interval, paired
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

__all__ = ["Nest", "as_json", "measure_users", "over", "summarise"]

_COMPARED = (
    *(("personal", mode) for mode in ("collective", "seed", "other", "base")),
    *((mode, "base") for mode in ("seed", "collective")),
)


# {"loss", "metrics": {name}, "mean_over_users": {name}}, with any value at the leaves. The loss is
# the mean over users of a user's mean nats a target token; "metrics" count all queries alike, as LaMP's
# scripts do, "mean_over_users" each user's own. Free texts have "text_metrics" too, of all queries alike.
Nest = Mapping[str, Any]


def over(of: Callable[..., Any], *nests: Nest) -> dict[str, Any]:
    """Apply `of` leaf by leaf to nests of one shape."""
    return {
        key: over(of, *(nest[key] for nest in nests))
        if isinstance(value, Mapping)
        else of(*(nest[key] for nest in nests))
        for key, value in nests[0].items()
    }


def measure_users(task: Task, users: Sequence[UserFigures], mode: str) -> Nest:
    """A nest of `Statistic`, the u-th row of each being the u-th user, of measures that all users have."""
    measured = [user.modes[mode] for user in users]

    def statistics(names: Iterable[str]) -> dict[str, Statistic]:
        return {
            name: Statistic(
                np.stack([one.sums[name] for one in measured]),
                partial(scores.combine, name),
                scores.HIGHER_IS_BETTER[name],
                text_scores.miss if name == "length_ratio" else None,
            )
            for name in names
            if all(name in one.sums for one in measured)
        }

    metrics = statistics(scores.metric_names(task))
    own = {
        name: Statistic.mean(statistic.by_user, higher_is_better=statistic.higher_is_better)
        for name, statistic in metrics.items()
    }
    loss = Statistic.mean([one.loss for one in measured], higher_is_better=False)
    nest = {"loss": loss, "metrics": metrics, "mean_over_users": own}
    return nest | ({"text_metrics": statistics(text_scores.NAMES)} if scores.is_text(task) else {})


def summarise(run: Run) -> dict[str, Any]:
    """summary.json, plain JSON values; a mode that was not measured is missing.

    `loss` is in nats a target token. `metrics` counts all queries alike, `mean_over_users` all users.
    Intervals are 95 %; `paired` is one mode minus another; `drift` is of runs that measured it.
    """
    if not run.people:
        raise InvalidData(f"{run.folder} has no users")
    measured = {mode: measure_users(run.task, run.figures, mode) for mode in run.modes}
    queries = [query for user in run.users for query in user.queries]
    golds = [query.gold for query in queries]
    summary = _by_mode(measured, lambda statistic: statistic.value)
    # What is reported first comes straight from the libraries that LaMP's scripts use, if texts are there.
    for mode in measured if queries else ():
        for name, value in scores.score(run.task, [q.answers[mode] for q in queries], golds).items():
            summary["metrics"][name][mode] = value
    return dict(
        as_json(
            {
                "task": run.task.name,
                **summary,
                "users": [_user(user, index, measured) for index, user in enumerate(run.figures)],
                "seconds": run.seconds,
                "settings": run.settings,
                "intervals": _by_mode(measured, interval),
                "paired": {
                    f"{one}_vs_{two}": over(paired, measured[one], measured[two])
                    for one, two in _COMPARED
                    if one in measured and two in measured
                },
                **({} if (drift := drift_of(run)) is None else {"drift": drift}),
            }
        )
    )


def _by_mode(measured: Mapping[str, Nest], of: Callable[[Statistic], Any]) -> dict[str, Any]:
    """{"loss": {mode}, "metrics": {name: {mode}}, "mean_over_users": {name: {mode}}}"""
    return over(lambda *each: dict(zip(measured, map(of, each), strict=True)), *measured.values())


def _user(user: UserFigures, index: int, measured: Mapping[str, Nest]) -> dict[str, Any]:
    own = _by_mode(measured, lambda statistic: statistic.by_user[index])
    return {
        "user_id": user.user_id,
        "loss": own["loss"],
        "metrics": own["metrics"],
        "queries": user.queries,
        "tokens": user.tokens,
        "examples": user.examples,
        "steps": user.steps,
    }


def as_json(value: Any) -> Any:
    """Plain JSON values: tuples to lists, and None for what JSON lacks (NaN, ∞)."""
    if isinstance(value, Paired):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float):  # NumPy's too
        return float(value) if math.isfinite(value) else None
    return value
