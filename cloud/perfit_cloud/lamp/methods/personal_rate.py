"""The rate of personal training where none is given: by trial fits of people of the collective data.

    OUT/personal_rate.json   what was chosen, and by which trials

Each trial learns from the earlier part of a history and is measured on its latest part, as the trials of
devices' rates are. The people who are tested on are not looked at.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perfit_cloud.collective.trials import Search
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.lamp.results import write_json
from perfit_shared.errors import InvalidData, UpdateFailed
from perfit_shared.splits import LEAST_HISTORY, split_sizes

__all__ = ["FALLBACK", "choose_personal_rate"]

FALLBACK = 1e-3  # peak, where nobody's history is long enough to tell
_USERS = 2
Trial = Callable[[Sequence[Pair], Sequence[Pair], float | None], float]


def choose_personal_rate(
    path: Path,
    depends: Mapping[str, Any],
    histories: Callable[[], Mapping[str, Sequence[Pair]]],
    trial: Trial,
    say: Callable[[str], None],
) -> tuple[float, float]:
    """(rate, seconds that it took): what `path` holds, or found by trials, which depend on `depends`.

    `depends` holds plain JSON values. `trial` gives the mean loss on its second pairs after training on
    the first at a rate, or at the start for None. Raises InvalidData on a damaged file.
    """
    if path.is_file():
        try:
            known = json.loads(path.read_text("utf-8"))
            if known["depends"] == depends:
                return float(known["rate"]), float(known["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidData(f"{path} is damaged; remove it and run again") from error
    began = time.monotonic()
    trials: dict[float, float] = {}
    long = [pairs for pairs in histories().values() if len(pairs) >= LEAST_HISTORY][:_USERS]
    if not long:
        say(f"no history of the collective data is long enough to choose a rate; it is {FALLBACK:g}")
        return FALLBACK, 0.0
    parts = [_parted(pairs) for pairs in long]

    def mean(rate: float | None) -> float:
        return statistics.fmean(trial(*part, rate) for part in parts)

    def loss_of(rate: float) -> float:
        try:
            found = mean(rate)
        except UpdateFailed:  # it diverged
            found = math.inf
        trials[rate] = found if math.isfinite(found) else math.inf
        say(f"personal learning rate {rate:g}: held-out loss {start:.4f} -> {trials[rate]:.4f}")
        return trials[rate]

    start = mean(None)
    rate = Search(loss_of, start).run()
    seconds = time.monotonic() - began
    losses = {f"{tried:g}": loss for tried, loss in trials.items() if math.isfinite(loss)}
    found = {"rate": rate, "seconds": seconds, "start": start, "trials": losses, "users": len(long)}
    write_json(path, {"depends": depends, **found})
    return rate, seconds


def _parted(pairs: Sequence[Pair]) -> tuple[Sequence[Pair], Sequence[Pair]]:
    test = split_sizes(len(pairs), test_apart=False)[2]
    return pairs[:-test], pairs[-test:]
