"""What the benchmarks run on: a model, an artefact of random shifts, people, prompts, examples; seeded."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import common
import numpy as np
import torch

from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.positions import Positions
from perfit_shared.presets import preset_for
from perfit_shared.shifts import ShiftTensors
from perfit_shared.starts import near_identity
from perfit_shared.tasks import task_named
from perfit_shared.types import Mode, Sampling

sys.path.append(str(Path(__file__).resolve().parents[1]))
import tiny

__all__ = [
    "RANDOM",
    "Asked",
    "Pair",
    "artefact_for",
    "examples",
    "load_model",
    "locations",
    "parser",
    "person",
    "prompts",
    "uses",
]

Asked = tuple[list[int], ShiftUse, Sampling]
Pair = tuple[list[int], list[int]]

# Random Llamas, made in memory, with the tokenizer of scripts/tiny.py: hidden size, inner size, blocks,
# heads, heads of keys and values. random-8m has newslm's shapes.
RANDOM = {
    "random-7b": (4096, 11008, 32, 32, 32),
    "random-100m": (768, 2048, 12, 12, 12),
    "random-8m": (256, 704, 8, 8, 4),
    "random-tiny": (64, 176, 4, 4, 2),
}
_VOCABULARY = 8192  # newslm's
_NEAR = 0.01  # size of the noise that takes a shift off the identity; the entries of R are about 0.05


def parser(description: str | None) -> argparse.ArgumentParser:
    """common.parser with what says which model is run, how, and how often."""
    made = common.parser(description)
    made.add_argument(
        "--model", default="random-8m", help=f"what --model of serve takes, or one of {', '.join(RANDOM)}"
    )
    made.add_argument("--dtype", default="float32", help="of the base; pyreft takes float32 alone")
    made.add_argument("--device", default="auto")
    made.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    made.add_argument("--pairs", type=int, default=9, help="rounds in which every side has its turn")
    return made


def load_model(args: argparse.Namespace) -> BaseModel:
    """What the flags name: a folder's model, or one of RANDOM. Answers have no end but their length."""
    torch.set_num_threads(args.threads)
    name = "random-tiny" if args.small else args.model
    load = _random_model if name in RANDOM else load_base
    base = load(name, dtype=args.dtype, device=args.device)
    base.model.generation_config.eos_token_id = []
    base.tokenizer.chat_template = None  # it would end turns
    return replace(base, _codec=None)


def _random_model(name: str, *, dtype: str, device: str) -> BaseModel:
    from transformers import AutoModelForCausalLM, LlamaConfig

    with tempfile.TemporaryDirectory() as folder:  # its tokenizer, and what "auto" stands for here
        tiny.save_model(Path(folder))
        start = load_base(folder, dtype=dtype, device=device)
    hidden_size, inner_size, blocks, heads, key_heads = RANDOM[name]
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=inner_size,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=2048,
        vocab_size=_VOCABULARY,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=start.model.dtype)
    model = model.to(start.device).eval().requires_grad_(False)
    return replace(start, name=name, fingerprint=name, model=model)


def artefact_for(
    base: BaseModel,
    *,
    positions: str | None = None,
    layers: tuple[int, ...] | None = None,
    collective_rank: int | None = None,
    personal_rank: int | None = None,
) -> Artefact:
    """LaMP-2M's preset on this model (ranks 32/4, f7+l7, two layers), with what is given in its place."""
    task = task_named("movie_tagging").resolved(False)
    spec = preset_for(task.name).spec(
        blocks=base.blocks,
        hidden_size=base.hidden_size,
        layers=layers,
        positions=positions,
        collective_rank=collective_rank,
        personal_rank=personal_rank,
    )
    return Artefact(
        name=task.name,
        spec=spec,
        task=task,
        fingerprint=base.fingerprint,
        collective=near_identity(spec, spec.collective_rank, seed=1, size=_NEAR),
        seed=ShiftTensors.identity(spec, spec.personal_rank, seed=2),
        learning_rate=5e-3,
        epochs=4,
        batch_size=16,
    )


def person(artefact: Artefact, number: int) -> ShiftTensors:
    """One person's shift, a little off the identity."""
    return near_identity(artefact.spec, artefact.spec.personal_rank, seed=100 + number, size=_NEAR)


def uses(artefact: Artefact | None, distinct: int, count: int) -> list[ShiftUse]:
    """For `count` requests of `distinct` people in turn; of the base model without an artefact."""
    if artefact is None:
        return [ShiftUse(Mode.BASE)] * count
    people = [ShiftUse(Mode.PERSONAL, artefact, person(artefact, i)) for i in range(distinct)]
    return [people[i % distinct] for i in range(count)]


def prompts(base: BaseModel, count: int, shortest: int, longest: int, *, seed: int = 0) -> list[list[int]]:
    """Random token ids; lengths evenly drawn from shortest to longest."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(shortest, longest + 1, count)
    return [rng.integers(5, base.model.config.vocab_size, n).tolist() for n in lengths]


def examples(base: BaseModel, count: int, prompt_tokens: int, *, seed: int = 0) -> list[Pair]:
    """Prompts within a sixth of this length, targets of 4 to 16 tokens."""
    near = prompt_tokens // 6
    asked = prompts(base, count, prompt_tokens - near, prompt_tokens + near, seed=seed)
    return list(zip(asked, prompts(base, count, 4, 16, seed=seed + 1), strict=True))


def locations(artefact: Artefact, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The intervened places of each prompt."""
    positions = Positions.parse(artefact.spec.positions)
    return [positions.indices(len(prompt)) for prompt in prompts]
