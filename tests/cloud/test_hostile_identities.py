"""Devices that want another identity than their own, or whose certificate ends in mid-stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step
from tests.support.authority import csr_of, new_key
from tests.support.cloud import BASE, TIMEOUT, Device, Running, failure

from perfit_cloud.engine.gradients.scheduler import GradientScheduler
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.wire import enrollment_pb2 as enrol_pb
from perfit_shared.wire import enrollment_pb2_grpc as enrol_grpc
from perfit_shared.wire import personalization_pb2 as pb


def test_a_certificate_renews_its_own_identity_alone(run: Callable[..., Running]) -> None:
    running = run()
    victim, hostile = running.device(), running.device()
    key = new_key()
    request = enrol_pb.RenewRequest(csr=csr_of(key, name=victim.identity))
    given = enrol_grpc.IdentityStub(hostile.channel).Renew(request)
    assert running.with_certificate(key, given.certificate).identity == hostile.identity
    # And on the other listener: the victim's certificate, which is no secret, with a key that is not its own.
    stub = enrol_grpc.EnrollmentStub(running.enrolment())
    nonce, csr = stub.Challenge(enrol_pb.ChallengeRequest()).nonce, csr_of(key)
    for signature in (b"", sign(hostile, nonce + csr), sign(hostile, csr)):
        lapsed = enrol_pb.RenewLapsedRequest(
            certificate=victim.certificate, nonce=nonce, csr=csr, signature=signature
        )
        assert failure(lambda r=lapsed: stub.RenewLapsed(r))[0] == "UNAUTHENTICATED"  # type: ignore[misc]
    victim.describe()


def sign(device: Device, data: bytes) -> bytes:
    return device.key.sign(b"perfit-renew-v1" + data, ec.ECDSA(hashes.SHA256()))


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_stream_whose_certificate_ends_gets_no_further(
    run: Callable[..., Running],
    artefact: Artefact,
    step_queue: GradientScheduler,
    monkeypatch: pytest.MonkeyPatch,
    wrong_clock: Callable[[float], None],
    how: str,
) -> None:
    """It was looked at before an answer went out, but the work of it was done."""
    running = run(certificate_seconds=60)
    device = running.device()
    stream = Stream(device, opening(artefact), examples(EXAMPLES))
    stream.ask(step(mine(artefact, 1), [0]))
    submitted = []
    monkeypatch.setattr(step_queue, "submit", submitted.append)
    if how == "expired":
        wrong_clock(61)
    else:
        running.authority.revoke(device.identity)
    want = "UNAUTHENTICATED" if how == "expired" else "PERMISSION_DENIED"
    assert failure(lambda: stream.ask(step(mine(artefact, 1), [0])))[0] == want
    assert not submitted
    ask = device.stub.Ask(iter([pb.AskRequest(shift=BASE)]), timeout=TIMEOUT)
    assert failure(lambda: list(ask))[0] == want
    stream.end()
