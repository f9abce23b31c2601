"""What is wrong with this device, its profile and its cloud, and what mends it."""

from __future__ import annotations

import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Operation
from perfit_shared.errors import (
    BrokenOff,
    Busy,
    ConfigError,
    IdentityRevoked,
    NotAuthenticated,
    PerfitError,
    TooSlow,
    Unavailable,
)
from perfit_shared.ownership import check_ownership

if TYPE_CHECKING:
    from perfit_device.cloud.codec import CloudInfo
    from perfit_device.profile import Profile
    from perfit_device.settings import DeviceSettings

__all__ = ["Examination", "Examine", "Finding", "examine_machine"]

_ROOM = 64 << 20  # bytes that a vault and its next change fit into
_SKEW = 300.0  # seconds between the clock and a file of ours
_MADE = datetime(2026, 11, 1, tzinfo=UTC)  # no clock is right that shows less
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
_EXEMPT = ("no_grpc_proxy", "no_proxy")


@dataclass(frozen=True)
class Finding:
    """`state` is "ok", "note" (nothing is broken) or "broken"; `fix` is one line, "" where none is needed."""

    name: str
    state: str
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Examination:
    findings: list[Finding]


# -- without the profile -------------------------------------------------------------------------------


def examine_machine(settings: DeviceSettings) -> list[Finding]:
    """What can be seen without opening the vault; nothing is written."""
    return [
        _clock(settings.vault_path),
        _home(settings.home),
        _disk(settings.home),
        _proxies(),
        _profile(settings),
        _agent(settings.vault_path.with_name("agent.sock")),
    ]


def _clock(vault: Path) -> Finding:
    now = datetime.now(UTC)
    fix = "set the clock, best from the network: timedatectl set-ntp true"
    if now < _MADE:
        return Finding("clock", "broken", f"it shows {now:%Y-%m-%d}, before perfit was made", fix)
    try:
        ahead = vault.stat().st_mtime - time.time()
    except OSError:
        ahead = 0.0
    if ahead > _SKEW:
        return Finding("clock", "broken", f"the vault was written {ahead / 60:.0f} minutes from now", fix)
    return Finding("clock", "ok", f"{now:%Y-%m-%dT%H:%M:%SZ}")


def _home(home: Path) -> Finding:
    if not home.exists():
        return Finding("home", "note", f"{home} is not there yet", "`perfit enroll INVITE` makes it")
    try:
        check_ownership(home)
    except ConfigError as error:
        text, _, fix = str(error).partition("; ")
        return Finding("home", "broken", text, fix)
    if not os.access(home, os.W_OK | os.X_OK):
        return Finding("home", "broken", f"{home} cannot be written", f"chmod u+rwx {home}")
    return Finding("home", "ok", f"{home} is its owner's alone to write")


def _disk(home: Path) -> Finding:
    at = next(path for path in (home, *home.absolute().parents) if path.exists())
    free = shutil.disk_usage(at).free
    if free < _ROOM:
        text = f"{free >> 20} MiB are free where {home} lies, and {_ROOM >> 20} are needed"
        return Finding("disk", "broken", text, "free some room, or set PERFIT_HOME to another disk")
    return Finding("disk", "ok", f"{free / (1 << 30):.1f} GiB free")


def _proxies() -> Finding:
    """gRPC sends every call through a proxy that the environment names; many pass no HTTP/2."""
    named = [name for name in _PROXIES if os.environ.get(name)]
    if not named:
        return Finding("proxy", "ok", "no variable names one")
    if exempt := next((name for name in _EXEMPT if os.environ.get(name)), ""):
        return Finding("proxy", "note", f"{named[0]} is set; {exempt} says which hosts go without it")
    return Finding(
        "proxy",
        "note",
        f"{named[0]} is set, and calls to the cloud go through it",
        "where they fail, name the cloud's host in no_proxy",
    )


def _profile(settings: DeviceSettings) -> Finding:
    """Whether there is a vault, and its lock: the keyring is looked at where it is needed."""
    from perfit_device.vault.store import Vault

    name = settings.profile
    if not settings.vault_path.exists():
        fix = "`perfit enroll INVITE` makes it; `perfit profiles` lists others"
        return Finding("profile", "note", f'there is no profile "{name}"', fix)
    try:
        lock = Vault.lock_of(settings.vault_path, costly=settings.costly_vault)
    except PerfitError as error:
        return _broken("profile", error)
    if lock == "keyring":
        return _keyring(name)
    return Finding("profile", "ok", f'"{name}", locked by a passphrase; the keyring is not needed')


def _agent(address: Path) -> Finding:
    if not address.exists():
        return Finding("agent", "ok", "none runs; commands open the vault themselves")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.settimeout(5)
        try:
            stream.connect(str(address))
        except OSError as error:
            text = f"nobody answers at {address}: {error.strerror or error}"
            return Finding("agent", "note", text, "perfit agent start")
    return Finding("agent", "ok", "one runs and answers")


def _keyring(name: str) -> Finding:
    import keyring

    backend = keyring.get_keyring()
    if backend.priority <= 0:
        text = f'"{name}" is locked by the keyring, and {backend.name} keeps nothing'
        return Finding("keyring", "broken", text, "log in to the desktop, or unlock its keyring")
    return Finding("keyring", "ok", f'"{name}" is locked by {backend.name}')


# -- with the profile ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Examine(Operation[Examination]):
    """The vault, the certificate, the cloud and what was trained for it. Nothing raises but a lost caller."""

    def run(self, profile: Profile, emit: Emit) -> Examination:
        return Examination(list(_examine(profile)))


def _examine(profile: Profile) -> Iterator[Finding]:
    from perfit_device.cloud.channels import addresses_of
    from perfit_device.cloud.retry import NO_RETRIES
    from perfit_device.cloud_record import read_enrolment

    yield _vault(profile)
    with profile.vault() as vault:
        enrolment = read_enrolment(vault)
    if enrolment is None:
        yield Finding("cloud", "note", "this profile is enrolled with none", "perfit enroll INVITE")
        return
    yield _certificate(enrolment.certificate)
    found = [_reach(address) for address in addresses_of(enrolment.address)]
    yield from (each for each in found if each is not None)
    if all(found):
        return
    try:
        _, info = profile.connect(NO_RETRIES)
    except PerfitError as error:
        yield _broken("cloud", error)
        return
    yield Finding("cloud", "ok", f"{enrolment.address} answers, by TLS both ways")
    yield from _shifts(profile, info)


def _vault(profile: Profile) -> Finding:
    """Opening it has checked its file and the list of its rows; every row is read once more."""
    from perfit_device import history, personal
    from perfit_device.cloud_record import read_record

    try:
        with profile.vault() as vault:
            items = history.load(vault)
            cloud_id = read_record(vault).cloud_id
            for artefact in personal.artefacts(vault, cloud_id):
                for version in (personal.read_versions(vault, cloud_id, artefact) or _NONE).kept:
                    personal.read_tensors(vault, cloud_id, artefact, version.number)
    except PerfitError as error:
        return _broken("vault", error)
    return Finding("vault", "ok", f"whole, with {len(items)} examples")


def _certificate(certificate: bytes) -> Finding:
    from perfit_device.cloud.identity import certificate_life

    start, end = certificate_life(certificate)
    now = datetime.now(UTC)
    if now + timedelta(seconds=_SKEW) < start:
        text = f"it holds from {start:%Y-%m-%dT%H:%MZ}, which the clock has not reached"
        return Finding("certificate", "broken", text, "set the clock")
    if now > end:
        text = f"it lapsed on {end:%Y-%m-%d}"
        return Finding("certificate", "note", text, "the next command renews it, within 30 days")
    return Finding("certificate", "ok", f"until {end:%Y-%m-%dT%H:%MZ}; it renews by itself")


def _reach(address: str) -> Finding | None:
    """What keeps a plain connection from the address; None: nothing does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        fix = "is it running, and this machine online? ask the operator for its address"
        return Finding("cloud", "broken", f"nothing answers at {address}: {reason}", fix)
    return None


def _shifts(profile: Profile, info: CloudInfo) -> Iterator[Finding]:
    """Whether what was trained fits what the cloud serves now."""
    from perfit_device import personal

    served = {artefact.name: artefact for artefact in info.artefacts}
    with profile.vault() as vault:
        trained = {
            name: personal.read_versions(vault, info.cloud_id, name)
            for name in personal.artefacts(vault, info.cloud_id)
        }
    for name, versions in sorted(trained.items()):
        if versions is None:
            continue
        if name not in served:
            fix = "ask the operator; your shift stays"
            yield Finding(f"shift {name}", "note", "the cloud serves this task no longer", fix)
        elif versions.now.artefact_version != served[name].version:
            text = "it was trained for another version of the artefact than the cloud serves"
            fix = f"perfit update --fresh --task {name}"
            yield Finding(f"shift {name}", "broken", text, fix)
        else:
            yield Finding(f"shift {name}", "ok", f"version {versions.current}, as the cloud serves it")


# -- fixes ---------------------------------------------------------------------------------------------


class _NoVersions:
    kept = ()


_NONE = _NoVersions()
_FIXES: dict[type[PerfitError], str] = {
    IdentityRevoked: "ask the operator for a new invite, then: perfit enroll INVITE --replace",
    NotAuthenticated: "ask the operator for a new invite, then: perfit enroll INVITE --replace",
    BrokenOff: "look whether the clock is right, and ask the operator",
    Busy: "try again later",
    TooSlow: "try again later",
    Unavailable: "try again later; ask the operator when it stays",
}


def _broken(name: str, error: PerfitError) -> Finding:
    """A message of ours ends with what to do; where it does not, the class of the error knows."""
    text, _, told = str(error).partition("; ")
    fix = next((_FIXES[cls] for cls in type(error).__mro__ if cls in _FIXES), "")
    return Finding(name, "broken", text, fix or told or "ask the operator")
