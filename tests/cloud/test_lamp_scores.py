"""Metrics as LaMP counts them, and how sure they are."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score, mean_absolute_error, root_mean_squared_error
from tests.support.lamp_runs import LABELS, RATINGS, TEXTS

from perfit_cloud.lamp.scores import combine, metric_names, parts, score
from perfit_cloud.lamp.statistics import Statistic, interval, paired
from perfit_shared.errors import InvalidInput
from perfit_shared.tasks import TASKS, Task


def _mean(values: list[float], *, higher: bool = False) -> Statistic:
    return Statistic.mean(values, higher_is_better=higher)


# -- metrics -----------------------------------------------------------------------------------


def test_what_each_task_reports() -> None:
    names = {name: metric_names(task) for name, task in TASKS.items()}
    assert names["news_categorize"] == names["movie_tagging"] == ("accuracy", "macro_f1")
    assert names["product_rating"] == ("mae", "rmse")
    assert names["news_headline"] == names["tweet_paraphrase"] == ("rouge_1", "rouge_l")
    assert metric_names(Task("open", "{x}", "{y}", "accuracy")) == ("accuracy",)


def test_macro_f1_by_hand() -> None:
    golds = ["a", "a", "a", "b"]
    answers = [" a", "b", "neither", "b"]
    # a: 1 of 1 answered, 1 of 3 golds: F1 1/2; b: 1 of 2, 1 of 1: 2/3; c is in the list and never
    # comes: 0. "neither" hits nobody and is nobody's mistake but a's.
    assert score(LABELS, answers, golds) == {
        "accuracy": pytest.approx(0.5),
        "macro_f1": pytest.approx((1 / 2 + 2 / 3 + 0) / 3),
    }


def test_no_examples_is_an_error() -> None:
    for task in (LABELS, RATINGS, TEXTS):
        with pytest.raises(InvalidInput, match="no examples"):
            score(task, [], [])


@pytest.mark.parametrize("seed", range(5))
def test_sums_give_what_the_libraries_give(seed: int) -> None:
    """The resampled numbers are the reported ones, on data with answers outside the list."""
    rng = np.random.default_rng(seed)
    golds, answers = (rng.choice(list(letters), 40).tolist() for letters in ("aab", "aabbcx"))
    made = parts(LABELS, answers, golds)
    f1 = f1_score(golds, answers, labels=["a", "b", "c"], average="macro", zero_division=0)
    assert float(combine("macro_f1", made["macro_f1"].sum(0))) == pytest.approx(f1, abs=1e-12)
    assert float(combine("accuracy", made["accuracy"].sum(0))) == np.mean(np.array(golds) == answers)

    golds, answers = (rng.choice(list("12345"), 40).tolist() for _ in range(2))
    made = parts(RATINGS, answers, golds)
    for name, function in (("mae", mean_absolute_error), ("rmse", root_mean_squared_error)):
        expected = function([float(g) for g in golds], [float(a) for a in answers])
        assert float(combine(name, made[name].sum(0))) == pytest.approx(expected, abs=1e-12)
        assert score(RATINGS, answers, golds)[name] == pytest.approx(expected, abs=1e-12)

    golds, answers = ([" ".join(rng.choice(list("abcd"), 5)) for _ in range(20)] for _ in range(2))
    made = parts(TEXTS, answers, golds)
    for name, value in score(TEXTS, answers, golds).items():
        assert float(combine(name, made[name].sum(0))) == pytest.approx(value, abs=1e-12)


def test_combine_takes_many_resamples_at_once() -> None:
    made = parts(LABELS, ["a", "b", "x"], ["a", "a", "b"])["macro_f1"]
    rows = np.array([[0, 1, 2], [0, 0, 0], [2, 2, 2]])
    assert combine("macro_f1", made[rows].sum(-2)) == pytest.approx([(2 * 1 / 3 + 0 + 0) / 3, 1 / 3, 0])


# -- intervals ---------------------------------------------------------------------------------


def test_interval_is_scipys_of_the_users_values() -> None:
    values = np.random.default_rng(3).exponential(size=30)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=2_000, method="BCa", rng=np.random.default_rng(0)
    ).confidence_interval
    assert interval(_mean(values.tolist())) == pytest.approx(tuple(expected), abs=1e-9)


def test_interval_of_a_metric_draws_users_not_queries() -> None:
    """Three users all right, three all wrong: more queries of the same users tell nothing new."""
    widths = []
    for repeats in (1, 100):
        sums = np.array([[right * repeats, repeats] for right in (1, 1, 1, 0, 0, 0)], float)
        low, high = interval(Statistic(sums, partial(combine, "accuracy"), True)) or (0, 0)
        widths.append((low, high))
        assert low < 0.2
        assert high > 0.8
    assert widths[0] == pytest.approx(widths[1])


def test_interval_of_macro_f1_is_recomputed_on_each_resample() -> None:
    rng = np.random.default_rng(0)
    users = [
        parts(LABELS, rng.choice(list("abc"), 8).tolist(), rng.choice(list("abc"), 8).tolist())["macro_f1"]
        for _ in range(12)
    ]
    statistic = Statistic(np.stack([u.sum(0) for u in users]), partial(combine, "macro_f1"), True)

    def by_hand(index: np.ndarray, axis: int = -1) -> float:
        return float(combine("macro_f1", np.concatenate([users[int(i)] for i in index]).sum(0)))

    expected = stats.bootstrap(
        (np.arange(12),), by_hand, vectorized=False, n_resamples=2_000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert interval(statistic) == pytest.approx(tuple(expected), abs=1e-9)


def test_intervals_without_spread_or_users() -> None:
    assert interval(_mean([2.0, 2.0, 2.0])) == (2.0, 2.0)
    assert interval(_mean([2.0])) is None
    assert interval(_mean([2.0, math.nan, 1.0])) is None


# -- paired tests ------------------------------------------------------------------------------


def test_few_users_are_tested_exactly() -> None:
    # All eight better: only "all as they are" and "all swapped" are as far out, 2 of 2^8.
    worse = [1.0, 1.1, 1.4, 1.2, 1.3, 1.6, 1.8, 1.7]
    found = paired(_mean([w - 0.1 - 0.01 * i for i, w in enumerate(worse)]), _mean(worse))
    assert found.p == pytest.approx(2 / 256)
    assert found.difference == pytest.approx(-0.135)
    assert (found.better, found.worse, found.of) == (8, 0, 8)
    # Differences -1, -2, +3, -4 sum to -4. Of the 16 sums of signs, -10, -8, -6 and two of -4 are as
    # low: 2 · 5 / 16.
    found = paired(_mean([0, 0, 3, 0]), _mean([1, 2, 0, 4]))
    assert found.p == pytest.approx(10 / 16)
    assert (found.difference, found.better, found.worse) == (-1, 3, 1)


def test_many_users_are_tested_by_draws() -> None:
    rng = np.random.default_rng(1)
    start = rng.normal(3, 1, 40)
    clear = paired(_mean((start - 0.5).tolist()), _mean(start.tolist()))
    assert clear.p == pytest.approx(2 / 10_000)
    chance = paired(_mean((start + rng.choice([-0.1, 0.1], 40)).tolist()), _mean(start.tolist()))
    assert chance.p is not None and chance.p > 0.05
    assert paired(_mean(start.tolist()), _mean(start.tolist())).p == 1


def test_ties_are_ties_in_spite_of_rounding() -> None:
    """0.1 + 0.2 is no 0.3 to a computer; swaps that change nothing must count as equal."""
    a, b = [0.5, 0.5, 0.4, 0.4, 0.4, 0.0], [0.5, 0.3, 0.6, 0.2, 0.4, 0.2]
    found = paired(_mean(a, higher=True), _mean(b, higher=True))
    assert (found.better, found.worse) == (2, 2)
    assert found.p == 1  # differences 2, -2, 2, -2 tenths sum to 0, the middle


def test_paired_interval_holds_the_difference_together() -> None:
    """Users differ by much, the two results by 0.1: only pairing sees it."""
    start = [float(value) for value in range(10)]
    found = paired(_mean([value - 0.1 + 0.001 * value for value in start]), _mean(start))
    assert found.interval is not None
    assert -0.11 < found.interval[0] < found.difference < found.interval[1] < -0.09


def test_test_of_a_metric_over_all_queries_swaps_whole_users() -> None:
    # One user has 98 of 100 queries and is right in a alone; the other is right in b alone. Two
    # users cannot be significant, however many queries.
    sums = lambda rows: Statistic(np.array(rows, float), partial(combine, "accuracy"), True)  # noqa: E731
    found = paired(sums([[98, 98], [0, 2]]), sums([[0, 98], [2, 2]]))
    assert found.difference == pytest.approx(0.96)
    assert found.p == 1  # of the 4 swaps 0.96, 1.0, -1.0, -0.96 two are as high: 2 · 2 / 4
    assert (found.better, found.worse) == (1, 1)


def test_a_single_user_or_a_lost_number_has_no_test() -> None:
    assert paired(_mean([1.0]), _mean([2.0])).p is None
    assert paired(_mean([1.0, math.nan]), _mean([2.0, 1.0])).p is None
