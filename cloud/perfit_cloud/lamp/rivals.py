"""Which runs of other methods stand beside PerFit's, and what they are called."""

from __future__ import annotations

import math
from collections.abc import Sequence

from perfit_cloud.lamp.groups import RunGroup, main_groups

__all__ = ["answering", "by_reference", "label", "row_of"]

_PARTS = ("perfit_stage1", "perfit_stage2")  # of PerFit: the ablation's rows
_OWN_LAYERS = "PerFit's"


def row_of(group: RunGroup) -> str:
    """A method as the paper's tables name it."""
    name = "reft" if group.method == "perfit_stage2_sum" else group.method
    if name == "lora-c+perfit":
        name += f", {'all' if group.get('lora_layers') != 'perfit' else _OWN_LAYERS} layers"
    if (k := group.get("k")) is not None:
        name += f", k = {k}"
    return name


def label(group: RunGroup) -> str:
    """The same, with how many users its stage 1 saw, if fewer than PerFit's."""
    if "collective" in group.modes and group.collective_users not in (None, group.whole):
        return f"{row_of(group)}, {group.collective_users} collective users"
    return row_of(group)


def answering(group: RunGroup) -> str:
    """The mode that is the method's own answer."""
    return next(mode for mode in ("personal", "seed", "collective", "base") if mode in group.modes)


def by_reference(groups: Sequence[RunGroup]) -> list[tuple[RunGroup, list[RunGroup]]]:
    """Each whole method with the others that were measured on the same people in the same way.

    Where a task and model has no run of PerFit, its first method stands in.
    """
    references = main_groups(groups)
    rivals = [
        group
        for group in groups
        if group.method not in ("perfit", *_PARTS)
        and group.get("histories", "own") == "own"
        and group.get("collective_group") is None
    ]
    of = {(group.task.name, group.get("fingerprint")) for group in references}
    for group in rivals:
        if (key := (group.task.name, group.get("fingerprint"))) not in of:
            of.add(key)
            references.append(group)
    return [(full, _of_most_users([g for g in rivals if _is_alike(g, full)])) for full in references]


def _of_most_users(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """Of each method those whose stage 1 saw as many as PerFit's, or else the most of its runs."""

    def seen(group: RunGroup) -> float:
        # What nobody shares does not depend on whom stage 1 saw.
        whole = "collective" not in group.modes or group.collective_users in (None, group.whole)
        return math.inf if whole else group.collective_users or 0

    most: dict[str, float] = {}
    for group in groups:
        most[group.method] = max(seen(group), most.get(group.method, 0))
    return [group for group in groups if seen(group) == most[group.method]]


def _is_alike(group: RunGroup, full: RunGroup) -> bool:
    return group is not full and group.measured_on == full.measured_on
