"""Servers that share a PostgreSQL: one enrols and has no model, others serve and have no CA key."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from tests.support.adapt_calls import EXAMPLES, Stream, examples, opening
from tests.support.authority import DAY, csr_of, new_key
from tests.support.cloud import Device, Running, failure, generate
from tests.support.fleet import NAMES, Fleet
from tests.support.waiting import wait_for

from local_postgres import MISSING, Cluster, server_programs
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.identity import identity_cache
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.server_renewal import ServerRenewal
from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.identity import Identity
from perfit_shared.errors import (
    CertificateExpired,
    CertificateSuperseded,
    IdentityRevoked,
    NotAuthenticated,
    Unavailable,
)
from perfit_shared.invites import Invite
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb

pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = pytest.mark.skipif(server_programs() is None, reason=MISSING)


def at(running: Running, device: Device) -> Device:
    """The same device, at another server."""
    return running.with_certificate(device.key, device.certificate)


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.PERMISSION_DENIED)  # type: ignore[attr-defined]
    return False


# -- who may call ------------------------------------------------------------------------------------


def test_who_enrolled_at_one_is_served_by_all_without_a_key_of_an_authority(fleet: Fleet) -> None:
    first, second = fleet.replica(), fleet.replica()
    key = new_key()
    request = enrol_pb.EnrollRequest(secret=fleet.authority.invite(60)[0], csr=csr_of(key))
    answer = fleet.enrolment().Enroll(request)
    assert answer.address == "127.0.0.1:1"  # where the others are found, behind a balancer
    for replica in (first, second):
        device = replica.with_certificate(key, answer.certificate)
        assert device.describe().cloud_id == answer.cloud_id == fleet.authority.cloud_id
        assert list(device.stub.Generate(generate()))
        keys = [path.name for path in replica.config.state.iterdir() if "_ca.pem" in path.name]
        assert keys == []


def test_calls_of_known_devices_ask_the_database_nothing(
    fleet: Fleet, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = fleet.replica().device()
    device.describe()
    cluster.stop()
    try:
        for _ in range(20):
            assert list(device.stub.Generate(generate()))
    finally:
        cluster.start()


def test_a_revocation_reaches_calls_and_streams_of_every_server(fleet: Fleet, artefact: Artefact) -> None:
    replicas = [fleet.replica() for _ in range(2)]
    device, other = replicas[0].device(), replicas[0].device()
    devices = [at(replica, device) for replica in replicas]
    streams = [Stream(each, opening(artefact), examples(EXAMPLES)) for each in devices]
    for each in devices:
        each.describe()
    begun = time.monotonic()
    fleet.authority.revoke(device.identity)
    with ThreadPoolExecutor(4) as pool:
        waits = [pool.submit(wait_for, lambda each=each: is_refused(each.describe)) for each in devices]
        waits += [pool.submit(wait_for, stream.call.done) for stream in streams]
        for wait in waits:
            wait.result()
    assert time.monotonic() - begun < 2
    for replica in replicas:
        at(replica, other).describe()
    fleet.authority.restore(device.identity)
    wait_for(lambda: not is_refused(devices[1].describe))


def test_without_word_of_the_database_nobody_is_let_in_until_it_is_back(
    fleet: Fleet, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = fleet.replica()
    device, revoked = replica.device(), replica.device()
    device.describe()
    revoked.describe()
    fleet.authority.revoke(revoked.identity)
    cluster.stop()
    try:
        forward = time.monotonic
        monkeypatch.setattr(identity_cache.time, "monotonic", lambda: forward() + 31)
        status, metadata, _ = failure(device.describe)
        assert (status, metadata["perfit-code"]) == ("UNAVAILABLE", "unavailable")
    finally:
        cluster.start()
    wait_for(lambda: _served(device))
    assert is_refused(revoked.describe)


def _served(device: Device) -> bool:
    try:
        return bool(device.describe())
    except grpc.RpcError:
        return False


# -- renewals of devices -----------------------------------------------------------------------------


def test_a_certificate_that_holds_is_renewed_where_devices_enrol(fleet: Fleet) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    first, second = fleet.replica(), fleet.replica()
    device = first.device()
    renew = enrol_grpc.IdentityStub(device.channel).Renew
    csr = csr_of(key := new_key())
    assert failure(lambda: renew(enrol_pb.RenewRequest(csr=csr)))[1] == {"perfit-code": "not_here"}
    stub = fleet.enrolment()
    nonce = stub.Challenge(enrol_pb.ChallengeRequest()).nonce
    signature = device.key.sign(b"perfit-renew-v1" + nonce + csr, ec.ECDSA(hashes.SHA256()))
    request = enrol_pb.RenewLapsedRequest(
        certificate=device.certificate, nonce=nonce, signature=signature, csr=csr
    )
    # Devices try this whenever a server goes away, and no certificate of theirs should be retired by it.
    assert failure(lambda: stub.RenewLapsed(request))[1] == {"perfit-code": "certificate_valid"}
    request.not_here = True
    answer = stub.RenewLapsed(request)
    assert failure(lambda: stub.RenewLapsed(request))[0] == "UNAUTHENTICATED"  # the nonce was used
    second.with_certificate(key, answer.certificate).describe()
    # The other server hears that the old one is retired within a second.
    wait_for(lambda: _code(device.describe) == "certificate_superseded", seconds=5)


def test_perfit_itself_renews_where_it_enrolled(fleet: Fleet) -> None:
    """The balancer may lead it to a server that issues nothing."""
    replica = fleet.replica()
    secret, expires = fleet.authority.invite(60)
    invite = Invite(fleet.enrolling.addresses.enrol_address, fleet.authority.server_ca_der, expires, secret)
    first = replace(enrolments.enroll(invite, Identity.create()), address=replica.address)
    with mutual_channel(first, first.address) as channel:
        renewed = replace(enrolments.renew(channel, first, first.address), address=replica.address)
    assert renewed.certificate != first.certificate
    with Cloud(renewed) as cloud:
        assert cloud.describe().cloud_id == fleet.authority.cloud_id
    with Cloud(first) as cloud, pytest.raises(CertificateSuperseded):
        cloud.describe()


def _code(call: Callable[[], object]) -> str:
    try:
        call()
    except grpc.RpcError as error:
        return str(dict(error.trailing_metadata()).get("perfit-code"))  # type: ignore[attr-defined]
    return ""


def test_a_device_leaves_at_any_server(fleet: Fleet) -> None:
    first, second = fleet.replica(), fleet.replica()
    device = first.device()
    enrol_grpc.IdentityStub(device.channel).Leave(enrol_pb.LeaveRequest())
    wait_for(lambda: is_refused(at(second, device).describe), seconds=5)


# -- roles -------------------------------------------------------------------------------------------


def test_a_server_does_what_its_roles_say(fleet: Fleet, artefact: Artefact) -> None:
    answers, updates = fleet.replica(("answers",)), fleet.replica(("updates",))
    device = answers.device()
    assert list(device.stub.Generate(generate()))
    not_here = ("UNIMPLEMENTED", {"perfit-code": "not_here"})
    assert failure(lambda: device.stub.ComputeGradient(pb.ComputeGradientRequest()))[:2] == not_here
    stream = Stream(device, opening(artefact), examples(EXAMPLES))
    assert failure(lambda: next(stream.call))[:2] == not_here
    other = at(updates, device)
    assert failure(lambda: next(other.stub.Generate(generate())))[:2] == not_here
    gradient = failure(lambda: other.stub.ComputeGradient(pb.ComputeGradientRequest()))
    assert gradient[0] == "INVALID_ARGUMENT"  # of what it asks
    for each in (device, other):
        each.stub.FetchSeed(pb.FetchSeedRequest(artefact=artefact.name))


# -- servers' certificates ---------------------------------------------------------------------------


def test_a_server_renews_its_certificate_by_proof_of_its_key(fleet: Fleet) -> None:
    replica = fleet.replica()
    files = ServerFiles(replica.config.state)
    before = files.identity()
    fleet.renewal(replica).renew()
    after = files.identity()
    assert after.certificate_pem != before.certificate_pem and after.key_pem != before.key_pem
    assert after.certificate.subject == before.certificate.subject
    assert {path.stat().st_mode & 0o777 for path in replica.config.state.glob("*.pem")} == {0o600}
    fleet.renewal(replica).renew()  # with the new one


def test_a_server_that_lay_still_renews_a_lapsed_certificate(
    fleet: Fleet, clock: Callable[[float], None]
) -> None:
    replica = fleet.replica()
    clock(7.5 * DAY)
    fleet.renewal(replica).renew()
    assert ServerFiles(replica.config.state).identity().ends_at > time.time()


def test_servers_that_began_with_the_same_files_renew_apart(fleet: Fleet, tmp_path: Path) -> None:
    replica = fleet.replica()
    shutil.copytree(replica.config.state, tmp_path / "copy")
    address = fleet.enrolling.addresses.enrol_address
    renewals = [fleet.renewal(replica), ServerRenewal(ServerFiles(tmp_path / "copy"), address)]
    for renewal in renewals * 2:
        renewal.renew()


def first_files(fleet: Fleet, folder: Path) -> ServerRenewal:
    """Of a server that has not begun yet: a Secret's, say."""
    folder.mkdir(mode=0o700)
    fleet.authority.write_serving_files(folder, NAMES)
    return ServerRenewal(ServerFiles(folder), fleet.enrolling.addresses.enrol_address)


def test_first_files_may_be_renewed_as_long_as_any_certificate(
    fleet: Fleet, tmp_path: Path, clock: Callable[[float], None]
) -> None:
    """7 days and `lapse_seconds`, which is a day here: docs/fleet.md, "First files end"."""
    early, late = (first_files(fleet, tmp_path / name) for name in ("early", "late"))
    clock(7.9 * DAY)
    early.renew()
    clock(8.1 * DAY)
    with pytest.raises(CertificateExpired):
        late.renew()


def test_first_files_end_with_a_rotation(fleet: Fleet, tmp_path: Path) -> None:
    rotation = fleet.authority.rotation
    before = first_files(fleet, tmp_path / "before")
    rotation.take("begin", now=True)
    begun = [first_files(fleet, tmp_path / f"begun{n}") for n in range(2)]
    rotation.take("switch", now=True)
    switched = first_files(fleet, tmp_path / "switched")
    with pytest.raises(Unavailable):  # it does not trust the new authority
        before.renew()
    begun[0].renew()
    rotation.take("finish", now=True)
    with pytest.raises(NotAuthenticated):
        begun[1].renew()
    switched.renew()


def test_a_server_that_was_withdrawn_renews_no_more(fleet: Fleet) -> None:
    replica, other = fleet.replica(), fleet.replica()
    (identity,) = [
        device.identity
        for device in fleet.authority.devices()
        if device.identity in replica.server._credentials._identity.certificate.subject.rfc4514_string()
    ]
    fleet.authority.revoke(identity)
    before = (replica.config.state / "server.pem").read_bytes()
    with pytest.raises(IdentityRevoked):
        fleet.renewal(replica).renew()
    assert (replica.config.state / "server.pem").read_bytes() == before
    fleet.renewal(other).renew()


def test_no_certificate_of_a_device_renews_as_a_server(fleet: Fleet, tmp_path: Path) -> None:
    replica = fleet.replica()
    device = replica.device()
    from tests.support.cloud import key_pem, pem

    path = replica.config.state / "server.pem"
    path.write_bytes(key_pem(device.key) + pem(device.certificate))
    with pytest.raises(NotAuthenticated, match="did not issue"):
        fleet.renewal(replica).renew()


def test_the_key_of_another_server_proves_nothing(fleet: Fleet) -> None:
    first, second = fleet.replica(), fleet.replica()
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    from perfit_cloud.service.identity.server_authority import RENEW_SERVER_CONTEXT

    mine, theirs = (ServerFiles(each.config.state).identity() for each in (first, second))
    nonce, csr = fleet.authority.challenge(), csr_of(new_key())
    for key, fails in ((mine.key, True), (theirs.key, False)):
        request = {
            "certificate": theirs.certificate.public_bytes(serialization.Encoding.DER),
            "nonce": nonce,
            "signature": key.sign(RENEW_SERVER_CONTEXT + nonce + csr, ec.ECDSA(hashes.SHA256())),
            "csr": csr,
        }
        if fails:
            with pytest.raises(NotAuthenticated, match="not signed"):
                fleet.authority.servers.renew(**request)
        else:
            fleet.authority.servers.renew(**request)
