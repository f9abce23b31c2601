"""Losses, gradients, answers and stage 1 of any family are what each sequence has alone, in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.models import random_shift, tiny_tokenizer

from families import FAMILIES, tiny_model
from perfit_cloud.collective.forward import forward_for
from perfit_cloud.collective.steps import trainable
from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import GenerationSettings, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.capabilities import Batching, try_model
from perfit_cloud.model.forward import forward
from perfit_cloud.model.interventions import ShiftGroup, active_interventions, hooked, row_index, to_torch
from perfit_cloud.service.catalog import Catalog
from perfit_shared.errors import ConfigError, InvalidData
from perfit_shared.positions import Positions
from perfit_shared.types import Mode, Sampling

# Padding that is not neutral, states and caches of their own, blocks that give lists, heads by another name;
# the slow test has one of everything.
ODD = ("rwkv", "recurrent_gemma", "minimax", "bloom", "gemma3n_text", "mamba")
REFUSED = {
    "cpmant": "reads ahead",
    "bert": "reads ahead",
    "deepseek_v4": "one hidden state a token",
    "roberta": "not what its passes predict",  # `generate` counts positions from 0, the model from 3
}
PAIRS: list[Pair] = [
    ([0, 20, 31, 44, 58, 63], [70, 71, 1]),
    ([0, 25], [90, 1]),
    ([0, *range(40, 60)], [33, 1]),
    ([0, 77, 78, 79], [60, 61, 62, 63, 64, 1]),
    ([0, 81, 82, 83], [65, 66, 67, 68, 69, 1]),
]
NEW = 6


def load(family: str) -> BaseModel:
    tokenizer = tiny_tokenizer()
    model = tiny_model(family, len(tokenizer))
    model.generation_config.eos_token_id = 1
    return BaseModel(family, "fingerprint", model, tokenizer, try_model(model))


def alone(base: BaseModel, ids: list[int], prompt: int, use: ShiftUse) -> torch.Tensor:
    """Logits (T, V) of one sequence by the model's own forward."""
    assert use.artefact is not None
    groups = []
    if use.mode is not Mode.BASE:
        rows = Positions.parse(use.artefact.spec.positions).indices(prompt)
        personal = None if use.personal is None else to_torch(use.personal, base.device)
        groups = [
            ShiftGroup(
                *row_index([rows], base.device), to_torch(use.artefact.collective, base.device), personal
            )
        ]
    with torch.no_grad(), hooked(base.model, use.artefact.spec.layers), active_interventions(groups):
        logits: torch.Tensor = forward(base.model, base.capabilities.arguments, torch.tensor([ids])).logits
        return logits[0].float()


def losses(base: BaseModel, use: ShiftUse) -> list[torch.Tensor]:
    """Of every target token of PAIRS, nats."""
    found = []
    for prompt, target in PAIRS:
        scores = alone(base, [*prompt, *target], len(prompt), use).log_softmax(-1)
        found.append(-scores[range(len(prompt) - 1, len(prompt) + len(target) - 1), target])
    return found


def greedy(base: BaseModel, prompt: list[int], use: ShiftUse) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW and (len(ids) == len(prompt) or ids[-1] != 1):
        ids.append(int(alone(base, ids, len(prompt), use)[-1].argmax()))
    return ids[len(prompt) :]


def check(family: str, make_artefact: Any) -> None:
    base = load(family)
    artefact = make_artefact(base)
    spec = artefact.spec
    personal = random_shift(spec, spec.personal_rank, 5)
    uses = [ShiftUse(Mode.BASE, artefact), ShiftUse(Mode.PERSONAL, artefact, personal)]
    plain, shifted = (losses(base, use) for use in uses)
    mean = float(torch.cat(shifted).mean())

    engine = GradientEngine(base)
    for use, truth in zip(uses, (plain, shifted), strict=True):
        for score, want in zip(engine.score(PAIRS, use), truth, strict=True):
            assert -score.log_likelihood == pytest.approx(float(want.sum()), abs=1e-4, rel=1e-5)
    whole = engine.gradient(PAIRS, uses[1])
    singles = [engine.gradient([pair], uses[1]) for pair in PAIRS]
    assert whole.loss == pytest.approx(mean, rel=1e-5, abs=1e-5)
    updates = UpdateEngine(base, keep_bytes=2**26)
    with updates.open(PAIRS, artefact) as update:
        (step,) = updates.gradients([GradientRequest(update, range(len(PAIRS)), personal)])
    assert step.loss == pytest.approx(mean, rel=1e-5, abs=1e-5)
    for layer in spec.layers:
        for part in range(3):
            want = sum(s.tensors.layers[layer][part] * s.tokens for s in singles) / whole.tokens
            size = float(abs(want).max())
            for found in (whole, step):
                assert abs(found.tensors.layers[layer][part] - want).max() <= 1e-3 * size
    engine.close()

    forward = forward_for(base, spec)
    forward.cache(PAIRS, lambda _: None)
    total = forward.loss(PAIRS, *(trainable(t, base.device) for t in (artefact.collective, personal)), 1.0)
    assert total / whole.tokens == pytest.approx(mean, rel=1e-4, abs=1e-4)

    serving = build_engine(base, {artefact.name: artefact}, GenerationSettings(cache_tokens=2048))
    serving.start()
    try:
        asked = [(prompt, use) for prompt, _ in PAIRS for use in uses]
        answers = [serving.submit(prompt, use, Sampling(NEW)) for prompt, use in asked]
        for (prompt, use), answer in zip(asked, answers, strict=True):
            assert list(answer) and answer.ids == greedy(base, prompt, use), (len(prompt), use.mode)
    finally:
        serving.stop()


@pytest.mark.parametrize("family", ODD)
def test_odd_families_give_what_each_sequence_has_alone(family: str, make_artefact: Any) -> None:
    check(family, make_artefact)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_shifted_or_scored_is_refused_by_name(family: str) -> None:
    model = tiny_model(family, **({"is_decoder": False} if family == "bert" else {}))
    with pytest.raises(InvalidData, match=REFUSED[family]):
        try_model(model)


def test_what_families_can_do_together() -> None:
    """Trying finds out what is known of these."""
    able = {
        family: try_model(tiny_model(family)) for family in ("llama", "rwkv", "recurrent_gemma", "minimax")
    }
    assert able["llama"].passes is able["llama"].answers is Batching.ANY_LENGTHS
    assert [family for family in able if able[family].keeps_state] == ["recurrent_gemma"]
    assert able["rwkv"].passes is able["recurrent_gemma"].passes is Batching.EQUAL_LENGTHS
    assert able["rwkv"].answers is Batching.SINGLE
    assert able["llama"].caches and not able["minimax"].caches
    assert all(each.in_slices for each in able.values())


@pytest.mark.slow
# Kimi's linear attention without its kernels takes minutes; scripts/families.py runs it for docs/models.md.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "kimi_linear"])
def test_every_family_is_right_or_refused(family: str, make_artefact: Any) -> None:
    try:
        tiny_model(family)
    except Exception as error:
        pytest.skip(f"no tiny model: {error}")
    try:
        check(family, make_artefact)
    except InvalidData as error:
        assert str(error)


@pytest.mark.slow
def test_the_page_says_how_families_are_run() -> None:
    from families import table

    page = Path(__file__).resolve().parents[2] / "docs" / "models.md"
    assert table() in page.read_text("utf-8"), "run scripts/families.py docs/models.md"


def test_a_model_that_keeps_its_last_pass_is_not_served(tmp_path: Path) -> None:
    """RecurrentGemma leaves states of the last sequence on its modules, where nothing overwrites them."""
    model = tiny_model("recurrent_gemma")
    base = BaseModel("tiny", "fingerprint", model, None, try_model(model))
    with pytest.raises(ConfigError, match="could not forget"):
        Catalog.build(CloudConfig(state=tmp_path), base, [], "c0")
    Catalog.build(CloudConfig(state=tmp_path, hardening="off"), base, [], "c0")
