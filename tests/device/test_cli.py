"""The commands, in a redirected home, against the fake cloud over real TLS."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.device import Perfit
from tests.support.waiting import SECONDS

from perfit_shared.errors import Busy, CertificateExpired, IdentityRevoked, Unavailable
from perfit_shared.shifts import ShiftSpec, ShiftTensors, read_metadata

SPEC = ShiftSpec(layers=(1, 2), positions="l7", collective_rank=4, personal_rank=2, hidden_size=16)


def vault_bytes(home: Path) -> bytes:
    return (home / "profiles" / "default" / "vault.db").read_bytes()


# -- the main job ------------------------------------------------------------------------------


def test_enrol_ask_update_evaluate_export(ready: Perfit, tmp_path: Path, home: Path) -> None:
    code, out, err = ready("ask", "The council met.")
    assert (code, out) == (0, "Hello world personal \n")
    assert "seed" in err
    updated = ready.json("update")
    assert set(updated) >= {
        "task",
        "steps",
        "epochs",
        "examples",
        "loss_first",
        "loss_last",
        "gate",
        "seconds",
        "bytes_up",
        "bytes_down",
    }
    assert updated["gate"]["accepted"] and updated["loss_last"] < updated["loss_first"]
    # In folds, which spend no example on the gate.
    assert (updated["epochs"], updated["examples"], updated["steps"]) == (7, 16, 28)
    assert updated["bytes_up"] > 1000 and updated["bytes_down"] > 1000
    report = ready.json("evaluate")
    assert report["loss"]["personal"] < report["loss"]["collective"]
    assert set(report["metric"]) == {"name", "base", "collective", "personal"}
    answers = ready.json("evaluate", "--answers")["answers"]
    assert len(answers) == report["examples"] == 4
    assert answers[0]["personal"] == "Hello world personal" and answers[0]["gold"].startswith("Meeting")
    assert "Hello world personal" in ready.ok("evaluate", "--answers")
    shift = tmp_path / "mine.shift"
    ready.ok("export", "--shift", str(shift))
    assert shift.stat().st_mode & 0o777 == 0o600
    assert read_metadata(shift.read_bytes())["artefact"] == "news_headline"
    other = ready.json("evaluate", "--shift", str(shift))
    assert other["loss"]["other"] == pytest.approx(other["loss"]["personal"])
    assert (home / "profiles").stat().st_mode & 0o777 == 0o700
    assert (home / "profiles" / "default" / "vault.db").stat().st_mode & 0o777 == 0o600


def test_ask_modes_and_json(enrolled: Perfit, cloud: Any) -> None:
    assert enrolled.json("ask", "x", "--mode", "base") == {
        "task": "news_headline",
        "mode": "base",
        "answer": "Hello world base",
        "prompt_tokens": 5,
        "answer_tokens": 3,
    }
    answers = enrolled.json("ask", "x", "--compare")["answers"]
    assert answers == {m: f"Hello world {m}" for m in ("base", "collective", "personal")}
    assert "collective: Hello world" in enrolled.ok("ask", "x", "--compare")
    assert enrolled.fails("ask", " ")
    assert "at most 64" in enrolled.fails("ask", "x", "--max-tokens", "65")
    assert "longer than" in enrolled.fails("ask", "much too long", "--mode", "base")


def test_a_stream_of_json(enrolled: Perfit, cloud: Any) -> None:
    alone = enrolled.json("ask", "x", "--mode", "base")
    lines = [
        json.loads(line)
        for line in enrolled.ok("ask", "x", "--mode", "base", "--json", "--stream").splitlines()
    ]
    *pieces, last = lines
    assert {piece["mode"] for piece in pieces} == {"base"} and len(pieces) > 1
    assert "".join(piece["text"] for piece in pieces).strip() == alone["answer"]
    assert last == alone | {"done": True}
    *pieces, last = map(json.loads, enrolled.ok("ask", "x", "--compare", "--json", "--stream").splitlines())
    assert [*dict.fromkeys(piece["mode"] for piece in pieces)] == ["base", "collective", "personal"]
    assert last["done"] and set(last["answers"]) == {"base", "collective", "personal"}


def test_answers_cannot_steer_the_terminal(enrolled: Perfit, cloud: Any) -> None:
    cloud.answer = "\x1b[2Jred \u202eder\x07\x9b1m"
    out = enrolled.ok("ask", "x", "--mode", "base")
    assert not set(out) & set("\x1b\x07\x9b\u202e")
    assert "\x9b" not in enrolled.ok("ask", "x", "--mode", "base", "--json")


def test_profiles_stand_side_by_side(enrolled: Perfit, cloud: Any) -> None:
    enrolled.ok("--profile", "work", "enroll", cloud.invite().encode())
    enrolled.ok("history", "add", "a thing", "A Title", "--profile", "work")
    assert enrolled.json("--profile", "work", "status")["tasks"]["news_headline"]["examples"] == 1
    assert enrolled.json("status")["tasks"]["news_headline"]["examples"] == 0
    assert 'no profile "none"' in enrolled.fails("status", "--profile", "none")
    enrolled.fails("status", "--profile", "../x")


def test_several_tasks_ask_for_a_choice(enrolled: Perfit, cloud: Any) -> None:
    cloud.tasks = ["news_headline", "news_categorize"]
    assert "news_categorize, news_headline" in enrolled.fails("ask", "x")
    assert "it has news_categorize, news_headline" in enrolled.fails("ask", "x", "--task", "poems")
    assert (
        enrolled.json("ask", "x", "--task", "news_categorize", "--mode", "base")["task"] == "news_categorize"
    )


def test_status(ready: Perfit, cloud: Any) -> None:
    report = ready.json("status")
    assert (
        report["identity"] == "d" and report["cloud"] == "reachable" and report["cloud_id"] == cloud.cloud_id
    )
    assert report["tasks"]["news_headline"]["examples"] == 20
    ready.ok("update")
    assert ready.json("status")["tasks"]["news_headline"]["updates"] == 1
    cloud.stop()
    code, out, _ = ready("status", "--json")
    assert code == 3 and "cannot reach" in json.loads(out)["cloud"]


# -- history -----------------------------------------------------------------------------------


def test_history_commands(ready: Perfit, history_file: Path) -> None:
    done = ready.json("history", "import", str(history_file))
    assert (done["task"], done["added"], done["known"]) == ("news_headline", 0, 20)
    items = ready.json("history", "list")
    assert len(items) == 20 and items[0]["fields"]["title"] == "Meeting 0"
    assert ready.json("history", "forget", items[0]["name"][:8], "--yes") == {"forgotten": 1}
    ready.fails("history", "forget", items[0]["name"][:8], "--yes")
    ready.fails("history", "forget")
    assert ready.json("history", "forget", "--all", "--yes") == {"forgotten": 19}
    assert "at least 10" in ready.fails("update")


def test_forgetting_says_what_a_trained_shift_keeps(ready: Perfit) -> None:
    ready.ok("update")
    _, _, err = ready("history", "forget", "--task", "news_headline", "--yes")
    assert "perfit update --fresh" in err


# -- what goes wrong ---------------------------------------------------------------------------


def test_bad_invites(perfit: Perfit, cloud: Any, home: Path) -> None:
    good = cloud.invite().encode()
    altered = good[:40] + ("A" if good[40] != "A" else "B") + good[41:]
    assert "altered" in perfit.fails("enroll", altered)
    assert "not an invite" in perfit.fails("enroll", "hello")
    assert "expired on" in perfit.fails("enroll", cloud.invite(expires_in=-5).encode(), code=4)
    assert cloud.calls == [] and not home.exists()
    perfit.ok("enroll", good)
    assert "used already" in perfit.fails("enroll", good, "--profile", "second", code=4)
    assert "enrolled with" in perfit.fails("enroll", cloud.invite().encode())
    perfit.ok("enroll", good)  # the same device again: the reply may have been lost
    perfit.ok("enroll", cloud.invite().encode(), "--replace")


def test_a_lost_reply_costs_no_invite(perfit: Perfit, cloud: Any) -> None:
    invite = cloud.invite().encode()
    cloud.fail = lambda method: Unavailable("stopping") if method == "Enroll" else None
    perfit.fails("enroll", invite, code=3)
    cloud.fail = lambda method: None
    perfit.ok("enroll", invite)


def test_wrong_ca(perfit: Perfit, cloud: Any) -> None:
    other = type(cloud)()
    try:
        invite = cloud.invite()
        mixed = type(invite)(invite.address, other.invite().server_ca_der, invite.expires_unix, invite.secret)
        assert "not the cloud that this device trusts" in perfit.fails("enroll", mixed.encode(), code=4)
    finally:
        other.stop()


def test_cloud_errors_are_one_line(ready: Perfit, cloud: Any) -> None:
    errors = (
        (IdentityRevoked("this device was revoked; ask the operator"), 4),
        (Busy("busy", retry_ms=5), 3),
    )
    for error, code in errors:
        cloud.fail = lambda method, e=error: e
        assert str(error) in ready.fails("ask", "x", code=code)
    cloud.fail = lambda method: None
    cloud.stop()
    line = ready.fails("ask", "x", code=3)
    assert "cannot reach the cloud at 127.0.0.1:" in line and "is it running" in line


def test_certificates_renew_by_themselves(perfit: Perfit, cloud: Any) -> None:
    cloud.certificate_age = timedelta(hours=20)
    perfit.ok("enroll", cloud.invite().encode())
    cloud.certificate_age = timedelta(hours=20)
    perfit.ok("ask", "x", "--mode", "base")
    assert "Renew" in cloud.calls
    cloud.calls.clear()
    perfit.ok("ask", "x", "--mode", "base")
    assert "Renew" not in cloud.calls and "RenewLapsed" not in cloud.calls


def test_a_lapsed_certificate_renews_by_signature(perfit: Perfit, cloud: Any) -> None:
    cloud.certificate_age = timedelta(hours=30)
    # Enrolment's own look at the cloud renews it at once; the device never notices.
    perfit.ok("enroll", cloud.invite().encode())
    assert "RenewLapsed" in cloud.calls
    perfit.ok("ask", "x", "--mode", "base")


def test_expiry_in_mid_call_renews_once(enrolled: Perfit, cloud: Any) -> None:
    left = [CertificateExpired("this certificate has expired")]
    cloud.fail = lambda method: left.pop() if method == "Describe" and left else None
    enrolled.ok("ask", "x", "--mode", "base")
    assert cloud.calls.count("RenewLapsed") == 1


def test_vault_errors_touch_nothing(ready: Perfit, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = vault_bytes(home)
    monkeypatch.setenv("PERFIT_PASSPHRASE", "wrong")
    assert "wrong passphrase" in ready.fails("status", code=6)
    monkeypatch.setenv("PERFIT_PASSPHRASE", "correct horse")
    path = home / "profiles" / "default" / "vault.db"
    damaged = bytearray(before)
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    assert "restore a copy" in ready.fails("status", code=6)
    assert path.read_bytes() == bytes(damaged)
    path.write_bytes(before)
    ready.ok("status")
    monkeypatch.delenv("PERFIT_PASSPHRASE")
    assert "PERFIT_PASSPHRASE" in ready.fails("status")


def test_passphrase_changes(ready: Perfit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFIT_NEW_PASSPHRASE", "battery staple")
    ready.ok("passphrase")
    ready.fails("status", code=6)
    monkeypatch.setenv("PERFIT_PASSPHRASE", "battery staple")
    assert ready.json("status")["tasks"]["news_headline"]["examples"] == 20


def test_foreign_shifts_must_fit(ready: Perfit, cloud: Any, tmp_path: Path) -> None:
    ready.ok("update")
    shift = tmp_path / "s.shift"
    ready.ok("export", "--shift", str(shift))
    assert "exists" in ready.fails("export", "--shift", str(shift))
    ready.ok("export", "--shift", str(shift), "--force")
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk" * 100)
    assert "not a shift file" in ready.fails("evaluate", "--shift", str(junk))
    cloud.version = "v2"
    line = ready.fails("evaluate", "--shift", str(shift))
    assert "another version" in line and "perfit migrate" in line
    ready.ok("update", "--fresh")
    assert str(shift) in ready.fails("evaluate", "--shift", str(shift))


def test_a_hostile_cloud_is_refused(ready: Perfit, cloud: Any) -> None:
    """Tensors of the wrong names, shapes or values never reach the vault."""
    wrong = ShiftTensors.identity(replace(SPEC, hidden_size=8), 2)
    nan = ShiftTensors.from_named({n: a * np.float32("nan") for n, a in cloud.seed.named()})
    skewed = ShiftTensors.from_named({n: a * np.float32(2) for n, a in cloud.seed.named()})
    for seed in (b"junk", wrong.to_bytes(), nan.to_bytes(), skewed.to_bytes()):
        cloud.seed_bytes = seed
        assert "tell its operator" in ready.fails("update")
    cloud.seed_bytes = None
    for gradient in (b"junk", wrong.to_bytes(), nan.to_bytes(), bytes(10_000_000)):
        cloud.gradient = lambda tensors, data=gradient: data
        assert "tell its operator" in ready.fails("update")
    assert ready.json("status")["tasks"]["news_headline"]["updates"] == 0
    cloud.answer = "x" * 2_000_000
    assert "without end" in ready("ask", "x", "--mode", "base")[2]
    cloud.cloud_id = "another"
    assert "another cloud" in ready.fails("ask", "x", code=4)


def test_usage_errors_are_2(perfit: Perfit) -> None:
    for arguments in (["fly"], ["ask"], ["ask", "x", "--mode", "royal"]):
        code, _, err = perfit(*arguments)
        assert code == 2 and "Usage" in err


def test_help_is_quick_and_light() -> None:
    probe = (
        "import sys; sys.argv=['perfit','--help']\n"
        "from perfit_device.cli.main import run\n"
        "try: run()\nexcept SystemExit: pass\n"
        "heavy={'torch','transformers','numpy','grpc','cryptography','safetensors','keyring','rich'}\n"
        "bad=[m for m in sys.modules if m.split('.')[0] in heavy or m.startswith('perfit_cloud')]\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr

    def cpu_seconds() -> float:
        """Of children that ended: what else the machine does does not count."""
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    best = 10.0
    for _ in range(5):
        start = cpu_seconds()
        subprocess.run([sys.executable, "-m", "perfit_device.cli", "--help"], capture_output=True, check=True)
        best = min(best, cpu_seconds() - start)
    assert best < 0.6  # 0.1 alone; another thread on the same core doubles it and more


def test_ctrl_c_says_where_it_left_things(ready: Perfit, cloud: Any, home: Path) -> None:
    import signal
    import threading

    steps, sixth = itertools.count(1), threading.Event()

    def slow(method: str) -> None:
        if method == "ComputeGradient":
            if next(steps) == 6:
                sixth.set()
            time.sleep(0.2)

    cloud.fail = slow
    process = subprocess.Popen(
        [sys.executable, "-m", "perfit_device.cli", "update", "--epochs", "16"],
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert sixth.wait(SECONDS)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "the same command resumes there" in err
    assert "Traceback" not in err
    cloud.fail = lambda method: None
    assert ready.json("update")["resumed_from"] > 0


def test_leaving_an_answer_cancels_it(enrolled: Perfit, cloud: Any) -> None:
    import signal

    cloud.answer, cloud.pause = "word " * 200, 0.05
    process = subprocess.Popen(
        [sys.executable, "-m", "perfit_device.cli", "ask", "x", "--mode", "base"],
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert cloud.cancelled.wait(SECONDS)


def test_a_cloud_killed_in_mid_answer(enrolled: Perfit, cloud: Any) -> None:
    import threading

    cloud.answer, cloud.pause = "word " * 200, 0.05
    threading.Timer(1.0, cloud.stop).start()
    code, out, err = enrolled("ask", "x", "--mode", "base")
    assert code == 3 and "word" in out and "perfit: " in err


def test_no_command_leaves_a_core_dump() -> None:
    probe = (
        "import resource; from perfit_device.settings import prepare_process\n"
        "prepare_process(); print(resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(0, 0)"
