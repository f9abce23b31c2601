"""Many questions over one stream, against the fake cloud over real TLS."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.fake_cloud import SPEC, FakeCloud
from tests.support.models import random_shift

from perfit_device.cloud import enrolment
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.identity import Identity
from perfit_device.cloud.questions import ask_all
from perfit_device.cloud.retry import RetryPolicy
from perfit_shared.errors import (
    Busy,
    CertificateExpired,
    IdentityRevoked,
    InvalidPrompt,
    PerfitError,
    Unavailable,
)
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb

QUESTIONS = [(f"question {n}", Sampling(8)) for n in range(10)]
HURRIED = RetryPolicy(give_up=20.0, first_wait=0.01, longest_wait=0.05)


@pytest.fixture
def device(cloud: FakeCloud) -> Iterator[Cloud]:
    with Cloud(enrolment.enroll(cloud.invite(), Identity.create())) as opened:
        yield opened


@pytest.fixture
def use(device: Cloud) -> ShiftUse:
    (artefact,) = device.describe().artefacts
    return ShiftUse(artefact, random_shift(SPEC, SPEC.personal_rank, 3))


@pytest.fixture(autouse=True)
def echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that tell which question they are of."""
    from tests.support.fake_cloud import Personalization

    def generate(self: Any, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:
        self.cloud.check("Generate", context)
        for piece in ("re: ", request.prompt.text):
            time.sleep(self.cloud.pause)
            yield pb.GenerateResponse(text=piece)
        yield pb.GenerateResponse(finish=pb.FINISH_REASON_END, prompt_tokens=5, answer_tokens=3)

    monkeypatch.setattr(Personalization, "Generate", generate)


EXPECTED = [f"re: question {n}" for n in range(10)]


def test_answers_come_in_order_and_the_tensors_go_once(
    device: Cloud, use: ShiftUse, cloud: FakeCloud
) -> None:
    before = device.bytes_up
    assert ask_all(device, use, QUESTIONS, in_flight=4) == EXPECTED
    over_one = device.bytes_up - before
    assert cloud.calls.count("Ask") == 1 and cloud.calls.count("Question") == 10
    assert use.personal is not None
    assert over_one < len(use.personal.to_bytes(dtype="int8")) + 10 * 60
    assert ask_all(device, use, QUESTIONS, in_flight=0) == EXPECTED, "as single calls"
    assert cloud.calls.count("Ask") == 1 and device.bytes_up - before > 5 * over_one
    assert ask_all(device, use, [], in_flight=4) == []


def test_questions_turned_away_are_asked_again(device: Cloud, use: ShiftUse, cloud: FakeCloud) -> None:
    device_lock = iter(range(10_000))

    def fail(method: str) -> PerfitError | None:
        turned_away = method == "Question" and next(device_lock) % 3 == 0
        return Busy("the cloud is busy", retry_ms=5) if turned_away else None

    cloud.fail = fail
    assert ask_all(device, use, QUESTIONS, in_flight=4, retry_policy=HURRIED) == EXPECTED


def test_a_stream_that_breaks_asks_only_for_the_rest(device: Cloud, use: ShiftUse, cloud: FakeCloud) -> None:
    left = iter([None] * 5 + [Unavailable("stopping")] + [None] * 100)
    cloud.fail = lambda method: next(left) if method == "Generate" else None
    assert ask_all(device, use, QUESTIONS, in_flight=3, retry_policy=HURRIED) == EXPECTED
    assert cloud.calls.count("Ask") == 2
    assert cloud.calls.count("Question") == 10 + 1


def test_a_certificate_that_runs_out_meanwhile_is_renewed(
    device: Cloud, use: ShiftUse, cloud: FakeCloud
) -> None:
    left = iter([None] * 5 + [CertificateExpired("expired")] + [None] * 100)
    cloud.fail = lambda method: next(left) if method == "Generate" else None
    assert ask_all(device, use, QUESTIONS, in_flight=3) == EXPECTED
    assert cloud.calls.count("RenewLapsed") == 1
    cloud.fail = lambda method: CertificateExpired("expired") if method == "Generate" else None
    with pytest.raises(CertificateExpired):
        ask_all(device, use, QUESTIONS, in_flight=3)
    assert cloud.calls.count("RenewLapsed") == 2


def test_a_cloud_that_goes_and_comes_back(device: Cloud, use: ShiftUse, cloud: FakeCloud) -> None:
    cloud.pause = 0.03

    def restart() -> None:
        time.sleep(0.2)
        cloud.stop()
        cloud.start()

    thread = threading.Thread(target=restart)
    thread.start()
    assert ask_all(device, use, QUESTIONS, in_flight=3, retry_policy=HURRIED) == EXPECTED
    thread.join()
    assert cloud.calls.count("Ask") >= 2


def test_patience_ends(device: Cloud, use: ShiftUse, cloud: FakeCloud) -> None:
    cloud.fail = lambda method: Busy("the cloud is busy", retry_ms=5) if method == "Question" else None
    with pytest.raises(Busy):
        ask_all(device, use, QUESTIONS, in_flight=3, retry_policy=RetryPolicy(give_up=0.2, first_wait=0.02))
    assert cloud.calls.count("Question") % 3 == 0, "whoever is turned away asks for less"
    cloud.fail = lambda method: Busy("busy", retry_ms=3_000_000_000) if method == "Question" else None
    with pytest.raises(Busy):  # a cloud may name any delay
        ask_all(device, use, QUESTIONS, in_flight=3, retry_policy=HURRIED)


@pytest.mark.parametrize(
    "error", [InvalidPrompt("it is too long; shorten it"), IdentityRevoked("ask the operator")]
)
def test_any_other_failure_ends_it(
    device: Cloud, use: ShiftUse, cloud: FakeCloud, error: PerfitError
) -> None:
    asked = iter(range(100))
    cloud.fail = lambda method: error if method == "Question" and next(asked) == 2 else None
    with pytest.raises(type(error), match=str(error)):
        ask_all(device, use, QUESTIONS, in_flight=3, retry_policy=HURRIED)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (pb.AskResponse(number=77, part=pb.GenerateResponse(text="x")), "not asked"),
        (pb.AskResponse(number=0, part=pb.GenerateResponse(text="x" * 2_000_000)), "without end"),
        (pb.AskResponse(number=0, failure=pb.Failure(code="\x1b[2J", message="\x1b[2J")), "^.2J$"),
        (pb.AskResponse(number=0), "no reason"),
        (None, "broke off"),
    ],
)
def test_a_hostile_cloud_is_refused(
    device: Cloud, use: ShiftUse, cloud: FakeCloud, monkeypatch: pytest.MonkeyPatch, part: Any, says: str
) -> None:
    from tests.support.fake_cloud import Personalization

    def ask(self: Any, requests: Any, context: Any) -> Iterator[Any]:
        next(requests)
        yield from () if part is None else (part,)

    cloud.stop()
    monkeypatch.setattr(Personalization, "Ask", ask)
    cloud.start()
    with pytest.raises(PerfitError, match=says):
        ask_all(device, use, QUESTIONS, in_flight=3)


def test_no_thread_stays_behind(device: Cloud, use: ShiftUse, cloud: FakeCloud) -> None:
    """gRPC reads the questions in a thread, which waited for the next one for ever."""
    cloud.fail = lambda method: InvalidPrompt("too long") if method == "Question" else None

    def threads() -> int:
        """Without those of the fake cloud's pool, and at rest."""
        time.sleep(0.2)
        return sum(not thread.name.startswith("ThreadPool") for thread in threading.enumerate())

    before = threads()
    for _ in range(5):
        with pytest.raises(InvalidPrompt):
            ask_all(device, use, QUESTIONS[:1], in_flight=1)
    assert threads() < before + 5
