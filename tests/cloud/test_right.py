"""Promises 1 and 2 on four families: served tokens, gradients, identity, and apartness."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import FAMILIES, random_shift

from perfit_cloud.engine.generation import GenerationEngine, GenerationSettings
from perfit_cloud.engine.gradients import GradientEngine
from perfit_cloud.engine.types import Finish, Mode, Sampling, ShiftUse
from perfit_cloud.model.shifts import Group, hooked, open_book, phi, row_index, to_torch
from perfit_shared.errors import Busy, InvalidPrompt
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors

SMALL = GenerationSettings(cache_tokens=2048, batch_tokens=24, max_requests=16)  # forces chunked prefill
NEW = 12


def prompts(count: int) -> list[list[int]]:
    """Prompts of 1 to about 50 tokens, so that positions halve in some and prefill is chunked in others."""
    rng = np.random.default_rng(5)
    lengths = [1, 2, 3, 5, 8, 13, 30, 50]
    return [[0, *rng.integers(3, 250, lengths[i % len(lengths)] - 1).tolist()] for i in range(count)]


def alone(base: Any, prompt: list[int], use: ShiftUse, new: int = NEW) -> list[int]:
    """Greedy `generate` of one request with φ₂∘φ₁ written out by hand in a hook on the prompt pass."""
    ids = torch.tensor([prompt])
    handles = []

    def hook(layer: int) -> Any:
        def apply(_m: Any, _a: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] != len(prompt) or len(prompt) == 1:
                return None  # a decode step; and a one-token prompt has no positions
            hidden = hidden.clone()
            for p in Positions.parse(use.artefact.spec.positions).indices(len(prompt)):
                x = hidden[0, p].double()
                for tensors in (use.artefact.collective, use.personal):
                    if tensors is not None:
                        r, w, b = (torch.tensor(t).double() for t in tensors.layers[layer])
                        x = x + r.T @ (w @ x + b - r @ x)
                hidden[0, p] = x.to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return apply

    if use.artefact is not None:
        from perfit_cloud.model.base import block_list

        handles = [block_list(base.model)[i].register_forward_hook(hook(i)) for i in use.artefact.spec.layers]
    try:
        out = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=2
        )
    finally:
        for handle in handles:
            handle.remove()
    return out[0, len(prompt) :].tolist()


def serve(engine: GenerationEngine, wanted: list[tuple[list[int], ShiftUse, Sampling]]) -> list[list[int]]:
    """All requests at once; token ids of every answer."""
    answers = [engine.submit(*w) for w in wanted]
    ids = []
    for answer in answers:
        for piece in answer:
            last = piece
        assert last.finish in (Finish.END, Finish.LENGTH)
        ids.append(answer._ids)
        assert last.answer_tokens == len(answer._ids)
    return ids


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, load: Any, make_artefact: Any) -> Any:
    base = load(request.param)
    artefacts = {
        "news_headline": make_artefact(base),
        "chat": make_artefact(base, "chat", positions="l4", layers=(0, 2, 3), seed=9, ranks=(4, 5)),
    }
    engine = GenerationEngine(base, artefacts, SMALL)
    engine.start()
    yield base, artefacts, engine
    engine.stop()


def uses(artefacts: dict[str, Any], count: int) -> list[ShiftUse]:
    """BASE, COLLECTIVE and PERSONAL in turn, over both artefacts, every person another."""
    out = []
    for i in range(count):
        artefact = list(artefacts.values())[i % 2]
        mode = list(Mode)[i % 3]
        personal = random_shift(artefact.spec, artefact.spec.personal_rank, 100 + i)
        out.append(ShiftUse(mode, artefact if mode is not Mode.BASE else None,
                            personal if mode is Mode.PERSONAL else None))  # fmt: skip
    return out


def test_served_tokens_equal_hooked_generate(family: Any) -> None:
    base, artefacts, engine = family
    wanted = [(p, u, Sampling(NEW)) for p, u in zip(prompts(16), uses(artefacts, 16), strict=True)]
    served = serve(engine, wanted)
    for (prompt, use, _), got in zip(wanted, served, strict=True):
        assert got == alone(base, prompt, use), (use.mode, len(prompt))
    base_answers = [alone(base, p, ShiftUse(Mode.BASE)) for p, _, _ in wanted]
    changed = sum(g != b for g, b, (_, u, _) in zip(served, base_answers, wanted, strict=True)
                  if u.mode is not Mode.BASE)  # fmt: skip
    assert changed >= 5  # the shifts are on


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
    book = [Group(index, valid, to_torch(artefact.collective, base.device), None)]
    with torch.no_grad():
        before = base.model(ids).logits
        with hooked(base.model, artefact.spec.layers):
            assert torch.equal(base.model(ids).logits, before)  # no book is open
            with open_book(book):
                on = base.model(ids).logits
            assert torch.equal(base.model(ids).logits, before)
        assert torch.equal(base.model(ids).logits, before)
    assert not torch.allclose(on, before)


def test_gradients_equal_local_autograd(family: Any) -> None:
    """Against autograd through φ written by the formula, one example at a time, unpadded."""
    base, artefacts, _ = family
    artefact = artefacts["news_headline"]
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
    leaves = {
        layer: [torch.tensor(t).requires_grad_() for t in shift] for layer, shift in person.layers.items()
    }
    total, tokens = torch.zeros(()), 0
    for prompt, target in pairs:
        loss = _local_loss(base, artefact, leaves, prompt, target)
        total, tokens = total + loss, tokens + len(target)
    (total / tokens).backward()
    assert got.tokens == tokens
    assert got.loss == pytest.approx(float(total.detach()) / tokens, rel=1e-5)
    assert -sum(s.log_likelihood for s in scores) == pytest.approx(float(total.detach()), rel=1e-5)
    for layer, shift in got.tensors.layers.items():
        for ours, leaf in zip(shift, leaves[layer], strict=True):
            assert leaf.grad is not None
            error = np.linalg.norm(ours - leaf.grad.numpy()) / np.linalg.norm(leaf.grad.numpy())
            assert error < 1e-5


def _local_loss(base: Any, artefact: Any, leaves: Any, prompt: list[int], target: list[int]) -> torch.Tensor:
    from perfit_cloud.model.base import block_list

    positions = Positions.parse(artefact.spec.positions).indices(len(prompt))
    handles = []
    for layer in artefact.spec.layers:
        first = [torch.tensor(t) for t in artefact.collective.layers[layer]]

        def hook(_m: Any, _a: Any, output: Any, first: Any = first, layer: int = layer) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            rows = list(hidden.unbind(1))
            for p in positions:
                for r, w, b in (first, leaves[layer]):
                    rows[p] = rows[p] + (rows[p] @ w.T + b - rows[p] @ r.T) @ r
            hidden = torch.stack(rows, 1)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handles.append(block_list(base.model)[layer].register_forward_hook(hook))
    try:
        logits = base.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    finally:
        for handle in handles:
            handle.remove()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")


def test_a_neighbour_changes_no_bit_of_mine(load: Any, make_artefact: Any) -> None:
    """Same shapes, other tensors and other text beside me: my hidden states stay bit for bit."""
    base = load("llama")
    artefact = make_artefact(base)
    collective = to_torch(artefact.collective, base.device)

    def logits(neighbour_seed: int, neighbour_text: int) -> torch.Tensor:
        mine = to_torch(random_shift(artefact.spec, 3, 1), base.device)
        other = to_torch(random_shift(artefact.spec, 3, neighbour_seed, size=20.0), base.device)
        ids = torch.tensor([[0, 10, 11, 12, 13, 14], [0, *[neighbour_text] * 5]])
        rows = [[b * 6 + p for p in Positions(3, 3).indices(6)] for b in range(2)]
        index, valid = row_index(rows, base.device)
        both = {k: type(mine[k])(*(torch.cat(t) for t in zip(mine[k], other[k], strict=True))) for k in mine}
        with (
            torch.no_grad(),
            hooked(base.model, artefact.spec.layers),
            open_book([Group(index, valid, collective, both)]),
        ):
            return base.model(ids).logits

    first, second = logits(2, 20), logits(3, 99)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1])


def test_sampling_is_per_request(family: Any) -> None:
    base, artefacts, engine = family
    prompt = prompts(8)[6]
    use = uses(artefacts, 3)[1]
    hot = Sampling(NEW, temperature=1.5, top_k=50, top_p=0.95, seed=7)
    crowd = [(prompt, use, Sampling(NEW, temperature=1.5, seed=i)) for i in range(6)]
    first = serve(engine, [(prompt, use, hot), (prompt, use, Sampling(NEW)), *crowd])
    again = serve(engine, [(prompt, use, Sampling(NEW)), (prompt, use, hot)])
    assert first[0] == again[1]  # my seed, whoever is beside me
    assert first[1] == again[0] == alone(base, prompt, use)  # greedy neighbours stay greedy
    assert len({tuple(ids) for ids in first[2:]}) > 1
    assert serve(engine, [(prompt, use, Sampling(NEW, temperature=5.0, top_k=1, seed=3))])[0] == again[0]


def test_stop_texts_and_cancel(family: Any) -> None:
    base, artefacts, engine = family
    prompt, use = prompts(8)[7], uses(artefacts, 3)[2]
    whole = base.decode(alone(base, prompt, use, 24))
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    pieces = list(engine.submit(prompt, use, Sampling(24, stop=(stop,))))
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish is Finish.END
    answer = engine.submit(prompt, use, Sampling(150))
    next(answer)
    answer.cancel()
    assert list(answer) == []
    assert engine.in_flight == 0


def test_limits(family: Any) -> None:
    base, _, engine = family
    with pytest.raises(InvalidPrompt, match="tokens"):
        engine.submit([5] * 300, ShiftUse(Mode.BASE), Sampling(10))
    waiting = [engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(100)) for _ in range(16)]
    with pytest.raises(Busy) as busy:
        engine.submit([0, 5], ShiftUse(Mode.BASE), Sampling(5))
    assert busy.value.retry_ms > 0
    for answer in waiting:
        answer.cancel()
    assert serve(engine, [([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))])[0] == alone(
        base, [0, 5, 6], ShiftUse(Mode.BASE), 4
    )


def test_personal_tensors_of_a_layer_are_checked(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefact = make_artefact(base)
    good = random_shift(artefact.spec, 3, 0)
    layers = dict(good.layers)
    layers[1] = LayerShift(*(t[:2] for t in layers[1]))
    from perfit_shared.errors import InvalidTensors

    with pytest.raises(InvalidTensors, match="shape"):
        ShiftTensors(layers).check(artefact.spec, 3)
