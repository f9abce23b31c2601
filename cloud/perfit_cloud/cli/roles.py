"""What a process needs for its roles: the authorities' keys to enrol, else a certificate of its own."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from perfit_cloud.cli.common import open_authority
from perfit_cloud.config import CloudConfig
from perfit_shared.errors import CertificateExpired

if TYPE_CHECKING:
    from perfit_cloud.service.identity.authenticator import Authenticator
    from perfit_cloud.service.identity.authority import Authority
    from perfit_cloud.service.identity.server_files import ServerFiles
    from perfit_cloud.service.sealing.keys import ReplicaKeys
    from perfit_cloud.service.server_renewal import ServerRenewal

__all__ = ["issuer_of", "opened_identity", "sealing_keys"]


@contextlib.contextmanager
def opened_identity(
    config: CloudConfig, end: Callable[[Callable[[], None]], object]
) -> Iterator[Authenticator]:
    """Who may call, as this process knows it; an Authority where it enrols. `end` calls what closes it.

    Without the role enrolment its certificate is renewed now and every hour. Raises ConfigError, Busy, and
    CertificateExpired where that has ended and nobody renewed it.
    """
    with contextlib.ExitStack() as stack:
        if "enrolment" in config.roles:
            authenticator: Authenticator = open_authority(config)
        else:
            stack.enter_context(_renewing(config))  # first: the certificate may have lapsed by now
            authenticator = _open_authenticator(config)
        stack.callback(end, authenticator.close)
        yield authenticator


def issuer_of(authenticator: Authenticator) -> Authority | None:
    """The same where it can issue certificates."""
    from perfit_cloud.service.identity.authority import Authority

    return authenticator if isinstance(authenticator, Authority) else None


def sealing_keys(authenticator: Authenticator, config: CloudConfig) -> ReplicaKeys | None:
    """Of this process, certified by its own authority, or by the one that it asks.

    None where no front ends TLS. Raises PerfitError where nobody certifies them.
    """
    from perfit_cloud.service.sealing.keys import ReplicaKeys

    if not config.front_address:
        return None
    certify = (issuer_of(authenticator) or _renewal(config)).certify_sealing_key
    return ReplicaKeys(certify, life_seconds=config.sealing_seconds, replica=config.sealing_replica)


def _files(config: CloudConfig) -> ServerFiles:
    from perfit_cloud.service.identity.server_files import ServerFiles

    return ServerFiles(config.state, trusts_group=config.state_writers == "group")


def _renewal(config: CloudConfig) -> ServerRenewal:
    from perfit_cloud.service.server_renewal import ServerRenewal

    return ServerRenewal(_files(config), config.authority_address)


def _open_authenticator(config: CloudConfig) -> Authenticator:
    from perfit_cloud.service.identity.authenticator import Authenticator

    return Authenticator.open(
        config.state,
        trusts_group=config.state_writers == "group",
        database=config.database,
        refuse_after=config.unheard_seconds,
    )


@contextlib.contextmanager
def _renewing(config: CloudConfig) -> Iterator[None]:
    renewal = _renewal(config)
    if not renewal.try_renew():
        _check_end(_files(config), config.authority_address)
    renewal.start()
    try:
        yield
    finally:
        renewal.stop()


def _check_end(files: ServerFiles, address: str) -> None:
    """Raises CertificateExpired: a server that nobody trusts would say that it is ready, and get calls."""
    ended = files.identity().certificate.not_valid_after_utc
    if ended.timestamp() < time.time():
        raise CertificateExpired(
            f"this server's certificate ended on {ended:%Y-%m-%d} and was not renewed at {address}; mend "
            "what the log says, or make it new files with `perfit-cloud server`"
        )
