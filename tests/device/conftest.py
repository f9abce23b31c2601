"""Fixtures of the device: a fake cloud, a home with a vault, and the command line over both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import FakeCloud
from tests.support.vaults import CHEAP

from perfit_device import profile
from perfit_device.cli import prompts


@pytest.fixture
def cloud() -> Iterator[FakeCloud]:
    fake = FakeCloud()
    yield fake
    fake.stop()


@pytest.fixture
def cheap_vaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """New vaults with a key derivation that tests can afford."""
    from perfit_device.vault import store as vault

    monkeypatch.setattr(vault, "KdfParams", lambda: CHEAP)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheap_vaults: None) -> Path:
    monkeypatch.setenv("PERFIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PERFIT_PASSPHRASE", "correct horse")
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
def perfit(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Perfit:
    monkeypatch.setattr(prompts, "has_terminal", lambda: False)  # whoever runs the tests may have one
    monkeypatch.setattr(profile, "OPENING_SECONDS", 0.1)  # most clouds here that are gone stay away
    return Perfit(capsys, monkeypatch)


@pytest.fixture
def enrolled(perfit: Perfit, cloud: Any) -> Perfit:
    perfit.ok("enroll", cloud.invite().encode())
    return perfit


@pytest.fixture
def ready(enrolled: Perfit, history_file: Path) -> Perfit:
    enrolled.ok("history", "import", str(history_file))
    return enrolled
