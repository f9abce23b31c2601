"""What seals and opens, without a network: contexts, chunks, proofs, keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from tests.support.authority import open_authority

from perfit_shared.errors import NotAuthenticated, SealBroken
from perfit_shared.sealing.calls import CallHeader, CallSecret, check_proof, sign_proof
from perfit_shared.sealing.chunks import ChunkOpener, ChunkSealer, most_sealed_bytes, padded_size
from perfit_shared.sealing.keys import PrivateSealingKey, SealingKey

HEADER = CallHeader("/perfit.v1.Personalization/Generate", "a.1", "news_headline", 1_700_000_000_000)


@pytest.fixture(scope="module")
def key() -> PrivateSealingKey:
    return PrivateSealingKey.generate()


@pytest.fixture
def both(key: PrivateSealingKey) -> tuple[CallSecret, CallSecret]:
    """The device's and the server's."""
    sealed = CallSecret.seal(key.public, HEADER)
    return sealed, CallSecret.open(key, HEADER, sealed.sealed)


def test_what_one_side_seals_the_other_opens(both: tuple[CallSecret, CallSecret]) -> None:
    device, server = both
    sealer, opener = ChunkSealer(device.request_keys()), ChunkOpener(server.request_keys())
    payloads = [b"", b"a", b"b" * 70_000, bytes(100), b"\x01\x02\x00"]
    assert [opener.open(sealer.seal(payload)) for payload in payloads] == payloads
    assert not opener.is_complete
    assert opener.open(sealer.seal(b"end", last=True)) == b"end"
    opener.check_complete()
    random = b"r" * 32
    answer = ChunkSealer(server.response_keys(random)).seal(b"yes", last=True)
    assert ChunkOpener(device.response_keys(random)).open(answer) == b"yes"


@pytest.mark.parametrize(
    "other",
    [
        replace(HEADER, method="/perfit.v1.Personalization/Score"),
        replace(HEADER, key_id="a.2"),
        replace(HEADER, artefact="chat"),
        replace(HEADER, time_ms=HEADER.time_ms + 1),
        replace(HEADER, key_id="a.1n", artefact="ews_headline"),  # the same letters, parted elsewhere
    ],
    ids=["method", "key", "artefact", "time", "borders"],
)
def test_what_is_in_the_clear_is_bound(key: PrivateSealingKey, other: CallHeader) -> None:
    sealed = CallSecret.seal(key.public, HEADER).sealed
    with pytest.raises(SealBroken):
        CallSecret.open(key, other, sealed)


def test_another_key_opens_nothing(key: PrivateSealingKey) -> None:
    sealed = CallSecret.seal(key.public, HEADER).sealed
    with pytest.raises(SealBroken):
        CallSecret.open(PrivateSealingKey.generate(), HEADER, sealed)
    for at in (0, 1087, 1088, len(sealed) - 1):  # of ML-KEM's, of X25519's and of the secret's part
        with pytest.raises(SealBroken):
            CallSecret.open(key, HEADER, sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
    for length in (0, len(sealed) - 1):
        with pytest.raises(SealBroken):
            CallSecret.open(key, HEADER, sealed[:length])


def test_a_replay_meets_another_key(both: tuple[CallSecret, CallSecret]) -> None:
    """The same request twice: the server's random bytes part the answers."""
    _, server = both
    answers = [ChunkSealer(server.response_keys(bytes([n]) * 32)).seal(b"the same") for n in range(2)]
    assert answers[0] != answers[1]
    with pytest.raises(SealBroken):
        ChunkOpener(server.response_keys(bytes(32))).open(answers[1])
    with pytest.raises(SealBroken):
        server.response_keys(b"short")


def test_the_directions_have_keys_of_their_own(both: tuple[CallSecret, CallSecret]) -> None:
    device, server = both
    request = ChunkSealer(device.request_keys()).seal(b"mine")
    with pytest.raises(SealBroken):
        ChunkOpener(server.response_keys(bytes(32))).open(request)


@pytest.mark.parametrize(
    "chunks",
    [[1, 0], [0, 0], [1], [2, 0, 1], [0, 2]],
    ids=["swapped", "twice", "first left out", "moved", "gap"],
)
def test_order_counts(both: tuple[CallSecret, CallSecret], chunks: list[int]) -> None:
    device, server = both
    sealer, opener = ChunkSealer(device.request_keys()), ChunkOpener(server.request_keys())
    sealed = [sealer.seal(bytes([n])) for n in range(3)]
    with pytest.raises(SealBroken):
        for n in chunks:
            opener.open(sealed[n])


def test_a_cut_is_an_error_and_so_is_what_follows_the_end(both: tuple[CallSecret, CallSecret]) -> None:
    device, server = both
    sealer, opener = ChunkSealer(device.request_keys()), ChunkOpener(server.request_keys())
    opener.open(sealer.seal(b"first"))
    with pytest.raises(SealBroken, match="break off"):
        opener.check_complete()
    end = sealer.seal(b"", last=True)
    with pytest.raises(ValueError, match="nothing follows"):
        sealer.seal(b"more")
    opener.open(end)
    with pytest.raises(SealBroken, match="after the last"):
        opener.open(end)


def test_sizes_tell_steps_alone(both: tuple[CallSecret, CallSecret]) -> None:
    sizes = {len(ChunkSealer(both[0].request_keys()).seal(b"x" * n)) for n in range(64)}
    assert sizes == {64 + 16}
    for size in (1, 64, 65, 1000, 66_000, 2**24):
        assert size <= padded_size(size) <= size + max(63, size / 8)
        assert padded_size(padded_size(size)) == padded_size(size)
    assert len(ChunkSealer(both[0].request_keys(), pads=False).seal(b"x" * 59)) == 59 + 1 + 16
    assert most_sealed_bytes(2**20) < 2**20 * 9 / 8 + 8192


def test_a_chunk_without_a_mark_is_an_error(both: tuple[CallSecret, CallSecret]) -> None:
    keys = both[0].request_keys()
    for plain in (b"", bytes(64), b"abc\x03" + bytes(60)):
        chunk = keys.aead.encrypt(keys.nonce_of(0), plain, None)
        with pytest.raises(SealBroken):
            ChunkOpener(keys).open(chunk)


def test_a_proof_is_of_one_key_and_one_call() -> None:
    mine, other = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    signature = sign_proof(mine, HEADER, b"sealed")
    check_proof(mine.public_key(), signature, HEADER, b"sealed")
    for key, header, sealed in (
        (other, HEADER, b"sealed"),
        (mine, replace(HEADER, method="/perfit.v1.Identity/Leave"), b"sealed"),
        (mine, replace(HEADER, time_ms=1), b"sealed"),
        (mine, HEADER, b"other"),
    ):
        with pytest.raises(SealBroken):
            check_proof(key.public_key(), signature, header, sealed)


def test_a_sealing_key_is_the_server_cas(tmp_path: Path, key: PrivateSealingKey) -> None:
    authority, other = open_authority(tmp_path / "one"), open_authority(tmp_path / "two")
    data = authority.certify_sealing_key(key.public, "a.1", 3600)
    found = SealingKey.from_certificate(data, authority.server_ca_der)
    assert found.key_id == "a.1"
    assert found.is_current()
    assert found.public.binding == key.public.binding
    assert CallSecret.open(key, HEADER, CallSecret.seal(found.public, HEADER).sealed)
    # While a cloud changes its root, either may have issued it.
    both = SealingKey.from_certificate(data, other.server_ca_der, authority.server_ca_der)
    assert both.key_id == "a.1"
    for roots in ((other.server_ca_der,), ()):
        with pytest.raises(NotAuthenticated):
            SealingKey.from_certificate(data, *roots)
    with pytest.raises(NotAuthenticated):
        SealingKey.from_certificate(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], authority.server_ca_der)
    with pytest.raises(NotAuthenticated):
        SealingKey.from_certificate(b"nothing", authority.server_ca_der)


def test_a_servers_certificate_is_no_sealing_key(tmp_path: Path) -> None:
    """A front may hold one, for its TLS."""
    authority = open_authority(tmp_path / "state")
    leaf = authority.server_identity(["localhost"]).certificate_pem
    der = x509.load_pem_x509_certificate(leaf).public_bytes(Encoding.DER)
    with pytest.raises(NotAuthenticated):
        SealingKey.from_certificate(der, authority.server_ca_der)
