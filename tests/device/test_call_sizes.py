"""Calls stay within what the cloud takes at once: 64 long examples in one ComputeGradient were refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from tests.support.fake_cloud import FakeCloud

from perfit_device import history
from perfit_device.cloud import enrolment
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import Artefact, Limits, ShiftUse
from perfit_device.cloud.identity import Identity
from perfit_device.evaluation import TaskClient, gradient_of
from perfit_device.history import HistoryItem
from perfit_device.training.gradients import GradientSource
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import TASKS
from perfit_shared.types import Score
from perfit_shared.validation import mean_loss

TASK = TASKS["chat"]
SPEC = ShiftSpec((0,), "l7", 2, 2, 8)
ARTEFACT = Artefact("chat", "1", SPEC, TASK, 1e-3, 1, 4)


class CountingCloud:
    """Notes how many examples each call held; every example is one target token at loss 1."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def compute_gradient(
        self, pairs: Sequence[Any], artefact: Artefact, tensors: ShiftTensors
    ) -> tuple[float, int, ShiftTensors]:
        self.calls.append(len(pairs))
        return 1.0, len(pairs), tensors

    def score(self, pairs: Sequence[Any], use: ShiftUse) -> list[Score]:
        self.calls.append(len(pairs))
        return [Score(-1.0, 1) for _ in pairs]


def items(*lengths: int) -> list[HistoryItem]:
    """Each of so many bytes, the template's ("{prompt}") and the end of the answer included."""
    return [
        HistoryItem.make(TASK, {"prompt": "x" * (n - 11), "reply": f"{k:02}"}) for k, n in enumerate(lengths)
    ]


def limits(call_tokens: int) -> Limits:
    return Limits(512, 64, 4, 1 << 20, 4, 100, call_tokens)


@pytest.mark.parametrize(
    ("lengths", "call_tokens", "calls"),
    [
        ((50,) * 6, 0, [4, 2]),  # a cloud that does not say
        ((50,) * 6, 100_000, [4, 2]),
        ((50,) * 6, 150, [3, 3]),
        ((50,) * 6, 149, [2, 2, 2]),
        ((50, 500, 50, 50), 120, [1, 1, 2]),  # what is larger than a call goes alone
    ],
)
def test_a_call_holds_no_more_than_the_cloud_takes(
    lengths: tuple[int, ...], call_tokens: int, calls: list[int]
) -> None:
    cloud, tensors = CountingCloud(), ShiftTensors.identity(SPEC, 2)
    loss, tokens, _ = gradient_of(cloud, ARTEFACT, limits(call_tokens))(items(*lengths), tensors)  # type: ignore[arg-type]
    assert (loss, tokens, cloud.calls) == (1.0, len(lengths), calls)
    cloud.calls.clear()
    use = ShiftUse(ARTEFACT, tensors)
    client = TaskClient(cloud, TASK, limits(call_tokens))  # type: ignore[arg-type]
    assert mean_loss(client.all_scores(items(*lengths), use)) == 1.0
    assert cloud.calls == calls


def test_what_stands_before_an_example_counts() -> None:
    """It fills a call, too: two of 50 bytes behind one of 50 are twice as much."""
    cloud, tensors, six = CountingCloud(), ShiftTensors.identity(SPEC, 2), items(*(50,) * 6)
    size = len("x" * 39 + "00")  # of the fields; the template and the end count for each turn

    def before(item: HistoryItem) -> list[Any]:
        return [six[0].fields]

    room = 2 * (2 * size + 2 * len(TASK.template) + len(TASK.system) + 2)
    for call_tokens, calls in ((room, [2, 2, 2]), (room - 1, [1] * 6)):
        cloud.calls.clear()
        gradient_of(cloud, ARTEFACT, limits(call_tokens), before)(six, tensors)  # type: ignore[arg-type]
        client = TaskClient(cloud, TASK, limits(call_tokens), before=before)  # type: ignore[arg-type]
        client.all_scores(six, ShiftUse(ARTEFACT, tensors))
        assert cloud.calls == calls * 2


def test_a_cloud_that_has_no_adapt_is_asked_call_by_call(cloud: FakeCloud) -> None:
    items = [HistoryItem.make(TASKS["news_headline"], {"text": f"text {n}", "title": "t"}) for n in range(20)]
    with Cloud(enrolment.enroll(cloud.invite(), Identity.create())) as device:
        info = device.describe()
        assert info.limits.adapt_examples == 0
        for limit in (0, 100):  # what it says, and what a liar could
            limits = replace(info.limits, adapt_examples=limit)
            with GradientSource(device, info.artefacts[0], limits, history.split(items)) as source:
                for _ in range(2):
                    assert source.gradient([0, 1], cloud.seed)()[1] == 8
                    assert len(source.scores([0, 15], cloud.seed)()) == 2
    assert cloud.calls.count("ComputeGradient") == 4
