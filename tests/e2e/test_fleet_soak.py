"""The faults of the fleet's soak (scripts/soak/fleet.py) come as it says, and its judgement can fail."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from soak import fleet as soak
from soak.fleet import _Load

SECONDS = 20_000  # of a run: 1,000 kills


def load_of(calls: int) -> Any:
    replicas = [SimpleNamespace(number=n, is_up=True, starting_seconds=[1.0]) for n in range(3)]
    fleet: Any = SimpleNamespace(
        replicas=replicas, outages=[1, 2], balancer=SimpleNamespace(reload=None, reloads=4)
    )
    return _Load(fleet, [], calls=calls, updates=0, seed=1)


def test_a_kill_that_has_to_wait_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was dropped where only one replica was up: here 609 came of 1,000."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    load = load_of(10_000)
    starts: dict[int, float] = {}

    def kill(replica: Any, how: str) -> None:
        load.kills.append(how)
        replica.is_up, starts[replica.number] = False, now + 35

    monkeypatch.setattr(load, "_kill", kill)
    load._plan()
    while now < SECONDS:
        now += 0.25
        for replica in load._fleet.replicas:
            replica.is_up |= now >= starts.get(replica.number, 0.0)
        load._disturb()
        assert sum(replica.is_up for replica in load._fleet.replicas) >= 1
    assert 0.85 < len(load.kills) / (SECONDS / soak._KILL_SECONDS) < 1.15


@pytest.mark.parametrize(
    ("calls", "kills", "per_call", "said"),
    [
        (10_000, 11, 0.01, []),
        (10_000, 10, 0.0, ["10 kills, where 21.0 come on average"]),
        (10_000, 11, 0.012, ["a call costs 0.012 transactions of the database"]),
        (9_000, 1, 0.3, []),  # a few transactions more or less, and as few kills as a short run may have
    ],
)
def test_too_few_faults_and_a_database_that_is_asked_fall_short(
    calls: int, kills: int, per_call: float, said: list[str]
) -> None:
    load = load_of(calls)
    load.kills = ["SIGKILL"] * kills
    load._faults_seconds = 21 * soak._KILL_SECONDS
    load._transactions = {"per_call": per_call}
    told = load.short()
    assert [line for line in told if "kills" in line or "database" in line] == said
