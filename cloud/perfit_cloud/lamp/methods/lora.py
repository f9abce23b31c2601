"""LoRA by peft on a tree of its own over the base model's tensors, with the paper's settings.

A *collective* adapter and a *personal* one may lie on the same projections; their changes add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from perfit_cloud.lamp.methods.added_weights import AddedWeights, check_whole
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import ConfigError, InvalidInput

__all__ = ["ALPHA", "COLLECTIVE", "DROPOUT", "PERSONAL", "RANK", "Adapter", "add_lora"]

RANK, ALPHA, DROPOUT = 8, 8, 0.05  # PerFit, baselines


@dataclass(frozen=True)
class Adapter:
    """One LoRA: a name, which projections it is on, and of which blocks (None: of all)."""

    name: str
    projections: str  # "qkv" or "qv"
    layers: tuple[int, ...] | None = None


COLLECTIVE, PERSONAL = Adapter("collective", "qkv"), Adapter("personal", "qv")


def add_lora(base: BaseModel, adapters: Sequence[Adapter], *, seed: int) -> list[AddedWeights]:
    """The adapters on one tree, all active, each at its start: A drawn by the seed, B zero, so no change.

    Raises ConfigError without peft, InvalidInput for a model without separate projections.
    """
    lora, inject, activate = _library()
    check_whole(base)
    model = base.share_weights()
    for number, adapter in enumerate(adapters):
        config = lora(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=_targets(model, adapter))
        with torch.random.fork_rng([]):
            inject(config, model, adapter.name)
            torch.manual_seed(2 * seed + number)
            _start(model, adapter.name)
        del model.peft_config  # or the next one warns that there are several
    activate(model, [adapter.name for adapter in adapters])
    model.requires_grad_(False).eval()
    adapted = replace(base, model=model)
    return [_of(adapted, adapter.name) for adapter in adapters]


def _of(base: BaseModel, name: str) -> AddedWeights:
    parts = [(path, module) for path, module in base.model.named_modules() if path.endswith(f".{name}")]
    parameters = {
        path: module.weight for path, module in parts if path.split(".")[-2] in ("lora_A", "lora_B")
    }
    dropouts = [module for path, module in parts if path.split(".")[-2] == "lora_dropout"]
    return AddedWeights(base, parameters, dropouts)


def _start(model: Any, name: str) -> None:
    """Float32 whatever the base is, and drawn anew in it."""
    for module in model.modules():
        if name in getattr(module, "lora_A", ()):
            for part in (module.lora_A[name], module.lora_B[name]):
                part.float()
            module.reset_lora_parameters(name, True)


def _targets(model: Any, adapter: Adapter) -> list[str]:
    """Full names of the projections."""
    blocks = block_list(model)
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    found = []
    for layer in range(len(blocks)) if adapter.layers is None else adapter.layers:
        names = [name for name, _ in blocks[layer].named_modules()]
        for kind in adapter.projections:
            own = [name for name in names if name.split(".")[-1] == f"{kind}_proj"]
            if not own:
                raise InvalidInput(
                    f"LoRA goes on q, k and v, and blocks of the family {model.config.model_type} have no "
                    f"{kind}_proj; take another model, or another method"
                )
            found += [f"{prefix}.{layer}.{name}" for name in own]
    return found


def _library() -> tuple[Any, Any, Any]:
    try:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.functional import set_adapter
    except ImportError as error:
        raise ConfigError("LoRA needs peft; pip install 'perfit[research]'") from error
    return LoraConfig, inject_adapter_in_model, set_adapter
