"""Many calls and many that are left half-way: nothing of them stays, and every call has an end."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.adapt_calls import EXAMPLES, Stream, examples, mine, opening, step
from tests.support.cloud import BASE, TIMEOUT, Device, Running, failure, generate, personal
from tests.support.doubles import Slow, score
from tests.support.limits import under_way
from tests.support.waiting import wait_for

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.service.interceptor import CallInterceptor
from perfit_device.cloud import enrolment
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.identity import Identity
from perfit_device.cloud.questions import ask_all
from perfit_shared.errors import CertificateValid
from perfit_shared.invites import Invite
from perfit_shared.types import Sampling
from perfit_shared.wire import enrollment_pb2, personalization_pb2
from perfit_shared.wire import personalization_pb2 as pb


def rounds(running: Running, devices: list[Device], artefact: Artefact, count: int) -> None:
    """Of each three calls that stream, every other time all are left half-way."""
    shift, _ = personal(artefact)
    pairs = [pb.Example(prompt=pb.Prompt(text=text), target=target) for text, target in EXAMPLES[:2]]
    asked = [
        pb.AskRequest(shift=shift),
        *(
            pb.AskRequest(
                question=pb.Question(
                    number=n, prompt=pb.Prompt(text="the cat"), sampling=pb.Sampling(max_new_tokens=3)
                )
            )
            for n in range(2)
        ),
    ]
    for number in range(count):
        stub, is_left = devices[number % len(devices)].stub, number % 2 == 1
        calls = [
            stub.Generate(generate(shift=shift, max_new_tokens=100 if is_left else 3), timeout=TIMEOUT),
            stub.Ask(iter(asked), timeout=TIMEOUT),
        ]
        stream = Stream(
            devices[number % len(devices)],
            opening(artefact),
            examples(EXAMPLES[:2]),
            step(mine(artefact, 1), [0]),
        )
        for call in (*calls, stream.call):
            if is_left:
                call.cancel()
        stream.end()
        if not is_left:
            assert [len(list(call)) for call in (*calls, stream.call)]
        stub.ComputeGradient(pb.ComputeGradientRequest(examples=pairs, shift=shift), timeout=TIMEOUT)
        failure(lambda s=stub: s.Score(pb.ScoreRequest(shift=BASE), timeout=TIMEOUT))  # type: ignore[misc]
    wait_for(lambda: sum(under_way(running, device) for device in devices) == 0)


def census() -> tuple[Counter[str], int]:
    """Objects by type, and threads, once nothing goes any more."""
    gc.collect()
    of_calls = ("perfit-ask", "perfit-adapt")
    wait_for(lambda: not any(thread.name.startswith(of_calls) for thread in threading.enumerate()))
    time.sleep(0.2)  # gRPC lets go of its own in threads of its own
    gc.collect()
    types = (type(thing) for thing in gc.get_objects())
    return Counter(f"{kind.__module__}.{kind.__qualname__}" for kind in types), threading.active_count()


def test_nothing_stays_of_calls_however_they_end(run: Callable[..., Running], artefact: Artefact) -> None:
    running = run()
    devices = [running.device() for _ in range(3)]
    rounds(running, devices, artefact, 30)  # as many: what first calls make stays, up to 110 weakrefs
    before, threads = census()
    ours = ("perfit", "concurrent", "queue", "torch", "numpy", "google", "threading.Timer")
    leaks: list[dict[str, int]] = []
    for _ in range(2):
        rounds(running, devices, artefact, 30)  # 150 calls, 45 of them left half-way
        after, threads_after = census()
        grown = {kind: after[kind] - before[kind] for kind in after}
        # What gRPC and the interpreter hold goes up and down by some dozens; of ours there should be no more.
        # What goes up once may be theirs by chance, so a leak is what goes up again.
        leaks.append({k: n for k, n in grown.items() if n >= (5 if k.startswith(ours) else 100)})
        if not leaks[-1]:
            break
        before = after
    assert not set.intersection(*map(set, leaks)), leaks
    assert threads_after <= threads + 4  # the pool of the RPCs makes its threads when they are wanted


# -- an end to every call ------------------------------------------------------------------------


def test_a_call_that_the_engine_holds_up_is_cut_off(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unary call had no cap but its caller's deadline, and its caller need not set one."""
    monkeypatch.setattr("perfit_cloud.service.interceptor._LATE_SECONDS", 0.3)
    monkeypatch.setattr(
        "perfit_cloud.service.listeners._GRACE_SECONDS", 10 * TIMEOUT
    )  # or the connection's end would
    slow = Slow()
    device = run(steps=slow, call_seconds=1).device()
    begun = time.monotonic()
    assert failure(lambda: device.stub.Score(score()))[0] in {"CANCELLED", "UNAVAILABLE"}
    assert time.monotonic() - begun >= 1
    slow.go.set()


def test_every_call_of_a_device_has_a_deadline(
    run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cloud never answers is given up."""
    left: dict[str, float | None] = {}
    responses = CallInterceptor._responses

    def looked_at(self: Any, method: Any, key_id: str, requests: Any, context: Any) -> Any:
        left[method.name] = context.time_remaining()
        return responses(self, method, key_id, requests, context)

    monkeypatch.setattr(CallInterceptor, "_responses", looked_at)
    running = run()
    secret, expires = running.authority.invite(60)
    enrolled = enrolment.enroll(
        Invite(
            address=running.server.addresses.enrol_address,
            server_ca_der=running.authority.server_ca_der,
            secret=secret,
            expires_unix=expires,
        ),
        Identity.create(),
    )
    with Cloud(enrolled) as cloud:
        artefact = cloud.describe().artefacts[0]
        use = ShiftUse(artefact, cloud.fetch_seed(artefact))
        assert use.personal is not None
        list(cloud.generate("the cat", use, Sampling(3)))
        cloud.score([("the cat", " sat")], use)
        cloud.compute_gradient([("the cat", " sat")], artefact, use.personal)
        assert ask_all(cloud, use, [("the cat", Sampling(3))] * 2, in_flight=2)
        enrolled = enrolment.renew(cloud._connections.for_call().channel, enrolled, enrolled.address)
    with pytest.raises(CertificateValid):
        enrolment.renew_lapsed(enrolled)
    enrolment.leave(enrolled)
    every = {
        m.name
        for file in (personalization_pb2, enrollment_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        if service.name != "Servers"  # no device calls it
        for m in service.methods
    }
    assert every - set(left) == {"Adapt"}  # whose deadline its own tests look at
    assert {name: seconds for name, seconds in left.items() if seconds is None or seconds > 601} == {}
