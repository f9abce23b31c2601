"""Fixtures of the device: a fake cloud, a home with a vault, and the command line over both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.endpoint import App, serving
from tests.support.fake_cloud import FakeCloud
from tests.support.vaults import PASSPHRASE, make_cheap

from perfit_device import profile
from perfit_device.cli import prompts
from perfit_device.history.importers import read_history
from perfit_device.operations.enroll import Enroll
from perfit_device.operations.imports import ImportExamples
from perfit_device.settings import DeviceSettings
from perfit_shared import schedules
from perfit_shared.tasks import TASKS


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    fake = FakeCloud()
    yield fake
    fake.stop()


@pytest.fixture
def cheap_vaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """New vaults and backups with a key derivation that tests can afford."""
    make_cheap(monkeypatch)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheap_vaults: None) -> Path:
    monkeypatch.setenv("PERFIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PERFIT_PASSPHRASE", "correct horse")
    monkeypatch.setenv("PERFIT_AGENT_START", "never")
    return tmp_path / "home"


@pytest.fixture
def history_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    lines = [
        {"text": f"The council met in room {n}.", "title": f"Meeting {n}", "date": f"2024-01-{n + 1:02}"}
        for n in range(20)
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines), "utf-8")
    return path


@pytest.fixture
def short_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Updates in this process take a third of the steps, each of which is calls to a cloud."""
    monkeypatch.setattr(schedules, "_LEAST_STEPS", 50)
    monkeypatch.setattr(schedules, "_LEAST_STEPS_IN_FOLDS", 25)


@pytest.fixture
def perfit(
    home: Path, short_updates: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Perfit:
    monkeypatch.setattr(prompts, "has_terminal", lambda: False)  # whoever runs the tests may have one
    monkeypatch.setattr(profile, "OPENING_SECONDS", 0.1)  # most clouds here that are gone stay away
    return Perfit(capsys, monkeypatch)


@pytest.fixture
def enrolled(perfit: Perfit, cloud: Any) -> Perfit:
    perfit.ok("enroll", cloud.invite().encode())
    return perfit


@pytest.fixture
def ready(enrolled: Perfit, history_file: Path) -> Perfit:
    enrolled.ok("history", "import", str(history_file), "--offline")
    return enrolled


@pytest.fixture
def opened(enrolled: Perfit, home: Path) -> Iterator[profile.Profile]:
    """The enrolled profile, in this process."""
    settings = DeviceSettings("default", home)
    with profile.Profile.open(settings, passphrase=lambda: "correct horse") as opened:
        yield opened


@pytest.fixture
def messages() -> list[str]:
    """What a profile tells its user."""
    return []


@pytest.fixture
def newcomer(
    home: Path, cloud: Any, history_file: Path, messages: list[str], short_updates: None
) -> Iterator[profile.Profile]:
    """Somebody with examples and without an update, whose headlines a model writes that reads chats."""
    task = TASKS["news_headline"].resolved(True)
    cloud.own_tasks["news_headline"] = task
    settings = DeviceSettings("one", home)
    with profile.Profile.create(settings, passphrase=PASSPHRASE, notify=messages.append) as created:
        created.perform(Enroll(cloud.invite().encode()))
        created.perform(ImportExamples(read_history(history_file, task), offline=True))
        yield created


@pytest.fixture
def app(opened: profile.Profile) -> Iterator[App]:
    """An app at the endpoint of that profile."""
    with serving(opened) as app:
        yield app
