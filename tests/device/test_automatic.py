"""Updates by themselves: what decides, what is read of the machine, and what an agent's timer wakes."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_device import machine
from perfit_device.cli.progress import Progress
from perfit_device.machine import Machine, Power
from perfit_device.operations.automatic import AutomaticUpdates, Decision
from perfit_device.operations.update import Update
from perfit_device.profile import Profile
from perfit_device.training.automatic import (
    Due,
    NotDue,
    State,
    battery_warning,
    clock_trouble,
    due,
    enough_new,
)
from perfit_device.training.update import update_row
from perfit_shared.errors import UpdateFailed

IDLE = Machine(cores=4, load=0.1, power=Power(on_battery=False), free=1 << 40)
READY = State(usable=30, least=10, new=10, machine=IDLE, room=1 << 20)


def test_due() -> None:
    assert due(READY) == Due()
    assert due(replace(READY, machine=Machine(1, None, Power(), 1 << 30))) == Due(), "unknown is no hindrance"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"usable": 9, "new": 9}, "9 examples, and an update needs 10"),
        ({"new": 0}, "nothing is new"),
        ({"usable": 40, "new": 6}, "6 new examples of the 7 that are worth one"),
        ({"hours_since": 0.5}, "less than an hour ago"),
        ({"other_artefact": True}, "the cloud's artefact changed"),
        ({"clock": "the clock is wrong"}, "the clock is wrong"),
        ({"cloud": "cannot reach it"}, "cannot reach it"),
        ({"machine": replace(IDLE, free=10)}, "the disk has 0 MiB free"),
        ({"machine": replace(IDLE, power=Power(on_battery=True, percent=90))}, "on its battery"),
        ({"machine": replace(IDLE, load=2.1)}, "busy (load 2.1 on 4 cores)"),
    ],
)
def test_not_due(changes: dict[str, Any], reason: str) -> None:
    found = due(replace(READY, **changes))
    assert isinstance(found, NotDue) and reason in found.reason


def test_a_half_done_update_waits_for_nothing_new_but_for_power() -> None:
    waiting = replace(READY, new=0, half_done=True, hours_since=0.0)
    assert due(waiting) == Due()
    assert due(replace(waiting, machine=replace(IDLE, power=Power(on_battery=True)))) != Due()


def test_a_clock_that_was_set_back_holds_no_update_up() -> None:
    assert due(replace(READY, hours_since=-1.0)) == Due()


def test_enough_is_a_fifth_within_bounds() -> None:
    assert [enough_new(known) for known in (0, 10, 40, 80, 1000)] == [3, 3, 8, 16, 16]


def test_clocks_by_the_certificate() -> None:
    start = datetime(2026, 1, 10, tzinfo=UTC)
    life = (start, start + timedelta(days=30))
    assert clock_trouble(life, start - timedelta(minutes=4)) == ""
    assert clock_trouble(life, start + timedelta(days=59)) == "", "a lapsed certificate renews"
    assert "before your certificate" in clock_trouble(life, datetime(1970, 1, 1, tzinfo=UTC))
    assert "your certificate ended 2026-02-09" in clock_trouble(life, start + timedelta(days=61))


def test_only_a_battery_that_runs_low_is_worth_a_warning() -> None:
    assert "at 12 %" in battery_warning(replace(IDLE, power=Power(on_battery=True, percent=12)))
    for power in (Power(on_battery=True, percent=80), Power(on_battery=False, percent=12), Power()):
        assert battery_warning(replace(IDLE, power=power)) == ""


# -- the machine ---------------------------------------------------------------------------------


def supply(folder: Path, name: str, **values: str) -> None:
    (folder / name).mkdir(parents=True)
    for key, value in values.items():
        (folder / name / key).write_text(value + "\n")


def test_power_of_linux(tmp_path: Path) -> None:
    assert machine.power_of_linux(tmp_path / "none") == Power()
    laptop = tmp_path / "laptop"
    supply(laptop, "BAT0", type="Battery", status="Discharging", capacity="57")
    supply(laptop, "hidpp_battery_0", type="Battery", scope="Device", status="Discharging", capacity="5")
    assert machine.power_of_linux(laptop) == Power(on_battery=True, percent=57)
    supply(laptop, "AC", type="Mains", online="1")
    assert machine.power_of_linux(laptop) == Power(on_battery=False, percent=57)
    supply(tmp_path / "desktop", "AC", type="Mains", online="1")
    assert machine.power_of_linux(tmp_path / "desktop") == Power(on_battery=False)


def test_power_of_the_others() -> None:
    on_battery = (
        "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t85%; discharging; 4:02 remaining"
    )
    assert machine.power_of_macos(on_battery) == Power(on_battery=True, percent=85)
    assert machine.power_of_macos("Now drawing from 'AC Power'\n") == Power(on_battery=False)
    assert machine.power_of_macos("") == Power()
    assert machine.power_of_windows(0, 40) == Power(on_battery=True, percent=40)
    assert machine.power_of_windows(255, 255) == Power()


def test_this_machine_can_be_looked_at(tmp_path: Path) -> None:
    here = machine.look(tmp_path)
    assert here.cores >= 1 and here.free > 0


# -- perfit update --auto ------------------------------------------------------------------------


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "look", lambda folder: IDLE)


def decided(perfit: Perfit) -> dict[str, Any]:
    (decision,) = perfit.json("update", "--auto")
    return dict(decision)


@pytest.mark.usefixtures("idle")
def test_never_twice_on_the_same_history(ready: Perfit, cloud: Any) -> None:
    """After an undo too, which forgets that an equal update would learn nothing."""
    assert decided(ready)["trained"]
    cloud.calls.clear()
    assert decided(ready)["reason"] == "nothing is new"
    ready.ok("update", "--again", "--anyway")
    ready.ok("undo")
    cloud.calls.clear()
    assert decided(ready)["reason"] == "nothing is new"
    assert not cloud.calls, "the cloud need not be asked for that"


@pytest.mark.usefixtures("idle")
def test_an_update_of_before_the_journal_counts(ready: Perfit, home: Path) -> None:
    from perfit_device.vault.store import Vault

    ready.ok("update")
    with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
        for name in vault.list("updates"):
            vault.delete("updates", name)
    assert decided(ready)["reason"] == "nothing is new"


@pytest.mark.usefixtures("idle")
def test_what_was_added_since_makes_it_due(
    ready: Perfit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from perfit_device.operations import automatic

    ready.ok("update")
    # Dated before all others: it counts by when it was added.
    lines = [{"text": f"Old {n}", "title": f"T {n}", "date": "1999-01-01"} for n in range(4)]
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(map(json.dumps, lines[:3])))
    ready.ok("history", "import", str(more))
    assert decided(ready)["reason"] == "3 new examples of the 4 that are worth one"
    more.write_text(json.dumps(lines[3]))
    ready.ok("history", "import", str(more))
    assert "less than an hour ago" in decided(ready)["reason"]
    monkeypatch.setattr(automatic, "_hours_since", lambda date: 2.0)
    assert ready.json("status")["tasks"]["news_headline"]["due"]
    assert decided(ready)["trained"]


def test_a_machine_on_battery_asks_no_cloud(
    ready: Perfit, cloud: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    low = replace(IDLE, power=Power(on_battery=True, percent=9))
    monkeypatch.setattr(machine, "look", lambda folder: low)
    cloud.calls.clear()
    code, out, err = ready("update", "--auto")
    assert (code, out, cloud.calls) == (0, "", [])
    assert "news_headline: not now: the machine runs on its battery" in err
    # A person who asks for it gets a warning and the update.
    code, _, err = ready("update")
    assert code == 0 and "the battery is at 9 %" in err


@pytest.mark.usefixtures("idle")
def test_a_cloud_that_is_away_is_no_error(ready: Perfit, cloud: Any) -> None:
    cloud.stop()
    code, _, err = ready("update", "--auto")
    assert code == 0 and "not now: cannot reach" in err


@pytest.mark.usefixtures("idle")
def test_one_that_runs_already_or_stops_half_way_is_no_error(
    ready: Perfit, cloud: Any, opened: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened.release_vault()
    with opened.updating(update_row(cloud.cloud_id, "news_headline", "news_headline")):
        assert "running already" in decided(ready)["reason"]

    def stop(update: Update, *_: object) -> None:
        raise UpdateFailed("stopped after step 5 of 9, and `perfit update` resumes there")

    monkeypatch.setattr(Update, "run", stop)
    assert "stopped after step 5" in decided(ready)["reason"]


def test_auto_takes_no_plan(ready: Perfit) -> None:
    for flags in (["--epochs", "0"], ["--fresh"]):
        assert "--auto decides by itself" in ready.fails("update", "--auto", *flags)


def test_progress_shows_rate_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    """By the steps of this run alone: the ones before an interrupt cost nothing now."""
    seconds = iter([0.0, 60.0, 120.0])
    progress = Progress(clock=lambda: next(seconds))
    for step in (90, 105, 120):
        progress.step(step, 150, 1.0)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.endswith("loss 1.0000")
    assert second.endswith("0.2/s  3:00 min left")
    assert third.endswith("0.2/s  2:00 min left")


# -- the agent's timer ---------------------------------------------------------------------------


class Agent:
    """A holder, and the performer that it holds."""

    def __init__(self, *, locked: bool, keyring: bool) -> None:
        self.is_locked, self.keyring, self.held = locked, keyring, False
        self.asked: list[str] = []

    def unlock_by_keyring(self) -> bool:
        self.asked.append("keyring")
        self.is_locked = not self.keyring
        return self.keyring

    @contextlib.contextmanager
    def hold(self) -> Iterator[Agent]:
        self.held = True
        yield self
        self.held = False

    def perform(self, operation: Any, emit: Any = None) -> Any:
        assert self.held and not self.is_locked
        self.asked.append(type(operation).__name__)
        return (Decision("a", trained=True),)


@pytest.mark.parametrize(
    ("locked", "keyring", "enabled", "allowed", "asked"),
    [
        (False, False, True, False, ["AutomaticUpdate"]),
        (False, False, False, False, []),
        (True, True, True, False, []),
        (True, True, True, True, ["keyring", "AutomaticUpdate"]),
        (True, False, True, True, ["keyring"]),
    ],
)
def test_a_locked_agent_trains_only_by_leave(
    locked: bool, keyring: bool, enabled: bool, allowed: bool, asked: list[str]
) -> None:
    agent = Agent(locked=locked, keyring=keyring)
    done = AutomaticUpdates(agent, enabled=enabled, by_keyring=allowed).wake()
    assert agent.asked == asked
    assert bool(done) == ("AutomaticUpdate" in asked)
    assert not agent.held


# -- perfit status -------------------------------------------------------------------------------


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("columns", [80, 40])
def test_status_at_a_glance(ready: Perfit, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    before = " ".join(ready.ok("status").split())
    assert "20 examples: 13 train, 3 gate, 4 test; 20 new" in before
    assert "best not known; `perfit evaluate` measures it" in before and "update due" in before
    ready.ok("update")
    assert "best personal, by the gate" in " ".join(ready.ok("status").split())
    ready.ok("evaluate", "--with-seed")
    out = ready.ok("status")
    flat = " ".join(out.split())
    assert "best personal, by evaluate on 4: base" in flat and "not due: nothing is new" in flat
    long = [line for line in out.splitlines() if len(line) > columns and "/" not in line]
    assert not long
    task = ready.json("status")["tasks"]["news_headline"]
    assert task["best"] == "personal" and set(task["measured"]["loss"]) >= {"base", "seed", "personal"}
    assert sum(task["split"].values()) == 20 and task["last"]["accepted"]
