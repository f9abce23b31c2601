"""`perfit update` and `evaluate` as commands: what resumes, what is left out, what is said."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.device.commands import Perfit

from perfit_shared.errors import Busy, IdentityRevoked, Unavailable


def test_a_cloud_gone_in_mid_update_costs_no_step(ready: Perfit, cloud: Any) -> None:
    steps = iter(range(1000))
    cloud.fail = lambda m: Unavailable("stopping") if m == "ComputeGradient" and next(steps) > 6 else None
    line = ready.fails("update", "--patience", "1")
    assert "`perfit update` resumes there" in line
    assert ready.json("status")["tasks"]["news_headline"]["half_done"] > 0
    cloud.fail = lambda method: None
    assert ready.json("update")["resumed_from"] > 0


def test_other_settings_or_history_start_anew(ready: Perfit, cloud: Any) -> None:
    steps = iter(range(1000))
    cloud.fail = lambda m: Unavailable("stopping") if m == "ComputeGradient" and next(steps) > 6 else None
    ready.fails("update", "--patience", "1", "--epochs", "4")
    cloud.fail = lambda method: None
    ready.ok("history", "add", "One more.", "More", "--task", "news_headline")
    code, _, err = ready("update")
    assert code == 0 and "your history changed; starting anew" in err


def test_a_batch_larger_than_the_history_resumes(ready: Perfit, cloud: Any) -> None:
    """The plan keeps min(64, 13), and was compared with the 64 asked for: the half-done update was lost."""
    again = ("update", "--batch-size", "64")
    # A batch of 13 takes five calls of at most 3 examples.
    calls = iter(range(1000))
    cloud.fail = lambda m: Unavailable("stopping") if m == "ComputeGradient" and next(calls) > 16 else None
    ready.fails(*again, "--patience", "1")
    cloud.fail = lambda method: None
    result = ready.json(*again)
    assert result["resumed_from"] == 3 and result["steps"] == 150


def busy_at_times(*methods: str) -> Any:
    """A cloud that turns every other call of these methods away."""
    seen: list[str] = []

    def fail(method: str) -> Busy | None:
        seen.extend([method] if method in methods else [])
        turned_away = method in methods and seen.count(method) % 2 == 1
        return Busy("the cloud is busy; come back soon", retry_ms=20) if turned_away else None

    return fail


def test_a_busy_cloud_is_waited_for(ready: Perfit, cloud: Any) -> None:
    """It says when to come back, and evaluate and ask died all the same."""
    cloud.fail = busy_at_times("Score", "Ask", "Question")
    assert ready.json("evaluate")["examples"] == 4
    cloud.fail = busy_at_times("Generate")
    code, out, err = ready("ask", "x", "--mode", "base")
    assert (code, out) == (0, "Hello world base \n")
    assert "the cloud is busy; come back soon; waiting, for 60 s at most" in err


def test_a_refused_device_ends_an_evaluation(ready: Perfit, cloud: Any) -> None:
    """The other questions, which the cloud was too busy for, kept it waiting."""
    trouble = iter([IdentityRevoked("this device was revoked; ask the operator")])
    busy = Busy("busy", retry_ms=30_000)
    cloud.fail = lambda method: next(trouble, busy) if method == "Question" else None
    start = time.monotonic()
    assert "revoked" in ready.fails("evaluate")
    assert time.monotonic() - start < 15


def test_an_example_that_the_cloud_refuses_is_left_out(
    enrolled: Perfit, tmp_path: Path, history_file: Path, cloud: Any
) -> None:
    """One of 20,000 words, accepted at import, ended every later update."""
    with history_file.open("a") as file:
        for n in range(2):
            file.write(f'\n{{"text": "much too long {n}", "title": "x", "date": "2020-01-0{n + 1}"}}')
    enrolled.ok("history", "import", str(history_file))
    done = enrolled.json("update", "--epochs", "2")
    assert (done["skipped"], done["examples"]) == (2, 13)
    cloud.calls.clear()
    _, _, err = enrolled("update", "--epochs", "3")
    assert "2 examples are too long for this cloud and are left out" in err
    # They are remembered: of 13 examples in batches of 4, as calls of at most 3, none was refused.
    assert cloud.calls.count("ComputeGradient") == 3 * (2 * 3 + 1)


def test_too_few_examples_are_left(enrolled: Perfit, history_file: Path, cloud: Any) -> None:
    enrolled.ok("history", "import", str(history_file))
    cloud.refuses = lambda text: "room 1" in text
    assert "there are 9 examples to learn from" in enrolled.fails("update")
    assert cloud.calls.count("FetchSeed") == 1, "found at once, not batch by batch"


def test_test_examples_that_the_cloud_refuses_are_left_out(ready: Perfit, cloud: Any) -> None:
    cloud.refuses = lambda text: "room 17" in text
    report = ready.json("evaluate", "--answers")
    assert (report["examples"], report["skipped"], len(report["answers"])) == (3, 1, 3)
    assert "Meeting 17" not in {row["gold"] for row in report["answers"]}
    cloud.refuses = lambda text: True
    assert "refuses every example of the test part" in ready.fails("evaluate")
