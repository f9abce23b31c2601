"""Gradient steps from what is kept equal full autograd, for one user and for several at once."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from tests.cloud.test_tail import build
from tests.conftest import FAMILIES, KEPT, random_shift

from perfit_cloud.engine import adaptation as module
from perfit_cloud.engine import kept as kept_module
from perfit_cloud.engine.adaptation import AdaptationEngine, Step
from perfit_cloud.engine.gradients import GradientEngine
from perfit_cloud.engine.kept import Caps
from perfit_cloud.engine.types import Gradient, Mode, ShiftUse
from perfit_cloud.model.base import block_list
from perfit_shared.errors import InvalidInput, InvalidTensors
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors

PLENTY = 2**30
# (layers, positions): first and last tokens or the last alone, one layer or several, the very last block.
SPECS = [((1, 2), "f3+l3"), ((0, 2, 3), "l4"), ((3,), "f7+l7"), ((1,), "l3"), ((2,), "f2")]
Pairs = list[tuple[list[int], list[int]]]


def make_pairs(lengths: list[int], seed: int = 0) -> Pairs:
    """One pair for each length of a prompt, with targets of 1 to 6 tokens."""
    rng = np.random.default_rng(seed)
    return [
        ([0, *rng.integers(3, 290, n - 1).tolist()], [*rng.integers(3, 290, i % 6).tolist(), 1])
        for i, n in enumerate(lengths)
    ]


RAGGED = make_pairs([13, 2, 50, 3, 1, 30, 5, 21])


def by_autograd(base: Any, artefact: Any, personal: ShiftTensors, pairs: Pairs) -> Gradient:
    """φ₂∘φ₁ by the formula in hooks on the library's model, an example at a time, unpadded."""
    leaves = {at: [torch.tensor(t).requires_grad_() for t in s] for at, s in personal.layers.items()}
    total, tokens = torch.zeros(()), sum(len(target) for _, target in pairs)
    for prompt, target in pairs:
        marks = Positions.parse(artefact.spec.positions).indices(len(prompt))
        handles = []
        for layer in artefact.spec.layers:
            both = ([torch.tensor(t) for t in artefact.collective.layers[layer]], leaves[layer])

            def hook(_m: Any, _a: Any, output: Any, both: Any = both, marks: Any = marks) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                rows = list(hidden.unbind(1))
                for p in marks:
                    for r, w, b in both:
                        rows[p] = rows[p] + (rows[p] @ w.T + b - rows[p] @ r.T) @ r
                return (
                    (torch.stack(rows, 1), *output[1:]) if isinstance(output, tuple) else torch.stack(rows, 1)
                )

            handles.append(block_list(base.model)[layer].register_forward_hook(hook))
        logits = base.model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")
        for handle in handles:
            handle.remove()
    flat = [t for tensors in leaves.values() for t in tensors]
    found = iter(torch.autograd.grad(total / tokens, flat, allow_unused=True, materialize_grads=True))
    layers = {at: LayerShift(*(next(found).numpy() for _ in tensors)) for at, tensors in leaves.items()}
    return Gradient(float(total.detach()) / tokens, tokens, ShiftTensors(layers))


def assert_equal(got: Gradient, wanted: Gradient, tolerance: float = 2e-5) -> None:
    assert got.tokens == wanted.tokens
    assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
    assert wanted.tensors.norm() > 1e-3
    for (name, a), (_, b) in zip(got.tensors.named(), wanted.tensors.named(), strict=True):
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b) + 1e-7, name


def person(artefact: Any, seed: int) -> ShiftTensors:
    return random_shift(artefact.spec, artefact.spec.personal_rank, seed)


@pytest.fixture
def llama(make_artefact: Any) -> Any:
    """(base, artefact with last positions, engine that keeps everything)."""
    base = build("llama")
    engine = AdaptationEngine(base, keep_bytes=PLENTY)
    yield base, make_artefact(base, positions="l4"), engine
    engine.close()


@pytest.mark.parametrize(("layers", "positions"), SPECS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_equals_full_autograd(family: str, layers: Any, positions: str, make_artefact: Any) -> None:
    base = build(family)
    artefact = make_artefact(base, layers=layers, positions=positions)
    engine = AdaptationEngine(base, keep_bytes=PLENTY)
    assert engine.keeps == (family in KEPT)
    rows, mine = [2, 0, 7, 4, 5, 1], person(artefact, 3)
    wanted = by_autograd(base, artefact, mine, [RAGGED[row] for row in rows])
    with engine.open(RAGGED, artefact) as adaptation:
        step = Step(adaptation, rows, mine)
        (got,) = engine.gradients([step])
        assert_equal(got, wanted)
        assert engine.losses([step]) == [(pytest.approx(got.loss, rel=1e-6), got.tokens)]


@pytest.mark.parametrize("positions", ["f3+l3", "l4"])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("keep_bytes", [PLENTY, 6000, 0])
def test_several_users_together_equal_each_alone(
    family: str, positions: str, keep_bytes: int, make_artefact: Any
) -> None:
    """Ragged batches, one user twice, one with nothing to change, one under another artefact; any budget."""
    base = build(family)
    artefact, other = make_artefact(base, positions=positions), make_artefact(base, layers=(0, 3), seed=5)
    engine, alone = AdaptationEngine(base, keep_bytes=keep_bytes), GradientEngine(base)
    histories = [RAGGED, make_pairs([40, 20, 2, 1, 7], 1), make_pairs([1, 1], 2), make_pairs([9, 9, 9], 3)]
    artefacts = [artefact, artefact, artefact, other]
    opened = [engine.open(pairs, a) for pairs, a in zip(histories, artefacts, strict=True)]
    kept = sum(a.kept_examples for a in opened)
    if family != "gpt2":
        changing = sum(len(prompt) > 1 for pairs in histories for prompt, _ in pairs)
        assert {PLENTY: kept == changing, 6000: 0 < kept < changing, 0: kept == 0}[keep_bytes]
        assert sum(a.kept_bytes for a in opened) <= keep_bytes
    asked = [(0, [7, 0, 3]), (1, [0, 3, 2, 1]), (0, [5]), (2, [0, 1]), (3, [0, 2])]
    steps = [
        Step(opened[i], rows, person(artefacts[i], 10 + at)) for at, (i, rows) in enumerate(asked)
    ]  # fmt: skip
    together = engine.gradients(steps)
    for step, (i, rows), got in zip(steps, asked, together, strict=True):
        use = ShiftUse(Mode.PERSONAL, artefacts[i], step.personal)
        wanted = alone.gradient([histories[i][row] for row in rows], use)
        if i == 2:  # prompts of one token: a loss that no tensor changes
            assert got.tensors.norm() == wanted.tensors.norm() == 0
            assert got.loss == pytest.approx(wanted.loss, rel=1e-5)
        else:
            assert_equal(got, wanted)
            assert_equal(engine.gradients([step])[0], wanted)
    for got, (loss, tokens) in zip(together, engine.losses(steps), strict=True):
        assert (loss, tokens) == (pytest.approx(got.loss, rel=1e-6), got.tokens)
    alone.close()
    engine.close()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("positions", ["f3+l3", "l4"])
def test_what_a_neighbour_sends_changes_no_bit(family: str, positions: str, make_artefact: Any) -> None:
    base = build(family)
    artefact = make_artefact(base, positions=positions)
    engine = AdaptationEngine(base, keep_bytes=PLENTY)
    mine = engine.open(RAGGED, artefact)
    found = []
    for seed, scale in ((1, 1.0), (2, 60.0)):  # another text of the same lengths, and tensors near the cap
        theirs = engine.open(make_pairs([13, 2, 50, 3, 1, 30, 5, 21], seed), artefact)
        shift = person(artefact, seed)
        huge = ShiftTensors(
            {at: LayerShift(r, w * scale, b * scale) for at, (r, w, b) in shift.layers.items()}
        )
        rows = list(range(8))
        steps = [Step(theirs, rows, huge), Step(mine, rows, person(artefact, 9)), Step(theirs, rows, huge)]
        found.append(engine.gradients(steps))
    assert found[0][0].loss != found[1][0].loss
    assert found[0][1].loss == found[1][1].loss
    for (name, a), (_, b) in zip(
        found[0][1].tensors.named(), found[1][1].tensors.named(), strict=True
    ):  # fmt: skip
        assert a.tobytes() == b.tobytes(), name


def test_a_step_runs_only_what_the_tensors_can_change(llama: Any) -> None:
    """Rows that meet each block and its MLP: none below the first intervened one, no past, few at the end."""
    _, artefact, engine = llama
    adaptation = engine.open(RAGGED, artefact)
    blocks = block_list(engine._own.model)
    seen: dict[str, int] = {}
    for at, block in enumerate(blocks):
        for name, part in (("attention", block.self_attn.q_proj), ("mlp", block.mlp)):
            part.register_forward_pre_hook(
                lambda _m, args, key=f"{name} {at}": seen.update({key: args[0].shape[1]})
            )
    engine.gradients([Step(adaptation, [2, 5], person(artefact, 1))])  # layers 1 and 2, l4
    targets = [len(RAGGED[row][1]) for row in (2, 5)]
    rows = sum(4 + n - 1 for n in targets)
    assert seen == {
        "attention 2": rows, "mlp 2": rows, "attention 3": rows, "mlp 3": sum(targets),
    }  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_big_steps_are_cut_into_passes(
    family: str, make_artefact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(family)
    artefact = make_artefact(base)
    engine = AdaptationEngine(base, keep_bytes=PLENTY)
    steps = [
        Step(engine.open(make_pairs(lengths, i), artefact), range(len(lengths)), person(artefact, i))
        for i, lengths in enumerate([[30, 5, 40, 12, 20], [6, 7], [8, 9], [60, 10]])
    ]
    whole = engine.gradients(steps)
    passes: list[Any] = []
    run = engine._pass

    def counted(shares: Any, **how: Any) -> Any:
        passes.append(shares)
        return run(shares, **how)

    monkeypatch.setattr(engine, "_pass", counted)
    for caps in (
        Caps(48, 2**20, 2**20),
        Caps(2**20, 64, 2**20),
        Caps(2**20, 2**20, 300),
    ):
        passes.clear()
        monkeypatch.setattr(engine, "_caps", caps)
        for got, wanted in zip(engine.gradients(steps), whole, strict=True):
            assert_equal(got, wanted)
        assert len(passes) > 2
        assert any(len(shares) > 1 for shares in passes)  # like lengths of several users
        for shares in passes:
            of_pass = [t.adaptation._arrays for t, which in shares for _ in which]
            sizes = [
                (a.rows[i], a.rows[i] + a.starts[i])
                for a, i in zip(of_pass, (i for _, which in shares for i in which), strict=True)
            ]
            rows, lengths = zip(*sizes, strict=True)
            padding = len(sizes) * max(rows) * max(lengths) - sum(r * n for r, n in sizes)
            within = (sum(rows) <= caps.rows, len(sizes) * max(lengths) <= caps.keys, padding <= caps.padding)
            assert len(sizes) == 1 or all(within)


def test_nothing_is_left_after_close(make_artefact: Any) -> None:
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    engine = AdaptationEngine(base, keep_bytes=6000, spill_bytes=9000)
    adaptation = engine.open(RAGGED, artefact)
    held, taken = [adaptation._arrays.ids], []
    for kept in adaptation._stores:
        held += (own := [kept.hidden, *(t for pair in kept.past.values() for t in pair)])
        taken.append(sum(t.nbytes for t in own))
    assert all(tensor.abs().sum() > 0 for tensor in held)
    assert taken == [adaptation.kept_bytes, adaptation.spilled_bytes]
    assert engine._room == [6000 - taken[0], 9000 - taken[1]]
    step = Step(adaptation, [0, 1], person(artefact, 1))
    engine.gradients([step])
    adaptation.close()
    adaptation.close()
    assert not any(tensor.abs().sum() for tensor in held)
    assert not adaptation._constants.any()
    assert engine._room == [6000, 9000]
    for call in (engine.gradients, engine.losses):
        for late in (step, Step(adaptation, [4], step.personal)):  # the other needs no pass
            with pytest.raises(InvalidInput, match="closed"):
                call([late])


@pytest.mark.parametrize("positions", ["f3+l3", "l4"])
def test_what_exceeds_the_device_is_spilled_and_then_computed_again(
    positions: str, make_artefact: Any
) -> None:
    """The cheapest on the device, the next in host memory, the rest nowhere; the gradients are the same."""
    base = build("qwen3")
    artefact = make_artefact(base, positions=positions)
    mine = person(artefact, 3)
    everything = AdaptationEngine(base, keep_bytes=PLENTY).open(RAGGED, artefact)
    assert (everything.kept_examples, everything.spilled_examples) == (7, 0)
    wanted = by_autograd(base, artefact, mine, RAGGED)
    keep_bytes = spill_bytes = everything.kept_bytes // 3
    engine = AdaptationEngine(base, keep_bytes=keep_bytes, spill_bytes=spill_bytes)
    adaptation = engine.open(RAGGED, artefact)
    counts = (adaptation.kept_examples, adaptation.spilled_examples)
    assert min(counts) > 0 and sum(counts) < 7
    assert adaptation.kept_bytes <= keep_bytes and adaptation.spilled_bytes <= spill_bytes
    costs = adaptation._arrays.lengths
    on_device, spilled, nowhere = (costs[adaptation._where == w] for w in (0, 1, -1))
    assert on_device[on_device > 1].max() <= spilled.min() and spilled.max() <= nowhere.max()
    assert_equal(engine.gradients([Step(adaptation, range(8), mine)])[0], wanted)
    with engine.open(RAGGED, artefact) as late:  # what is left is too little even for the cheapest
        assert_equal(engine.gradients([Step(late, range(8), mine)])[0], wanted)
    assert late.kept_examples + late.spilled_examples < sum(counts)
    adaptation.close()
    assert engine._room == [keep_bytes, spill_bytes]


def test_an_adaptation_closed_while_it_opens_holds_nothing(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, artefact, engine = llama
    room, compute, made = list(engine._room), module.keep, []

    def keep(*arguments: Any, **how: Any) -> Any:
        made.append(compute(*arguments, **how))
        engine.close()
        return made[0]

    monkeypatch.setattr(module, "keep", keep)
    with pytest.raises(InvalidInput, match="closed"):
        engine.open(RAGGED, artefact)
    assert not made[0].hidden.any()
    assert engine._room == room


def test_no_pass_begins_for_one_who_left(make_artefact: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there is to fill: the passes after the caller has left are not run."""
    base = build("llama")
    artefact, left = make_artefact(base, positions="l4"), threading.Event()
    engine = AdaptationEngine(base, keep_bytes=PLENTY)
    monkeypatch.setattr(Caps, "of", lambda _device: Caps(30, 2**20, 2**20))
    fill, passes = kept_module._fill, []

    def filled(tail: Any, part: Any, collective: Any) -> None:
        passes.append(part.kept)
        fill(tail, part, collective)
        left.set()

    monkeypatch.setattr(kept_module, "_fill", filled)
    with pytest.raises(InvalidInput, match="closed"):
        engine.open(RAGGED, artefact, left=left)
    assert len(passes) == 1
    assert not passes[0].hidden.any()
    assert not engine._open and engine._room == [PLENTY, 0]


def test_close_waits_for_the_pass_at_work(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artefact, engine = llama
    mine, theirs = engine.open(RAGGED, artefact), engine.open(RAGGED, artefact)
    at_work, go_on, compute = threading.Event(), threading.Event(), module.pass_from_kept

    def slow(*arguments: Any) -> Any:
        at_work.set()
        assert go_on.wait(10)
        return compute(*arguments)

    monkeypatch.setattr(module, "pass_from_kept", slow)
    found: list[Gradient] = []
    step = Step(mine, [2, 5], person(artefact, 1))
    worker = threading.Thread(target=lambda: found.extend(engine.gradients([step])))
    worker.start()
    assert at_work.wait(10)
    theirs.close()  # no part of the pass, so nothing to wait for
    closing = threading.Thread(target=mine.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive() and all(kept.hidden.any() for kept in mine._stores[:1])
    go_on.set()
    worker.join(10)
    closing.join(10)
    assert not closing.is_alive() and not mine._stores
    assert np.isfinite(found[0].loss)


def test_passes_breathe_between_blocks(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling, a step and its backward pass each let others in; with nobody waiting they only look."""
    _, artefact, engine = llama
    breaths: list[str] = []
    doing = ""
    monkeypatch.setattr(type(engine._turns), "breathe", lambda _self: breaths.append(doing))
    doing = "fill"
    adaptation = engine.open(RAGGED, artefact)
    step = Step(adaptation, [2, 5], person(artefact, 1))
    doing = "loss"
    engine.losses([step])
    doing = "gradient"
    engine.gradients([step])
    # Layers 1 and 2 of 4, l4. Filling: all four for a prompt that nothing changes, two for rows and the
    # third for the past. The last block of a part is cut short, and does not count.
    assert {name: breaths.count(name) for name in breaths} == {"fill": 7, "loss": 1, "gradient": 2}


def test_an_adaptation_that_fails_to_open_holds_no_room(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, artefact, engine = llama
    room = list(engine._room)
    monkeypatch.setattr(module, "keep", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.open(RAGGED, artefact)
    assert engine._room == room
    assert not engine._open


def test_the_next_one_gets_the_room_that_a_closed_one_had(make_artefact: Any) -> None:
    base = build("llama")
    artefact = make_artefact(base, positions="l4")
    probe = AdaptationEngine(base, keep_bytes=PLENTY)
    engine = AdaptationEngine(base, keep_bytes=probe.open(RAGGED, artefact).kept_bytes)
    with engine.open(RAGGED, artefact) as first:
        assert first.kept_examples == 7
        assert engine.open(RAGGED, artefact).kept_examples == 0
    assert engine.open(RAGGED, artefact).kept_examples == 7


def test_steps_from_many_threads(llama: Any) -> None:
    _, artefact, engine = llama
    adaptation = engine.open(RAGGED, artefact)
    steps = [Step(adaptation, [i, 7 - i], person(artefact, i)) for i in (0, 1, 2)]
    wanted = [engine.gradients([step])[0] for step in steps]
    found: dict[int, list[Gradient]] = {i: [] for i in range(3)}

    def work(i: int) -> None:
        with engine.open(RAGGED, artefact) as own:
            for _ in range(5):
                found[i] += engine.gradients([Step(own, steps[i].rows, steps[i].personal)])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(3):
        assert len(found[i]) == 5
        for got in found[i]:
            assert_equal(got, wanted[i])


def test_what_cannot_be_is_refused(llama: Any) -> None:
    _, artefact, engine = llama
    for examples in ([], [([], [5])], [([5, 6], [])]):
        with pytest.raises(InvalidInput):
            engine.open(examples, artefact)
    adaptation, mine = engine.open(RAGGED, artefact), person(artefact, 1)
    for rows in ([], [8], [-1, 2]):
        with pytest.raises(InvalidInput, match="examples"):
            engine.gradients([Step(adaptation, rows, mine)])
    narrow = {at: LayerShift(r[:2], w[:2], b[:2]) for at, (r, w, b) in mine.layers.items()}
    fewer = {1: mine.layers[1]}
    for layers in (narrow, fewer):
        with pytest.raises(InvalidTensors, match="shapes"):
            engine.gradients([Step(adaptation, [0], mine), Step(adaptation, [0], ShiftTensors(layers))])


@pytest.mark.parametrize("positions", ["f3+l3", "l4"])
def test_in_bfloat16_a_step_is_as_near_to_float32_as_the_full_one(positions: str, make_artefact: Any) -> None:
    exact, base = build("llama"), build("llama", torch.bfloat16)
    artefact = make_artefact(base, positions=positions)
    mine, use = person(artefact, 3), ShiftUse(Mode.PERSONAL, artefact, person(artefact, 3))
    # The same weights in both.
    for a, b in zip(exact.model.parameters(), base.model.parameters(), strict=True):
        b.data.copy_(a)
    engine, alone = AdaptationEngine(base, keep_bytes=PLENTY), GradientEngine(base)
    wanted = by_autograd(exact, artefact, mine, RAGGED)
    full = alone.gradient(RAGGED, use)
    (got,) = engine.gradients([Step(engine.open(RAGGED, artefact), range(8), mine)])
    alone.close()

    def error(of: Gradient) -> float:
        pairs = zip(of.tensors.named(), wanted.tensors.named(), strict=True)
        return sum(float(np.linalg.norm(a - b)) for (_, a), (_, b) in pairs) / wanted.tensors.norm()

    assert got.loss == pytest.approx(wanted.loss, rel=1e-2)
    assert error(got) < 1.5 * error(full) + 1e-2
