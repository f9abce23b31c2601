"""`perfit update` and `evaluate` as commands: what resumes, what is left out, what is said."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.support.device import Perfit

from perfit_device import evaluation, history
from perfit_device.vault.store import Vault
from perfit_shared.command_line import run_command
from perfit_shared.errors import Busy, IdentityRevoked, Unavailable, VaultError


def test_a_cloud_gone_in_mid_update_costs_no_step(ready: Perfit, cloud: Any) -> None:
    steps = iter(range(1000))
    cloud.fail = lambda m: Unavailable("stopping") if m == "ComputeGradient" and next(steps) > 6 else None
    line = ready.fails("update", "--patience", "1", code=7)
    assert "the same command resumes there" in line
    assert ready.json("status")["tasks"]["news_headline"]["half_done"] > 0
    cloud.fail = lambda method: None
    assert ready.json("update")["resumed_from"] > 0


def test_other_settings_or_history_start_anew(ready: Perfit, cloud: Any) -> None:
    steps = iter(range(1000))
    cloud.fail = lambda m: Unavailable("stopping") if m == "ComputeGradient" and next(steps) > 6 else None
    ready.fails("update", "--patience", "1", "--epochs", "4", code=7)
    cloud.fail = lambda method: None
    ready.ok("history", "add", "One more.", "More", "--task", "news_headline")
    code, _, err = ready("update")
    assert code == 0 and "your history changed; starting anew" in err


def test_a_batch_larger_than_the_history_resumes(ready: Perfit, cloud: Any) -> None:
    """The plan keeps min(64, 16), and was compared with the 64 asked for: the half-done update was lost."""
    again = ("update", "--batch-size", "64")
    # A batch of 16 takes six calls of at most 3 examples, and those of the three folds four each.
    calls = iter(range(1000))
    cloud.fail = lambda m: Unavailable("stopping") if m == "ComputeGradient" and next(calls) > 60 else None
    ready.fails(*again, "--patience", "1", code=7)
    cloud.fail = lambda method: None
    result = ready.json(*again)
    assert result["resumed_from"] == 3 and result["steps"] == 25


def busy_at_times(*methods: str) -> Any:
    """A cloud that turns every other call of these methods away."""
    seen: list[str] = []

    def fail(method: str) -> Busy | None:
        seen.extend([method] if method in methods else [])
        turned_away = method in methods and seen.count(method) % 2 == 1
        return Busy("the cloud is busy; come back soon", retry_ms=20) if turned_away else None

    return fail


@pytest.mark.slow
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
    assert "revoked" in ready.fails("evaluate", code=4)
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
    assert (done["skipped"], done["examples"]) == (2, 16)
    cloud.calls.clear()
    _, _, err = enrolled("update", "--epochs", "3")
    assert "2 examples are too long for this cloud and are left out" in err
    # They are remembered: of 16 examples in batches of 4, as calls of at most 3, none was refused. The
    # batches of the folds have 2 or 3.
    assert cloud.calls.count("ComputeGradient") == 3 * 4 * (2 + 3)


def test_an_evaluation_splits_as_the_update_did(enrolled: Perfit, history_file: Path) -> None:
    """With the refused ones among all, its test part reached into what the gate had judged by."""
    with history_file.open("a") as file:
        for n in range(8):
            file.write(f'\n{{"text": "much too long {n}", "title": "x", "date": "2010-01-0{n + 1}"}}')
    enrolled.ok("history", "import", str(history_file))
    assert enrolled.json("update", "--epochs", "2")["skipped"] == 8
    report = enrolled.json("evaluate")
    assert (report["examples"], report["skipped"]) == (4, 8)


def test_no_name_of_a_forgotten_example_stays(ready: Perfit, home: Path, tmp_path: Path) -> None:
    """A name is a digest of the text. The others that the cloud refuses are found again."""
    file = tmp_path / "long.jsonl"
    file.write_text("".join(f'{{"text": "much too long {n}", "title": "x"}}\n' for n in range(2)))
    ready.ok("history", "import", str(file))
    ready.ok("update", "--epochs", "2")
    name = next(item["name"] for item in ready.json("history", "list") if "long 0" in item["fields"]["text"])
    ready.ok("history", "forget", name, "--yes")
    with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
        kinds = (
            "example",
            "checkpoint",
            "shift",
            "previous",
            "refused",
            "finished",
            "forgotten",
            "counter",
            "trained",
        )
        assert not any(name.encode() in row for kind in kinds for row in vault.list(kind).values())
    assert ready.json("update", "--epochs", "3")["skipped"] == 1


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


# -- stopping, and disks that take nothing ---------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_keep_the_steps(ready: Perfit, cloud: Any, number: signal.Signals) -> None:
    """SIGTERM lost all steps since the last checkpoint, where Ctrl-C kept them."""
    steps = iter(range(1000))
    reached = threading.Event()

    def slow(method: str) -> None:
        if method == "ComputeGradient" and next(steps) > 40:
            reached.set()
            time.sleep(0.1)

    cloud.fail = slow
    process = subprocess.Popen(
        [sys.executable, "-c", _NOT_IGNORING, "update", "--epochs", "50"],
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert reached.wait(30)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert "the same command resumes there" in err and "Traceback" not in err
    cloud.fail = lambda method: None
    assert ready.json("status")["tasks"]["news_headline"]["half_done"] >= 2


# Whoever runs the tests may ignore the end of a terminal, and their children with them.
_NOT_IGNORING = """
import signal
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from perfit_device.cli.main import run
run()
"""


def test_nohup_stays_nohup(monkeypatch: pytest.MonkeyPatch) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        seen = []
        app = typer.Typer()
        app.command("x")(lambda: seen.append(signal.getsignal(signal.SIGHUP)))
        monkeypatch.setattr(sys, "argv", ["program", "x"])
        with pytest.raises(SystemExit):
            run_command("program", app)
        assert seen == [signal.SIG_IGN]
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("what", ["the disk is full", "cannot be written"])
def test_a_vault_that_takes_nothing_is_noticed_before_the_first_step(
    ready: Perfit, cloud: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It was noticed after training, which was lost."""
    put = Vault.put

    def refusing(self: Vault, kind: str, name: str, data: bytes, **how: bool) -> None:
        if len(data) > 2000:
            raise VaultError(f"{what}, so nothing was changed")
        put(self, kind, name, data, **how)

    monkeypatch.setattr(Vault, "put", refusing)
    cloud.calls.clear()
    assert what in ready.fails("update", code=6)
    assert not {"ComputeGradient", "Score"} & set(cloud.calls)


def test_room_is_tried_for_all_that_an_update_writes(ready: Perfit, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, int] = {}
    put = Vault.put

    def noting(self: Vault, kind: str, name: str, data: bytes, **how: bool) -> None:
        sizes[kind] = max(sizes.get(kind, 0), len(data))
        put(self, kind, name, data, **how)

    monkeypatch.setattr(Vault, "put", noting)
    ready.ok("update", "--epochs", "3", "--checkpoint", "0")
    assert sizes["reserve"] >= sizes["checkpoint"] > sizes["shift"]


def test_examples_without_the_task_s_fields_are_left_out(ready: Perfit, home: Path, cloud: Any) -> None:
    """One, from a listing or of a task that has other fields now, ended every later update and evaluate."""
    with Vault.open(home / "profiles" / "default" / "vault.db", "correct horse") as vault:
        newest = {"date": "2025-01-01", "part": ""}
        history.add(vault, [history.HistoryItem("news_headline", {"foo": "x"}, **newest)])
    done = ready.json("update", "--epochs", "2")
    assert (done["skipped"], done["examples"]) == (1, 16)
    assert "1 examples lack fields of news_headline and are left out" in ready("update", "--again")[2]
    report = ready.json("evaluate")
    assert (report["examples"], report["skipped"]) == (4, 1)


def test_a_reserve_leaves_the_vault_as_it_was(ready: Perfit, home: Path) -> None:
    path = home / "profiles" / "default" / "vault.db"
    with Vault.open(path, "correct horse") as vault:
        before = {kind: vault.list(kind) for kind in ("example", "identity", "reserve")}
        size = path.stat().st_size
        vault.reserve(300_000)
        assert {kind: vault.list(kind) for kind in before} == before
    assert path.stat().st_size <= size + 8192


# -- evaluate --------------------------------------------------------------------------------------


def test_equal_shifts_are_measured_once(ready: Perfit, cloud: Any) -> None:
    """Without an update personal is the seed, and both were scored and answered."""
    cloud.calls.clear()
    report = ready.json("evaluate", "--with-seed")
    assert report["loss"]["seed"] == report["loss"]["personal"]
    # 4 examples as calls of at most 3, for base, collective and seed.
    assert (cloud.calls.count("Score"), cloud.calls.count("Question")) == (3 * 2, 3 * 4)


def test_evaluate_shows_how_far_it_is(ready: Perfit) -> None:
    """1,800 examples took 356 s without a sign of life."""
    _, _, err = ready("evaluate")
    lines = err.splitlines()
    assert "base: 8/8" in lines and "seed: 8/8" in lines
    assert lines.index("base: 3/8") < lines.index("base: 8/8") < lines.index("collective: 8/8")


@pytest.mark.parametrize(
    ("reason", "ends"), [(KeyboardInterrupt(), 130), (Unavailable("gone"), 3), (IdentityRevoked("no"), 4)]
)
def test_an_evaluation_that_is_stopped_says_what_it_has(
    ready: Perfit, monkeypatch: pytest.MonkeyPatch, reason: BaseException, ends: int
) -> None:
    """After an error of the cloud's, hours of measuring were lost."""
    judge = evaluation.TaskClient.judge
    left = iter(["base", "collective"])

    def stopping(*args: Any, **how: Any) -> evaluation.Judged:
        if next(left, None) is None:
            raise reason
        return judge(*args, **how)

    monkeypatch.setattr(evaluation.TaskClient, "judge", stopping)
    code, out, err = ready("evaluate", "--json")
    report = json.loads(out)
    assert (code, report["partial"], sorted(report["loss"])) == (ends, True, ["base", "collective"])
    assert "stopped; base, collective of base, collective, seed, personal are measured" in err
    code, out, err = ready("evaluate")
    assert (code, out) == (ends, "")
    assert ("before anything was measured" in err) is isinstance(reason, KeyboardInterrupt)
