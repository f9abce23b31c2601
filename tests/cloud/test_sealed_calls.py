"""Sealed calls between perfit's own client and a server, with nothing in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from tests.support.adapt_calls import EXAMPLES, examples, mine, opening, step
from tests.support.cloud import TIMEOUT, Running, failure

from perfit_cloud.model.artefacts import Artefact as Served
from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.identity import Identity, identity_in
from perfit_device.cloud.questions import ask_all
from perfit_device.cloud.sealed_channel import SealedChannel
from perfit_device.cloud.sealing import Sealer, Sealing
from perfit_device.config import Config
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import CertificateSuperseded, ConfigError, IdentityRevoked, NotFound, SealRequired
from perfit_shared.sealing.chunks import padded_size
from perfit_shared.sealing.keys import SealingKey
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire.personalization_pb2_grpc import PersonalizationStub

SAMPLING = Sampling(max_new_tokens=6)


@pytest.fixture
def running(run: Callable[..., Running]) -> Running:
    return run(front_address="127.0.0.1:0")


def answers(cloud: Cloud) -> list[Any]:
    """Of every call that a device makes of the model."""
    info = cloud.describe()
    artefact = info.artefacts[0]
    seed = cloud.fetch_seed(artefact)
    use = ShiftUse(artefact, seed)
    text = "".join(chunk.text for chunk in cloud.generate("the cat sat", use, SAMPLING))
    asked = ask_all(cloud, use, [("the dog", SAMPLING), ("a bird", SAMPLING)], in_flight=2)
    scores = cloud.score([("the cat", " sat")], use)
    loss, tokens, gradient = cloud.compute_gradient([("the cat", " sat")], artefact, seed)
    return [info, text, asked, scores, loss, tokens, gradient.to_bytes()]


@pytest.mark.parametrize("is_front", [False, True], ids=["over mTLS", "behind a front"])
def test_every_call_answers_as_it_does_unsealed(running: Running, is_front: bool) -> None:
    with Cloud(running.enrolled(running.address)) as plain:
        wanted = answers(plain)
    enrolment = running.enrolled(running.front_address if is_front else running.address)
    with Cloud(enrolment, sealing=Sealing()) as sealed:
        assert answers(sealed) == wanted
        assert answers(sealed) == wanted  # with the certificate known by now


def test_an_unsealed_call_is_refused_where_tls_ends_before(running: Running) -> None:
    with Cloud(running.enrolled(running.front_address)) as plain:
        plain.describe()  # has the keys
        with pytest.raises(SealRequired):
            list(plain.generate("the cat sat", ShiftUse(), SAMPLING))


def test_an_update_s_stream(running: Running, artefact: Served) -> None:
    """Adapt: examples once, then steps, each answered before the next."""
    tensors = mine(artefact, 1)
    steps = [step(tensors, [0, 1]), step(tensors, [1], loss_only=True)]
    requests = [opening(artefact), examples(EXAMPLES), *steps]

    def answers(address: str, sealing: Sealing | None) -> list[bytes]:
        with Cloud(running.enrolled(address), sealing=sealing) as cloud:
            responses = cloud.stream("Adapt", iter(requests), TIMEOUT)
            return [response.SerializeToString(deterministic=True) for response in responses]

    wanted = answers(running.address, None)
    assert len(wanted) == 2
    assert answers(running.front_address, Sealing()) == wanted


def test_a_certificate_is_renewed_and_left_through_a_front(running: Running) -> None:
    enrolment = running.enrolled(running.front_address)
    with Cloud(enrolment, sealing=Sealing()) as cloud:
        cloud.describe()
        new = enrolments.renew(cloud._connections.for_call().channel, enrolment, enrolment.address)
    new = replace(new, address=running.front_address)  # the server names the one that it has itself
    with Cloud(new, sealing=Sealing()) as cloud:
        cloud.describe()
    with Cloud(enrolment, sealing=Sealing()) as cloud, pytest.raises(CertificateSuperseded):
        cloud.describe()
    enrolments.leave(new, Sealing())
    with Cloud(new, sealing=Sealing()) as cloud, pytest.raises(IdentityRevoked):
        cloud.describe()


def test_a_revocation_ends_a_sealed_stream(running: Running) -> None:
    enrolment = running.enrolled(running.front_address)
    asked: SimpleQueue[Any] = SimpleQueue()
    asked.put(pb.AskRequest(shift=pb.Shift(mode=pb.SHIFT_MODE_BASE)))
    question = pb.Question(number=1, prompt=pb.Prompt(text="the dog"), sampling=pb.Sampling(max_new_tokens=2))
    asked.put(pb.AskRequest(question=question))
    with Cloud(enrolment, sealing=Sealing()) as cloud:
        responses = cloud.stream("Ask", iter(asked.get, None), TIMEOUT)
        while not next(responses).part.finish:
            continue
        running.authority.revoke(identity_in(enrolment.certificate))
        asked.put(pb.AskRequest(question=question))
        with pytest.raises(IdentityRevoked):
            list(responses)
        asked.put(None)


def test_a_connection_carries_no_other_device_s_calls(running: Running) -> None:
    """Over mutual TLS, who signed inside has to be whose connection it is."""
    own, other = running.enrolled(running.address), running.enrolled(running.address)

    def keys() -> Any:
        with Cloud(own) as cloud:
            return cloud._connections.for_call().stub.Describe(pb.DescribeRequest()).sealing_keys

    with mutual_channel(own, own.address) as channel:
        stub: Any = PersonalizationStub(SealedChannel(channel, Sealer(other, Sealing(), keys)))
        status, metadata, _ = failure(lambda: stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT))
        assert (status, metadata["perfit-code"]) == ("INVALID_ARGUMENT", "seal_broken")
        stub = PersonalizationStub(SealedChannel(channel, Sealer(own, Sealing(), keys)))
        assert stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT).cloud_id == own.cloud_id


def test_a_signature_of_another_key_is_refused(running: Running) -> None:
    """Somebody shows a device's certificate, which is no secret, without its key."""
    enrolment = replace(running.enrolled(running.front_address), identity=Identity.create())
    with mutual_channel(running.enrolled(running.front_address), running.front_address) as channel:
        clear: Any = PersonalizationStub(channel)
        keys = clear.Describe(pb.DescribeRequest(), timeout=TIMEOUT).sealing_keys
        stub: Any = PersonalizationStub(SealedChannel(channel, Sealer(enrolment, Sealing(), lambda: keys)))
        _, metadata, message = failure(lambda: stub.Describe(pb.DescribeRequest(), timeout=TIMEOUT))
    assert metadata["perfit-code"] == "seal_broken"
    assert "not signed" in message


@pytest.mark.parametrize("data", [b"", b"\xff", b"\x0a\x00", b"\x12\x01a"], ids=repr)
def test_garbage_where_a_sealed_call_should_be(running: Running, data: bytes) -> None:
    with mutual_channel(running.enrolled(running.front_address), running.front_address) as channel:
        clear: Any = PersonalizationStub(channel)
        [key] = clear.Describe(pb.DescribeRequest(), timeout=TIMEOUT).sealing_keys
        key_id = SealingKey.from_certificate(key.certificate, running.authority.server_ca_der).key_id
        begin: Any = channel.stream_stream("/perfit.v1.Personalization/Generate")
        for name in (key_id, "nobody's"):
            call = partial(begin, iter([data]), metadata=[("perfit-seal-key", name)], timeout=TIMEOUT)
            _, metadata, _ = failure(lambda call=call: list(call()))  # type: ignore[misc]
            assert metadata["perfit-code"] == (
                "seal_broken" if name == key_id or data == b"\xff" else "seal_unknown"
            )


def test_a_large_request_fits_though_it_is_padded(run: Callable[..., Running]) -> None:
    """Limits count what is sealed; the padding comes on top of them."""
    running = run(front_address="127.0.0.1:0", message_bytes=200_000, prompt_tokens=2000)
    with Cloud(running.enrolled(running.front_address), sealing=Sealing()) as cloud:
        most = cloud.describe().limits.message_bytes
        size = next(n for n in range(most, 0, -1) if padded_size(n + 1) > most + 1000)
        request = examples([("x" * (size - 64), "y")])
        assert request.ByteSize() <= most < padded_size(request.ByteSize() + 1)
        first = pb.AdaptRequest(open=pb.AdaptOpen(artefact="none", version="none"))
        with pytest.raises(NotFound):  # and not Busy, nor gRPC's own RESOURCE_EXHAUSTED
            list(cloud.stream("Adapt", iter([first, request]), TIMEOUT))


def test_a_setting_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERFIT_HOME", str(tmp_path))
    settings = DeviceSettings.from_environment("work")
    assert settings.sealing() is None
    Config().with_value("sealed.work", "true").write(settings.config_path)
    assert settings.sealing() == Sealing()  # as an agent finds it that was there before
    assert DeviceSettings.from_environment("default").sealing() is None
    roots = tmp_path / "front.pem"
    config = Config().with_value("sealed.work", "true").with_value("front_ca.work", str(roots))
    config.write(settings.config_path)
    with pytest.raises(ConfigError, match="front_ca"):
        settings.sealing()
    roots.write_bytes(b"PEM")
    assert settings.sealing() == Sealing(front_roots=b"PEM")
