"""Every table of the PerFit paper (ICLR 2026) as figures, for reports to stand ours beside.

All are of Llama-2-7B on LaMP's test users, unless a table says otherwise. Figures 5 and 6 are pictures
without printed numbers. A row of the texts below is a label and, for each task, two figures; "-" is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = [
    "ABLATION",
    "BACKBONES",
    "CAPABILITIES",
    "COLLECTIVE_GROUPS",
    "DATA",
    "FEW_USERS",
    "LAYERS",
    "LORA_BELOW",
    "MAIN",
    "OTHER_TASKS",
    "PARAMETERS",
    "PICTURES",
    "RANKS",
    "SEEDS",
    "TRAINING_TIME",
    "PaperTable",
]


@dataclass(frozen=True)
class PaperTable:
    """`figures[task][measure][row]`."""

    what: str
    tables: str  # their numbers in the paper
    figures: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)

    @property
    def cited(self) -> str:
        return f"The paper's figures: {self.what} (PerFit, ICLR 2026, {self.tables})."

    def get(self, task: str, measure: str, row: str) -> float | None:
        return self.figures.get(task, {}).get(measure, {}).get(row)

    def rows(self, task: str) -> list[str]:
        """Labels of the rows that have a figure for this task, in the paper's order."""
        return list(dict.fromkeys(row for of in self.figures.get(task, {}).values() for row in of))


_LABELS, _RATINGS, _TEXTS = ("accuracy", "macro_f1"), ("mae", "rmse"), ("rouge_1", "rouge_l")
_TASKS = {
    "2N": ("news_categorize", _LABELS),
    "2M": ("movie_tagging", _LABELS),
    "3": ("product_rating", _RATINGS),
    "4": ("news_headline", _TEXTS),
    "5": ("scholarly_title", _TEXTS),
    "7": ("tweet_paraphrase", _TEXTS),
}


Figures = dict[str, dict[str, dict[str, float]]]


def _read(text: str, measures: Mapping[str, tuple[str, tuple[str, str]]] = _TASKS) -> Figures:
    """The first line names the columns, each of two figures; a row is "label: figures"."""
    head, *rows = text.strip().splitlines()
    found: Figures = {}
    for row in rows:
        label, _, numbers = row.partition(":")
        cells = iter(numbers.split())
        for column in head.split():
            task, names = measures[column]
            for name, cell in zip(names, (next(cells), next(cells)), strict=True):
                if cell != "-":
                    found.setdefault(task, {}).setdefault(name, {})[label.strip()] = float(cell)
    return found


# Rows are named as `lamp run --method` names methods.
MAIN = PaperTable(
    "the main results",
    "Tables 2 and 3",
    _read(
        """2N 2M 3 4 5 7
        none: - - - - - - 0.030 0.029 0.145 0.118 0.126 0.123
        pag: - - - - - - 0.098 0.082 0.149 0.121 0.135 0.124
        rag, k = 1: - - - - - - 0.101 0.085 0.152 0.122 0.149 0.140
        rag, k = 2: - - - - - - 0.106 0.088 0.167 0.132 0.136 0.130
        rag, k = 4: - - - - - - 0.110 0.092 0.169 0.135 0.164 0.157
        stylevector: - - - - - - 0.104 0.086 0.156 0.125 0.132 0.127
        lora-c: 0.787 0.538 0.478 0.425 0.223 0.491 0.186 0.167 0.476 0.415 0.527 0.474
        lora-p: 0.591 0.397 0.528 0.383 0.183 0.502 0.120 0.108 0.489 0.435 0.398 0.333
        lofit: 0.758 0.525 0.566 0.440 - - 0.199 0.179 - - 0.272 0.256
        oppu: 0.810 0.589 0.600 0.493 0.179 0.443 0.191 0.171 0.519 0.442 0.539 0.483
        perfit: 0.818 0.586 0.630 0.518 0.179 0.443 0.207 0.186 0.521 0.451 0.525 0.472"""
    ),
)

# ReFT is stage 2 alone at both ranks' sum.
ABLATION = PaperTable(
    "the ablation",
    "Table 4",
    _read(
        """2N 2M 4 7
        full: 0.818 0.586 0.630 0.518 0.207 0.186 0.525 0.472
        stage1: 0.792 0.529 0.466 0.415 0.189 0.169 0.493 0.450
        stage2_sum: 0.803 0.604 0.620 0.496 0.194 0.175 0.483 0.438
        stage2: 0.801 0.594 0.599 0.473 0.190 0.171 0.478 0.433
        lora-p: 0.591 0.397 0.528 0.383 0.120 0.108 0.398 0.333"""
    ),
)

SEEDS = PaperTable(
    "means, standard deviations over seeds, and p of PerFit against OPPU",
    "Table 10",
    _read(
        """2N 2M 3 4 5 7
        perfit, mean: 0.818 0.586 0.630 0.518 0.179 0.443 0.207 0.186 0.521 0.451 0.525 0.472
        perfit, sd: 3.2e-5 2.8e-5 2.5e-5 5.4e-5 5.2e-3 5.9e-3 9.1e-5 6.2e-5 3.3e-3 2.5e-3 3.1e-3 2.3e-3
        oppu, mean: 0.810 0.589 0.600 0.493 0.179 0.443 0.191 0.171 0.519 0.442 0.539 0.483
        oppu, sd: 3.2e-3 6.3e-3 3.4e-3 6.3e-3 5.2e-3 5.9e-3 5.3e-3 9.6e-3 1.2e-2 6.7e-3 1.0e-2 5.2e-3
        p: 0.026 0.089 0.007 0.003 0.256 0.632 0.024 0.055 0.089 0.011 0.401 0.119"""
    ),
)

LAYERS = PaperTable(
    "one of 32 layers at a time",
    "Table 11",
    _read(
        """2M 2N 4
        0: 0.598 0.479 0.809 0.599 0.207 0.186
        5: 0.630 0.522 0.808 0.593 0.208 0.187
        10: 0.634 0.523 0.817 0.603 0.203 0.183
        15: 0.616 0.506 0.805 0.587 0.190 0.171
        20: 0.609 0.486 0.796 0.569 0.170 0.153
        25: 0.590 0.468 0.795 0.560 0.161 0.145
        31: 0.000 0.000 0.000 0.000 0.031 0.030"""
    ),
)

LORA_BELOW = PaperTable(
    "a collective LoRA below the personal shift, which trains 8 to 16 times PerFit's collective parameters "
    "on all layers",
    "Table 12",
    _read(
        """2N 2M 4 7
        perfit: 0.818 0.586 0.630 0.518 0.207 0.186 0.525 0.472
        lora-c+perfit, PerFit's layers: 0.788 0.582 0.604 0.467 0.193 0.173 0.509 0.461
        lora-c+perfit, all layers: 0.791 0.584 0.640 0.529 0.205 0.186 0.561 0.515"""
    ),
)

BACKBONES = PaperTable(
    "other backbones, with ranks 32/32, layers 7;9;11, f7+l7 and 2 epochs; PerFit's row of Llama-3 3B "
    "repeats the 8B model's, as printed",
    "Table 13",
    _read(
        """2M 2N 4 7
        Llama-3 8B, lora-c: 0.537 0.494 0.798 0.554 0.201 0.181 0.553 0.501
        Llama-3 8B, lora-p: 0.212 0.125 0.539 0.333 0.094 0.086 0.136 0.120
        Llama-3 8B, oppu: 0.627 0.529 0.802 0.587 0.209 0.188 0.494 0.442
        Llama-3 8B, perfit: 0.644 0.550 0.818 0.612 0.201 0.180 0.533 0.487
        Qwen2.5 7B, lora-c: 0.429 0.384 0.792 0.519 0.177 0.159 0.526 0.469
        Qwen2.5 7B, lora-p: 0.485 0.305 0.781 0.560 0.164 0.147 0.446 0.400
        Qwen2.5 7B, oppu: 0.567 0.451 0.789 0.555 0.185 0.166 0.524 0.473
        Qwen2.5 7B, perfit: 0.612 0.508 0.808 0.612 0.182 0.164 0.532 0.482
        Llama-3 3B, lora-c: 0.438 0.401 0.783 0.510 0.175 0.156 0.534 0.477
        Llama-3 3B, lora-p: 0.163 0.063 0.688 0.501 0.124 0.110 0.201 0.171
        Llama-3 3B, oppu: 0.579 0.464 0.792 0.566 0.185 0.165 0.512 0.460
        Llama-3 3B, perfit: 0.644 0.550 0.818 0.612 0.201 0.180 0.533 0.487
        Llama-3 1B, lora-c: 0.402 0.349 0.771 0.491 0.147 0.132 0.524 0.474
        Llama-3 1B, lora-p: 0.105 0.041 0.490 0.309 0.075 0.067 0.160 0.143
        Llama-3 1B, oppu: 0.529 0.405 0.780 0.545 0.157 0.141 0.376 0.338
        Llama-3 1B, perfit: 0.563 0.448 0.796 0.577 0.146 0.130 0.500 0.456"""
    )
    | _read(
        """parameters
        Llama-3 8B, lora-c: 4.72e6 0.059
        Llama-3 8B, lora-p: 3.41e6 0.042
        Llama-3 8B, oppu: 8.13e6 0.051
        Llama-3 8B, perfit: 1.57e6 0.010
        Qwen2.5 7B, lora-c: 3.44e6 0.045
        Qwen2.5 7B, lora-p: 2.52e6 0.033
        Qwen2.5 7B, oppu: 5.96e6 0.039
        Qwen2.5 7B, perfit: 1.38e6 0.009
        Llama-3 3B, lora-c: 3.21e6 0.100
        Llama-3 3B, lora-p: 2.29e6 0.071
        Llama-3 3B, oppu: 5.51e6 0.086
        Llama-3 3B, perfit: 1.18e6 0.018
        Llama-3 1B, lora-c: 1.18e6 0.095
        Llama-3 1B, lora-p: 0.85e6 0.069
        Llama-3 1B, oppu: 2.03e6 0.082
        Llama-3 1B, perfit: 0.79e6 0.032""",
        {"parameters": ("every task", ("parameters", "percent"))},
    ),
)

FEW_USERS = PaperTable(
    "few collective users",
    "Table 14",
    _read(
        """2N 2M 4 7
        10, oppu: 0.783 0.569 0.168 0.075 0.197 0.177 0.142 0.136
        10, perfit: 0.800 0.589 0.535 0.398 0.199 0.179 0.465 0.418
        100, oppu: 0.801 0.600 0.538 0.385 0.197 0.177 0.472 0.428
        100, perfit: 0.812 0.598 0.587 0.464 0.201 0.181 0.476 0.429"""
    ),
)

COLLECTIVE_GROUPS = PaperTable(
    "five other groups of collective users",
    "Table 15",
    _read(
        """2M 2N 7
        0: 0.600 0.478 0.804 0.588 0.482 0.440
        1: 0.604 0.485 0.808 0.600 0.489 0.445
        2: 0.601 0.482 0.804 0.591 0.488 0.446
        3: 0.599 0.478 0.809 0.595 0.482 0.442
        4: 0.597 0.476 0.810 0.592 0.475 0.433
        variance: 5.0e-6 1.1e-5 6.0e-6 1.7e-5 2.5e-5 2.1e-5"""
    ),
)

# Rows: the task of stage 1.
OTHER_TASKS = PaperTable(
    "the collective shift of another task",
    "Table 16",
    _read(
        """2M 2N 4 7
        movie_tagging: 0.636 0.520 0.815 0.591 0.194 0.174 0.466 0.420
        news_categorize: 0.545 0.408 0.818 0.588 0.195 0.175 0.467 0.419
        news_headline: 0.540 0.381 0.814 0.586 0.207 0.186 0.212 0.203
        tweet_paraphrase: 0.521 0.364 0.795 0.579 0.196 0.176 0.490 0.447"""
    ),
)

PARAMETERS = PaperTable(
    "trained parameters in per cent of Llama-2-7B, and in per cent fewer than OPPU's",
    "Tables 2 and 3",
    {
        task: {
            "percent": {"collective": collective, "personal": personal},
            "fewer_than_oppu": {"collective": fewer_collective, "personal": fewer_personal},
        }
        for task, collective, personal, fewer_collective, fewer_personal in (
            ("news_categorize", 0.0058, 0.0117, 93.75, 81.25),
            ("movie_tagging", 0.0078, 0.0010, 91.67, 98.44),
            ("product_rating", 0.0117, 0.0015, 87.50, 97.66),
            ("news_headline", 0.0117, 0.0015, 87.50, 97.66),
            ("scholarly_title", 0.0039, 0.0010, 95.83, 98.44),
            ("tweet_paraphrase", 0.0078, 0.0039, 91.67, 93.75),
        )
    },
)

# Smallest rank that explains a share of the δ-vectors' variance, and its ratio in per mille to what bounds
# it: 4,096, or for 2M, 2N and 4 the number of users. Of LaMP-7 at 0.9 Table 5 prints 22, the project page 32.
RANKS = PaperTable(
    "ranks of the δ-vectors",
    "Tables 1 and 5",
    _read(
        """2M 2N 3 4 5 7
        0.8: 1 1.21 1 3.65 3 0.73 34 22.03 4 0.98 3 0.73
        0.85: 1 1.21 2 7.30 7 1.71 91 58.98 14 3.42 10 2.44
        0.9: 3 3.62 4 14.60 18 4.39 167 108.23 40 9.77 22 7.81
        0.95: 12 14.48 20 72.99 93 22.71 368 238.50 203 49.56 177 43.21""",
        {name: (task, ("rank", "per_mille")) for name, (task, _) in _TASKS.items()},
    ),
)

_DATA = (
    "users 1",
    "users 2",
    "queries 1",
    "input 1",
    "output 1",
    "queries 2",
    "history 2",
    "input 2",
    "output 2",
)
DATA = PaperTable(
    "users, queries, past examples a user, and words of inputs and outputs, of stages 1 and 2",
    "Table 6",
    {
        task: {"data": {name: value for name, value in zip(_DATA, values, strict=True) if value is not None}}
        for task, *values in (
            ("movie_tagging", 829, 100, 3181, 92.1, None, 3302, 55.6, 92.6, None),
            ("news_categorize", 274, 49, 3662, 68.2, None, 6033, 219.9, 63.5, None),
            ("product_rating", 19899, 101, 22388, 128.7, None, 112, 959.8, 211.9, None),
            ("news_headline", 1543, 100, 7275, 33.9, 9.2, 6275, 270.1, 25.2, 11.1),
            ("scholarly_title", 14581, 101, 16075, 162.1, 9.7, 107, 442.9, 171.6, 10.3),
            ("tweet_paraphrase", 13337, 100, 14826, 29.7, 18.3, 109, 121.2, 29.4, 18.0),
        )
    },
)


def _off_and_on(names: str, off: str, on: str) -> dict[str, dict[str, float]]:
    numbers = {way: map(float, text.split()) for way, text in (("off", off), ("on", on))}
    return {way: dict(zip(names.split(), values, strict=True)) for way, values in numbers.items()}


_TABLE_17 = "boolq piqa social_iqa hellaswag winogrande arc_easy arc_challenge openbookqa mean"
# `figures[model and shift]["off" or "on"][task]`, tasks by lm-eval's names.
CAPABILITIES = PaperTable(
    "general capabilities with the shift off and on",
    "Tables 17 and 18",
    {
        "Qwen2.5-7B, movie_tagging": _off_and_on(
            _TABLE_17,
            "0.846 0.787 0.547 0.600 0.730 0.804 0.479 0.336 0.641",
            "0.846 0.787 0.548 0.600 0.732 0.804 0.482 0.338 0.642",
        ),
        "Llama-2-7B, tweet_paraphrase": _off_and_on(
            _TABLE_17,
            "0.777 0.781 0.461 0.572 0.690 0.763 0.434 0.314 0.599",
            "0.764 0.784 0.459 0.571 0.691 0.759 0.424 0.316 0.596",
        ),
        "Qwen2.5-7B, movie_tagging (Table 18)": _off_and_on(
            "sst2 cola mrpc qqp qnli mnli rte mean",
            "0.919 0.257 0.672 0.860 0.648 0.621 0.812 0.684",
            "0.919 0.256 0.672 0.860 0.648 0.620 0.809 0.683",
        ),
    },
)

TRAINING_TIME = "In words: stage 1 takes 17.0 to 35.8 % less time than the baselines' (PerFit, ICLR 2026)."
PICTURES: Mapping[str, str] = {
    "ranks": "The paper's Figure 5 is a picture without printed numbers; in words: the personal rank matters "
    "more than the collective one.",
    "layers": "The paper's Figure 6 is a picture without printed numbers; in words: more layers help up to a "
    "point, and all layers hurt.",
}
