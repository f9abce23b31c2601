"""Enrol, ask, update, evaluate through real processes over mutual TLS, and what happens when they die.

The model is a tiny random Llama, so answers are noise; what is tested is that the whole way works,
that updates lower the loss, and that nothing is lost when a side disappears.
"""

from __future__ import annotations

import json
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.processes import ForkedCloud, ForkedDevice
from tests.support.waiting import read_until

from local import CommandFailed, Device, LocalCloud
from perfit_shared.shifts import ShiftTensors, read_metadata

TASK = "news_headline"


@pytest.fixture(scope="module")
def artefact(load: Any, make_artefact: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    make_artefact(load("llama"), layers=(0, 1, 2)).save(folder)
    return folder


@pytest.fixture(scope="module")
def cloud(
    model_folder: Callable[[str], Path], artefact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalCloud]:
    with LocalCloud(model_folder("llama"), [artefact], tmp_path_factory.mktemp("state") / "cloud") as cloud:
        yield cloud


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 examples with a habit that a shift can learn: the same few letters."""
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "mat", "door", "sat", "ran"]
    path = tmp_path_factory.mktemp("history") / "titles.jsonl"
    lines = [
        json.dumps({"text": " ".join(rng.choice(words, 5)), "title": f"the {rng.choice(words)} sat"})
        for _ in range(40)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def device(cloud: LocalCloud, tmp_path: Path) -> Device:
    device = ForkedDevice(tmp_path, "default")
    device("enroll", "-", text=cloud.invite())
    return device


def fails(run: Callable[[], Any], code: int = 1) -> CommandFailed:
    """The command must fail with this exit code, and one line on standard error that is no traceback."""
    with pytest.raises(CommandFailed) as caught:
        run()
    said = caught.value.said.strip()
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2, said
    assert caught.value.code == code  # by the class of the error
    return caught.value


def test_the_short_way(
    model_folder: Callable[[str], Path], history: Path, artefact: Path, tmp_path: Path
) -> None:
    """The whole way, where libraries are loaded once."""
    with ForkedCloud(model_folder("llama"), [artefact], tmp_path / "cloud") as cloud:
        go_the_whole_way(cloud, ForkedDevice(tmp_path, "default"), history, artefact)


@pytest.mark.slow
def test_the_whole_way(cloud: LocalCloud, history: Path, artefact: Path, tmp_path: Path) -> None:
    """By commands as users start them."""
    go_the_whole_way(cloud, Device(tmp_path, "default"), history, artefact)


def go_the_whole_way(cloud: LocalCloud, device: Device, history: Path, artefact: Path) -> None:
    assert cloud.said["artefacts"] == [TASK]
    device("enroll", "-", text=cloud.invite())
    first = device.json("ask", "the cat sat", "--task", TASK, "--temperature", "0")
    assert first["mode"] == "personal"
    assert first["answer_tokens"] >= 1
    compared = device.json("ask", "the cat sat", "--compare", "--temperature", "0")["answers"]
    assert set(compared) == {"base", "collective", "personal"}
    assert compared["personal"] == first["answer"]  # the seed of this artefact is the identity …
    assert compared["collective"] == compared["personal"] != compared["base"]  # … on the collective shift

    device("history", "import", str(history), "--task", TASK)
    update = device.json("update", "--task", TASK, "--epochs", "6", "--lr", "0.02")
    assert update["loss_last"] < update["loss_first"]
    assert update["gate"]["accepted"]
    assert update["gate"]["after"] < update["gate"]["before"]
    assert update["bytes_up"] > 0
    assert update["bytes_down"] > 0

    shift = Path(device.env["PERFIT_HOME"], "mine.safetensors")
    device("export", "--shift", str(shift), "--task", TASK)
    assert shift.stat().st_mode & 0o777 == 0o600
    assert read_metadata(shift.read_bytes())["artefact"] == TASK
    spec = json.loads((artefact / "artefact.json").read_text())["spec"]
    from perfit_shared.shifts import ShiftSpec

    ShiftTensors.from_bytes(shift.read_bytes(), ShiftSpec.from_json(spec), spec["personal_rank"])

    result = device.json("evaluate", "--task", TASK, "--shift", str(shift))
    assert result["loss"]["personal"] < result["loss"]["collective"]
    assert result["loss"]["other"] == pytest.approx(result["loss"]["personal"], rel=1e-4)
    assert result["metric"]["name"] == "rouge_1"
    status = device.json("status")
    assert TASK in json.dumps(status)
    assert device("history", "list", "--task", TASK).count("sat") > 10


@pytest.mark.slow
def test_answers_stream(device: Device) -> None:
    process = device.popen("ask", "the cat", "--max-tokens", "40", "--temperature", "0", "--mode", "base")
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert out.strip()


@pytest.mark.slow
def test_two_profiles_do_not_mix(cloud: LocalCloud, device: Device, history: Path, tmp_path: Path) -> None:
    other = ForkedDevice(tmp_path, "other")
    other("enroll", "-", text=cloud.invite())
    device("history", "import", str(history), "--task", TASK)
    assert "sat" not in other("history", "list")
    assert fails(lambda: other("update", "--task", TASK)).said


@pytest.mark.slow
def test_bad_invites(cloud: LocalCloud, device: Device, tmp_path: Path) -> None:
    invite = cloud.invite()
    ForkedDevice(tmp_path, "first")("enroll", "-", text=invite)
    reused = fails(lambda: ForkedDevice(tmp_path, "second")("enroll", "-", text=invite), code=4)
    assert "invite" in reused.said
    altered = invite[:30] + ("A" if invite[30] != "A" else "B") + invite[31:]
    assert "invite" in fails(lambda: ForkedDevice(tmp_path, "third")("enroll", altered)).said
    expired = cloud.invite("--life", "1s")
    time.sleep(1.5)
    fourth = ForkedDevice(tmp_path, "fourth")
    assert "expired" in fails(lambda: fourth("enroll", "-", text=expired), code=4).said


@pytest.mark.slow
def test_a_revoked_device_is_refused(cloud: LocalCloud, device: Device) -> None:
    device("ask", "the cat", "--max-tokens", "2")
    cloud.revoke(device.json("status")["identity"])
    time.sleep(2)  # in which every server hears of it
    said = fails(lambda: device("ask", "the cat", "--max-tokens", "2"), code=4).said
    assert "revoked" in said or "withdrawn" in said or "withdrew" in said


@pytest.mark.slow
def test_prompts_that_cannot_be(device: Device) -> None:
    assert "give a text" in fails(lambda: device("ask", "  ", "--mode", "base")).said
    assert "shorten it" in fails(lambda: device("ask", "the cat " * 4000)).said


@pytest.mark.slow
def test_wrong_passphrase_and_flipped_byte(device: Device, history: Path) -> None:
    device("history", "import", str(history), "--task", TASK)
    wrong = ForkedDevice(Path(device.env["PERFIT_HOME"]), "default")
    wrong.env["PERFIT_PASSPHRASE"] = "another"
    assert "passphrase" in fails(lambda: wrong("status"), code=6).said
    [vault] = Path(device.env["PERFIT_HOME"]).rglob("vault.db")
    good = vault.read_bytes()
    with sqlite3.connect(vault) as db:
        kept = db.execute("SELECT sealed, kind, id FROM rows").fetchall()
        flips = [(bytes([sealed[0] ^ 1]) + sealed[1:], *place) for sealed, *place in kept]
        db.executemany("UPDATE rows SET sealed = ? WHERE kind = ? AND id = ?", flips)
    db.close()
    flipped = vault.read_bytes()
    said = fails(lambda: device("history", "list"), code=6).said
    assert "changed" in said or "damaged" in said
    assert vault.read_bytes() == flipped
    vault.write_bytes(good)
    device("history", "list")


@pytest.mark.slow
def test_cloud_killed_in_mid_update_and_mid_answer(
    model_folder: Callable[[str], Path], artefact: Path, history: Path, tmp_path: Path
) -> None:
    with ForkedCloud(model_folder("llama"), [artefact], tmp_path / "cloud") as cloud:
        device = ForkedDevice(tmp_path / "home", "default")
        device("enroll", "-", text=cloud.invite())
        device("history", "import", str(history), "--task", TASK)
        assert device.json("status")["tasks"][TASK]["updates"] == 0

        # 240 tokens take the tiny model over a second; the first have come when the cloud dies.
        answer = device.popen("ask", "the cat", "--max-tokens", "240", "--mode", "base", "--temperature", "3")
        assert answer.stdout is not None
        assert answer.stdout.read(1)
        cloud.kill()
        _, said = answer.communicate(timeout=60)
        assert answer.returncode == 3
        assert "cloud" in said
        assert "Traceback" not in said

        cloud.at_the_same_ports()
        update = device.popen("update", "--task", TASK, "--epochs", "20", "--lr", "0.02")
        assert update.stderr is not None
        read_until(update.stderr, "loss")  # progress: at least one step has been taken
        cloud.kill()
        answer.communicate(timeout=60)
        time.sleep(1)
        update.send_signal(signal.SIGINT)
        _, said = update.communicate(timeout=90)
        assert update.returncode not in (0, None)
        assert "the same command resumes there" in said
        waiting = device.json("status")["tasks"][TASK]
        assert waiting["updates"] == 0
        assert waiting["half_done"] >= 1

        said = fails(lambda: device("ask", "the cat"), code=3).said
        assert "reach" in said or "cloud" in said

        cloud.at_the_same_ports()
        resumed = device.json("update", "--task", TASK, "--epochs", "20", "--lr", "0.02")
        assert resumed.get("resumed_from", 0) >= 1
        assert resumed["gate"]["accepted"]
        assert device.json("status")["tasks"][TASK]["updates"] == 1


@pytest.mark.slow
def test_another_artefact_is_a_mismatch_and_says_what_to_do(
    model_folder: Callable[[str], Path],
    artefact: Path,
    load: Any,
    make_artefact: Any,
    history: Path,
    tmp_path: Path,
) -> None:
    with ForkedCloud(model_folder("llama"), [artefact], tmp_path / "cloud") as cloud:
        device = ForkedDevice(tmp_path / "home", "default")
        device("enroll", "-", text=cloud.invite())
        device("history", "import", str(history), "--task", TASK)
        device("update", "--task", TASK, "--epochs", "2", "--lr", "0.02")
        cloud.stop()
        make_artefact(load("llama"), layers=(0, 3), seed=5).save(tmp_path / "newer")
        cloud.command[cloud.command.index(str(artefact))] = str(tmp_path / "newer")
        cloud.at_the_same_ports()
        said = fails(lambda: device("ask", "the cat", "--task", TASK)).said
        assert "perfit migrate" in said
        assert "perfit migrate" in fails(lambda: device("update", "--task", TASK)).said
        device("update", "--task", TASK, "--epochs", "2", "--lr", "0.02", "--fresh")
        device("ask", "the cat", "--task", TASK, "--max-tokens", "3")


@pytest.mark.slow
def test_serve_refuses_an_artefact_of_another_model(
    model_folder: Callable[[str], Path], artefact: Path, tmp_path: Path
) -> None:
    with pytest.raises(CommandFailed) as caught:
        ForkedCloud(model_folder("qwen2"), [artefact], tmp_path / "cloud").start()
    assert "Traceback" not in caught.value.said
    assert "fingerprint" in caught.value.said or "another model" in caught.value.said
