"""Servers without the authorities' keys have their sealing keys certified by one that has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tests.support.authority import DAY
from tests.support.cloud import Running, key_pem, pem
from tests.support.fleet import Fleet

from local_postgres import MISSING, server_programs
from perfit_cloud.service.identity.certificates import server_of
from perfit_cloud.service.identity.server_authority import SealingKeyRequest
from perfit_cloud.service.identity.server_files import ServerFiles
from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.cloud.sealing import Sealing
from perfit_shared.errors import (
    CertificateExpired,
    IdentityRevoked,
    InvalidInput,
    NotAuthenticated,
    Unavailable,
)
from perfit_shared.sealing.keys import PrivateSealingKey, SealingKey
from perfit_shared.types import Sampling

pytest.importorskip("psycopg", reason="psycopg is not installed")
pytestmark = pytest.mark.skipif(server_programs() is None, reason=MISSING)
FRONT = "127.0.0.1:0"


def answer(running: Running, address: str, sealing: Sealing | None) -> str:
    with Cloud(running.enrolled(address), sealing=sealing) as cloud:
        chunks = cloud.generate("the cat sat", ShiftUse(), Sampling(max_new_tokens=6))
        return "".join(chunk.text for chunk in chunks)


def wanted(key_id: str = "a.1", life_seconds: int = 60) -> SealingKeyRequest:
    return SealingKeyRequest.of(PrivateSealingKey.generate().public, key_id, life_seconds)


def certified(fleet: Fleet, running: Running, request: SealingKeyRequest, **other: Any) -> bytes:
    """As the RPC does, with what `other` has in place of what the server would send."""
    own, nonce = ServerFiles(running.config.state).identity(), fleet.authority.challenge()
    signature = own.key.sign(request.signed(nonce), ec.ECDSA(hashes.SHA256()))
    sent = {"certificate": own.certificate.public_bytes(Encoding.DER), "nonce": nonce, "signature": signature}
    return fleet.authority.servers.certify(other.pop("sends", request), **{**sent, **other})


def test_it_takes_sealed_calls(fleet: Fleet) -> None:
    one, two = fleet.replica(front_address=FRONT), fleet.replica(front_address=FRONT, sealing_replica="r2")
    for running in (one, two):
        assert not list(running.config.state.glob("*_ca.pem"))
        direct = answer(running, running.address, None)
        assert direct
        assert answer(running, running.front_address, Sealing()) == direct
    published = two.device().describe().sealing_keys
    found = [SealingKey.from_certificate(key.certificate, fleet.authority.server_ca_der) for key in published]
    assert [key.key_id[:3] for key in found] == ["r2."]


def test_each_address_is_sealed_to_by_keys_of_its_own(fleet: Fleet) -> None:
    """The other address is another server, which cannot open what is sealed to the first."""
    one, two = fleet.replica(front_address=FRONT), fleet.replica(front_address=FRONT)
    wants = answer(one, one.address, None)
    enrolment = one.enrolled(f"{one.front_address},{two.front_address}")
    with Cloud(enrolment, sealing=Sealing()) as cloud:
        cloud.describe()
        first = cloud._connections.for_call()
        at, other = (one, two) if first.address == one.front_address else (two, one)
        first.end()
        at.server.stop(0)
        assert RetryPolicy(give_up=30.0, first_wait=0.01).call(cloud.describe)
        second = cloud._connections.for_call()
        second.end()
        assert second.address == other.front_address
        assert second.sealer is not None and first.sealer is not None
        assert second.sealer.key().key_id != first.sealer._keys[0].key_id
        text = "".join(c.text for c in cloud.generate("the cat sat", ShiftUse(), Sampling(max_new_tokens=6)))
        assert text == wants


def test_a_server_that_was_withdrawn_gets_none(fleet: Fleet) -> None:
    running, other = fleet.replica(), fleet.replica()
    identity, _ = server_of(ServerFiles(running.config.state).identity().certificate)
    assert certified(fleet, running, wanted())
    fleet.authority.revoke(identity)
    with pytest.raises(IdentityRevoked, match="server was withdrawn"):
        fleet.renewal(running).certify_sealing_key(PrivateSealingKey.generate().public, "a", 60)
    fleet.renewal(other).certify_sealing_key(PrivateSealingKey.generate().public, "a", 60)


def test_nobody_else_gets_one(fleet: Fleet) -> None:
    running, other = fleet.replica(), fleet.replica()
    theirs = ServerFiles(other.config.state).identity().certificate.public_bytes(Encoding.DER)
    with pytest.raises(NotAuthenticated, match="not signed"):
        certified(fleet, running, wanted(), certificate=theirs)
    device = running.device()
    path = running.config.state / "server.pem"
    own = path.read_bytes()
    path.write_bytes(key_pem(device.key) + pem(device.certificate))
    with pytest.raises(NotAuthenticated, match="did not issue"):
        fleet.renewal(running).certify_sealing_key(PrivateSealingKey.generate().public, "a", 60)
    path.write_bytes(own)
    certified(fleet, running, wanted())


@pytest.mark.parametrize(
    "change",
    [{"key_id": "a.2"}, {"life_seconds": 61}, {"x25519": wanted().x25519}, {"mlkem": wanted().mlkem}],
)
def test_what_was_signed_is_what_is_certified(fleet: Fleet, change: dict[str, Any]) -> None:
    request = wanted()
    with pytest.raises(NotAuthenticated, match="not signed"):
        certified(fleet, fleet.replica(), request, sends=replace(request, **change))


def test_a_nonce_is_good_once(fleet: Fleet) -> None:
    running, request, nonce = fleet.replica(), wanted(), fleet.authority.challenge()
    own = ServerFiles(running.config.state).identity()
    signature = own.key.sign(request.signed(nonce), ec.ECDSA(hashes.SHA256()))
    certified(fleet, running, request, nonce=nonce, signature=signature)
    with pytest.raises(NotAuthenticated, match="used already"):
        certified(fleet, running, request, nonce=nonce, signature=signature)


@pytest.mark.parametrize(
    "request_",
    [wanted(life_seconds=8 * DAY), wanted(life_seconds=0), wanted("a b"), replace(wanted(), mlkem=b"x")],
)
def test_what_is_no_key_is_refused(fleet: Fleet, request_: SealingKeyRequest) -> None:
    with pytest.raises(InvalidInput):
        certified(fleet, fleet.replica(), request_)


def test_a_lapsed_certificate_gets_none_until_it_is_renewed(
    fleet: Fleet, clock: Callable[[float], None]
) -> None:
    running = fleet.replica()
    clock(7.5 * DAY)
    renewal, key = fleet.renewal(running), PrivateSealingKey.generate().public
    with pytest.raises(CertificateExpired):
        renewal.certify_sealing_key(key, "a", 60)
    renewal.renew()
    renewal.certify_sealing_key(key, "a", 60)


def test_while_nobody_certifies_calls_go_on(fleet: Fleet) -> None:
    """And a server that starts then does not."""
    running, now = fleet.replica(), 0.0
    renewal = fleet.renewal(running)
    keys = ReplicaKeys(renewal.certify_sealing_key, life_seconds=100, clock=lambda: now)
    fleet.enrolling.stop(0)
    now = 60.0
    assert len(keys.published()) == 1
    assert keys._making is not None
    keys._making.join(30)
    assert len(keys.published()) == 1
    with pytest.raises(Unavailable):
        ReplicaKeys(renewal.certify_sealing_key, life_seconds=100)
