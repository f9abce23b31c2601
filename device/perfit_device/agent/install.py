"""What lets the system start an agent at login: a systemd user unit, a launchd agent, a scheduled task.

The agent starts locked, so `perfit unlock` opens it; or it takes the key from the keyring, where its owner
said so.
"""

from __future__ import annotations

import contextlib
import os
import plistlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from perfit_device.agent.launch import command_for
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import ConfigError, NotFound
from perfit_shared.files import write_whole

__all__ = ["StartFile", "install", "launchd_plist", "start_file", "systemd_unit", "task_xml", "uninstall"]

_STOP_SECONDS = 60  # for an update's checkpoint


@dataclass(frozen=True)
class StartFile:
    """A file for the system, and the commands that make it read it and forget it."""

    path: Path
    data: bytes
    enable: Sequence[Sequence[str]]
    disable: Sequence[Sequence[str]]


def start_file(settings: DeviceSettings, *, unlock: str) -> StartFile:
    """That of this platform."""
    words, home = command_for(settings, unlock=unlock), str(settings.home.absolute())
    if sys.platform == "win32":
        name = f"perfit-agent-{settings.profile}"
        path = settings.vault_path.with_name("agent-task.xml")
        return StartFile(
            path,
            task_xml(words).encode("utf-16"),
            [["schtasks", "/Create", "/F", "/TN", name, "/XML", str(path)]],
            [["schtasks", "/Delete", "/F", "/TN", name]],
        )
    if sys.platform == "darwin":
        label = f"org.perfit.agent.{settings.profile}"
        path = Path.home() / "Library" / "LaunchAgents" / f"{label}.plist"
        log = settings.vault_path.with_name("agent.log").absolute()
        domain = f"gui/{os.getuid()}"
        return StartFile(
            path,
            launchd_plist(label, words, home, log),
            [["launchctl", "bootstrap", domain, str(path)]],
            [["launchctl", "bootout", f"{domain}/{label}"]],
        )
    unit = f"perfit-agent-{settings.profile}.service"
    path = settings.systemd_folder / unit
    return StartFile(
        path,
        systemd_unit(settings.profile, words, home).encode(),
        [["systemctl", "--user", "daemon-reload"], ["systemctl", "--user", "enable", unit]],
        [["systemctl", "--user", "disable", unit]],
    )


def install(file: StartFile) -> list[str]:
    """Write the file and have the system read it; the commands that failed, for a person to try."""
    try:
        file.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file.path, file.data, mode=0o644)
    except OSError as error:
        raise ConfigError(f"cannot write {file.path}: {error.strerror}") from error
    return [" ".join(words) for words in file.enable if not _run(words)]


def uninstall(file: StartFile) -> None:
    """Raises NotFound where it is not installed."""
    if not file.path.exists():
        raise NotFound(f"there is no {file.path}; nothing was installed")
    for words in file.disable:
        _run(words)
    file.path.unlink()


def _run(words: Sequence[str]) -> bool:
    with contextlib.suppress(OSError):
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    return False


def systemd_unit(profile: str, words: Sequence[str], home: str) -> str:
    return f"""[Unit]
Description=perfit agent of the profile {profile}

[Service]
ExecStart={" ".join(map(_systemd_word, words))}
Environment={_systemd_word(f"PERFIT_HOME={home}")}
Restart=on-failure
RestartSec=10
TimeoutStopSec={_STOP_SECONDS}
StandardOutput=null
UMask=0077
LimitCORE=0
NoNewPrivileges=yes

[Install]
WantedBy=default.target
"""


def _systemd_word(text: str) -> str:
    """Quoted as systemd.service(5) reads it: %, $ and quotes mean something there."""
    for character, quoted in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%"), ("$", "$$")):
        text = text.replace(character, quoted)
    return f'"{text}"'


def launchd_plist(label: str, words: Sequence[str], home: str, log: Path) -> bytes:
    values = {
        "Label": label,
        "ProgramArguments": list(words),
        "EnvironmentVariables": {"PERFIT_HOME": home},
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ExitTimeOut": _STOP_SECONDS,
        "ProcessType": "Background",
        "StandardOutPath": os.devnull,
        "StandardErrorPath": str(log),
        "Umask": 0o077,
    }
    return plistlib.dumps(values)


def task_xml(words: Sequence[str]) -> str:
    """For Windows' Task Scheduler, which takes the home from the user's own environment."""
    return f"""<?xml version="1.0" encoding="UTF-16"?>
<Task version="1.2" xmlns="http://schemas.microsoft.com/windows/2004/02/mit/task">
  <Triggers><LogonTrigger><Enabled>true</Enabled></LogonTrigger></Triggers>
  <Principals><Principal id="owner"><RunLevel>LeastPrivilege</RunLevel></Principal></Principals>
  <Settings>
    <MultipleInstancesPolicy>IgnoreNew</MultipleInstancesPolicy>
    <DisallowStartIfOnBatteries>false</DisallowStartIfOnBatteries>
    <StopIfGoingOnBatteries>false</StopIfGoingOnBatteries>
    <ExecutionTimeLimit>PT0S</ExecutionTimeLimit>
    <Hidden>true</Hidden>
  </Settings>
  <Actions Context="owner">
    <Exec>
      <Command>{escape(words[0])}</Command>
      <Arguments>{escape(subprocess.list2cmdline(words[1:]))}</Arguments>
    </Exec>
  </Actions>
</Task>
"""
