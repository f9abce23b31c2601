"""Promises 1 and 2 on every family: served tokens, gradients, identity, and apartness."""

from __future__ import annotations

import gc
import time
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import FAMILIES, random_shift

from perfit_cloud.engine.generation import Engine, GenerationEngine, GenerationSettings, can_share, engine_for
from perfit_cloud.engine.gradients import GradientEngine, passes
from perfit_cloud.engine.types import Finish, Mode, Sampling, ShiftUse
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.shifts import Group, hooked, open_book, phi, row_index, to_torch
from perfit_shared.errors import Busy, InvalidPrompt, Unavailable
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


def serve(engine: Engine, wanted: list[tuple[list[int], ShiftUse, Sampling]]) -> list[list[int]]:
    """All requests at once; token ids of every answer."""
    answers = [engine.submit(*w) for w in wanted]
    ids = []
    for answer in answers:
        for piece in answer:
            last = piece
        assert last.finish in (Finish.END, Finish.LENGTH)
        ids.append(answer.ids)
        assert last.answer_tokens == len(answer.ids)
    return ids


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, load: Any, make_artefact: Any) -> Any:
    base = load(request.param)
    artefacts = {
        "news_headline": make_artefact(base),
        "chat": make_artefact(base, "chat", positions="l4", layers=(0, 2, 3), seed=9, ranks=(4, 5)),
    }
    engine = engine_for(base, artefacts, SMALL)
    engine.start()
    yield base, artefacts, engine
    engine.stop()


def test_who_shares_a_batch(family: Any) -> None:
    """Falcon's attention does not go through the library's interface; it is served all the same."""
    base, _, engine = family
    assert engine.continuous == (base.model.config.model_type != "falcon")


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


def test_the_same_prompt_of_many_users_is_not_shared(family: Any) -> None:
    """A page of keys and values holds one user's shift; a prefix cache would hand it to the next."""
    base, artefacts, engine = family
    prompt = [0, *np.random.default_rng(8).integers(3, 250, 69).tolist()]  # over two pages
    wanted = [(prompt, use, Sampling(NEW)) for use in uses(artefacts, 6)]
    for (_, use, _), got in zip(wanted, serve(engine, wanted), strict=True):
        assert got == alone(base, prompt, use)


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


class Recorded:
    """Serves requests that all enter one batch, and keeps the logits of every one's tokens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, engine: GenerationEngine) -> None:
        if not engine.continuous:
            pytest.skip("this family has no batch that requests join")
        self.engine = engine
        self.rows: dict[Any, list[torch.Tensor]] = {}
        forward = engine._forward

        def recording(plan: Any) -> Any:
            logits, speaking = forward(plan)
            for request, row in zip(speaking, logits.clone(), strict=True):
                self.rows.setdefault(request.answer, []).append(row)
            return logits, speaking

        monkeypatch.setattr(engine, "_forward", recording)

    def __call__(self, wanted: list[tuple[list[int], ShiftUse, Sampling]]) -> list[torch.Tensor]:
        """Logits (tokens, V) of each request."""
        self.rows.clear()
        with self.engine._changed:  # nobody is admitted before all have come
            answers = [self.engine.submit(*w) for w in wanted]
        for answer in answers:
            list(answer)
        return [torch.stack(self.rows[answer]) for answer in answers]


def test_served_logits_equal_the_untouched_model_s(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a tiny random model may agree by luck, so the logits have to, too."""
    base, _, engine = family
    wanted = [(p, ShiftUse(Mode.BASE), Sampling(4)) for p in prompts(16)]
    for (prompt, _, _), logits in zip(wanted, Recorded(monkeypatch, engine)(wanted), strict=True):
        with torch.no_grad():
            want = base.model(torch.tensor([prompt])).logits[0, -1]
        assert torch.allclose(logits[0], want, atol=2e-4, rtol=1e-4), (logits[0] - want).abs().max()


def test_a_neighbour_changes_no_bit_of_mine(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same shapes, other tensors and other text beside me: not one bit of my logits moves.

    Both artefacts, all modes and chunked prefill in one batch; the neighbours' tensors are as
    large as the wire lets through.
    """
    _, artefacts, engine = family
    rng = np.random.default_rng(3)

    def crowd(seed: int, size: float) -> list[tuple[list[int], ShiftUse, Sampling]]:
        out = []
        for i, artefact in enumerate([*artefacts.values()] * 3):
            text = [0, *np.random.default_rng([seed, i]).integers(3, 250, 12 + 9 * i).tolist()]
            person = random_shift(artefact.spec, artefact.spec.personal_rank, seed + i, size)
            person.check(artefact.spec, artefact.spec.personal_rank)
            out.append((text, ShiftUse(Mode.PERSONAL, artefact, person), Sampling(NEW, temperature=1.0)))
        return out

    mine = [([0, *rng.integers(3, 250, 40).tolist()], use, Sampling(NEW)) for use in uses(artefacts, 3)]
    record = Recorded(monkeypatch, engine)
    monkeypatch.setattr(engine, "end_ids", frozenset())  # else a neighbour's end would change the shapes
    first, second = record([*mine, *crowd(1, 0.5)])[:3], record([*mine, *crowd(2, 8.0)])[:3]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert torch.isfinite(b).all()


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


def test_who_finds_no_room_waits_and_gets_the_same_answer(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefacts = {"news_headline": make_artefact(base)}
    engine = GenerationEngine(base, artefacts, GenerationSettings(320, 64, 16))
    use = ShiftUse(
        Mode.PERSONAL, artefacts["news_headline"], random_shift(artefacts["news_headline"].spec, 3, 5)
    )
    wanted = [(p, use, Sampling(40)) for p in prompts(12)]
    together, forward = [], engine._forward

    def counting(plan: Any) -> Any:
        together.append(len(engine._places))
        return forward(plan)

    engine._forward = counting  # type: ignore[method-assign]
    try:
        served = serve(engine, wanted)
    finally:
        engine.stop()
    assert 1 < max(together) < 12
    for (prompt, _, _), got in zip(wanted, served, strict=True):
        assert got == alone(base, prompt, use, 40)


def test_a_long_prompt_and_short_ones_keep_nobody_waiting(load: Any) -> None:
    """A short prompt that comes behind a long one speaks first; the long one goes on all the while."""
    base = load("llama")
    engine = GenerationEngine(base, {}, GenerationSettings(2048, 16, 16))
    first: list[str] = []
    forward = engine._forward

    def noting(plan: Any) -> Any:
        logits, speaking = forward(plan)
        first.extend(name for name, answer in names.items()
                     if any(r.answer is answer for r in speaking) and name not in first)  # fmt: skip
        return logits, speaking

    engine._forward = noting  # type: ignore[method-assign]
    long, short = [0] * 240, [0, 5, 6, 7]
    with engine._changed:
        names = {"long": engine.submit(long, ShiftUse(Mode.BASE), Sampling(2))}
        names |= {f"short{i}": engine.submit(short, ShiftUse(Mode.BASE), Sampling(2)) for i in range(12)}
    try:
        for answer in names.values():
            list(answer)
    finally:
        engine.stop()
    assert first.index("long") == len(first) - 1
    assert len(first) == 13


def test_coming_and_leaving_leaves_nothing_behind(load: Any) -> None:
    """A thousand who come and go, behind others that read nothing of their answers: no place stays taken."""
    base = load("llama")
    engine = GenerationEngine(base, {}, GenerationSettings(512, 64, 8))
    hot = Sampling(60, temperature=2.0)
    try:
        slow = [engine.submit([0, 5, 6], ShiftUse(Mode.BASE), hot) for _ in range(4)]
        for _ in range(1000):
            engine.submit([0] * 100, ShiftUse(Mode.BASE), Sampling(100)).cancel()
            assert len(engine._waiting) <= 8 and engine.in_flight <= 8
        assert serve(engine, [([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))])[0] == alone(
            base, [0, 5, 6], ShiftUse(Mode.BASE), 4
        )
        assert all(list(answer)[-1].finish for answer in slow)  # made meanwhile, and kept for them
        assert engine.in_flight == 0 and not engine._places
    finally:
        engine.stop()
    assert not any(shelf.places for shelf in engine._shelves._shelves.values())


def test_what_a_request_held_goes_with_it(load: Any, make_artefact: Any) -> None:
    """Not at some later collection of cycles: on an idle cloud that may be hours away."""
    base = load("llama")
    artefact = make_artefact(base)
    engine = GenerationEngine(base, {artefact.name: artefact}, SMALL)
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, 3, 1))
    gc.collect()
    gc.disable()
    try:
        answers = [engine.submit([0, 5, 6, 7], use, Sampling(n)) for n in (3, 200)]
        held = [weakref.ref(request) for request in engine._requests]
        held += [weakref.ref(t) for r in engine._requests for phi in r.personal.values() for t in phi]
        list(answers[0])
        next(answers[1])
        answers[1].cancel()
        deadline = time.monotonic() + 30
        while any(ref() is not None for ref in held) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(held) == 14
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()
        engine.stop()


def test_an_engine_that_cannot_forget_stops(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of the device itself nothing works any more: readers and callers must hear of it."""
    engine = GenerationEngine(load("llama"), {}, SMALL)

    def broken(*_: Any) -> Any:
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(engine, "_forward", broken)
    monkeypatch.setattr(engine._shelves, "clear", broken)
    with pytest.raises(Unavailable):
        list(engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4)))
    assert engine._thread is not None
    engine._thread.join(30)
    with pytest.raises(Unavailable):
        engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))


@pytest.mark.parametrize("kind", ["qwen2_moe", "phimoe"])
def test_a_family_that_hides_its_window_in_the_mask_is_not_packed(kind: str) -> None:
    """Such a block does not tell its attention of it, which would look back over everything."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=100, max_position_embeddings=256, sliding_window=10,
        use_sliding_window=True, max_window_layers=2, initializer_range=0.3,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not can_share(BaseModel("tiny", "", model, None))


def test_a_token_beyond_the_vocabulary_is_refused(load: Any) -> None:
    """In a shared pass it would end everybody's answers."""
    engine = GenerationEngine(load("llama"), {}, SMALL)
    with pytest.raises(InvalidPrompt, match="does not know"):
        engine.submit([0, 10**6], ShiftUse(Mode.BASE), Sampling(4))


def test_half_precision_serves_what_generate_does_up_to_ties(model_folder: Any, make_artefact: Any) -> None:
    """bfloat16: where served and hooked `generate` part, the two best tokens were next to equal."""
    base = load_base(str(model_folder("llama")), dtype="bfloat16")
    artefacts = {"news_headline": make_artefact(base)}
    engine = engine_for(base, artefacts, SMALL)
    assert engine.continuous
    asked = uses(artefacts | {"again": artefacts["news_headline"]}, 12)
    wanted = [(p, u, Sampling(NEW)) for p, u in zip(prompts(12), asked, strict=True)]
    try:
        served = serve(engine, wanted)
    finally:
        engine.stop()
    same = 0
    for (prompt, use, _), got in zip(wanted, served, strict=True):
        want = alone(base, prompt, use)
        part = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        same += part is None
        if part is not None:
            gap = _gap(base, prompt, use, want[:part], got[part], want[part])
            assert gap < 0.06, gap  # logits of this model span about 6; bfloat16 rounds them to 0.03
    assert same >= 6


def _gap(base: Any, prompt: list[int], use: ShiftUse, before: list[int], a: int, b: int) -> float:
    """How far apart two tokens' log-likelihoods are after prompt and `before`."""
    engine = GradientEngine(base)
    try:
        scores = engine.score([(prompt, [*before, a]), (prompt, [*before, b])], use)
    finally:
        engine.close()
    return abs(scores[0].log_likelihood - scores[1].log_likelihood)


def test_an_error_in_a_pass_ends_its_answers_and_the_engine_goes_on(load: Any) -> None:
    base = load("llama")
    engine = GenerationEngine(base, {}, SMALL)
    forward = engine._forward

    def failing(plan: Any) -> Any:
        engine._forward = forward  # type: ignore[method-assign]
        raise RuntimeError("secret")

    engine._forward = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(Unavailable) as caught:
            list(engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4)))
        assert "secret" not in str(caught.value)
        assert engine.in_flight == 0
        assert serve(engine, [([0, 5, 6], ShiftUse(Mode.BASE), Sampling(4))])[0] == alone(
            base, [0, 5, 6], ShiftUse(Mode.BASE), 4
        )
    finally:
        engine.stop()


def test_text_comes_as_the_whole_answer_reads(family: Any) -> None:
    """Piece by piece, characters of several tokens and spaces in front of words included."""
    base, artefacts, engine = family
    for seed, use in enumerate(uses(artefacts, 6)):
        answer = engine.submit(prompts(8)[6], use, Sampling(40, temperature=3.0, seed=seed))
        text = "".join(piece.text for piece in answer)
        ids = answer.ids[:-1] if answer.ids[-1] in engine.end_ids else answer.ids
        assert text == base.decode(ids)


def test_the_order_of_the_engines_does_not_matter(load: Any, make_artefact: Any) -> None:
    base = load("llama")
    artefacts = {"news_headline": make_artefact(base)}
    gradients = GradientEngine(base)  # its hooks must not be copied into the serving twin
    engine = GenerationEngine(base, artefacts, SMALL)
    use = uses(artefacts | {"again": artefacts["news_headline"]}, 3)[2]
    try:
        assert serve(engine, [(prompts(7)[6], use, Sampling(NEW))])[0] == alone(base, prompts(7)[6], use)
    finally:
        engine.stop()
        gradients.close()


def test_a_stopped_engine_stays_stopped(load: Any) -> None:
    engine = GenerationEngine(load("llama"), {}, SMALL)
    answer = engine.submit([0, 5, 6], ShiftUse(Mode.BASE), Sampling(200))
    next(answer)
    engine.stop()
    with pytest.raises(Unavailable):
        list(answer)
    with pytest.raises(Unavailable):
        engine.submit([0, 5], ShiftUse(Mode.BASE), Sampling(2))


def test_long_and_short_examples_together_take_little_memory(load: Any, make_artefact: Any) -> None:
    """One long example must not pad 63 short ones up to its length in a single pass."""
    pairs = [([0] * 200, [5, 1]), *[([0, 4], [6, 1])] * 63]
    made = passes(pairs)
    assert sorted(i for chunk in made for i in chunk) == list(range(64))
    assert max(len(chunk) * max(sum(map(len, pairs[i])) for i in chunk) for chunk in made) <= 8192
    base = load("llama")
    artefact = make_artefact(base)
    use = ShiftUse(Mode.PERSONAL, artefact, random_shift(artefact.spec, 3, 1))
    engine = GradientEngine(base)
    try:
        whole = engine.gradient(pairs, use)
        monkey = pytest.MonkeyPatch()
        monkey.setattr("perfit_cloud.engine.gradients._PASS_TOKENS", 64)
        chunked = engine.gradient(pairs, use)
        monkey.undo()
    finally:
        engine.close()
    assert chunked.loss == pytest.approx(whole.loss, rel=1e-5)
    for (_, a), (_, b) in zip(whole.tensors.named(), chunked.tensors.named(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)


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
    answer = engine.submit(prompt, use, Sampling(150, temperature=2.0))
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
