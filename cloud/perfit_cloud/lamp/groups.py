"""Which runs belong together: seeds of one setting, and the sweeps and variants around it.

`run.settings` decides; run.py writes its keys.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from perfit_cloud.lamp.results import MODES, Run
from perfit_cloud.lamp.scores import metric_names
from perfit_cloud.lamp.summary import summarise
from perfit_shared.tasks import TASKS, Task

__all__ = [
    "Cell",
    "RunGroup",
    "collective_sizes",
    "families",
    "group_runs",
    "main_groups",
    "nearest",
    "rank_grids",
    "short_histories",
    "sweeps",
]

_log = logging.getLogger(__name__)
# What another seed changes besides: the collective shift or LoRA of stage 1 that it trained.
_OF_THE_SEED = ("seed", "artefact", "lora")


_COMPARED = ("fingerprint", "users", "data", "prompts", "chat", "examples")
_STARTS = ("perfit", "perfit+rag", "perfit_behind+rag", "perfit_stage1+rag")  # what a newcomer may have


@dataclass(frozen=True)
class Cell:
    """A number with its spread: one standard deviation over seeds, or the 95 % interval of one run."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        if self.seeds > 1:
            return f"{self.value:.3f} ± {self.high - self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ in their seed alone, by seed."""

    task: Task
    settings: Mapping[str, Any]  # of the first run
    runs: tuple[Run, ...]
    summaries: tuple[Mapping[str, Any], ...]
    collective_users: int | None = None  # whom stage 1 saw, here or where it was taken from; None: all
    whole: int | None = None  # the same of the whole method, of this task, model and queries

    def get(self, key: str, default: Any = None) -> Any:
        return self.settings.get(key, default)

    @property
    def seeds(self) -> list[int]:
        return [_seed(run) for run in self.runs]

    @property
    def modes(self) -> tuple[str, ...]:
        """Those of all seeds."""
        return tuple(mode for mode in MODES if all(mode in summary["loss"] for summary in self.summaries))

    @property
    def measures(self) -> tuple[str, ...]:
        """ "loss", then the task's metrics."""
        return ("loss", *metric_names(self.task))

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.get("layers", ()))

    @property
    def ranks(self) -> tuple[int, int]:
        """(collective, personal)"""
        return self.get("collective_rank", 0), self.get("personal_rank", 0)

    @property
    def plain(self) -> bool:
        """The whole method, as the paper's main table has it."""
        return self.complete and self.collective_users == self.whole

    @property
    def complete(self) -> bool:
        """PerFit as it is, but perhaps with few collective users."""
        return self.method == "perfit" and self.own_task

    @property
    def own_task(self) -> bool:
        """Own histories, and what is shared comes from people of this task, asked in the same words."""
        return (
            self.get("histories", "own") == "own"
            and self.get("collective_group") is None
            and self.get("artefact_prompts") == self.get("prompts")
            and not self.foreign
        )

    @property
    def queries_of(self) -> tuple[Any, ...]:
        """Which people's queries, of which task and model."""
        return (self.task, *(self.get(key) for key in ("fingerprint", "users", "asked")))

    @property
    def measured_on(self) -> tuple[Any, ...]:
        """What methods have in common that are compared: model, people, histories, prompts, decoding."""
        return (self.task.name, self.decoding, *(self.get(key) for key in _COMPARED))

    @property
    def decoding(self) -> str:
        return self.runs[0].decoding

    @property
    def foreign(self) -> bool:
        """With another task's collective shift."""
        return self.get("artefact_task") not in (None, self.task.name)

    @property
    def method(self) -> str:
        return str(self.get("method"))

    @property
    def ablation(self) -> str:
        """What is left of PerFit, of layout.ABLATIONS; another method's own name."""
        return "full" if self.method == "perfit" else self.method.removeprefix("perfit_")

    def seconds(self, part: str) -> float:
        """Mean over seeds."""
        return statistics.fmean(summary["seconds"].get(part) or 0.0 for summary in self.summaries)

    def values(self, measure: str, mode: str) -> list[float | None]:
        """By seed."""
        return [_look_up(summary, measure, mode) for summary in self.summaries]

    def cell(self, measure: str, mode: str) -> Cell | None:
        """None where the mode was not measured, or not for every seed."""
        values = [value for value in self.values(measure, mode) if value is not None]
        if not values or len(values) < len(self.summaries):
            return None
        mean = statistics.fmean(values)
        if len(values) > 1:
            spread = statistics.stdev(values)
            return Cell(mean, mean - spread, mean + spread, len(values))
        low, high = _look_up(self.summaries[0]["intervals"], measure, mode) or (None, None)
        return Cell(mean, low, high, 1)


def _look_up(nest: Mapping[str, Any], measure: str, mode: str) -> Any:
    if measure == "loss":
        return nest["loss"].get(mode)
    metrics = {**nest["metrics"], **nest.get("text_metrics", {})}
    return metrics.get(measure, {}).get(mode)


def group_runs(runs: Iterable[Run]) -> list[RunGroup]:
    """Groups by task, the whole method first. Of equal runs, as of two sweeps, that of most modes counts."""
    distinct: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        twin = distinct.setdefault((_key(run.settings), _seed(run), _stage_1(run.settings)), run)
        if twin is not run:
            more, less = (run, twin) if len(run.modes) > len(twin.modes) else (twin, run)
            distinct[_key(run.settings), _seed(run), _stage_1(run.settings)] = more
            _log.warning("%s is the same run as %s and is left out", less.folder, more.folder)
    found: dict[str, list[Run]] = {}
    for run in distinct.values():
        key = _key(run.settings)
        same_seed = [other for other in found.get(key, []) if _seed(other) == _seed(run)]
        # One seed with another artefact is another collective shift, not another seed.
        found.setdefault(f"{key} {_stage_1(run.settings)}" if same_seed else key, []).append(run)
    groups = [_group(sorted(members, key=_seed)) for members in found.values()]
    return sorted(_with_collective_users(groups), key=_order)


def _with_collective_users(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """Where no run saw all collective users, the whole method is the one that saw most of them.

    Without a run of PerFit, any method that shares something says how many that were.
    """
    trained = {_stage_1(g.settings): users for g in groups if (users := g.get("collective_users"))}
    trained.pop(None, None)
    known = [
        replace(g, collective_users=g.get("collective_users") or trained.get(_stage_1(g.settings)))
        for g in groups
    ]
    seen: dict[tuple[Any, ...], list[int | None]] = {}
    for group in known:
        users = seen.setdefault((*group.queries_of, group.complete), [])
        if group.complete or "collective" in group.modes:
            users.append(group.collective_users)

    def whole(group: RunGroup) -> int | None:
        users = seen.get((*group.queries_of, True)) or seen.get((*group.queries_of, False)) or [None]
        return None if None in users else max(filter(None, users))

    return [replace(group, whole=whole(group)) for group in known]


def _stage_1(settings: Mapping[str, Any]) -> Any:
    """The version of the collective LoRA or shift."""
    return (settings.get("lora") or {}).get("version") or settings.get("artefact")


def _seed(run: Run) -> int:
    return int(run.settings.get("seed", 0))


def _group(members: Sequence[Run]) -> RunGroup:
    first = members[0]
    return RunGroup(first.task, first.settings, tuple(members), tuple(summarise(run) for run in members))


def _order(group: RunGroup) -> tuple[Any, ...]:
    """By task and model, the whole method first, many users first, then layers and ranks."""
    names = list(TASKS)
    task = names.index(group.task.name) if group.task.name in names else len(names)
    return task, group.get("model", ""), not group.plain, -group.get("users", 0), group.layers, group.ranks


def _key(settings: Mapping[str, Any]) -> str:
    decoding = {key: value for key, value in settings.get("decoding", {}).items() if key != "seed"}
    rest = {key: value for key, value in settings.items() if key not in _OF_THE_SEED}
    return json.dumps(rest | {"decoding": decoding}, sort_keys=True)


def families(groups: Sequence[RunGroup], *varied: str) -> list[list[RunGroup]]:
    """Groups whose settings differ in `varied` alone, two or more together.

    And in what follows from that: the number of parameters, and the learning rate, which trials choose. Of
    groups that are alike in `varied` the one at the rate of most stays.
    """
    found: dict[str, list[RunGroup]] = {}
    for group in groups:
        free = (*varied, "personal_parameters", "learning_rate")
        found.setdefault(_key({k: v for k, v in group.settings.items() if k not in free}), []).append(group)
    whole = (_one_each(family, varied) for family in found.values())
    return [family for family in whole if len(family) > 1]


def _one_each(family: Sequence[RunGroup], varied: Sequence[str]) -> list[RunGroup]:
    ((usual, _),) = Counter(group.get("learning_rate") for group in family).most_common(1)
    chosen: dict[str, RunGroup] = {}
    for group in sorted(family, key=lambda each: each.get("learning_rate") != usual):
        chosen.setdefault(json.dumps([_varied(group, name) for name in varied]), group)
    kept = {id(group) for group in chosen.values()}
    return [group for group in family if id(group) in kept]


def _varied(group: RunGroup, name: str) -> Any:
    return group.collective_users if name == "collective_users" else group.get(name)


def sweeps(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """Three or more groups of PerFit that differ in their layers alone, single layers first, ascending."""
    found = families([group for group in groups if group.complete], "layers")
    return [sorted(f, key=lambda g: (len(g.layers), g.layers)) for f in found if len(f) > 2]


def collective_sizes(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """Groups of PerFit that differ alone in how many users stage 1 saw, the fewest first.

    Beside them those of other methods whose stage 1 saw as many; beside PerFit on all users alone, those
    whose stage 1 saw fewer.
    """

    def size(group: RunGroup) -> tuple[float, bool]:
        users = math.inf if group.collective_users is None else group.collective_users
        return users, not group.complete

    found = []
    known = families([group for group in groups if group.complete], "collective_users")
    members = {id(group) for family in known for group in family}
    alone = [[group] for group in groups if group.plain and id(group) not in members]
    for family in (*known, *alone):
        first, sizes = family[0], {group.collective_users for group in family}
        others = [
            group
            for group in groups
            if group.own_task
            and not group.complete
            and "collective" in group.modes
            and group.collective_users not in (None, first.whole)
            and (len(family) == 1 or group.collective_users in sizes)
            and group.measured_on == first.measured_on
        ]
        if len(family) + len(others) > 1:
            found.append(sorted([*family, *others], key=size))
    return found


def rank_grids(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """Groups of PerFit that differ in their ranks alone, with at least two of each rank."""
    found = families([group for group in groups if group.complete], "collective_rank", "personal_rank")
    return [
        sorted(family, key=lambda group: group.ranks)
        for family in found
        if all(len({group.ranks[axis] for group in family}) > 1 for axis in (0, 1))
    ]


def short_histories(groups: Sequence[RunGroup]) -> list[list[RunGroup]]:
    """Groups with histories of several lengths, with plain seeds or other starts; the shortest first."""
    own = [g for g in groups if g.get("histories", "own") == "own" and g.method in _STARTS]
    starts, follow = ("communities", "community_seeds"), ("data", "shortened", "asked", "together")
    found = families(own, "examples", "method", "k", "examples_as", *starts, *follow)
    lengths = [sorted(f, key=lambda g: (_length(g), g.method, g.get("communities", 0))) for f in found]
    return [family for family in lengths if len({_length(group) for group in family}) > 1]


def _length(group: RunGroup) -> float:
    """Examples of a history; the whole of it is the longest."""
    examples = group.get("examples")
    return math.inf if examples is None else float(examples)


def main_groups(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """The groups of the main table: the plain ones that are no member of a sweep or a grid.

    Where a task and model has no other, the member of most users, then of most seeds, stands in; then the
    one whose layers and ranks most variants share.
    """

    def rank(group: RunGroup) -> tuple[int, ...]:
        alike = [g for g in groups if not g.plain and (g.layers, g.ranks) == (group.layers, group.ranks)]
        return group.get("users", 0), len(group.summaries), len(alike)

    explored = {id(group) for family in (*sweeps(groups), *rank_grids(groups)) for group in family}
    explored |= {
        id(g) for family in short_histories(groups) for g in family if _length(g) < _length(family[-1])
    }
    explored |= {
        id(g) for family in collective_sizes(groups) for g in family if g.collective_users is not None
    }
    found: dict[tuple[Any, ...], list[RunGroup]] = {}
    for group in groups:
        if group.plain:
            found.setdefault((group.task, group.get("fingerprint")), []).append(group)
    chosen = []
    for candidates in found.values():
        own = [group for group in candidates if id(group) not in explored]
        chosen += own or [max(candidates, key=rank)]
    return chosen


def nearest(
    group: RunGroup, groups: Sequence[RunGroup], also: Callable[[RunGroup], int] = lambda _: 0
) -> RunGroup | None:
    """PerFit's group of the same task, model, test users, prompts and decoding that stands nearest.

    What `also` counts comes first; then whether one sweep made both, whether stage 1 saw as many users, and
    whether it is the plain one; then how many settings they share.
    """
    candidates = [
        other
        for other in groups
        if other.complete
        and other is not group
        and other.task.name == group.task.name
        and all(
            other.get(key) == group.get(key) for key in ("fingerprint", "users", "data", "prompts", "chat")
        )
        and other.decoding == group.decoding
    ]
    if not candidates:
        return None
    beside = {run.folder.parent for run in group.runs}

    def rank(other: RunGroup) -> tuple[int, ...]:
        return (
            also(other),
            any(run.folder.parent in beside for run in other.runs),
            other.collective_users == group.collective_users,
            other.plain,
            sum(other.get(key) == value for key, value in group.settings.items()),
        )

    return max(candidates, key=rank)
