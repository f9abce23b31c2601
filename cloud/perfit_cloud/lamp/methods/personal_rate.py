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
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfit_cloud.collective.blank import RATE
from perfit_cloud.collective.data import find_data
from perfit_cloud.collective.progress import Progress
from perfit_cloud.collective.trials import USUAL_TRIALS, Search
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.lamp.methods.interface import Done, TaskData
from perfit_cloud.lamp.results import write_json
from perfit_cloud.lamp.stage1 import collective_corpus, prompt_texts
from perfit_shared.errors import Cancelled, InvalidData, UpdateFailed
from perfit_shared.splits import LEAST_HISTORY, split_sizes

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["Trial", "choose_personal_rate"]

_FILE = "personal_rate.json"

# Mean loss on the second pairs after training on the first at a rate, or at the start for None. The last gets
# the examples of each step and may raise.
Trial = Callable[[Sequence[Pair], Sequence[Pair], float | None, Done], float]


def choose_personal_rate(
    request: LampRequest,
    data: TaskData,
    trial: Trial,
    stop: Callable[[], bool],
    *,
    work: Callable[[Sequence[Pair]], int],
    depends: Mapping[str, Any],
    users: int = 2,
    fallback: float = RATE,
) -> tuple[float, float]:
    """(rate, seconds that it took): what is asked for, or OUT or the run to reuse holds, else by trials.

    `work`: examples that learning from so many pairs goes through. `depends`: what else the best rate
    depends on, plain JSON values. `users`: how many people each rate is tried on; of their histories, as of
    those of the people tested, the latest `request.examples`, but enough to be split. `fallback`: the rate
    where the collective data has no such person, or nobody trains.
    Raises Cancelled when `stop` says so, InvalidData on a damaged file.
    """
    if request.learning_rate is not None:
        return request.learning_rate, 0.0
    depends = {
        "fingerprint": data.base.fingerprint,
        "asked": data.people.asked,
        "prompts": list(prompt_texts(data.task)),
        "collective_users": request.collective_users,
        "collective_group": request.collective_group,
        "examples": request.examples,
        "seed": request.seed,
        **depends,
    }
    depends = json.loads(json.dumps(depends))
    path, made = request.out / _FILE, request.out / "settings.json"
    if isinstance(ours := _read(made).get("learning_rate"), float):
        return ours, float(_read(path).get("seconds", 0.0))
    if request.examples == 0:
        return fallback, 0.0
    for folder in (request.out, request.reuse):
        if folder is not None and (found := _known(folder / _FILE, depends)) is not None:
            if folder != request.out:
                write_json(path, found)
            return float(found["rate"]), float(found["seconds"])
    began, progress = time.monotonic(), Progress(0)
    latest = 0 if request.examples is None else max(request.examples, LEAST_HISTORY)  # 0: all
    histories = [pairs[-latest:] for pairs in _histories(request, data)]
    parts = [_parted(pairs) for pairs in histories if len(pairs) >= LEAST_HISTORY][:users]
    progress.total = USUAL_TRIALS * sum(work(train) for train, _ in parts)
    if not parts:
        progress.say(f"no history of the collective data is long enough to choose a rate; it is {fallback:g}")
        return fallback, 0.0

    def stepped(examples: int) -> None:
        progress.advance(examples, "a trial of a personal learning rate")
        if stop():
            raise Cancelled("stopped while learning rates were tried; the same command tries again")

    def mean(rate: float | None) -> float:
        return statistics.fmean(trial(*part, rate, stepped) for part in parts)

    trials: dict[float, float] = {}

    def loss_of(rate: float) -> float:
        try:
            found = mean(rate)
        except UpdateFailed:  # it diverged
            found = math.inf
        trials[rate] = found if math.isfinite(found) else math.inf
        progress.say(f"personal learning rate {rate:g}: held-out loss {start:.4f} -> {trials[rate]:.4f}")
        return trials[rate]

    start = mean(None)
    rate = Search(loss_of, start).run()
    seconds = time.monotonic() - began
    losses = {f"{tried:g}": loss for tried, loss in trials.items() if math.isfinite(loss)}
    chosen = {"rate": rate, "seconds": seconds, "start": start, "trials": losses, "users": len(parts)}
    write_json(path, {"depends": depends, **chosen})
    return rate, seconds


def _histories(request: LampRequest, data: TaskData) -> Collection[Sequence[Pair]]:
    """None where there is no collective data."""
    try:
        find_data(request.data)
    except InvalidData:
        return []
    return collective_corpus(request, data).histories.values()


def _parted(pairs: Sequence[Pair]) -> tuple[Sequence[Pair], Sequence[Pair]]:
    test = split_sizes(len(pairs), test_apart=False)[2]
    return pairs[:-test], pairs[-test:]


def _known(path: Path, depends: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What trials on which the same depends have chosen. Raises InvalidData."""
    if not path.is_file():
        return None
    known = _read(path)
    try:
        return known if known["depends"] == depends and known["rate"] > 0 and known["seconds"] >= 0 else None
    except (KeyError, TypeError) as error:
        raise InvalidData(f"{path} is damaged; remove it and run again") from error


def _read(path: Path) -> Mapping[str, Any]:
    """A file's object, nothing where there is no file. Raises InvalidData."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{path} is damaged; remove it and run again") from error
    if not isinstance(found, dict):
        raise InvalidData(f"{path} is damaged; remove it and run again")
    return found
