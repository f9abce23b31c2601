"""Whether an update should run by itself now: a pure decision on what was read before.

`look` of `machine`, the journal of updates and the history give the state; `due` reads no clock, no disk
and no cloud.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

from perfit_device.machine import Machine

__all__ = ["Due", "NotDue", "State", "battery_warning", "clock_trouble", "due", "enough_new"]

# What an update learns grows with the logarithm of the history, so the share that is new decides; and an
# update of few examples takes as many steps as one of many (`schedule_for`).
_NEW_SHARE = 5  # one in five
_LEAST_NEW = 3  # fewer change neither a fold nor a gate by more than chance
_MOST_NEW = 16  # a long history need not wait for its fifth part
_REST_HOURS = 1.0  # between two, for whoever keeps one answer after another
_IDLE_LOAD = 0.5  # a core
_LOW_BATTERY = 20  # percent
_CLOCK_ERROR = timedelta(minutes=5)  # that clouds allow as well
_RENEWABLE = timedelta(days=30)  # after a certificate's end


@dataclass(frozen=True)
class State:
    """What the decision looks at."""

    usable: int  # examples that an update can take
    least: int  # that it needs
    new: int  # of the usable ones, those added since the update that ended last
    machine: Machine
    room: int = 0  # bytes that an update takes
    half_done: bool = False  # one was begun
    hours_since: float = math.inf  # the update that ended last
    other_artefact: bool = False  # the current version was trained against another than the cloud's
    clock: str = ""  # what is wrong with it
    cloud: str = ""  # why it does not serve


@dataclass(frozen=True)
class Due:
    """An update should run."""


@dataclass(frozen=True)
class NotDue:
    reason: str


def due(state: State) -> Due | NotDue:
    """Where several reasons speak against it, the one that will last longest."""
    return next((NotDue(reason) for reason in _reasons(state)), Due())


def enough_new(known: int) -> int:
    """How many new examples an update waits for, when the one before knew so many."""
    return min(_MOST_NEW, max(_LEAST_NEW, math.ceil(known / _NEW_SHARE)))


def _reasons(state: State) -> Iterator[str]:
    machine = state.machine
    if state.usable < state.least:
        yield f"{state.usable} examples, and an update needs {state.least}"
    if state.other_artefact:
        yield "the cloud's artefact changed; `perfit update --fresh` trains anew"
    wanted = enough_new(state.usable - state.new)
    if not state.half_done and state.new < wanted:
        yield (
            f"{state.new} new examples of the {wanted} that are worth one" if state.new else "nothing is new"
        )
    if not state.half_done and 0 <= state.hours_since < _REST_HOURS:  # negative: the clock was set back
        yield "the last one ended less than an hour ago"
    if state.clock:
        yield state.clock
    if machine.free < state.room:
        yield f"the disk has {machine.free >> 20} MiB free, and an update takes {state.room >> 20}"
    if state.cloud:
        yield state.cloud
    if machine.power.on_battery:
        yield "the machine runs on its battery"
    if machine.load is not None and machine.load > _IDLE_LOAD * machine.cores:
        yield f"the machine is busy (load {machine.load:.1f} on {machine.cores} cores)"


def battery_warning(machine: Machine) -> str:
    """What to say before an update that a person asked for; "" where the battery will do."""
    power = machine.power
    if not power.on_battery or power.percent is None or power.percent > _LOW_BATTERY:
        return ""
    return f"the battery is at {power.percent} %; plug in, or stop it by Ctrl-C: it resumes where it stopped"


def clock_trouble(life: tuple[datetime, datetime], now: datetime) -> str:
    """Whether a clock can be right, by the certificate's first and last moment; "" when it can."""
    start, end = life
    if now < start - _CLOCK_ERROR:
        return f"the clock says {now:%Y-%m-%d %H:%M} UTC, before your certificate of {start:%Y-%m-%d}; set it"
    if now > end + _RENEWABLE:
        return f"the clock says {now:%Y-%m-%d}, and your certificate ended {end:%Y-%m-%d}; set it, or enroll"
    return ""
