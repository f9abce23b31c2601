"""A cloud that stops, hangs, lies or has another clock: bounded waiting, one clear error, nothing lost."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import chain, repeat
from typing import Any

import numpy as np
import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import FakeCloud, Personalization

from perfit_device import profile
from perfit_device.cloud import client as clouds
from perfit_device.cloud import enrolment
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse, chunk_from_wire
from perfit_device.cloud.identity import Identity
from perfit_shared.errors import Busy, NotAuthenticated, PerfitError, TooSlow, Unavailable
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Sampling, TokenLogprob, TopLogprob
from perfit_shared.wire import personalization_pb2 as pb


@pytest.fixture
def device(cloud: FakeCloud) -> Iterator[Cloud]:
    with Cloud(enrolment.enroll(cloud.invite(), Identity.create())) as opened:
        yield opened


def first(*errors: PerfitError, of: str) -> Callable[[str], PerfitError | None]:
    """A cloud that fails so often at a method, and works from then on."""
    left = chain(errors, repeat(None))
    return lambda method: next(left) if method == of else None


# -- certificates and clocks -------------------------------------------------------------------


def test_a_certificate_refused_at_the_handshake_is_renewed(
    cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a device whose clock is behind, and on a channel that reconnects: it was "broke off the call"."""
    cloud.certificate_age = timedelta(hours=30)
    expired = enrolment.enroll(cloud.invite(), Identity.create())
    monkeypatch.setattr(clouds, "life_left", lambda certificate: 1.0)
    monkeypatch.setattr(enrolment, "life_left", lambda certificate: 1.0)
    kept = []
    with Cloud(expired, on_renewed=kept.append) as device:
        assert device.describe().cloud_id == cloud.cloud_id
        assert cloud.calls == ["Enroll", "Challenge", "RenewLapsed", "Describe"]
        assert kept == [device.enrolment] != [expired]
    with Cloud(expired) as device:
        chunks = list(device.generate("x", ShiftUse(), Sampling(4)))
        assert "".join(chunk.text for chunk in chunks).strip() == "Hello world base"


def test_a_cloud_that_only_breaks_off_says_so(cloud: FakeCloud, device: Cloud) -> None:
    """Renewing does not help there, and what it says of itself is not what the user asked."""
    cloud.fail = lambda method: Unavailable("stopping") if method == "Challenge" else None
    broken = clouds.BrokenOff("the cloud broke off the call")

    def call() -> None:
        raise broken

    with pytest.raises(clouds.BrokenOff, match="broke off"):
        device.renewing(call)
    assert cloud.calls.count("Challenge") == 1


@pytest.mark.parametrize("age", [timedelta(days=3), timedelta(days=-3)])
def test_a_clock_that_is_wrong_is_named(cloud: FakeCloud, device: Cloud, age: timedelta) -> None:
    """Set back, or years ahead: it said that somebody else had made the server's certificate."""
    cloud.stop()
    cloud.server_age = age
    cloud.start()
    with pytest.raises(NotAuthenticated, match=r"by this device's clock, 20\d\d-.* set the clock"):
        device.describe()


# -- waiting -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_command_waits_for_a_cloud_that_is_back_soon(
    ready: Perfit, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cloud that was restarting ended what had only begun: describing it, and fetching the seed."""
    monkeypatch.setattr(profile, "OPENING_SECONDS", 10.0)
    for method in ("Describe", "FetchSeed"):
        cloud.fail = first(
            Unavailable("the cloud is stopping", retry_ms=30), Busy("busy", retry_ms=20), of=method
        )
        code, out, err = ready("ask", "x")
        assert (code, out) == (0, "Hello world personal \n"), err
        assert "the cloud is stopping; waiting, for 10 s at most" in err
    for method in ("Describe", "FetchSeed"):
        cloud.fail = first(Unavailable("the cloud is stopping", retry_ms=30), of=method)
        assert ready("update", "--epochs", "2", "--fresh")[0] == 0


def test_an_invite_waits_too(perfit: Perfit, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "OPENING_SECONDS", 10.0)
    cloud.fail = first(Unavailable("stopping", retry_ms=30), of="Enroll")
    perfit.ok("enroll", cloud.invite().encode())


def test_waiting_ends(enrolled: Perfit, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "OPENING_SECONDS", 1.5)
    cloud.fail = lambda method: Busy("the cloud is busy", retry_ms=100)
    begun = time.monotonic()
    assert "the cloud is busy" in enrolled.fails("ask", "x", code=3)
    assert 0.5 < time.monotonic() - begun < 10
    cloud.fail = lambda method: Unavailable("stopping", retry_ms=3_000_000_000)
    begun = time.monotonic()
    assert "stopping" in enrolled.fails("ask", "x", code=3)
    assert time.monotonic() - begun < 10, "a cloud may name any delay"


def test_every_call_has_a_deadline(cloud: FakeCloud, ready: Perfit) -> None:
    ready.ok("update", "--epochs", "1")
    ready.ok("evaluate")
    ready.ok("ask", "x")
    cloud.certificate_age = timedelta(hours=20)
    ready.ok("enroll", cloud.invite().encode(), "--replace")
    cloud.certificate_age = timedelta(hours=30)
    ready.ok("enroll", cloud.invite().encode(), "--replace")
    ready.ok("ask", "x")
    assert cloud.seconds.keys() >= {
        "Describe",
        "FetchSeed",
        "Generate",
        "Ask",
        "Score",
        "ComputeGradient",
        "Enroll",
        "Challenge",
        "RenewLapsed",
        "Renew",
    }
    assert {name for name, seconds in cloud.seconds.items() if seconds is None or seconds > 601} == set()


@pytest.mark.parametrize("method", ["Describe", "FetchSeed", "Score", "ComputeGradient"])
def test_a_cloud_that_hangs_is_left(
    cloud: FakeCloud, device: Cloud, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    (artefact,) = device.describe().artefacts
    monkeypatch.setitem(clouds._DEADLINES, method, 0.3)
    is_left = threading.Event()
    cloud.fail = lambda of: is_left.wait(60)
    calls: dict[str, Callable[[], Any]] = {
        "Describe": device.describe,
        "FetchSeed": lambda: device.fetch_seed(artefact),
        "Score": lambda: device.score([("x", "y")], ShiftUse(artefact)),
        "ComputeGradient": lambda: device.compute_gradient([("x", "y")], artefact, cloud.seed),
    }
    with pytest.raises(TooSlow, match="took too long"):
        calls[method]()
    is_left.set()


def test_pieces_without_text_have_an_end(
    cloud: FakeCloud, device: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only text was counted, so a cloud could fill the device's memory with nothing."""
    monkeypatch.setattr(clouds, "ANSWER_CHARACTERS", 1000)

    def generate(self: Any, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        while context.is_active():
            yield pb.GenerateResponse()

    cloud.stop()
    monkeypatch.setattr(Personalization, "Generate", generate)
    cloud.start()
    with pytest.raises(PerfitError, match="without end"):
        list(device.generate("x", ShiftUse(), Sampling(4)))


# -- lies --------------------------------------------------------------------------------------


def test_log_probabilities_arrive_and_those_that_cannot_be_are_refused() -> None:
    top = [pb.TopLogprob(text="b", data=b"b", logprob=-0.5)]
    good = pb.TokenLogprob(text="\ufffd", data=b"\xc3", logprob=-1.5, top=top)
    (told,) = chunk_from_wire(pb.GenerateResponse(text="a", logprobs=[good])).logprobs
    assert told == TokenLogprob("\ufffd", b"\xc3", -1.5, (TopLogprob("b", b"b", -0.5),))
    for change in ({"logprob": math.nan}, {"top": top * 21}, {"top": [pb.TopLogprob(logprob=math.inf)]}):
        bad = pb.TokenLogprob(**{"logprob": -1.0, **change})
        with pytest.raises(PerfitError, match="cannot be"):
            chunk_from_wire(pb.GenerateResponse(logprobs=[bad]))


def test_an_answer_of_log_probabilities_alone_has_an_end(
    cloud: FakeCloud, device: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clouds, "ANSWER_CHARACTERS", 1000)
    sent = []

    def generate(self: Any, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        while context.is_active() and len(sent) < 100:
            sent.append(request.sampling.logprobs)
            yield pb.GenerateResponse(logprobs=[pb.TokenLogprob()] * 500)

    cloud.stop()
    monkeypatch.setattr(Personalization, "Generate", generate)
    cloud.start()
    with pytest.raises(PerfitError, match="without end"):
        list(device.generate("x", ShiftUse(), Sampling(4, logprobs=2)))
    assert sent[0] == 2


@pytest.mark.slow
def test_what_a_cloud_makes_of_losses_and_gradients_costs_no_step(
    ready: Perfit, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN, infinity and tensors that cannot be, after some honest steps: the update goes on from there."""
    honest = Personalization.ComputeGradient
    nan = ShiftTensors.from_named({n: a * np.float32("nan") for n, a in cloud.seed.named()}).to_bytes()
    lie: dict[str, Any] = {}
    calls = 0

    def compute(self: Any, request: Any, context: Any) -> pb.ComputeGradientResponse:
        nonlocal calls
        calls += 1
        response = honest(self, request, context)
        for name, value in lie.items() if calls > 8 else ():
            setattr(response, name, value)
        return response

    cloud.stop()
    monkeypatch.setattr(Personalization, "ComputeGradient", compute)
    cloud.start()
    before = 0
    lies: tuple[dict[str, Any], ...] = (
        {"loss": float("nan")},
        {"loss": -float("inf")},
        {"tokens": 0},
        {"gradient": b""},
        {"gradient": nan},
    )
    for one in lies:
        lie, calls = one, 0
        code, says = (7, "no longer a number") if "loss" in one else (1, "tell its operator")
        assert says in ready.fails("update", "--epochs", "20", code=code)
        waiting = ready.json("status")["tasks"]["news_headline"]
        assert (waiting["updates"], waiting["half_done"] > before) == (0, True)
        before = waiting["half_done"]
    lie = {}
    assert ready.json("update", "--epochs", "20")["resumed_from"] == before
