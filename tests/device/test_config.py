"""The config file: a flag stands over a variable, a variable over the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_device.config import KEYS, Config
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import ConfigError


def test_a_flag_then_a_variable_then_the_file(
    perfit: Perfit, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PERFIT_AGENT_START")
    assert DeviceSettings.from_environment(None).profile == "default"
    perfit.ok("config", "set", "profile", "work")
    perfit.ok("config", "set", "task", "reply")  # of the profile at hand, which is work by now
    perfit.ok("--profile", "home.2", "config", "set", "task", "chat")
    perfit.ok("config", "set", "agent.lock_minutes", "30")
    assert perfit.json("config", "list") == {
        "profile": "work",
        "task.work": "reply",
        "task.home.2": "chat",
        "agent.lock_minutes": 30.0,
    }
    settings = DeviceSettings.from_environment(None)
    assert (settings.profile, settings.task) == ("work", "reply")
    assert (settings.config.lock_minutes, settings.config.agent_start) == (30, "auto")
    monkeypatch.setenv("PERFIT_PROFILE", "home.2")
    monkeypatch.setenv("PERFIT_AGENT_LOCK_MINUTES", "5")
    settings = DeviceSettings.from_environment(None)
    assert (settings.profile, settings.task, settings.config.lock_minutes) == ("home.2", "chat", 5)
    monkeypatch.setenv("PERFIT_TASK", "commit_message")
    assert DeviceSettings.from_environment(None).task == "commit_message"
    settings = DeviceSettings.from_environment("work")
    assert (settings.profile, settings.task) == ("work", "commit_message")
    perfit.ok("config", "unset", "profile")
    assert "not set" in perfit.fails("config", "get", "profile")
    assert perfit.ok("config", "get", "task.work") == "reply\n"
    assert (home / "config.toml").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "text",
    [
        'colour = "red"',
        "profile = 3",
        'profile = "../.."',
        "agent.lock_minutes = -1",
        "agent.lock_minutes = nan",
        "agent.lock_minutes = true",
        f"agent.lock_minutes = 1{400 * '0'}",
        'agent.start = "perhaps"',
        'agent.start = ["auto"]',
        "update.auto = 1",
        "task = 1",
        "[task.work.deep]\nx = 1",
        "x" * 70_000,
        "= what",
        "a = " + 5000 * "[",
        "\udcff",
    ],
)
def test_a_file_that_cannot_be_is_one_clear_error(perfit: Perfit, home: Path, text: str) -> None:
    home.mkdir(mode=0o700)
    (home / "config.toml").write_bytes(text.encode(errors="surrogateescape"))
    assert "config.toml" in perfit.fails("profiles")
    with pytest.raises(ConfigError):
        Config.read(home / "config.toml")


def test_a_setting_that_cannot_be_changes_nothing(perfit: Perfit, home: Path) -> None:
    perfit.ok("config", "set", "agent.start", "never")
    before = (home / "config.toml").read_bytes()
    assert (
        "task.PROFILE, sealed.PROFILE, front_ca.PROFILE, examples.PROFILE, agent.lock_minutes, agent.start"
        in perfit.fails("config", "set", "colour", "red")
    )
    assert "auto or never" in perfit.fails("config", "set", "agent.start", "later")
    assert (home / "config.toml").read_bytes() == before


def test_the_default_task_is_what_commands_mean(ready: Perfit, cloud: Any) -> None:
    cloud.tasks = ["commit_message", "reply"]
    assert "the cloud has several tasks" in ready.fails("ask", "x")
    ready.ok("config", "set", "task", "commit_message")
    assert ready.json("ask", "x")["task"] == "commit_message"
    assert ready.json("ask", "x", "--task", "reply")["task"] == "reply"
    ready.ok("config", "set", "task", "poems")
    assert 'the cloud has no task "poems"' in ready.fails("ask", "x")


def test_help_lists_every_key(perfit: Perfit) -> None:
    """The group's short help stood in the place of the list."""
    _, text, _ = perfit("config", "--help")
    assert not [key for key in KEYS if key.removesuffix(".PROFILE") not in text.split()]


def test_status_names_unused_tasks_in_one_line(ready: Perfit, cloud: Any) -> None:
    cloud.tasks = ["news_headline", "reply", "chat"]
    lines = ready.ok("status").splitlines()
    [unused] = [line for line in lines if line.startswith("unused")]
    assert unused.split(maxsplit=1)[1] == "chat, reply: nothing of yours"
    assert "news_headline" in lines and "reply" not in lines and "chat" not in lines
