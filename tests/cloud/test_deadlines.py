"""The thread that ends calls."""

from __future__ import annotations

import time

import pytest
from tests.cloud.doubles import wait_for

from perfit_cloud.service import deadlines
from perfit_cloud.service.deadlines import Deadlines


def test_what_is_late_is_cut_and_what_was_left_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "_IDLE_SECONDS", 0.2)
    watch, cut = Deadlines(), []
    with watch.after(0.05, lambda: cut.append("left")):
        pass
    with watch.after(0.05, lambda: cut.append("late")), watch.after(60, lambda: cut.append("early")):
        wait_for(lambda: bool(cut))
        assert watch._is_running
    time.sleep(0.3)
    assert cut == ["late"]
    wait_for(lambda: not watch._is_running)  # there is nothing to watch
    with watch.after(0.05, lambda: cut.append("again")):
        wait_for(lambda: len(cut) == 2)
    assert cut == ["late", "again"]
