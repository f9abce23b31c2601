"""A cloud small enough for thousands of calls a minute: a random Llama of four blocks, two artefacts.

The tokenizer is the starter's, so that text is real text; answers are noise, and always the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors

__all__ = ["Tiny", "build", "shift_off_identity"]

_STARTER = Path(__file__).resolve().parents[2] / "cloud" / "perfit_cloud" / "starter" / "perfit-starter"
_CONTEXT = 256  # tokens
_TASKS = {"news_headline": ((1, 2), "f3+l3"), "chat": ((0, 3), "l4")}  # layers and positions of each


@dataclass(frozen=True)
class Tiny:
    """Folders, as `perfit-cloud serve` takes them."""

    model: Path
    artefacts: tuple[Path, ...]


def build(folder: Path, *, seed: int = 0) -> Tiny:
    """Make both in `folder`; the same seed makes the same weights and tensors."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import load_base
    from perfit_shared.tasks import TASKS

    tokenizer = AutoTokenizer.from_pretrained(_STARTER)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=_CONTEXT,
        initializer_range=0.3,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = folder / "model"
    LlamaForCausalLM(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    base = load_base(str(model))
    artefacts = []
    for name, (layers, positions) in _TASKS.items():
        spec = ShiftSpec(layers, positions, 6, 3, hidden_size=base.hidden_size)
        artefact = Artefact(
            name=name,
            spec=spec,
            task=TASKS[name].resolved(False),
            fingerprint=base.fingerprint,
            collective=shift_off_identity(spec, spec.collective_rank, seed=seed + 1),
            seed=ShiftTensors.identity(spec, spec.personal_rank, seed + 2),
            learning_rate=5e-3,
            epochs=1,
            batch_size=4,
        )
        artefacts.append(folder / name)
        artefact.save(artefacts[-1])
    return Tiny(model, tuple(artefacts))


def shift_off_identity(spec: ShiftSpec, rank: int, *, seed: int, size: float = 0.3) -> ShiftTensors:
    """Orthonormal R; W and b off the identity by `size`, which changes answers."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer, shift in ShiftTensors.identity(spec, rank, seed).layers.items():
        noise = rng.standard_normal(shift.source.shape, np.float32)
        bias = rng.standard_normal(rank, np.float32)
        layers[layer] = LayerShift(
            shift.rotation, shift.source + np.float32(size) * noise, np.float32(size) * bias
        )
    return ShiftTensors(layers)
