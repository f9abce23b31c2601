"""Gradient steps from what is kept equal full autograd, for one user and for several at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.support.gradients import PLENTY, RAGGED, Pairs, assert_equal, make_pairs, person
from tests.support.models import FAMILIES, KEPT, build

from perfit_cloud.engine.gradients.batch import BatchBudget
from perfit_cloud.engine.gradients.example_cache import ON_DEVICE, SPILLED
from perfit_cloud.engine.gradients.requests import Sum, compute
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.blocks import block_list
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.types import Mode

# (layers, positions): first and last tokens or the last alone, one layer or several, the very last block.
SPECS = [
    ((1, 2), "f3+l3"),
    ((0, 2, 3), "l4"),
    ((3,), "f7+l7"),
    ((1,), "l3"),
    ((2,), "f2"),
    ((1, 2), "s1+f3+l3"),
]
# Every family once, and every place with a family that keeps activations and with one that does not.
FAMILIES_AND_SPECS = [
    pytest.param(
        family,
        *spec,
        marks=[] if spec is SPECS[0] or family in ("llama", "gpt2") else pytest.mark.slow,
        id=f"{family}-{spec[0]}-{spec[1]}".replace(" ", ""),
    )
    for family in FAMILIES
    for spec in SPECS
]


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


@pytest.mark.parametrize(("family", "layers", "positions"), FAMILIES_AND_SPECS)
def test_a_step_equals_full_autograd(family: str, layers: Any, positions: str, make_artefact: Any) -> None:
    base = build(family)
    artefact = make_artefact(base, layers=layers, positions=positions)
    engine = UpdateEngine(base, keep_bytes=PLENTY)
    assert engine.caches_activations == (family in KEPT)
    rows, mine = [2, 0, 7, 4, 5, 1], person(artefact, 3)
    wanted = by_autograd(base, artefact, mine, [RAGGED[row] for row in rows])
    with engine.open(RAGGED, artefact) as session:
        step = GradientRequest(session, rows, mine)
        (got,) = engine.gradients([step])
        assert_equal(got, wanted)
        assert engine.losses([step]) == [(pytest.approx(got.loss, rel=1e-6), got.tokens)]


@pytest.mark.parametrize("positions", ["f3+l3", pytest.param("l4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2"])
@pytest.mark.parametrize("keep_bytes", [PLENTY, 6000, 0])
def test_several_users_together_equal_each_alone(
    family: str, positions: str, keep_bytes: int, make_artefact: Any
) -> None:
    """Ragged batches, one user twice, one with nothing to change, one under another artefact; any budget."""
    base = build(family)
    artefact, other = make_artefact(base, positions=positions), make_artefact(base, layers=(0, 3), seed=5)
    engine, alone = UpdateEngine(base, keep_bytes=keep_bytes), GradientEngine(base)
    histories = [RAGGED, make_pairs([40, 20, 2, 1, 7], 1), make_pairs([1, 1], 2), make_pairs([9, 9, 9], 3)]
    artefacts = [artefact, artefact, artefact, other]
    opened = [engine.open(pairs, a) for pairs, a in zip(histories, artefacts, strict=True)]
    kept = sum(a.cache.count(ON_DEVICE) for a in opened)
    if family != "gpt2":
        changing = sum(len(prompt) > 1 for pairs in histories for prompt, _ in pairs)
        assert {PLENTY: kept == changing, 6000: 0 < kept < changing, 0: kept == 0}[keep_bytes]
        assert sum(a.cached_bytes[ON_DEVICE] for a in opened) <= keep_bytes
    asked = [(0, [7, 0, 3]), (1, [0, 3, 2, 1]), (0, [5]), (2, [0, 1]), (3, [0, 2])]
    steps = [
        GradientRequest(opened[i], rows, person(artefacts[i], 10 + at)) for at, (i, rows) in enumerate(asked)
    ]
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
    engine = UpdateEngine(base, keep_bytes=PLENTY)
    mine = engine.open(RAGGED, artefact)
    found = []
    for seed, scale in ((1, 1.0), (2, 60.0)):  # another text of the same lengths, and tensors near the cap
        theirs = engine.open(make_pairs([13, 2, 50, 3, 1, 30, 5, 21], seed), artefact)
        shift = person(artefact, seed)
        huge = ShiftTensors(
            {at: LayerShift(r, w * scale, b * scale) for at, (r, w, b) in shift.layers.items()}
        )
        rows = list(range(8))
        steps = [
            GradientRequest(theirs, rows, huge),
            GradientRequest(mine, rows, person(artefact, 9)),
            GradientRequest(theirs, rows, huge),
        ]
        found.append(engine.gradients(steps))
    assert found[0][0].loss != found[1][0].loss
    assert found[0][1].loss == found[1][1].loss
    for (name, a), (_, b) in zip(found[0][1].tensors.named(), found[1][1].tensors.named(), strict=True):
        assert a.tobytes() == b.tobytes(), name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_big_steps_are_cut_into_passes(
    family: str, make_artefact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = build(family)
    artefact = make_artefact(base)
    engine = UpdateEngine(base, keep_bytes=PLENTY)
    steps = [
        GradientRequest(
            engine.open(make_pairs(lengths, i), artefact), range(len(lengths)), person(artefact, i)
        )
        for i, lengths in enumerate([[30, 5, 40, 12, 20], [6, 7], [8, 9], [60, 10]])
    ]
    whole = engine.gradients(steps)
    passes: list[Any] = []
    run = engine.run_pass

    def counted(shares: Any) -> None:
        passes.append(shares)
        run(shares)

    monkeypatch.setattr(engine, "run_pass", counted)
    for caps in (
        BatchBudget(48, 2**20, 2**20),
        BatchBudget(2**20, 64, 2**20),
        BatchBudget(2**20, 2**20, 300),
    ):
        passes.clear()
        monkeypatch.setattr(engine, "budget", caps)
        for got, wanted in zip(engine.gradients(steps), whole, strict=True):
            assert_equal(got, wanted)
        assert len(passes) > 2
        assert any(len(shares) > 1 for shares in passes)  # like lengths of several users
        for shares in passes:
            sizes = [
                (int(rows), int(length))
                for total, which in shares
                for rows, length in zip(*total.session.sizes(total.examples[which]), strict=True)
            ]
            rows, lengths = zip(*sizes, strict=True)
            padding = len(sizes) * max(rows) * max(lengths) - sum(r * n for r, n in sizes)
            within = (sum(rows) <= caps.rows, len(sizes) * max(lengths) <= caps.keys, padding <= caps.padding)
            assert len(sizes) == 1 or all(within)


@pytest.mark.parametrize("positions", ["f3+l3", "l4"])
def test_what_exceeds_the_device_is_spilled_and_then_computed_again(
    positions: str, make_artefact: Any
) -> None:
    """The cheapest on the device, the next in host memory, the rest nowhere; the gradients are the same."""
    base = build("qwen3")
    artefact = make_artefact(base, positions=positions)
    mine = person(artefact, 3)
    everything = UpdateEngine(base, keep_bytes=PLENTY).open(RAGGED, artefact)
    assert (everything.cache.count(ON_DEVICE), everything.cache.count(SPILLED)) == (7, 0)
    wanted = by_autograd(base, artefact, mine, RAGGED)
    keep_bytes = spill_bytes = everything.cached_bytes[ON_DEVICE] // 3
    engine = UpdateEngine(base, keep_bytes=keep_bytes, spill_bytes=spill_bytes)
    session = engine.open(RAGGED, artefact)
    counts = (session.cache.count(ON_DEVICE), session.cache.count(SPILLED))
    assert min(counts) > 0 and sum(counts) < 7
    assert session.cached_bytes[ON_DEVICE] <= keep_bytes and session.cached_bytes[SPILLED] <= spill_bytes
    costs = session.arrays.lengths
    there, host = session.cache.blocks.values()
    nowhere = costs[~session.cache.is_cached(np.arange(8))]
    on_device, spilled = costs[there.which], costs[host.which]
    assert on_device[on_device > 1].max() <= spilled.min() and spilled.max() <= nowhere.max()
    assert_equal(engine.gradients([GradientRequest(session, range(8), mine)])[0], wanted)
    total = Sum(GradientRequest(session, [7, 4, 0, 3, 2, 5, 0], mine), differentiate=False)
    compute([total])
    use = ShiftUse(Mode.PERSONAL, artefact, mine)
    for got, score in zip(
        total.scores(), engine.stateless.score([RAGGED[i] for i in total.examples], use), strict=True
    ):
        assert got.log_likelihood == pytest.approx(score.log_likelihood, rel=1e-5)
    with engine.open(RAGGED, artefact) as late:  # what is left is too little even for the cheapest
        assert_equal(engine.gradients([GradientRequest(late, range(8), mine)])[0], wanted)
    assert late.cache.count(ON_DEVICE) + late.cache.count(SPILLED) < sum(counts)
    session.close()
    assert engine.bytes_held() == (0, 0)


@pytest.mark.parametrize("positions", ["f3+l3", "l4"])
def test_in_bfloat16_a_step_is_as_near_to_float32_as_the_full_one(positions: str, make_artefact: Any) -> None:
    exact, base = build("llama"), build("llama", "bfloat16")
    artefact = make_artefact(base, positions=positions)
    mine, use = person(artefact, 3), ShiftUse(Mode.PERSONAL, artefact, person(artefact, 3))
    # The same weights in both.
    for a, b in zip(exact.model.parameters(), base.model.parameters(), strict=True):
        b.data.copy_(a)
    engine, alone = UpdateEngine(base, keep_bytes=PLENTY), GradientEngine(base)
    wanted = by_autograd(exact, artefact, mine, RAGGED)
    full = alone.gradient(RAGGED, use)
    (got,) = engine.gradients([GradientRequest(engine.open(RAGGED, artefact), range(8), mine)])
    alone.close()

    def error(of: Gradient) -> float:
        pairs = zip(of.tensors.named(), wanted.tensors.named(), strict=True)
        return sum(float(np.linalg.norm(a - b)) for (_, a), (_, b) in pairs) / wanted.tensors.norm()

    assert got.loss == pytest.approx(wanted.loss, rel=1e-2)
    assert error(got) < 1.5 * error(full) + 1e-2
