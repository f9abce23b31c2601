"""Promises 1 and 2 for gradients and shifts; engines for answers have a suite in tests/support."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.engine_subject import halved
from tests.support.generation import prompts
from tests.support.gradients import OF_TOKENIZER, assert_equal, assert_right_in_half, autograd
from tests.support.models import FAMILIES, random_shift

from perfit_cloud.engine.gradients.batch import passes
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.capabilities import Batching
from perfit_cloud.model.interventions import (
    ShiftGroup,
    active_interventions,
    hooked,
    phi,
    row_index,
    to_torch,
)
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.types import Mode


def test_zero_shift_is_exactly_the_identity(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    spec = make_artefact(base).spec
    zero = to_torch(ShiftTensors.identity(spec, 3), base.device)[1]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = (torch.randn(2, 5, base.hidden_size) * 30).to(dtype)
        assert torch.equal(phi(x, zero), x)


def test_off_is_off_again(load: Any, make_artefact: Any) -> None:
    base, ids = load("llama"), torch.tensor([[0, 5, 6, 7, 8, 9]])
    artefact = make_artefact(base)
    index, valid = row_index([[0, 1, 4, 5]], base.device)
    book = [ShiftGroup(index, valid, to_torch(artefact.collective, base.device), None)]
    with torch.no_grad():
        before = base.model(ids).logits
        with hooked(base.model, artefact.spec.layers):
            assert torch.equal(base.model(ids).logits, before)  # no book is open
            with active_interventions(book):
                on = base.model(ids).logits
            assert torch.equal(base.model(ids).logits, before)
        assert torch.equal(base.model(ids).logits, before)
    assert not torch.allclose(on, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_local_autograd(name: str, load: Any, make_artefact: Any) -> None:
    """Against autograd through φ written by the formula, one example at a time, unpadded."""
    base = load(name)
    artefact = make_artefact(base)
    person = random_shift(artefact.spec, artefact.spec.personal_rank, 3)
    rng = np.random.default_rng(1)
    pairs = [
        (p, [*rng.integers(3, 250, n).tolist(), 1])
        for p, n in zip(prompts(7), (1, 2, 3, 4, 5, 6, 7), strict=True)
    ]
    engine = GradientEngine(base)
    try:
        got = engine.gradient(pairs, ShiftUse(Mode.PERSONAL, artefact, person))
        scores = engine.score(pairs, ShiftUse(Mode.PERSONAL, artefact, person))
    finally:
        engine.close()
    want = autograd(base, artefact, person, pairs)
    assert_equal(got, want, 1e-5)
    log_likelihood = sum(score.log_likelihood for score in scores)
    assert -log_likelihood == pytest.approx(want.loss * want.tokens, rel=1e-5)


def test_gradients_feel_no_other_call(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefact = make_artefact(base)
    engine = GradientEngine(base)
    pairs = [(p, [9, 8, 1]) for p in prompts(4)]
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, 3, 1))
    other = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, 3, 2, size=8.0))
    try:
        before = engine.gradient(pairs, use)
        engine.gradient([(p, [99, 1]) for p in prompts(8)], other)
        after = engine.gradient(pairs, use)
    finally:
        engine.close()
    assert before.tensors.digest() == after.tensors.digest()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_gradients_in_half_precision_are_off_by_less_than_it_changes_them(
    name: str, load: Any, make_artefact: Any
) -> None:
    """From plain autograd in bfloat16, by less than that is off from autograd in float32."""
    base = load(name)
    assert_right_in_half(halved(base), make_artefact(base), OF_TOKENIZER)


def test_long_and_short_examples_together_take_little_memory(load: Any, make_artefact: Any) -> None:
    """One long example must not pad 63 short ones up to its length in a single pass."""
    pairs = [([0] * 200, [5, 1]), *[([0, 4], [6, 1])] * 63]
    made = passes(pairs, Batching.ANY_LENGTHS)
    assert sorted(i for chunk in made for i in chunk) == list(range(64))
    assert max(len(chunk) * max(sum(map(len, pairs[i])) for i in chunk) for chunk in made) <= 8192
    base = load("llama")
    artefact = make_artefact(base)
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, 3, 1))
    engine, narrow = GradientEngine(base), GradientEngine(base, pass_tokens=64)
    try:
        whole = engine.gradient(pairs, use)
        chunked = narrow.gradient(pairs, use)
    finally:
        engine.close()
        narrow.close()
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-5)
    for (_, a), (_, b) in zip(whole.tensors.named(), chunked.tensors.named(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


def test_personal_tensors_of_a_layer_are_checked(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefact = make_artefact(base)
    good = random_shift(artefact.spec, 3, 0)
    layers = dict(good.layers)
    layers[1] = LayerShift(*(t[:2] for t in layers[1]))
    from perfit_shared.errors import InvalidTensors

    with pytest.raises(InvalidTensors, match="shape"):
        ShiftTensors(layers).check(artefact.spec, 3)
