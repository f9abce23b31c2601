"""What is yours on a real cloud: it moves to another device, is unlearned, follows a new artefact, and goes.

The model is a tiny random Llama; devices are homes of their own, over the command line in this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import agents
from tests.support.device import Perfit
from tests.support.processes import ForkedCloud
from tests.support.waiting import wait_for

from perfit_device import answers, personal
from perfit_device.agent import launch
from perfit_device.answers import Answer, Message
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.identity import Enrolment
from perfit_device.cloud_record import read_enrolment
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import IdentityRevoked

pytestmark = pytest.mark.slow

TASK = "news_headline"
QUESTIONS = ["the cat sat on the mat", "the town council met", "a dog ran to the door"]
WORDS = ["cat", "dog", "mat", "door", "sat", "ran", "town", "council"]
TITLES = [f"the {WORDS[n % 8]} sat canarybird{n}" for n in range(24)]


@pytest.fixture(scope="module")
def artefacts(load: Any, make_artefact: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two of one name: the cloud's at first, and the one that takes its place."""
    folders = [tmp_path_factory.mktemp("artefact") for _ in range(2)]
    for seed, folder in enumerate(folders):
        make_artefact(load("llama"), layers=(0, 1, 2), seed=seed).save(folder)
    return folders


@pytest.fixture
def cloud(
    model_folder: Callable[[str], Path], artefacts: list[Path], tmp_path: Path
) -> Iterator[ForkedCloud]:
    cloud = ForkedCloud(model_folder("llama"), artefacts[:1], tmp_path / "cloud")
    with cloud:
        yield cloud


@pytest.fixture
def first(perfit: Perfit, cloud: ForkedCloud, tmp_path: Path) -> Perfit:
    """A device with two versions of a shift, and a log."""
    file = tmp_path / "mine.jsonl"
    lines = [{"text": f"{QUESTIONS[n % 3]} canarybird{n}", "title": title} for n, title in enumerate(TITLES)]
    file.write_text("\n".join(map(json.dumps, lines)))
    perfit.ok("enroll", cloud.invite())
    perfit.ok("history", "import", str(file), "--task", TASK)
    train(perfit)
    perfit.ok("history", "add", "the door ran", "the newest canarybird", "--task", TASK)
    train(perfit, "--epochs", "3")
    perfit.ok("log", "on")
    return perfit


def train(perfit: Perfit, *options: str) -> None:
    perfit.ok("update", "--epochs", "4", "--lr", "0.02", "--anyway", *options)


def answers_of(perfit: Perfit) -> list[str]:
    return [
        perfit.json("ask", text, "--temperature", "0", "--max-tokens", "12")["answer"] for text in QUESTIONS
    ]


def vault_of(home: Path) -> Vault:
    return Vault.open(home / "profiles" / "default" / "vault.db", "correct horse")


def runs_of(secrets: list[bytes]) -> set[bytes]:
    """What would give one away, if a file held it."""
    return {secret[at : at + 16] for secret in secrets for at in range(0, max(1, len(secret) - 15), 16)}


def found_in(folder: Path, runs: set[bytes]) -> set[bytes]:
    files = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return {run for run in runs if any(run in data for data in files)}


def test_a_backup_answers_on_another_device_and_the_first_one_leaves_nothing(
    first: Perfit, cloud: ForkedCloud, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, history, versions = answers_of(first), first.json("history", "list"), first.json("versions", "list")
    base = first.json("ask", QUESTIONS[0], "--mode", "collective", "--temperature", "0", "--max-tokens", "12")
    assert base["answer"] != said[0], "the shift changes nothing, so its move would not be seen"
    file, other = tmp_path / "mine.perfit", tmp_path / "other"
    monkeypatch.setenv("PERFIT_BACKUP_PASSPHRASE", "battery staple")
    first.ok("backup", str(file))
    with vault_of(home) as vault:
        enrolment, key = read_enrolment(vault), bytes(vault.copy_key())
        header = vault._header.to_bytes()
    assert enrolment is not None

    with monkeypatch.context() as patch:
        patch.setenv("PERFIT_HOME", str(other))
        first.ok("enroll", cloud.invite())
        assert first.json("restore", str(file))["examples"] == len(TITLES) + 1
        assert answers_of(first) == said
        assert first.json("history", "list") == history
        moved = first.json("versions", "list")["versions"]
        kept = versions["versions"]
        assert [(v["number"], v["current"]) for v in moved] == [(v["number"], v["current"]) for v in kept]
        with vault_of(other) as vault:
            theirs = read_enrolment(vault)
        assert theirs is not None and theirs.identity.to_der() != enrolment.identity.to_der()

    sealed = runs_of([header])
    readable = runs_of(
        [key, enrolment.identity.to_der(), b"correct horse", b"battery staple", b"canarybird"]
        + [title.encode() for title in TITLES]
    )
    launch.start(DeviceSettings("default", home), "correct horse")
    with agents.connected(DeviceSettings("default", home)) as agent:
        pid = agent.hello.pid
    assert found_in(home, sealed) and not found_in(home, readable)
    first.ok("unenroll", "--yes")
    wait_for(lambda: agents.has_ended(pid))
    assert not found_in(home, sealed | readable)
    assert not any(path.is_file() for path in home.rglob("*"))
    assert refuses(enrolment)
    monkeypatch.setenv("PERFIT_HOME", str(other))
    assert answers_of(first) == said  # the other device's certificate is its own


def refuses(enrolment: Enrolment) -> bool:
    """Whether the cloud knows the certificate no more."""
    with Cloud(enrolment, on_renewed=lambda new: None) as cloud, pytest.raises(IdentityRevoked):
        cloud.describe()
    return True


def test_retraining_drops_every_version_and_answer_that_knows_an_example(first: Perfit, home: Path) -> None:
    said, title = answers_of(first), TITLES[3]
    example = next(e for e in first.json("history", "list") if e["fields"]["title"] == title)
    text, mark = example["fields"]["text"], bytes.fromhex(example["name"])[:16]
    first.ok("ask", text)
    with vault_of(home) as vault:
        answers.put(vault, Answer("x", TASK, messages=(Message("user", text),), is_response=True))
        answers.put(vault, Answer(title, TASK, is_response=True))
        assert sum(mark in row for row in vault.list("trained").values()) == 2
    done = first.json("forget", example["name"][:8], "--retrain", "--yes")
    assert [v["number"] for v in done["dropped"]] == [1, 2] and done["retrained"] == [TASK]
    assert [v["number"] for v in first.json("versions", "list")["versions"]] == [3]
    with vault_of(home) as vault:
        for kind in vault.kinds():
            for row in vault.list(kind).values():
                assert not any(what in row for what in (mark, text.encode(), title.encode())), kind
                assert example["name"].encode() not in row, kind
        assert len(answers.load(vault)) == len(QUESTIONS)
        assert len(vault.list("version")) == len(vault.list("trained")) == 1
    assert answers_of(first) != said


def test_a_new_artefact_gets_a_shift_of_its_own_beside_the_old_one(
    first: Perfit, cloud: ForkedCloud, artefacts: list[Path], home: Path
) -> None:
    said = answers_of(first)
    cloud.stop()
    cloud.command[cloud.command.index(str(artefacts[0]))] = str(artefacts[1])
    cloud.at_the_same_ports()
    assert "`perfit migrate` trains a new one" in first.fails("ask", "the cat")
    with vault_of(home) as vault:
        old = personal.read_tensors(vault, cloud_id_of(vault), TASK, 2)
    code, _, err = first("migrate")
    assert code == 0
    assert "version 3 is your shift now, and version 2 kept beside it; the old one had a loss of" in err
    assert "the new one has" in err and "the new seed" in err
    assert [v["current"] for v in first.json("versions", "list")["versions"]] == [False, False, True]
    with vault_of(home) as vault:
        kept = personal.read_tensors(vault, cloud_id_of(vault), TASK, 2)
        assert kept.to_bytes() == old.to_bytes()
    assert answers_of(first) != said
    first.ok("versions", "use", "2")
    assert "perfit migrate" in first.fails("ask", "the cat")


def cloud_id_of(vault: Vault) -> str:
    enrolment = read_enrolment(vault)
    assert enrolment is not None
    return enrolment.cloud_id
