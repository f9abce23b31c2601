"""Attention sinks: found in a model, left out of a spec, and never shifted by anything then."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_cloud.model.sinks import leading_sinks, past_sinks
from perfit_shared.errors import InvalidInput

PROMPTS = [list(range(3, 3 + length)) for length in (12, 15, 30, 18)]


def make_sinks(base: BaseModel, places: list[int], block: int, times: float = 100.0) -> list[Any]:
    """From `block` on, these tokens' states are as much longer, as real models make them."""

    def lengthen(_module: Any, _args: Any, output: Any) -> Any:
        hidden: Tensor = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, places] *= times
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return [block_list(base.model)[block].register_forward_hook(lengthen)]


@pytest.fixture
def own(base: BaseModel) -> Iterator[BaseModel]:
    """With modules of its own, so that hooks of a test end with it."""
    yield replace(base, model=base.share_weights())


@pytest.mark.parametrize(
    ("places", "block", "first_block", "skipped"),
    [
        ([], 2, 0, 0),
        ([0], 1, 1, 1),
        ([0], 3, 1, 1),  # it forms above the first intervened block, which could keep it from forming
        ([0, 1], 2, 0, 2),
        ([1], 2, 0, 2),
        ([9], 2, 0, 0),  # a word of these prompts, not the model's habit
    ],
)
def test_leading_sinks_are_counted(
    own: BaseModel, places: list[int], block: int, first_block: int, skipped: int
) -> None:
    make_sinks(own, places, block)
    assert leading_sinks(own, PROMPTS, first_block) == skipped


def test_a_long_token_is_no_sink(own: BaseModel) -> None:
    make_sinks(own, [0], 1, times=8.0)  # as begin-of-sequence tokens and delimiters are, without harm
    assert leading_sinks(own, PROMPTS, 0) == 0


def test_without_usable_prompts_there_is_none(own: BaseModel) -> None:
    make_sinks(own, [0], 1)
    assert leading_sinks(own, [], 0) == 0
    assert leading_sinks(own, [[3, 4]], 0) == 0


def test_positions_pass_the_sink_unless_they_say_themselves(own: BaseModel) -> None:
    make_sinks(own, [0], 2)
    assert past_sinks("f7+l7", own, PROMPTS, 1) == "s1+f7+l7"
    assert past_sinks("f3", own, PROMPTS, 1) == "s1+f3"
    assert past_sinks("l7", own, PROMPTS, 1) == "l7"
    assert past_sinks("s0+f7+l7", own, PROMPTS, 1) == "f7+l7"
    assert past_sinks("s2+f7", own, PROMPTS, 1) == "s2+f7"


def test_what_is_asked_fits_an_artefact_that_leaves_sinks_out(
    base: BaseModel, make_artefact: Any, tmp_path: Path
) -> None:
    from perfit_cloud.lamp.request import LampRequest
    from perfit_cloud.lamp.stage1 import collective_artefact

    made = make_artefact(base, positions="s1+f2+l3", layers=(1, 2))
    made.save(tmp_path)

    def found(positions: str | None) -> str:
        request = LampRequest(
            "news_headline", "m", tmp_path, tmp_path, artefact=tmp_path, positions=positions
        )
        return collective_artefact(request, made.task, base, lambda: False).spec.positions

    for asked in (None, "f2+l3", "s1+f2+l3"):  # the model decides, unless the request says
        assert found(asked) == "s1+f2+l3"
    for other in ("s0+f2+l3", "f3+l3", "l3"):
        with pytest.raises(InvalidInput, match="other positions"):
            found(other)
