"""LaMP's metrics of a task, by scikit-learn and rouge_score, and the sums that they are made of.

Every metric is a function of sums over queries: `combine(name, parts.sum(0))`. So users can be
resampled thousands of times by adding up what was computed once (`statistics`), macro-F1 included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from sklearn.metrics import f1_score

from perfit_cloud.lamp import text_scores
from perfit_shared import metrics
from perfit_shared.errors import InvalidInput
from perfit_shared.tasks import Task

__all__ = ["HIGHER_IS_BETTER", "combine", "is_text", "metric_names", "parts", "score"]

Array = npt.NDArray[np.float64]

HIGHER_IS_BETTER: Mapping[str, bool] = {
    **metrics.HIGHER_IS_BETTER,
    **text_scores.HIGHER_IS_BETTER,
    "macro_f1": True,
    "loss": False,
}


def metric_names(task: Task) -> tuple[str, ...]:
    """What LaMP reports for such a task. Macro-F1 needs a closed list of labels."""
    if task.metric == "accuracy":
        return ("accuracy", "macro_f1") if task.labels else ("accuracy",)
    return ("mae", "rmse") if task.metric in ("mae", "rmse") else ("rouge_1", "rouge_l")


def is_text(task: Task) -> bool:
    """Whether answers are free texts, which `text_scores` measures too."""
    return "rouge_1" in metric_names(task)


def score(task: Task, answers: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """Every metric of the task over these queries. Raises InvalidInput when there are none.

    Labels match after stripping white space; macro-F1 is the mean over the whole label list, so a
    label that never occurs counts 0, and an answer outside the list is wrong and no label's.
    """
    if not golds:
        raise InvalidInput("no examples to measure on")
    names = metric_names(task)
    if "rouge_1" in names:
        return dict(zip(names, metrics.rouge(answers, golds), strict=True))
    values = {name: metrics.measure(name, answers, golds) for name in names if name != "macro_f1"}
    if "macro_f1" in names:
        stripped = [[text.strip() for text in texts] for texts in (golds, answers)]
        labels = list(task.labels)
        values["macro_f1"] = float(f1_score(*stripped, labels=labels, average="macro", zero_division=0))
    return values


def parts(task: Task, answers: Sequence[str], golds: Sequence[str]) -> dict[str, Array]:
    """What each query adds to each metric: (queries, K), for `combine`.

    K = 2 (value, 1) for means; for macro-F1 2 L: a hit of each label, then how often it is gold and
    answered, together.
    """
    columns: dict[str, Sequence[float]] = {}
    for name in metric_names(task):
        if name == "accuracy":
            columns[name] = [float(a.strip() == g.strip()) for a, g in zip(answers, golds, strict=True)]
        elif name == "mae":
            errors = metrics.rating_errors(answers, golds)
            columns |= {"mae": [abs(e) for e in errors], "rmse": [e * e for e in errors]}
        elif name == "rouge_1":
            pairs = metrics.rouge_pairs(answers, golds)
            columns |= {"rouge_1": [p[0] for p in pairs], "rouge_l": [p[1] for p in pairs]}
    made = {name: np.stack([np.asarray(v, float), np.ones(len(v))], 1) for name, v in columns.items()}
    if "macro_f1" in metric_names(task):
        made["macro_f1"] = _label_parts(task.labels, answers, golds)
    return made


def _label_parts(labels: Sequence[str], answers: Sequence[str], golds: Sequence[str]) -> Array:
    column = {label: index for index, label in enumerate(labels)}
    table = np.zeros((len(golds), 2 * len(labels)))
    for row, answer, gold in zip(table, answers, golds, strict=True):
        given, right = column.get(answer.strip()), column.get(gold.strip())
        for label in (given, right):
            if label is not None:
                row[len(labels) + label] += 1
        if given is not None and given == right:
            row[given] += 1
    return table


def combine(name: str, sums: Array) -> Array:
    """The metric from sums of `parts` or `text_parts` over any queries: (..., K) → (...)."""
    if name == "macro_f1":
        hits, seen = np.split(sums, 2, axis=-1)
        f1: Array = np.divide(2 * hits, seen, out=np.zeros_like(hits), where=seen > 0)
        return np.asarray(f1.mean(-1))
    above, below = sums[..., 0], sums[..., 1]
    mean: Array = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    return np.sqrt(mean) if name == "rmse" else mean
