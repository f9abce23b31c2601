"""What a serving process says once it is ready: to its operator, to scripts, and to `perfit-cloud status`."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from perfit_cloud.config import CloudConfig
from perfit_cloud.service.state_folder import SERVING
from perfit_shared.errors import Busy
from perfit_shared.files import write_whole

if TYPE_CHECKING:
    from perfit_cloud.hardening.process import Hardening
    from perfit_cloud.service.identity.authority import Authority
    from perfit_cloud.service.server import CloudServer
    from perfit_cloud.service.settings import ServerParts

__all__ = ["announce_enrolment", "announce_serving", "say_what_is_next"]


def announce_enrolment(config: CloudConfig, server: CloudServer, *, as_json: bool) -> None:
    """Of a process without a model: where it enrols, on one line of standard output."""
    addresses = server.addresses
    if as_json:
        line = json.dumps({**asdict(addresses), "roles": config.roles})
    else:
        line = f"enrolling on {addresses.enrol_address} for {addresses.address}"
    print(line, flush=True)


def announce_serving(
    config: CloudConfig, server: CloudServer, parts: ServerParts, hardening: Hardening, *, as_json: bool
) -> None:
    """What is served, where, and how: one line on standard output, and a file for `perfit-cloud status`."""
    told = json.dumps(_told(server, parts, hardening))
    write_whole(config.state / SERVING, told.encode(), mode=0o600)
    print(told if as_json else _line(server, parts), flush=True)
    if not as_json and parts.issuer is not None:
        say_what_is_next(parts.issuer, config, list(parts.catalog.artefacts))


def _told(server: CloudServer, parts: ServerParts, hardening: Hardening) -> dict[str, object]:
    """For programs."""
    base, memory = parts.catalog.base, parts.memory
    return {
        "address": server.addresses.address,
        "enrol_address": server.addresses.enrol_address,
        "front_address": server.front_address,
        "model": base.name,
        "fingerprint": base.fingerprint,
        "precision": base.precision,
        "artefacts": list(parts.catalog.artefacts),
        "hardening": asdict(hardening),
        "memory": {**asdict(memory), "total": memory.total},
    }


def _line(server: CloudServer, parts: ServerParts) -> str:
    """For people."""
    base, addresses = parts.catalog.base, server.addresses
    enrolment = (
        f"enrolment on {addresses.enrol_address}" if addresses.enrol_address else "enrolment elsewhere"
    )
    front = f", sealed calls on {server.front_address}" if server.front_address else ""
    return (
        f"serving {base.name} ({base.fingerprint[:12]}) with "
        f"{', '.join(parts.catalog.artefacts) or 'no artefacts'} on {addresses.address}, "
        f"{enrolment}{front}; {base.precision}"
    )


def say_what_is_next(authority: Authority, config: CloudConfig, artefacts: list[str]) -> None:
    """On standard error, to an operator for whom nobody has enrolled yet."""
    with contextlib.suppress(Busy):
        if authority.devices():
            return
        own = "" if config.state == CloudConfig().state else f" --state {shlex.quote(str(config.state))}"
        lines = [f"nobody has enrolled yet: perfit-cloud invite{own} prints an invite for one person"]
        if artefacts:
            task = "chat" if "chat" in artefacts else artefacts[0]
            lines.append(f"who has it runs: perfit enroll INVITE, then perfit ask TEXT --task {task}")
        else:
            lines.append(
                "and there is no artefact to ask with: perfit-cloud collective blank makes one without "
                "data, perfit-cloud collective train learns one from many users"
            )
        print(*lines, sep="\n", file=sys.stderr, flush=True)
