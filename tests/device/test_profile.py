"""A profile without the command line: values in and out, nothing printed, nothing asked."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.vaults import CHEAP, PASSPHRASE

from perfit_device.operations import ask, enroll, evaluate, examples, status, update, versions
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidInput, NotFound, Unavailable, VaultBusy
from perfit_shared.types import Mode


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def profile(
    home: Path, cloud: Any, history_file: Path, messages: list[str], capsys: pytest.CaptureFixture[str]
) -> Iterator[Profile]:
    """Enrolled, with 20 examples."""
    with Profile.create(DeviceSettings("one", home), passphrase=PASSPHRASE, notify=messages.append) as opened:
        enroll.enroll(opened, cloud.invite())
        assert examples.import_file(opened, history_file).added == 20
        yield opened
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def answer(profile: Profile, mode: Mode) -> str:
    asked = ask.prepare(profile, ask.Question("The council met.", temperature=0.0), [mode])
    return "".join(chunk.text for chunk in asked.stream(mode))


SHORT = update.UpdateRequest(settings={"epochs": 2})


def test_a_day_with_a_profile(profile: Profile, messages: list[str]) -> None:
    assert answer(profile, Mode.PERSONAL) == "Hello world personal "
    assert messages == [
        "no personal shift for news_headline yet, so this is the seed; `perfit update` trains one"
    ]
    steps: list[int] = []
    done = update.update(profile, SHORT, lambda step, *_: steps.append(step))
    assert done.result is not None and done.result.gate.accepted
    assert steps == list(range(1, done.result.steps + 1))
    update.update(profile, update.UpdateRequest(settings={"epochs": 3}))
    name, kept = versions.read(profile, None)
    assert (name, [v.number for v in kept.kept], kept.current) == ("news_headline", [1, 2], 2)
    assert kept.kept[0].learned.gate_after == done.result.gate.after
    assert versions.undo(profile, None)[1].number == 1
    measuring = evaluate.prepare(profile)
    measuring.run()
    report = measuring.report()
    assert (report.examples, list(report.loss)) == (4, ["base", "collective", "personal"])
    assert report.answers[0]["personal"] == "Hello world personal"
    found, trouble = status.status(profile)
    assert trouble is None and found.tasks[name].examples == 20 and found.tasks[name].current == 1
    assert examples.add(profile, "It rained.", "Rain").added == 1
    assert len(examples.find(profile, "news_headline")) == 21
    assert examples.forget(profile, examples.find(profile)) == examples.Forgotten(21, is_trained=True)
    assert versions.read(profile, None)[1].before is None


def test_what_cannot_be_asked_is_an_error(profile: Profile) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        ask.Question(" ")
    with pytest.raises(InvalidInput):
        ask.prepare(profile, ask.Question("x", max_tokens=65), [Mode.BASE])
    with pytest.raises(NotFound):
        ask.prepare(profile, ask.Question("x", task="poems"), [Mode.BASE])


def test_the_passphrase_is_asked_for_once(profile: Profile, home: Path) -> None:
    asked: list[str] = []

    def passphrase() -> str:
        asked.append("")
        return PASSPHRASE

    profile.close()
    with Profile.open(DeviceSettings("one", home), passphrase=passphrase) as again:
        with pytest.raises(VaultBusy):
            Vault.open(again.settings.vault_path, PASSPHRASE, wait_seconds=0.0)
        again.release_vault()
        Vault.open(again.settings.vault_path, PASSPHRASE, wait_seconds=0.0).close()
        assert answer(again, Mode.COLLECTIVE) == "Hello world collective "
    assert len(asked) == 1
    with pytest.raises(NotFound, match='no profile "two"'):
        Profile.open(DeviceSettings("two", home), passphrase=passphrase)


def test_a_released_vault_that_is_busy_can_be_tried_again(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.release_vault()

    def busy(*_: Any, **__: Any) -> None:
        raise VaultBusy("another perfit is using it")

    monkeypatch.setattr(Vault, "open", busy)
    with pytest.raises(Unavailable), profile.vault():
        pass


def test_one_profile_answers_while_it_trains(profile: Profile, cloud: Any) -> None:
    """A process that keeps a profile open serves several callers at once."""
    under_way, answered = threading.Event(), threading.Event()

    def waiting(method: str) -> None:
        if method == "ComputeGradient":
            under_way.set()
            assert answered.wait(30)

    cloud.fail = waiting
    done: list[Any] = []
    training = threading.Thread(target=lambda: done.append(update.update(profile, SHORT)))
    training.start()
    try:
        assert under_way.wait(30)
        assert answer(profile, Mode.PERSONAL) == "Hello world personal "
        assert examples.add(profile, "It rained.", "Rain").added == 1
    finally:
        answered.set()
        training.join(60)
    assert done[0].result.gate.accepted
    assert len(examples.find(profile)) == 21


def test_a_thread_s_change_is_no_part_of_another_s(tmp_path: Path) -> None:
    """It was undone with it."""
    under_way, written = threading.Event(), threading.Event()
    with Vault.create(tmp_path / "v.db", PASSPHRASE, kdf=CHEAP) as vault:

        def write() -> None:
            assert under_way.wait(30)
            vault.put("a", "other", b"x")
            written.set()

        other = threading.Thread(target=write)
        other.start()
        with pytest.raises(InvalidInput), vault.transaction():
            vault.put("a", "mine", b"x")
            under_way.set()
            assert not written.wait(0.3), "it waits"
            raise InvalidInput("all of it goes back")
        other.join(30)
        assert vault.list("a") == {"other": b"x"}


def test_white_space_is_left_out_at_the_front_alone(profile: Profile, cloud: Any) -> None:
    cloud.answer = " Hello  world"
    assert answer(profile, Mode.BASE) == "Hello  world base "


def test_nothing_below_the_command_line_knows_typer() -> None:
    """The import contract says the same; this also finds what would import a module of the CLI."""
    program = (
        "import importlib, pkgutil, sys, perfit_device\n"
        "for module in pkgutil.walk_packages(perfit_device.__path__, 'perfit_device.'):\n"
        "    if not module.name.startswith('perfit_device.cli'):\n"
        "        importlib.import_module(module.name)\n"
        "sys.exit('typer' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_released_vault_is_shared_by_all_who_need_it(profile: Profile) -> None:
    """Each opened it anew, and found it held by its own process; a release closed it under a user's hands."""
    profile.release_vault()
    with profile.vault() as vault, profile.vault() as again:
        assert vault is again
        profile.release_vault()
        vault.put("note", "new", b"x")
    assert vault.closed
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(len(examples.find(profile)))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 12
