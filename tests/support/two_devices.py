"""Runs a tiny model over the CPU and a pretended card, and compares it with the model on the CPU.

    python -m tests.support.two_devices FAMILY FIRST SECOND

FIRST and SECOND are "cpu" and "card:0", or the other way round: of the lower half and of the upper.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from accelerate import dispatch_model

from perfit_cloud.analysis.residuals import last_tokens
from perfit_cloud.collective.forward import forward_for
from perfit_cloud.collective.steps import trainable
from perfit_cloud.engine.generation.continuous import GenerationEngine, can_share
from perfit_cloud.engine.generation.static import BatchedEngine
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_cloud.model.capabilities import try_model
from perfit_cloud.model.devices import finish_split
from perfit_cloud.model.sinks import leading_sinks
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import Task
from perfit_shared.types import Mode, Sampling
from tests.support.cards import moved
from tests.support.generation import NEW, SMALL, prompts, serve, uses
from tests.support.gradients import PLENTY, RAGGED, assert_equal, person
from tests.support.models import build, random_shift, tiny_tokenizer


def split_over(base: BaseModel, first: str, second: str) -> BaseModel:
    """The lower half of the blocks and the embedding on `first`, the rest on `second`."""
    model, where = copy.deepcopy(base.model), {}
    blocks = {id(block): number for number, block in enumerate(block_list(model))}
    for name, module in model.named_modules():
        if id(module) in blocks:
            where[name] = first if blocks[id(module)] < len(blocks) // 2 else second
        elif name.rpartition(".")[2] in ("embed_tokens", "wte", "wpe", "rotary_emb"):
            where[name] = first
        elif name.rpartition(".")[2] in ("norm", "ln_f", "lm_head"):
            where[name] = second
    dispatch_model(
        model, device_map=where, skip_keys=model._skip_keys_device_placement, main_device=torch.device("cpu")
    )
    finish_split(model)
    return BaseModel(base.name, "", model, base.tokenizer, try_model(model))


def artefact_for(base: BaseModel, layers: tuple[int, ...]) -> Artefact:
    spec = ShiftSpec(layers, "f3+l3", 6, 3, hidden_size=base.hidden_size)
    task = Task("news_headline", "{text} so", " {title}", "rouge_1")
    shift, seed = random_shift(spec, 6, 0), ShiftTensors.identity(spec, 3, 0)
    return Artefact("news_headline", spec, task, base.fingerprint, shift, seed, 5e-3, 2, 4)


def compare(whole: BaseModel, split: BaseModel) -> None:
    """Everything that runs passes. Raises AssertionError where the two differ."""
    assert whole.capabilities == split.capabilities
    for layers in ((0, 3), (1, 2), (2,)):
        artefact = artefact_for(whole, layers)
        use = ShiftUse(Mode.PERSONAL, artefact, person(artefact, 3))
        _same_gradients(whole, split, artefact)
        (scores, gradient), (of_whole, wanted) = (_of_calls(base, use) for base in (split, whole))
        for one, other in zip(scores, of_whole, strict=True):
            assert abs(one.log_likelihood - other.log_likelihood) < 1e-3, (one, other)
        assert_equal(gradient, wanted)
        losses = [_stage_1(base, artefact) for base in (split, whole)]
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    _same_answers(whole, split, artefact_for(whole, (1, 2)))
    sequences = [prompt for prompt, _ in RAGGED]
    rows = [[found for _, found in last_tokens(base, sequences, tokens=64)] for base in (split, whole)]
    for one, other in zip(*rows, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert leading_sinks(split, sequences, 0) == leading_sinks(whole, sequences, 0)


def _same_gradients(whole: BaseModel, split: BaseModel, artefact: Artefact) -> None:
    for room in ({"keep_bytes": PLENTY}, {"keep_bytes": 0}, {"keep_bytes": 0, "spill_bytes": PLENTY}):
        found: list[list[Any]] = []
        for base in (split, whole):
            engine = UpdateEngine(base, **room)  # type: ignore[arg-type]
            sessions = [engine.open(pairs, artefact) for pairs in (RAGGED[:5], RAGGED[3:])]
            steps = [
                GradientRequest(session, range(session.examples), person(artefact, seed))
                for seed, session in enumerate(sessions, 3)
            ]
            found.append(engine.gradients(steps))
            engine.close()
        for one, other in zip(*found, strict=True):
            assert_equal(one, other)


def _of_calls(base: BaseModel, use: ShiftUse) -> tuple[Any, Any]:
    engine = GradientEngine(base)
    found = engine.score(RAGGED, use), engine.gradient(RAGGED, use)
    engine.close()
    return found


def _stage_1(base: BaseModel, artefact: Artefact) -> torch.Tensor:
    """The loss of a step that trains both shifts, and their gradients."""
    forward = forward_for(base, artefact.spec)
    both = [trainable(each, base.device) for each in (artefact.collective, person(artefact, 3))]
    forward.cache(RAGGED[:4], lambda _: None)
    losses = [forward.loss(pairs, *both, 0.1) for pairs in (RAGGED[:4], RAGGED[4:])]
    leaves = [tensor for shift in both for phi in shift.values() for tensor in phi]
    return torch.cat([torch.tensor(losses), *(leaf.grad.cpu().flatten() for leaf in leaves)])  # type: ignore[union-attr]


def _same_answers(whole: BaseModel, split: BaseModel, artefact: Artefact) -> None:
    whose = uses({"one": artefact, "same": artefact}, 6)
    asked = [(prompt, use, Sampling(NEW)) for prompt, use in zip(prompts(6), whose, strict=True)]
    assert can_share(split) == can_share(whole)
    for kind in (GenerationEngine, BatchedEngine) if can_share(whole) else (BatchedEngine,):
        found = []
        for base in (split, whole):
            engine = kind(base, {artefact.name: artefact}, SMALL)
            found.append(serve(engine, asked))
            engine.stop()
        assert found[0] == found[1], kind


def main(family: str, first: str, second: str) -> None:
    base = build(family)
    whole = BaseModel(family, "", base.model, tiny_tokenizer(), try_model(base.model))
    split = split_over(whole, first, second)
    assert split.device.type == first.partition(":")[0] and len(split.devices) == 2
    moved.clear()
    compare(whole, split)
    crossed = min(moved["cpu", "card"], moved["card", "cpu"])
    assert crossed > 100, moved


if __name__ == "__main__":
    main(*sys.argv[1:])
