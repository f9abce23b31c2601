"""How an agent starts: by a passphrase that is typed, handed over, or by the system at login."""

from __future__ import annotations

import os
import plistlib
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.agents import SECRET, connected
from tests.support.device import Perfit
from tests.support.waiting import wait_for

from perfit_device.agent import client, install, launch
from perfit_device.operations.examples import FindExamples
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault

TASK = "news_headline"


@pytest.fixture
def settings(home: Path) -> DeviceSettings:
    return DeviceSettings("default", home)


@pytest.fixture
def made(settings: DeviceSettings) -> DeviceSettings:
    """Not enrolled."""
    Vault.create(settings.vault_path, SECRET).close()
    return settings


# -- passphrases -----------------------------------------------------------------------------------


@pytest.mark.parametrize("with_newline", ["", "\n", "\r\n"])
def test_the_passphrase_of_a_file_or_a_command(
    made: DeviceSettings, perfit: Perfit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, with_newline: str
) -> None:
    file = tmp_path / "a file; touch nothing"
    file.write_bytes((SECRET + with_newline).encode())
    monkeypatch.delenv("PERFIT_PASSPHRASE")
    monkeypatch.setenv("PERFIT_PASSPHRASE_FILE", str(file))
    perfit.ok("history", "list")
    monkeypatch.setenv("PERFIT_PASSPHRASE_FILE", str(tmp_path / "none"))
    assert "PERFIT_PASSPHRASE_FILE cannot be read" in perfit.fails("history", "list")
    monkeypatch.delenv("PERFIT_PASSPHRASE_FILE")
    monkeypatch.setenv("PERFIT_PASSPHRASE_COMMAND", f"cat '{file}'")
    perfit.ok("history", "list")
    monkeypatch.setenv("PERFIT_PASSPHRASE_COMMAND", f"echo x > {tmp_path}/made; echo")
    assert "wrong passphrase" in perfit.fails("history", "list", code=6)
    assert not (tmp_path / "made").exists(), "no shell reads it"
    for command, why in (
        ("false", "code 1"),
        ("/none", "No such file"),
        ("'", "failed"),
        ("true", "gave no passphrase"),
    ):
        monkeypatch.setenv("PERFIT_PASSPHRASE_COMMAND", command)
        assert why in perfit.fails("history", "list")


@pytest.mark.slow
def test_a_typed_passphrase_starts_an_agent(made: DeviceSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal whose command reads a pipe; the next command asks for nothing."""
    monkeypatch.delenv("PERFIT_PASSPHRASE")
    monkeypatch.delenv("PERFIT_AGENT_START")
    program = (
        "import os, sys\n"
        "os.close(os.open(sys.argv[1], os.O_RDWR))\n"
        "sys.argv = ['perfit', *sys.argv[2:]]\n"
        "from perfit_device.cli.main import run\n"
        "run()"
    )
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", program, os.ttyname(theirs), "history", "import", "-", "--task", TASK]
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdin is not None
    process.stdin.write(b'{"text": "It rained.", "title": "Rain"}\n')
    process.stdin.close()
    process.stdin = None
    asked = b""
    while b"Passphrase: " not in asked:
        asked += os.read(ours, 1000)
    os.write(ours, f"{SECRET}\n".encode())
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    agent = connected(made)
    with agent:
        assert len(agent.perform(FindExamples())) == 1
        os.kill(agent.hello.pid, signal.SIGTERM)
    wait_for(lambda: client.connect(made) is None)
    os.close(ours)
    os.close(theirs)


# -- files for the system --------------------------------------------------------------------------


def test_the_system_s_files_say_how_to_start_it(made: DeviceSettings, perfit: Perfit, tmp_path: Path) -> None:
    words, home = ["/opt/a dir/python", "-m", "x", '100% "$HOME"'], "/home/a b"
    unit = tmp_path / "perfit-agent-default.service"
    unit.write_text(install.systemd_unit("default", words, home))
    assert '"/opt/a dir/python" "-m" "x" "100%% \\"$$HOME\\""' in unit.read_text()
    if analyze := shutil.which("systemd-analyze"):
        own = tmp_path / "own.service"
        own.write_text(install.systemd_unit("default", launch.command_for(made, unlock="later"), home))
        done = subprocess.run(
            [analyze, "verify", "--user", str(own)], capture_output=True, text=True, check=False
        )
        assert "own.service" not in done.stderr, done.stderr
    plist = plistlib.loads(install.launchd_plist("label", words, home, Path("/log")))
    assert plist["ProgramArguments"] == words and plist["EnvironmentVariables"] == {"PERFIT_HOME": home}
    assert "100% &quot;" not in install.task_xml(
        words
    ) and "<Command>/opt/a dir/python</Command>" in install.task_xml(words)
    shown = perfit.ok("agent", "install", "--print")
    assert "perfit_device.agent" in shown and '"later"' in shown
    assert '"keyring"' in perfit.ok("agent", "install", "--print", "--keyring")


def test_install_and_uninstall(
    made: DeviceSettings, perfit: Perfit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(install, "_run", lambda words: False)
    _, _, said = perfit("agent", "install")
    unit = tmp_path / "config" / "systemd" / "user" / "perfit-agent-default.service"
    assert unit.exists() and "try it yourself: systemctl --user" in said
    perfit.ok("agent", "uninstall")
    assert not unit.exists()
    assert "nothing was installed" in perfit.fails("agent", "uninstall")
