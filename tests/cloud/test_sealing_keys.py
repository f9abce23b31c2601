"""A server's sealing keys, the certificates it knows, and the calls it has seen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.support.authority import enrolled, open_authority, renewed
from tests.support.cloud import Running

from perfit_cloud.service.identity.authority import Authority
from perfit_cloud.service.sealing.callers import KnownCertificates, Replays
from perfit_cloud.service.sealing.keys import ReplicaKeys
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.sealing import Sealing
from perfit_shared.errors import Busy, ConfigError, NotAuthenticated, SealBroken, SealUnknown, StoreFailed
from perfit_shared.sealing.calls import fingerprint_of
from perfit_shared.sealing.keys import PublicSealingKey, SealingKey
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import sealing_pb2 as sealing


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock_() -> Clock:
    return Clock()


def ids(keys: ReplicaKeys, authority: Authority) -> list[str]:
    """Once a key that was due is made, or could not be."""
    keys.published()
    if keys._making is not None:
        keys._making.join(10)
    return [
        SealingKey.from_certificate(key.certificate, authority.server_ca_der).key_id
        for key in keys.published()
    ]


def test_keys_roll_and_the_old_one_is_taken_until_its_end(authority: Authority, clock_: Clock) -> None:
    keys = ReplicaKeys(authority.certify_sealing_key, life_seconds=100, replica="a", clock=clock_)
    [first] = ids(keys, authority)
    assert first.startswith("a.")
    clock_.now += 49
    assert ids(keys, authority) == [first]
    clock_.now += 1
    second, old = ids(keys, authority)
    assert old == first != second
    assert keys.get(first) and keys.get(second)
    clock_.now += 50
    assert first not in ids(keys, authority)
    assert keys.get(first) is None
    assert keys.get(second)


def test_an_authority_that_is_away_leaves_the_last_key_in_use(authority: Authority, clock_: Clock) -> None:
    is_away = False

    def certify(key: PublicSealingKey, key_id: str, life: int) -> bytes:
        if is_away:
            raise StoreFailed("away")
        return authority.certify_sealing_key(key, key_id, life)

    keys = ReplicaKeys(certify, life_seconds=100, clock=clock_)
    [first] = ids(keys, authority)
    is_away = True
    clock_.now += 60
    assert ids(keys, authority) == [first]
    is_away = False
    assert ids(keys, authority) == [first]  # not asked again at every call
    clock_.now += 10
    assert len(ids(keys, authority)) == 2


def test_no_call_waits_for_a_key_to_be_certified(authority: Authority, clock_: Clock) -> None:
    goes_on, asked = threading.Event(), threading.Event()
    goes_on.set()

    def certify(key: PublicSealingKey, key_id: str, life: int) -> bytes:
        asked.set()
        assert goes_on.wait(10)
        return authority.certify_sealing_key(key, key_id, life)

    keys = ReplicaKeys(certify, life_seconds=100, clock=clock_)
    [first] = ids(keys, authority)
    for each in (goes_on, asked):
        each.clear()
    clock_.now += 60
    began = time.monotonic()
    assert len(keys.published()) == 1
    assert asked.wait(10)
    assert keys.get(first)
    assert len(keys.published()) == 1  # and nobody is asked a second time
    assert time.monotonic() - began < 5
    goes_on.set()
    second, old = ids(keys, authority)
    assert old == first != second


def test_after_a_long_silence_the_first_caller_waits_for_a_key_that_holds(
    authority: Authority, clock_: Clock
) -> None:
    keys = ReplicaKeys(authority.certify_sealing_key, life_seconds=100, clock=clock_)
    [first] = ids(keys, authority)
    clock_.now += 1000
    assert keys.get(first)  # the last one stays until there is another
    found = [SealingKey.from_certificate(k.certificate, authority.server_ca_der) for k in keys.published()]
    assert found[0].key_id != first


@pytest.mark.parametrize("replica", ["a.b", "a b", "ä", "x" * 33])
def test_a_replica_s_name_has_to_fit_where_it_stands(authority: Authority, replica: str) -> None:
    with pytest.raises(ConfigError):
        ReplicaKeys(authority.certify_sealing_key, life_seconds=100, replica=replica)


def test_a_call_is_good_once_for_as_long_as_its_time_is(clock_: Clock) -> None:
    replays = Replays(clock=clock_)
    replays.add(b"one")
    for seconds in (0, 300, 299, 0.9):
        clock_.now += seconds
        with pytest.raises(SealBroken):
            replays.add(b"one")
    clock_.now += 1200
    replays.add(b"one")  # out of time by now, whoever sends it


def test_more_calls_than_can_be_told_apart_are_refused(clock_: Clock) -> None:
    replays = Replays(3, clock=clock_)
    for n in range(3):
        replays.add(bytes([n]))
    with pytest.raises(Busy) as caught:
        replays.add(b"more")
    assert caught.value.retry_ms > 0
    clock_.now += 1300
    replays.add(b"more")


def test_a_certificate_is_shown_once(tmp_path: Path, authority: Authority) -> None:
    der = enrolled(authority).public_bytes(Encoding.DER)
    fingerprint = fingerprint_of(der)
    known = KnownCertificates(lambda: authority.device_ca_pem, 9)
    with pytest.raises(SealUnknown):
        known.of(sealing.SealedProof(fingerprint=fingerprint))
    proof = sealing.SealedProof(certificate=der, fingerprint=fingerprint)
    shown = known.of(proof)
    with pytest.raises(SealUnknown):  # whoever shows it has not proven yet that it is theirs
        known.of(sealing.SealedProof(fingerprint=fingerprint))
    known.remember(proof, shown)
    assert known.of(sealing.SealedProof(fingerprint=fingerprint)) == shown
    with pytest.raises(SealBroken):
        known.of(sealing.SealedProof(certificate=der, fingerprint=bytes(16)))
    stranger = enrolled(open_authority(tmp_path / "other")).public_bytes(Encoding.DER)
    with pytest.raises(NotAuthenticated):
        known.of(sealing.SealedProof(certificate=stranger, fingerprint=fingerprint_of(stranger)))


def test_a_change_of_authorities_forgets_the_certificates(tmp_path: Path, authority: Authority) -> None:
    der = enrolled(authority).public_bytes(Encoding.DER)
    proof = sealing.SealedProof(certificate=der, fingerprint=fingerprint_of(der))
    other = open_authority(tmp_path / "other")
    authorities = other.device_ca_pem + authority.device_ca_pem  # the old one and the new
    known = KnownCertificates(lambda: authorities, 9)
    certificate = known.of(proof)
    known.remember(proof, certificate)
    authorities = other.device_ca_pem
    with pytest.raises(NotAuthenticated):
        known.of(proof)
    with pytest.raises(NotAuthenticated):  # of a call that began before the change
        known.remember(proof, certificate)
    with pytest.raises(SealUnknown):
        known.of(sealing.SealedProof(fingerprint=proof.fingerprint))


def _show(known: KnownCertificates, certificate: x509.Certificate) -> sealing.SealedProof:
    """Show it and prove it; the proof that a later call brings."""
    der = certificate.public_bytes(Encoding.DER)
    proof = sealing.SealedProof(certificate=der, fingerprint=fingerprint_of(der))
    known.remember(proof, known.of(proof))
    return sealing.SealedProof(fingerprint=proof.fingerprint)


def test_one_device_with_many_certificates_crowds_nobody_out(authority: Authority) -> None:
    """Each renewal took a place, so one device could make all others show theirs at every call."""
    known = KnownCertificates(lambda: authority.device_ca_pem, 2)
    other, certificate = _show(known, enrolled(authority)), enrolled(authority)
    for _ in range(5):
        certificate = renewed(authority, certificate)
        _show(known, certificate)
    assert len(known) == 2
    known.of(other)


def test_the_device_that_was_silent_longest_shows_its_certificate_again(authority: Authority) -> None:
    known = KnownCertificates(lambda: authority.device_ca_pem, 2)
    first, second = (_show(known, enrolled(authority)) for _ in range(2))
    known.of(first)
    third = _show(known, enrolled(authority))
    for proof in (first, third):
        known.of(proof)
    with pytest.raises(SealUnknown):
        known.of(second)


# -- evidence: an interface, with a fake on both ends ----------------------------------------------


class FakeAttester:
    def evidence(self, binding: bytes) -> bytes:
        return b"measured:" + binding


class FakeVerifier:
    def verify(self, evidence: bytes, binding: bytes) -> None:
        if evidence != b"measured:" + binding:
            raise NotAuthenticated("no evidence of what runs there")


def attested(authority: Authority) -> ReplicaKeys:
    return ReplicaKeys(authority.certify_sealing_key, life_seconds=3600, attester=FakeAttester())


def test_evidence_is_bound_to_the_key_it_comes_with(run: Callable[..., Running]) -> None:
    running = run(front_address="127.0.0.1:0", sealing_keys=attested)
    with Cloud(running.enrolled(running.front_address), sealing=Sealing(verifier=FakeVerifier())) as cloud:
        cloud.describe()
    given: pb.SealingKey = attested(running.authority).published()[0]
    other: pb.SealingKey = attested(running.authority).published()[0]
    key = SealingKey.from_certificate(given.certificate, running.authority.server_ca_der)
    FakeVerifier().verify(given.evidence, key.public.binding)
    with pytest.raises(NotAuthenticated):
        FakeVerifier().verify(other.evidence, key.public.binding)


def test_a_device_that_asks_for_evidence_takes_no_key_without(run: Callable[..., Running]) -> None:
    running = run(front_address="127.0.0.1:0")
    with (
        Cloud(running.enrolled(running.front_address), sealing=Sealing(verifier=FakeVerifier())) as cloud,
        pytest.raises(NotAuthenticated, match="no evidence"),
    ):
        cloud.describe()
