"""What is measured of texts beside ROUGE, and whose words an answer shares with the person's own text.

meteor          METEOR (Lavie and Agarwal 2007) by nltk, with its stages of equal words and equal stems. The
                stage of synonyms needs WordNet, which is no part of any package, and is left out: these
                figures are lower than full METEOR.
chrf            chrF (Popović 2015) by sacrebleu, characters to n = 6, of each answer; 0 to 1
matter          of the words that answer and gold share (clipped counts, as ROUGE-1): the share that stands in
                the query's input
wording         the share that does not, and that the person uses often: in at least two of their own past
                answers, and in one of twenty
other_overlap   the rest, so that the three sum to 1 (all are 0 where nothing is shared)
length_ratio    words of all answers over words of all golds; 1 is best
edit_distance   Levenshtein's distance in characters to the person's own text, over the longer of both, by
                rapidfuzz; 0 to 1

Every one is a ratio of sums over queries. Words are runs of letters and digits, in lower case.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "HIGHER_IS_BETTER",
    "MATTER",
    "NAMES",
    "OTHER",
    "SHARES",
    "WORDING",
    "frequent_words",
    "miss",
    "origins_of",
    "text_parts",
]

Array = npt.NDArray[np.float64]

SHARES = ("matter", "wording", "other_overlap")
NAMES = ("meteor", "chrf", *SHARES, "length_ratio", "edit_distance")
# Of the shares, more of the person's own wording counts as better. A length is best at 1: see `miss`.
HIGHER_IS_BETTER: Mapping[str, bool] = {
    name: name not in ("other_overlap", "edit_distance") for name in NAMES
}
MATTER, WORDING, OTHER = "m", "w", "o"  # of one word of a gold
_WORD = re.compile(r"\w+")
_LEAST_ANSWERS, _LEAST_SHARE = 2, 1 / 20
_REMEMBERED = 2**17  # pairs of texts: reports meet the same answers of the base in many runs


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def frequent_words(answers: Iterable[str]) -> frozenset[str]:
    """The words of at least two of these texts, and of at least one of twenty."""
    texts = [set(words(text)) for text in answers]
    counts = Counter(word for text in texts for word in text)
    least = max(_LEAST_ANSWERS, _LEAST_SHARE * len(texts))
    return frozenset(word for word, count in counts.items() if count >= least)


def origins_of(gold: str, asked: Iterable[str], frequent: Collection[str]) -> str:
    """A letter for each word of `gold`: of the query's input, else of the person's wording, else other."""
    matter = {word for text in asked for word in words(text)}
    return "".join(
        MATTER if word in matter else WORDING if word in frequent else OTHER for word in words(gold)
    )


def text_parts(
    answers: Sequence[str], golds: Sequence[str], origins: Sequence[str | None]
) -> dict[str, Array]:
    """What each query adds above and below the line of each ratio, (queries, 2).

    `origins`: of `origins_of`; the three shares are left out where one is None.
    """
    pairs = list(zip(answers, golds, strict=True))
    made = {"meteor": [(_meteor(*pair), 1) for pair in pairs], "chrf": [(_chrf(*pair), 1) for pair in pairs]}
    known = [origin for origin in origins if origin is not None]
    if len(known) == len(pairs):
        shared = [_shared(*pair, origin) for pair, origin in zip(pairs, known, strict=True)]
        for at, name in enumerate(SHARES):
            made[name] = [(counts[at], sum(counts)) for counts in shared]
    made["length_ratio"] = [(len(words(answer)), len(words(gold))) for answer, gold in pairs]
    made["edit_distance"] = [(_edit_distance(*pair), 1) for pair in pairs]
    return {name: np.array(rows, float) for name, rows in made.items()}


def miss(ratio: float) -> float:
    """How far a length ratio is from 1, the same for half as for twice as long."""
    return abs(log(ratio)) if ratio > 0 else float("inf")


def _shared(answer: str, gold: str, origins: str) -> tuple[int, int, int]:
    """How many words of the gold the answer has, by where they come from."""
    origin = dict(zip(words(gold), origins, strict=True))  # a word has one origin
    counts: Counter[str] = Counter()
    for word, count in (Counter(words(answer)) & Counter(words(gold))).items():
        counts[origin[word]] += count
    return counts[MATTER], counts[WORDING], counts[OTHER]


class _NoSynonyms:
    """For nltk in place of WordNet."""

    @staticmethod
    def synsets(_word: str) -> tuple[()]:
        return ()


@lru_cache(_REMEMBERED)
def _meteor(answer: str, gold: str) -> float:
    from nltk.translate.meteor_score import single_meteor_score  # slow to import

    return float(single_meteor_score(words(gold), words(answer), wordnet=_NoSynonyms()))


@lru_cache(_REMEMBERED)
def _chrf(answer: str, gold: str) -> float:
    return float(_scorer().sentence_score(answer, [gold]).score) / 100


@cache
def _scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


@lru_cache(_REMEMBERED)
def _edit_distance(answer: str, gold: str) -> float:
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(answer, gold)
