"""Where a user starts: the choice among the cloud's seeds, made by a few examples and kept sealed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tests.support.device import Perfit
from tests.support.fake_cloud import SPEC, FakeCloud
from tests.support.models import random_shift

from perfit_device import history
from perfit_device.cloud import enrolment
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.identity import Identity
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.profile import Profile
from perfit_device.starts import start_of
from perfit_shared.shifts import LayerShift, ShiftTensors


def at(value: float) -> ShiftTensors:
    """Tensors whose loss at the fake cloud is the lower, the nearer `value` is to 0.23."""
    goal = ShiftTensors.identity(SPEC, SPEC.personal_rank, 7)
    return ShiftTensors(
        {
            layer: LayerShift(s.rotation, np.full_like(s.source, value), np.full_like(s.bias, value))
            for layer, s in goal.layers.items()
        }
    )


@pytest.fixture
def communities(cloud: FakeCloud) -> Iterator[FakeCloud]:
    """Three, the second of which suits everybody."""
    cloud.communities = [at(value).to_bytes() for value in (0.9, 0.1, -0.5)]
    yield cloud


def add(perfit: Perfit, *numbers: int) -> None:
    for number in numbers:
        perfit.ok("history", "add", f"article {number}", f"headline {number}")


def test_a_start_is_chosen_once_there_are_three_examples(enrolled: Perfit, communities: FakeCloud) -> None:
    assert "this is the seed" in enrolled("ask", "x")[2]
    add(enrolled, 1, 2)
    assert "this is the seed" in enrolled("ask", "x")[2]
    assert "Score" not in communities.calls
    add(enrolled, 3)
    communities.calls.clear()
    assert "community 2 of 3, which suits your latest 3 examples best" in enrolled("ask", "x")[2]
    # What the cloud sees: public seeds, and losses that it forgets. Which one it is, is decided here.
    assert {*communities.calls} <= {"Describe", "FetchSeed", "Score", "Generate"}
    assert communities.calls.count("Score") == 4  # of four starts
    assert communities.personal[-1] == at(0.1).to_bytes(dtype="int8")
    communities.calls.clear()
    add(enrolled, 4)
    assert "community 2 of 3" in enrolled("ask", "x")[2]
    assert "Score" not in communities.calls  # until there are twice as many
    task = enrolled.json("status")["tasks"]["news_headline"]
    assert (task["start"]["number"], task["start"]["of"], task["start"]["examples"]) == (2, 3, 3)
    assert "community 2 of 3, by your latest 3 examples" in " ".join(enrolled.ok("status").split())
    add(enrolled, 5, 6)
    assert "your latest 6 examples" in enrolled("ask", "x")[2]
    communities.communities = communities.communities[:1]  # others than it was chosen from
    assert "this is the seed" in enrolled("ask", "x")[2]
    enrolled.ok("history", "forget", "--all", "--yes")
    assert enrolled.json("status")["tasks"]["news_headline"]["start"] is None


def test_an_update_and_an_evaluation_begin_at_it(ready: Perfit, communities: FakeCloud) -> None:
    found = ready.json("evaluate")
    assert found["loss"]["personal"] < found["loss"]["seed"]
    before = ready.json("evaluate")["loss"]["personal"]
    assert before == found["loss"]["personal"]  # the same choice again
    gate = ready.json("update")["gate"]
    assert gate["after"] < gate["before"] < 0.5 * found["loss"]["seed"]


def test_a_start_is_chosen_as_it_will_be_read(newcomer: Profile, communities: FakeCloud) -> None:
    """Behind own examples where questions stand behind them; none of the test part is among these."""
    start_of(newcomer, newcomer.artefact(None), RetryPolicy())
    turns = [prompt.chat.messages for _, prompt in communities.scored]
    assert {len(said) for said in turns} == {9} and len(turns) == 4 * 16
    with newcomer.vault() as vault:
        test = {item.fields["title"] for item in history.split(history.load(vault)).test}
    assert not test & {message.content for said in turns for message in said}


def test_what_is_to_be_forgotten_has_no_say(ready: Perfit, opened: Profile, communities: FakeCloud) -> None:
    artefact, policy = opened.artefact("news_headline"), RetryPolicy()
    assert start_of(opened, artefact, policy).words.endswith("16 examples best")
    with opened.vault() as vault:
        half = [item.name for item in history.load(vault)][:10]
    assert start_of(opened, artefact, policy, without=half).words.endswith("7 examples best")


def test_seeds_that_cannot_be_are_refused(enrolled: Perfit, communities: FakeCloud) -> None:
    add(enrolled, 1, 2, 3)
    nan = ShiftTensors.from_named({n: a * np.float32("nan") for n, a in at(0.2).named()})
    wide = random_shift(SPEC, SPEC.personal_rank + 1, 3)
    bad: dict[str, list[bytes]] = {
        "cannot be used": [nan.to_bytes()],
        "a seed that": [wide.to_bytes()],
        "seed that": [b"x" * 100],
        "10,001 seeds, more than can be": [b""] * 10_000,
    }
    for words, seeds in bad.items():
        communities.communities = seeds
        assert words in enrolled.fails("ask", "x")
    assert enrolled.json("status")["tasks"]["news_headline"]["start"] is None
    communities.communities = []
    assert "this is the seed" in enrolled("ask", "x")[2]  # a cloud without any is as before


def test_the_plain_seed_is_where_old_clients_read_it(communities: FakeCloud) -> None:
    with Cloud(enrolment.enroll(communities.invite(), Identity.create())) as device:
        (artefact,) = device.describe().artefacts
        assert device.fetch_seed(artefact).digest() == communities.seed.digest()
        assert len(device.fetch_starts(artefact)) == 4 == artefact.communities + 1
