"""What is measured of texts beside ROUGE, by hand and against the libraries."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from sacrebleu import sentence_chrf

from perfit_cloud.lamp.scores import HIGHER_IS_BETTER, combine
from perfit_cloud.lamp.statistics import Statistic, paired
from perfit_cloud.lamp.text_scores import NAMES, frequent_words, miss, origins_of, text_parts

HISTORY = ["Fix: the parser", "fix the cat", "Add a door"] + ["nothing"] * 17


def _value(name: str, answers: list[str], golds: list[str], origins: list[str | None] | None = None) -> float:
    table = text_parts(answers, golds, origins or [None] * len(golds))[name]
    return float(combine(name, table.sum(0)))


def test_words_are_the_query_s_or_the_person_s_or_neither() -> None:
    frequent = frequent_words(HISTORY)
    assert frequent == {"fix", "the", "nothing"}, "in two texts and a twentieth of them"
    assert frequent_words(HISTORY + ["x"] * 30) == {"nothing", "x"}, "two of fifty are no habit"
    origins = origins_of("Fix: the DOOR of cats", ["a door, and"], frequent)
    assert origins == "wwmoo"
    answer, gold = "fix fix the door door cats", "Fix: the DOOR of cats"
    made = text_parts([answer, "unlike"], [gold, gold], [origins, origins])
    # Shared: fix, the | door | cats, each once, as the gold has them; the second answer shares nothing.
    assert [made[name].tolist() for name in ("matter", "wording", "other_overlap")] == [
        [[1, 4], [0, 0]],
        [[2, 4], [0, 0]],
        [[1, 4], [0, 0]],
    ]
    shares = [float(combine(name, made[name].sum(0))) for name in ("matter", "wording", "other_overlap")]
    assert (shares, sum(shares)) == ([0.25, 0.5, 0.25], 1.0)
    nothing = [float(combine(name, made[name][1])) for name in ("matter", "wording", "other_overlap")]
    assert nothing == [0, 0, 0], "a user whose answers share nothing is still counted"
    assert set(text_parts([answer], [gold], [None])) == set(NAMES) - {"matter", "wording", "other_overlap"}


@pytest.mark.parametrize(
    ("name", "answers", "golds", "expected"),
    [
        # Stems match ("cats"): precision and recall are 1, one chunk of three words: 1 − 0.5 / 27.
        ("meteor", ["The cat sat."], ["the cats sat"], 1 - 0.5 / 27),
        # "dog" and "hound" are synonyms, which this METEOR does not know.
        ("meteor", ["a dog"], ["a hound"], 0.5 * (1 - 0.5)),
        ("meteor", ["", "the cat sat"], ["the cat", "the cats sat"], (1 - 0.5 / 27) / 2),
        ("chrf", ["the cat"], ["the cats ran"], sentence_chrf("the cat", ["the cats ran"]).score / 100),
        ("length_ratio", ["a b", "c"], ["a b c", "d e f"], 0.5),
        ("edit_distance", ["kitten", "same"], ["sitting", "same"], 3 / 7 / 2),
    ],
)
def test_each_measure_by_hand(name: str, answers: list[str], golds: list[str], expected: float) -> None:
    assert _value(name, answers, golds) == pytest.approx(expected)


def test_the_better_length_is_the_nearer_one() -> None:
    """Half and twice as long are as bad; longer is no gain by itself."""
    assert miss(0.5) == pytest.approx(miss(2.0)) and miss(1.0) == 0 and miss(0) > miss(0.001)
    name = "length_ratio"
    of = lambda rows: Statistic(np.array(rows, float), partial(combine, name), HIGHER_IS_BETTER[name], miss)  # noqa: E731
    found = paired(of([[10, 10], [30, 10], [0, 10]]), of([[20, 10], [20, 10], [5, 10]]))
    assert (found.better, found.worse) == (1, 2)
