"""LaMP's rules, each against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from perfit_shared.errors import InvalidInput
from perfit_shared.metrics import accuracy, mae, measure, rating_errors, rmse, rouge, rouge_pairs


def test_labels_match_after_stripping_and_not_otherwise() -> None:
    assert accuracy([" sports\n", "Sports", "sports."], ["sports", "sports", " sports"]) == pytest.approx(
        1 / 3
    )


@pytest.mark.parametrize(
    ("answer", "gold", "error"),
    [
        ("4", "5", -1),
        (" 4.0 ", "5", -1),
        ("7", "5", 2),
        ("four", "1", 4),
        ("", "2", 3),
        ("4 stars", "5", -4),
        ("nan", "4", -3),
        ("inf", "2", 3),
        ("x", "3", 2),  # as far from 1 as from 5: 5, as in LaMP
    ],
)
def test_unreadable_ratings_count_as_the_farther_end(answer: str, gold: str, error: float) -> None:
    assert rating_errors([answer], [gold]) == [error]


def test_rating_means() -> None:
    answers, golds = ["5", "no idea", "2"], ["4", "2", "4"]  # errors 1, 3, -2
    assert mae(answers, golds) == 2
    assert rmse(answers, golds) == pytest.approx(math.sqrt(14 / 3))


@pytest.mark.parametrize("gold", ["good", "", "nan"])
def test_a_gold_that_is_no_rating_is_named(gold: str) -> None:
    with pytest.raises(InvalidInput, match="no rating"):
        mae(["4"], [gold])


def test_rouge_by_hand() -> None:
    answers = ["The cat sat down!", "mat the on", ""]
    golds = ["the cat ran", "on the mat", "dog"]
    # 2 of 4 and 2 of 3 words; all words, but only one in order; none.
    pairs = [(4 / 7, 4 / 7), (1.0, 1 / 3), (0.0, 0.0)]
    assert [pytest.approx(pair) for pair in pairs] == rouge_pairs(answers, golds)
    assert rouge(answers, golds) == pytest.approx((11 / 21, (4 / 7 + 1 / 3) / 3))
    assert measure("rouge_l", answers, golds) == pytest.approx((4 / 7 + 1 / 3) / 3)


def test_rouge_does_not_stem() -> None:
    assert rouge(["cats running"], ["cat run"]) == (0, 0)


def test_rating_rules_of_lamp() -> None:
    # Unreadable counts as whichever of 1 and 5 is farther from the gold.
    assert mae(["5", "x", "nan"], ["4", "2", "4"]) == pytest.approx((1 + 3 + 3) / 3)
    assert rmse(["5", "x"], ["4", "2"]) == pytest.approx((10 / 2) ** 0.5)


def test_text_metrics() -> None:
    one, longest = rouge(["the cat sat", ""], ["the cat ran", "dog"])
    assert one == pytest.approx(1 / 3)
    assert longest == pytest.approx(1 / 3)
    assert measure("accuracy", [" a ", "b"], ["a", "c"]) == 0.5
    with pytest.raises(InvalidInput):
        measure("accuracy", [], [])
    with pytest.raises(InvalidInput):
        measure("bleu", ["a"], ["a"])
