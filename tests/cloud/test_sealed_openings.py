"""Sealed calls at a front that do not open: who pays for them, and that they end without a key's work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from tests.support.cloud import TIMEOUT, Running, failure, pem
from tests.support.front import Front, FrontSettings
from tests.support.waiting import wait_for

from perfit_device.cloud.client import Cloud
from perfit_device.cloud.sealing import Sealing
from perfit_shared.errors import Busy
from perfit_shared.sealing import calls
from perfit_shared.sealing.calls import KEY_METADATA, CallHeader, CallSecret
from perfit_shared.sealing.chunks import ChunkSealer
from perfit_shared.sealing.keys import SealingKey
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import sealing_pb2 as sealing

GENERATE = "/perfit.v1.Personalization/Generate"
HEADER = "x-forwarded-for"
HONEST, STRANGER = "192.0.2.7", "198.51.100.9"
FEW = 5  # openings a minute; they wear off one in twelve seconds


@pytest.fixture
def running(run: Callable[..., Running]) -> Running:
    return run(
        front_address="127.0.0.1:0", front_caller="X-Forwarded-For", front_openings_minute=FEW, calls=8
    )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What the server's private key was used for."""
    seen: list[bytes] = []
    real = CallSecret.open.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, key: Any, header: CallHeader, sealed: bytes) -> CallSecret:
        seen.append(sealed)
        secret: CallSecret = real(cls, key, header, sealed)
        return secret

    monkeypatch.setattr(CallSecret, "open", classmethod(noted))
    return seen


class Stranger:
    """Somebody who holds no certificate, behind a front that says from where."""

    def __init__(self, running: Running) -> None:
        roots = grpc.ssl_channel_credentials(pem(running.authority.server_ca_der))
        self._channel = running.open(running.front_address, roots)
        described = self._channel.unary_unary(
            "/perfit.v1.Personalization/Describe", response_deserializer=pb.DescribeResponse.FromString
        )(b"", timeout=TIMEOUT)
        self.key = SealingKey.from_certificate(
            described.sealing_keys[0].certificate, running.authority.server_ca_der
        )

    def garbage(self) -> bytes:
        opening = sealing.SealedOpening(
            time_ms=int(1000 * time.time()), encapsulated=os.urandom(calls._SEALED_BYTES), proof=b"none"
        )
        return sealing.SealedRequest(opening=opening, chunk=b"none").SerializeToString()

    def proves_nothing(self) -> bytes:
        """Sealed as it should be, which anybody can; the proof inside names a certificate that is none."""
        header = CallHeader(GENERATE, self.key.key_id, "", int(1000 * time.time()))
        secret = CallSecret.seal(self.key.public, header)
        proof = ChunkSealer(secret.request_keys()).seal(
            sealing.SealedProof(fingerprint=b"1" * 16).SerializeToString()
        )
        opening = sealing.SealedOpening(time_ms=header.time_ms, encapsulated=secret.sealed, proof=proof)
        return sealing.SealedRequest(opening=opening, chunk=b"none").SerializeToString()

    def begin(self, messages: Iterator[bytes], address: str = STRANGER) -> Any:
        metadata = [(KEY_METADATA, self.key.key_id), (HEADER, address)]
        method: Any = self._channel.stream_stream(GENERATE)
        return method(messages, metadata=metadata, timeout=TIMEOUT)

    def code(self, message: bytes, address: str = STRANGER) -> str:
        """What the call is refused with."""
        return failure(lambda: next(self.begin(iter([message]), address)))[1]["perfit-code"]


@pytest.mark.parametrize(("kind", "code"), [("garbage", "seal_broken"), ("proves_nothing", "seal_unknown")])
def test_calls_that_do_not_open_are_paid_by_their_address_before_they_are_tried(
    running: Running, opened: list[bytes], kind: str, code: str
) -> None:
    """They were charged to nobody: a stranger had a replica do X25519 and ML-KEM without end."""
    stranger = Stranger(running)
    codes = [stranger.code(getattr(stranger, kind)()) for _ in range(FEW + 10)]
    assert codes[:FEW] == [code] * FEW
    assert codes[-1] == "busy"
    assert len(opened) <= FEW + 1  # a slow machine may see one wear off
    assert stranger.code(stranger.garbage(), "203.0.113.5") == "seal_broken"  # another address is another's


def test_who_opens_pays_nothing_and_is_not_hindered_by_another_address(
    running: Running, opened: list[bytes]
) -> None:
    stranger = Stranger(running)
    for _ in range(2 * FEW):
        stranger.code(stranger.garbage())
    front = Front(FrontSettings.of(running.authority, running.front_address))
    # What the caller says itself stands before what the front adds.
    front.metadata = lambda metadata: [*metadata, (HEADER, f"{STRANGER}, {HONEST}")]
    with Cloud(running.enrolled(front.address), sealing=Sealing()) as cloud:
        for _ in range(3 * FEW):
            cloud.describe()
        front.metadata = lambda metadata: [*metadata, (HEADER, STRANGER)]
        with pytest.raises(Busy):  # who shares an address shares its debts
            cloud.describe()
    front.close()


def test_a_replay_costs_a_look_up(running: Running, opened: list[bytes]) -> None:
    front = Front(FrontSettings.of(running.authority, running.front_address))
    with Cloud(running.enrolled(front.address), sealing=Sealing()) as cloud:
        cloud.describe()
    front.close()
    [*_, passed] = [call for call in front.calls if call.metadata]
    used = len(opened)
    stranger = Stranger(running)
    assert stranger.code(passed.requests[0]) == "seal_broken"
    assert len(opened) == used


def test_one_address_has_a_part_of_the_places_for_calls_that_say_nothing(run: Callable[..., Running]) -> None:
    running = run(front_address="127.0.0.1:0", front_caller=HEADER, calls=8)
    stranger, silence = Stranger(running), SimpleQueue[bytes | None]()
    held = [stranger.begin(iter(silence.get, None)) for _ in range(2)]  # of 8 at once, a fourth
    wait_for(lambda: stranger.code(stranger.garbage()) == "busy")
    assert all(call.is_active() for call in held)
    assert stranger.code(stranger.garbage(), HONEST) == "seal_broken"
    for call in held:
        call.cancel()
        silence.put(None)


def test_a_front_that_says_nothing_is_one_caller_with_room_for_all(
    run: Callable[..., Running], opened: list[bytes]
) -> None:
    """A budget as small as one address's would let one stranger shut out everybody."""
    running = run(front_address="127.0.0.1:0", front_openings_minute=FEW)
    stranger = Stranger(running)
    codes = {stranger.code(stranger.garbage()) for _ in range(4 * FEW)}
    assert codes == {"seal_broken"}
    with Cloud(running.enrolled(running.front_address), sealing=Sealing()) as cloud:
        cloud.describe()
