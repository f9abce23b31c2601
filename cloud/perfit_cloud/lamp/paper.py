"""The figures of the PerFit paper (ICLR 2026) that could be read in public, each with where it was read.

A table that is not here was not at hand; the report then says so. Nothing is filled in from memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ABLATION", "MAIN", "PARAMETERS", "REMARKS", "PaperTable", "not_at_hand"]

_AUTHORS = "https://personalizedllm.github.io/papers/perfit/"
_NOTES = (
    "https://en.papernotes.org/ICLR2026/llm_nlp/"
    "perfit_exploring_personalization_shifts_in_representation_space_of_llms/"
)


@dataclass(frozen=True)
class PaperTable:
    """`figures[task][measure][column]`."""

    what: str
    source: str  # address
    figures: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @property
    def cited(self) -> str:
        return f"The paper's figures: {self.what} ({self.source})."

    def get(self, task: str, measure: str, column: str) -> float | None:
        return self.figures.get(task, {}).get(measure, {}).get(column)


def _both(names: tuple[str, str], **columns: tuple[float, float]) -> dict[str, dict[str, float]]:
    """Columns of (first metric, second metric) by metric."""
    return {name: {column: pair[at] for column, pair in columns.items()} for at, name in enumerate(names)}


_LABELS, _RATINGS, _TEXTS = ("accuracy", "macro_f1"), ("mae", "rmse"), ("rouge_1", "rouge_l")

MAIN = PaperTable(
    "the main results, Llama-2-7B on LaMP's test users, on the authors' page",
    _AUTHORS,
    {
        "news_categorize": _both(_LABELS, perfit=(0.818, 0.586), oppu=(0.810, 0.589)),
        "movie_tagging": _both(_LABELS, perfit=(0.630, 0.518), oppu=(0.600, 0.493)),
        "product_rating": _both(_RATINGS, perfit=(0.179, 0.443), oppu=(0.179, 0.443)),
        "news_headline": _both(_TEXTS, perfit=(0.207, 0.186), oppu=(0.191, 0.171)),
        "scholarly_title": _both(_TEXTS, perfit=(0.521, 0.451), oppu=(0.519, 0.442)),
        "tweet_paraphrase": _both(_TEXTS, perfit=(0.525, 0.472), oppu=(0.539, 0.483)),
    },
)

ABLATION = PaperTable(
    "Table 4, Llama-2-7B on LaMP's test users, as notes on the paper give it (their row of the whole "
    "method is the authors' own)",
    _NOTES,
    {
        "news_categorize": _both(
            _LABELS,
            full=(0.818, 0.586),
            stage1=(0.792, 0.529),
            stage2_sum=(0.803, 0.604),
            stage2=(0.801, 0.594),
        ),
        "movie_tagging": _both(
            _LABELS,
            full=(0.630, 0.518),
            stage1=(0.466, 0.415),
            stage2_sum=(0.620, 0.496),
            stage2=(0.599, 0.473),
        ),
        "news_headline": _both(
            _TEXTS,
            full=(0.207, 0.186),
            stage1=(0.189, 0.169),
            stage2_sum=(0.194, 0.175),
            stage2=(0.190, 0.171),
        ),
        "tweet_paraphrase": _both(
            _TEXTS,
            full=(0.525, 0.472),
            stage1=(0.493, 0.450),
            stage2_sum=(0.483, 0.438),
            stage2=(0.478, 0.433),
        ),
    },
)

PARAMETERS = PaperTable(
    "trained parameters in per cent of Llama-2-7B, as notes on the paper give them",
    _NOTES,
    {
        task: {"percent": {"collective": collective, "personal": personal}}
        for task, collective, personal in (
            ("news_categorize", 0.0058, 0.0117),
            ("movie_tagging", 0.0078, 0.0010),
            ("product_rating", 0.0117, 0.0015),
            ("news_headline", 0.0117, 0.0015),
            ("scholarly_title", 0.0039, 0.0010),
            ("tweet_paraphrase", 0.0078, 0.0039),
        )
    },
)

# Remarks on tables whose figures were not at hand, by section of the report.
REMARKS: Mapping[str, tuple[str, str]] = {
    "layers": ("single layers 5 to 10 of 32 do best and the last one breaks the answers' format", _NOTES),
    "collective_users": ("the method depends little on their number; with 10 it still beats OPPU", _NOTES),
    "seconds": ("training takes 17.0 to 35.8 % less time than the baselines'", _AUTHORS),
}


def not_at_hand(key: str) -> str:
    """A note below a section that lacks the paper's figures."""
    remark = REMARKS.get(key)
    words = f" In words: {remark[0]} ({remark[1]})." if remark else ""
    return f"The paper's figures for this table are not at hand.{words}"
