"""How good answers are: accuracy, MAE, RMSE, ROUGE. Each as LaMP's own evaluation counts it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

from perfit_shared.errors import InvalidInput

__all__ = ["HIGHER_IS_BETTER", "accuracy", "mae", "measure", "rating_errors", "rmse", "rouge", "rouge_pairs"]

HIGHER_IS_BETTER = {"accuracy": True, "mae": False, "rmse": False, "rouge_1": True, "rouge_l": True}


def accuracy(answers: Sequence[str], golds: Sequence[str]) -> float:
    """Share of answers equal to the gold after stripping white space."""
    return sum(a.strip() == g.strip() for a, g in zip(answers, golds, strict=True)) / len(golds)


def rating_errors(answers: Sequence[str], golds: Sequence[str]) -> list[float]:
    """Rating minus gold rating, each. Raises InvalidInput when a gold is no number."""
    errors = []
    for answer, gold_text in zip(answers, golds, strict=True):
        gold = _number(gold_text)
        if gold is None:
            raise InvalidInput(f'the gold "{gold_text[:40]}" is no rating; one is a number from 1 to 5')
        rating = _number(answer)
        if rating is None:  # LaMP: unreadable counts as whichever of 1 and 5 is farther off
            rating = 1.0 if abs(1 - gold) > abs(5 - gold) else 5.0
        errors.append(rating - gold)
    return errors


def _number(text: str) -> float | None:
    """What float() reads, as in LaMP, but for "nan" and "inf": these would spoil every mean."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def mae(answers: Sequence[str], golds: Sequence[str]) -> float:
    """Mean absolute error of ratings 1 to 5."""
    return sum(map(abs, rating_errors(answers, golds))) / len(golds)


def rmse(answers: Sequence[str], golds: Sequence[str]) -> float:
    """Root mean squared error of ratings 1 to 5."""
    return math.sqrt(sum(e * e for e in rating_errors(answers, golds)) / len(golds))


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # slow to import, so only when used

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=False)


def rouge_pairs(answers: Sequence[str], golds: Sequence[str]) -> list[tuple[float, float]]:
    """F-measures (ROUGE-1, ROUGE-L) of each answer by rouge_score, case ignored, no stemming."""
    scores = [_scorer().score(g.strip(), a.strip()) for a, g in zip(answers, golds, strict=True)]
    return [(s["rouge1"].fmeasure, s["rougeL"].fmeasure) for s in scores]


def rouge(answers: Sequence[str], golds: Sequence[str]) -> tuple[float, float]:
    """Mean F-measures (ROUGE-1, ROUGE-L).

    LaMP's script prints the median of 1,000 bootstrapped means drawn without a seed; this is the
    mean that it estimates (a few 1e-4 apart at LaMP's sizes).
    """
    pairs = rouge_pairs(answers, golds)
    return sum(one for one, _ in pairs) / len(pairs), sum(longest for _, longest in pairs) / len(pairs)


def measure(name: str, answers: Sequence[str], golds: Sequence[str]) -> float:
    """The metric called `name` in HIGHER_IS_BETTER. Raises InvalidInput on no answers at all."""
    if not golds:
        raise InvalidInput("no examples to measure on")
    if name in ("rouge_1", "rouge_l"):
        return rouge(answers, golds)[0 if name == "rouge_1" else 1]
    functions = {"accuracy": accuracy, "mae": mae, "rmse": rmse}
    if name not in functions:
        raise InvalidInput(f'no metric "{name[:40]}"; there are {", ".join(HIGHER_IS_BETTER)}')
    return functions[name](answers, golds)
