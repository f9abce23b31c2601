"""Both authorities are replaced, and nobody enrols anew: over real TLS, with the device's own client."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.authority import DAY, csr_of, enrolled, new_key, open_authority, renew_lapsed, renewed
from tests.support.cloud import Running

from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.identity.certificates import identity_of
from perfit_cloud.service.identity.challenges import Challenges
from perfit_cloud.service.identity.server_authority import RENEW_SERVER_CONTEXT
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_shared.errors import ConfigError, InvalidInput, NotAuthenticated, PerfitError
from perfit_shared.invites import Invite


def invite(running: Running) -> Invite:
    secret, expires = running.authority.invite(600)
    return Invite(running.server.addresses.enrol_address, running.authority.server_ca_der, expires, secret)


def described(enrolment: Enrolment) -> str:
    with Cloud(enrolment) as cloud:
        return cloud.describe().cloud_id


def renewed_over_the_wire(enrolment: Enrolment) -> Enrolment:
    with mutual_channel(enrolment, enrolment.address) as channel:
        return enrolments.renew(channel, enrolment, enrolment.address)


def take(running: Running, step: str, *, now: bool = False) -> None:
    """As `perfit-cloud rotate` does, in a process beside the server."""
    other = Authority(running.config.state, certificate_seconds=9, lapse_seconds=running.config.lapse_seconds)
    other.rotation.take(step, now=now)
    other.close()


def test_a_device_goes_through_a_rotation_without_a_new_invite(
    run: Callable[..., Running], clock: Callable[[float], None]
) -> None:
    running = run(certificate_seconds=300 * DAY)
    first = enrolments.enroll(invite(running), Identity.create())
    assert first.other_server_ca == b""

    clock(2)
    take(running, "begin")
    assert described(first) == first.cloud_id  # who has not heard yet is served
    clock(4)
    both = renewed_over_the_wire(first)
    assert both.server_ca == first.server_ca and both.other_server_ca not in (b"", both.server_ca)
    new_root = both.other_server_ca
    assert described(both) == first.cloud_id
    assert Enrolment.from_bytes(both.to_bytes()).roots == both.roots

    clock(6)
    take(running, "switch")
    assert described(both) == first.cloud_id  # it shows a certificate of the new authority, without a restart
    assert not (running.config.state / "server_ca.next.pem").exists()
    clock(8)
    later = renewed_over_the_wire(both)  # its certificate is the new device CA's
    assert (later.server_ca, later.other_server_ca) == (new_root, first.server_ca)
    assert described(later) == first.cloud_id
    newcomer = enrolments.enroll(invite(running), Identity.create())
    assert described(newcomer) == first.cloud_id

    clock(10)
    take(running, "finish")
    last = renewed_over_the_wire(later)
    assert (last.server_ca, last.other_server_ca) == (new_root, b"")
    for enrolment in (last, newcomer):
        assert described(enrolment) == first.cloud_id
    # A certificate of the old device CA is trusted no more: the handshake itself refuses it.
    with pytest.raises(PerfitError), Cloud(both) as cloud:
        cloud.describe()


def test_who_knows_the_old_root_alone_finds_no_cloud_after_a_switch_by_force(
    run: Callable[..., Running],
) -> None:
    """The control of the test above: the roots that a device was told are what it trusts."""
    running = run()
    first = enrolments.enroll(invite(running), Identity.create())
    take(running, "begin")
    with pytest.raises(InvalidInput, match="1 devices or servers have not renewed"):
        take(running, "switch")
    take(running, "switch", now=True)
    with pytest.raises(NotAuthenticated, match="not the cloud that this device trusts"):
        described(first)


def test_steps_come_in_order_and_wait_for_all_who_may_still_renew(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    authority = open_authority(tmp_path / "state", life=7 * DAY, lapse=30 * DAY)
    certificate, lost, revoked = (enrolled(authority) for _ in range(3))
    authority.revoke(authority.check(revoked))
    rotation = authority.rotation
    for step in ("switch", "finish"):
        with pytest.raises(InvalidInput, match="the next step is begin"):
            rotation.take(step)
    state = rotation.take("begin")
    assert (state.step, state.next, len(state.waits_for)) == ("begun", "switch", 2)
    with pytest.raises(InvalidInput, match="next step is switch"):
        rotation.take("begin")
    clock(6 * DAY)
    renewed(authority, certificate)
    (waiting,) = rotation.state().waits_for
    assert waiting.identity == authority.check(lost)
    with pytest.raises(InvalidInput, match="1 devices"):
        rotation.take("switch")
    clock(38 * DAY)  # now it may renew no more
    (waiting,) = rotation.take("switch").waits_for  # it has not heard of this step
    assert waiting.identity == identity_of(certificate)
    clock(44 * DAY)
    assert rotation.take("finish").step == "finished"
    assert rotation.take("begin").step == "begun"  # the next time


def test_a_server_that_starts_in_the_middle_knows_where_it_stands(tmp_path: Path) -> None:
    state = tmp_path / "state"
    authority = open_authority(state)
    authority.rotation.take("begin")
    assert open_authority(state).other_server_ca_der == authority.other_server_ca_der != b""
    authority.rotation.take("switch", now=True)
    again = open_authority(state)
    assert again.server_ca_der == authority.server_ca_der
    assert again.rotation.state().step == "switched"
    assert {path.stat().st_mode & 0o777 for path in state.iterdir()} == {0o600}
    (state / "rotation.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        again.rotation.state()


def test_a_switch_that_was_cut_short_is_taken_again(tmp_path: Path) -> None:
    authority = open_authority(tmp_path / "state")
    authority.rotation.take("begin")
    roots = {authority.server_ca_der, authority.other_server_ca_der}
    authority._server_ca.switch()  # and the process ended here
    authority.rotation.take("switch", now=True)
    assert {authority.server_ca_der, authority.other_server_ca_der} == roots
    certificate = enrolled(authority)
    assert authority._device_ca.get().current.issued(certificate)
    assert authority.rotation.state().step == "switched"


def test_a_lapsed_certificate_of_the_old_authority_is_renewed_after_the_switch(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    authority, key = open_authority(tmp_path / "state"), new_key()
    old = enrolled(authority, key)
    authority.rotation.take("begin")
    authority.rotation.take("switch", now=True)
    clock(2 * DAY)
    new = renew_lapsed(authority, old, key)
    assert new.issuer == authority._device_ca.get().current.certificate.subject != old.issuer
    authority.rotation.take("finish", now=True)
    with pytest.raises(NotAuthenticated, match="did not issue"):
        renew_lapsed(authority, old, key)


def test_a_server_that_renews_while_a_rotation_begins_counts_as_told_only_if_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It read the roots before the step and noted its time after it: nobody waited for it."""
    authority = open_authority(tmp_path / "ca")
    identity = authority.write_serving_files(tmp_path, ["localhost"])
    own, new, nonce = ServerFiles(tmp_path).identity(), new_key(), authority.challenge()
    csr = csr_of(new)
    signature = own.key.sign(RENEW_SERVER_CONTEXT + nonce + csr, ec.ECDSA(hashes.SHA256()))
    use = Challenges.use

    def begun_meanwhile(challenges: Challenges, challenge: bytes) -> None:
        use(challenges, challenge)
        at = authority.rotation.take("begin").at
        while int(time.time()) == at:
            time.sleep(0.05)

    monkeypatch.setattr(Challenges, "use", begun_meanwhile)
    certificate = own.certificate.public_bytes(serialization.Encoding.DER)
    issued = authority.servers.renew(certificate=certificate, nonce=nonce, signature=signature, csr=csr)
    waits_for = {device.identity for device in authority.rotation.state().waits_for}
    assert len(issued.server_cas) == (1 if identity in waits_for else 2)
    authority.close()
