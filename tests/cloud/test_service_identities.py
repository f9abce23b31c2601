"""Over real TLS: renewals retire what they replace, and no call waits for the database."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.authority import DAY, csr_of, new_key
from tests.support.cloud import TIMEOUT, Device, Running, failure, generate
from tests.support.doubles import Drip
from tests.support.waiting import wait_for

from perfit_cloud.service.identity import certificates, identity_cache, sqlite_store
from perfit_cloud.service.identity.authority import Authority
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc

RETIRED = ("UNAUTHENTICATED", {"perfit-code": "certificate_superseded"})


def renewed(running: Running, device: Device) -> Device:
    key = new_key()
    answer = enrol_grpc.IdentityStub(device.channel).Renew(enrol_pb.RenewRequest(csr=csr_of(key)))
    return running.with_certificate(key, answer.certificate)


@contextmanager
def locked(running: Running, how: str = "EXCLUSIVE") -> Iterator[None]:
    """The database, by somebody who does not let go: a backup, a shell, a process that hangs."""
    other = sqlite3.connect(running.config.state / "authority.db", isolation_level=None, timeout=TIMEOUT)
    other.execute(f"BEGIN {how}")
    try:
        yield
    finally:
        other.close()


# -- renewals ----------------------------------------------------------------------------------------


def test_the_old_key_calls_no_more_once_the_new_one_did(run: Callable[..., Running]) -> None:
    running = run()
    old = running.device()
    old.describe()
    new = renewed(running, old)
    old.describe()
    new.describe()
    assert failure(old.describe)[:2] == RETIRED
    fresh = running.with_certificate(old.key, old.certificate)  # a handshake knows nothing of it
    assert failure(fresh.describe)[:2] == RETIRED
    renew = enrol_grpc.IdentityStub(old.channel).Renew
    assert failure(lambda: renew(enrol_pb.RenewRequest(csr=csr_of(old.key))))[:2] == RETIRED
    assert new.identity == old.identity
    new.describe()


def test_a_stream_of_the_old_certificate_ends_in_its_own_time(run: Callable[..., Running]) -> None:
    drip = Drip()
    running = run(engine=drip)
    old = running.device()
    stream = old.stub.Generate(generate(), timeout=TIMEOUT)
    drip.go.release()
    next(stream)
    renewed(running, old).describe()
    drip.go.release()
    assert next(stream).text == "word "
    assert failure(old.describe)[:2] == RETIRED
    stream.cancel()


def test_a_certificate_that_holds_is_not_renewed_by_signature(run: Callable[..., Running]) -> None:
    running = run()
    device = running.device()
    stub = enrol_grpc.EnrollmentStub(running.enrolment())
    nonce, csr = stub.Challenge(enrol_pb.ChallengeRequest()).nonce, csr_of(new_key())
    request = enrol_pb.RenewLapsedRequest(
        certificate=device.certificate,
        nonce=nonce,
        csr=csr,
        signature=device.key.sign(b"perfit-renew-v1" + nonce + csr, ec.ECDSA(hashes.SHA256())),
    )
    assert failure(lambda: stub.RenewLapsed(request))[:2] == (
        "INVALID_ARGUMENT",
        {"perfit-code": "certificate_valid"},
    )


def test_a_server_that_started_with_its_clock_ahead_is_trusted_once_it_is_right(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its certificate was not valid yet for every device, until it was half over or the server restarted."""
    with monkeypatch.context() as ahead:
        ahead.setattr(certificates, "time", SimpleNamespace(time=lambda: time.time() + 40 * DAY))
        running = run()
    running.device().describe()


# -- a database that somebody holds --------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite_store, "_LOCK_SECONDS", 0.2)


@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE"])
def test_no_call_waits_for_a_database_that_somebody_holds(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Every Describe waited 9.5 s. Here the database is waited for so long that a call would fail."""
    monkeypatch.setattr(sqlite_store, "_LOCK_SECONDS", 20 * TIMEOUT)
    running = run()
    old, other = running.device(), running.device()
    old.describe()
    new = renewed(running, old)
    stub, secret = enrol_grpc.EnrollmentStub(running.enrolment()), running.invite()
    with ThreadPoolExecutor(1) as pool:
        with locked(running, how):
            # Waits for the database, with a lock of ours.
            enrolling = pool.submit(stub.Enroll, enrol_pb.EnrollRequest(secret=secret, csr=csr_of(new_key())))
            for device in (other, new, new, other):
                device.describe()
            assert failure(old.describe)[:2] == RETIRED  # first uses are known at once
            assert not enrolling.done()
        assert enrolling.result(TIMEOUT).certificate
    new.describe()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["IMMEDIATE", "EXCLUSIVE"])
def test_what_needs_the_database_is_told_to_come_back(run: Callable[..., Running], how: str) -> None:
    running = run()
    device = running.device()
    enrol = enrol_grpc.EnrollmentStub(running.enrolment()).Enroll
    request = enrol_pb.EnrollRequest(secret=running.invite(), csr=csr_of(new_key()))
    with locked(running, how):
        for call in (lambda: enrol(request), lambda: renewed(running, device)):
            status, metadata, _ = failure(call)
            assert (status, metadata["perfit-code"]) == ("RESOURCE_EXHAUSTED", "busy")
            assert int(metadata["perfit-retry-ms"]) > 0
    assert enrol(request).certificate
    renewed(running, device).describe()


@pytest.mark.usefixtures("impatient")
def test_what_was_seen_meanwhile_is_written_when_the_database_is_free(run: Callable[..., Running]) -> None:
    running = run()
    old = running.device()
    old.describe()
    new = renewed(running, old)
    with locked(running):
        new.describe()
        assert failure(old.describe)[:2] == RETIRED

    def is_written() -> bool:
        return any(device.superseded is not None for device in running.authority.devices())

    wait_for(is_written)
    second = Authority(running.config.state, certificate_seconds=9, lapse_seconds=9)  # as after a restart
    assert second.devices() == running.authority.devices()


def test_a_revocation_by_another_process_is_seen_without_a_call_for_it(run: Callable[..., Running]) -> None:
    running = run()
    device, other = running.device(), running.device()
    device.describe()
    Authority(running.config.state, certificate_seconds=9, lapse_seconds=9).revoke(device.identity)

    def is_refused() -> bool:
        try:
            device.describe()
        except Exception as error:
            return error.code().name == "PERMISSION_DENIED"  # type: ignore[attr-defined]
        return False

    wait_for(is_refused)
    other.describe()


def test_a_device_that_another_process_enrolled_is_known_at_its_first_call(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused until the next look at the database, half a second later."""
    monkeypatch.setattr(identity_cache, "_REFRESH_SECONDS", 1000.0)
    running = run()
    second = Authority(running.config.state, certificate_seconds=900, lapse_seconds=9)
    key = new_key()
    certificate = second.enroll(second.invite(60)[0], csr_of(key))
    running.with_certificate(key, certificate).describe()


@pytest.mark.usefixtures("impatient")
def test_a_database_that_cannot_be_read_is_told_the_operator(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(identity_cache, "_STALE_SECONDS", 0.3)
    running = run()
    device = running.device()

    def age() -> float:
        value = running.server.telemetry.registry.get_sample_value("perfit_identities_age_seconds")
        assert value is not None
        return value

    with locked(running):
        wait_for(lambda: "who holds authority.db" in caplog.text)
        assert age() > 0.3
        device.describe()
    wait_for(lambda: "is read again" in caplog.text)
    assert device.identity not in caplog.text


def test_a_damaged_database_stops_no_call(run: Callable[..., Running]) -> None:
    running = run()
    device = running.device()
    path: Path = running.config.state / "authority.db"
    path.write_bytes(b"damage" * 1000)
    with pytest.raises(Exception, match=r"malformed|not a database|I/O"):
        running.authority.refresh()
    device.describe()
