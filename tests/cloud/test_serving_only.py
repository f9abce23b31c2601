"""A server that enrols nobody: it has the device CA's certificate and one of its own, and no CA key."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.authority import DAY, csr_of, new_key, open_authority
from tests.support.cloud import Running, failure, generate
from tests.support.waiting import wait_for

from perfit_cloud.cli.roles import opened_identity
from perfit_cloud.config import CloudConfig
from perfit_cloud.service.identity.authenticator import Authenticator
from perfit_cloud.service.identity.server_identity import ServerIdentity
from perfit_shared.errors import Busy, CertificateExpired, ConfigError
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc


def shown_by(running: Running) -> str:
    """The certificate that the server shows."""
    host, port = running.address.rsplit(":", 1)
    return ssl.get_server_certificate((host, int(port)))


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except Exception as error:
        return error.code().name == "PERMISSION_DENIED"  # type: ignore[attr-defined]
    return False


def test_it_serves_without_the_keys_of_the_authorities(run: Callable[..., Running]) -> None:
    running = run(serves_only=True)
    state = running.config.state
    assert not [name for name in ("server_ca.pem", "device_ca.pem") if (state / name).exists()]
    device, other = running.device(), running.device()  # enrolled by another process
    assert device.describe().cloud_id == running.authority.cloud_id
    assert list(device.stub.Generate(generate()))
    running.authority.revoke(device.identity)
    wait_for(lambda: is_refused(device.describe))
    other.describe()
    assert not [name for name in ("server_ca.pem", "device_ca.pem") if (state / name).exists()]


def test_it_neither_enrols_nor_renews(run: Callable[..., Running]) -> None:
    running = run(serves_only=True)
    device = running.device()
    renew = enrol_grpc.IdentityStub(device.channel).Renew
    assert failure(lambda: renew(enrol_pb.RenewRequest(csr=csr_of(new_key()))))[:2] == (
        "UNIMPLEMENTED",
        {"perfit-code": "not_here"},
    )
    assert running.server.addresses.enrol_address == ""
    # `perfit-cloud invite` reads there where devices enrol.
    assert not (running.config.state / "addresses.json").exists()


def test_it_shows_the_certificate_that_was_renewed_for_it(
    run: Callable[..., Running], clock: Callable[[float], None]
) -> None:
    running = run(serves_only=True, certificate_seconds=300 * DAY)
    device, first = running.device(), shown_by(running)
    running.authority.write_serving_files(running.config.state, ["localhost", "127.0.0.1"])
    device.describe()
    assert shown_by(running) == first  # at half of its life, and not before
    clock(4 * DAY)
    assert shown_by(running) != first
    running.with_certificate(device.key, device.certificate).describe()


def test_where_certificates_are_issued_the_server_renews_its_own(
    run: Callable[..., Running], clock: Callable[[float], None]
) -> None:
    running = run(certificate_seconds=300 * DAY)
    first = shown_by(running)
    assert shown_by(running) == first
    clock(50 * DAY)
    assert shown_by(running) != first


def test_what_it_needs_must_be_there_and_its_own(tmp_path: Path) -> None:
    state = tmp_path / "state"
    authority = open_authority(state)
    with pytest.raises(ConfigError, match=r"device_ca\.crt"):
        Authenticator.open(state)
    with pytest.raises(ConfigError, match=r"server\.pem"):
        ServerIdentity.load(state / "server.pem")
    authority.write_serving_files(state, ["localhost"])
    assert b"PRIVATE" not in (state / "device_ca.crt").read_bytes()
    ServerIdentity.load(state / "server.pem")
    (state / "server.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ServerIdentity.load(state / "server.pem")
    (state / "device_ca.crt").write_bytes(b"damage")
    with pytest.raises(ConfigError, match="cannot use"):
        Authenticator.open(state)
    (state / "device_ca.crt").chmod(0o666)
    with pytest.raises(ConfigError, match="others can write"):
        Authenticator.open(state)


def test_a_server_whose_certificate_ended_starts_only_once_that_is_renewed(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    """It served one that nobody trusts, and said that it was ready."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    open_authority(tmp_path / "ca").write_serving_files(state, ["localhost"])
    nobody = "127.0.0.1:1"
    config = CloudConfig(
        state=state,
        roles=("answers",),
        database="host=127.0.0.1 port=1 connect_timeout=2",
        authority_address=nobody,
    )

    def start() -> None:
        with contextlib.ExitStack() as ends, opened_identity(config, ends.callback):
            pass

    clock(6.9 * DAY)
    with pytest.raises(Busy):  # by the database; the certificate holds
        start()
    clock(7.1 * DAY)
    with pytest.raises(CertificateExpired, match=f"not renewed at {nobody}.*`perfit-cloud server`"):
        start()
