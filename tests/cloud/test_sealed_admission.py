"""What a sealed call costs whom before it is worked on: devices, strangers at a front, the withdrawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import grpc
import pytest
from tests.support.cloud import TIMEOUT, Running, failure, pem
from tests.support.front import FrontSettings
from tests.support.waiting import wait_for

from perfit_cloud.service.sealing.callers import Replays
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.identity import Enrolment, identity_in
from perfit_device.cloud.sealing import Sealing
from perfit_shared.errors import IdentityRevoked, Unavailable
from perfit_shared.sealing.calls import KEY_METADATA

GENERATE = "/perfit.v1.Personalization/Generate"


def key_id(cloud: Cloud) -> str:
    sealer = cloud._connections.for_call().sealer
    assert sealer is not None
    return sealer.key().key_id


class Silent:
    """Calls that say which key they are sealed to, and then nothing."""

    def __init__(self, enrolment: Enrolment, key_id: str) -> None:
        self._channel = mutual_channel(enrolment, enrolment.address)
        self._begin: Any = self._channel.stream_stream(GENERATE)
        self._key_id = key_id
        self._queues: list[SimpleQueue[bytes | None]] = []

    def call(self) -> Any:
        queue: SimpleQueue[bytes | None] = SimpleQueue()
        self._queues.append(queue)
        metadata = [(KEY_METADATA, self._key_id)]
        return self._begin(iter(queue.get, None), metadata=metadata, timeout=TIMEOUT)

    def close(self) -> None:
        for queue in self._queues:
            queue.put(None)
        self._channel.close()


@pytest.fixture
def silent() -> Iterator[Callable[[Enrolment, str], Silent]]:
    made: list[Silent] = []

    def make(enrolment: Enrolment, key_id: str) -> Silent:
        made.append(Silent(enrolment, key_id))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_over_mutual_tls_a_device_is_counted_before_it_sends(
    run: Callable[..., Running], silent: Callable[[Enrolment, str], Silent]
) -> None:
    """Calls that named a key and sent nothing took all threads of a listener, and counted as nobody's."""
    running = run(front_address="127.0.0.1:0", calls_each=2)
    enrolment = running.enrolled(running.address)
    with Cloud(enrolment, sealing=Sealing()) as cloud:
        cloud.describe()
        calls = silent(enrolment, key_id(cloud))
    held = [calls.call() for _ in range(2)]
    limiter = running.server._listeners.of_devices[0].rate_limiter
    wait_for(lambda: limiter._bucket(identity_in(enrolment.certificate)).held["calls"] == 2)
    status, metadata, _ = failure(lambda: next(calls.call()))
    assert (status, metadata["perfit-code"]) == ("RESOURCE_EXHAUSTED", "busy")
    for call in held:
        call.cancel()


def test_who_was_withdrawn_is_refused_before_anything_is_opened(
    run: Callable[..., Running], silent: Callable[[Enrolment, str], Silent]
) -> None:
    running = run(front_address="127.0.0.1:0")
    enrolment = running.enrolled(running.address)
    with Cloud(enrolment, sealing=Sealing()) as cloud:
        cloud.describe()
        calls = silent(enrolment, key_id(cloud))
    running.authority.revoke(identity_in(enrolment.certificate))
    _, metadata, _ = failure(lambda: next(calls.call()))
    assert metadata["perfit-code"] == "identity_revoked"


def test_strangers_at_the_front_take_nothing_from_the_other_listener(
    run: Callable[..., Running], silent: Callable[[Enrolment, str], Silent]
) -> None:
    """Both listeners shared the slots for calls whose caller is not known yet."""
    running = run(front_address="127.0.0.1:0", calls=2)
    with Cloud(running.enrolled(running.address), sealing=Sealing()) as cloud:
        cloud.describe()
        strangers = silent(running.enrolled(running.front_address), key_id(cloud))
        held = [strangers.call() for _ in range(3)]
        wait_for(lambda: not all(call.is_active() for call in held))
        [refused] = [call for call in held if not call.is_active()]  # two wait for their first message
        assert failure(lambda: next(refused))[1]["perfit-code"] == "busy"
        cloud.describe()
    for call in held:
        call.cancel()


def test_who_may_not_call_fills_no_memory_of_calls(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A withdrawn device could fill what tells calls apart, and with it shut everybody out."""
    remembered: list[bytes] = []
    add = Replays.add

    def noted(self: Replays, sealed: bytes) -> None:
        add(self, sealed)
        remembered.append(sealed)

    monkeypatch.setattr(Replays, "add", noted)
    running = run(front_address="127.0.0.1:0")
    enrolment = running.enrolled(running.front_address)
    with Cloud(enrolment, sealing=Sealing()) as cloud:
        cloud.describe()
        assert len(remembered) == 1
        running.authority.revoke(identity_in(enrolment.certificate))
        for _ in range(3):
            with pytest.raises(IdentityRevoked):
                cloud.describe()
        assert len(remembered) == 1
        running.authority.restore(identity_in(enrolment.certificate))
        cloud.describe()
        assert len(remembered) == 2


def test_a_front_that_asks_for_it_gets_the_certificate_of_a_device(run: Callable[..., Running]) -> None:
    """A limit that the security guide names: a device answers whoever it trusts at its cloud's address."""
    running = run(front_address="127.0.0.1:0")
    settings = FrontSettings.of(running.authority, running.front_address)
    seen: list[bytes] = []

    def asked(_: Any, context: grpc.ServicerContext) -> bytes:
        seen.extend(context.auth_context().get("x509_pem_cert", []))
        context.abort(grpc.StatusCode.UNAVAILABLE, "it only looks")

    handler = grpc.unary_unary_rpc_method_handler(asked)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_registered_method_handlers("perfit.v1.Personalization", {"Describe": handler})
    credentials = grpc.ssl_server_credentials(
        [(settings.key.encode(), settings.certificate.encode())],
        running.authority.device_ca_pem,
        require_client_auth=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    enrolment = running.enrolled(f"127.0.0.1:{port}")
    with Cloud(enrolment, sealing=Sealing()) as cloud, pytest.raises(Unavailable):
        cloud.describe()
    server.stop(None)
    assert seen == [pem(enrolment.certificate)]
