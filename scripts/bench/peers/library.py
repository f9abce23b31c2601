"""The same requests by the library's own `generate`, in one batch padded on the left: plain, and under peft.

peft's LoRA is OPPU's: r = 8 on q and v, an adapter a user, mixed in one batch by `adapter_names`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from perfit_cloud.model.base import BaseModel

__all__ = ["Lora", "Static"]

_RANK = 8


class Static:
    """`generate` of a batch. Called, it gives new tokens a second."""

    def __init__(self, base: BaseModel, prompts: Sequence[list[int]], new_tokens: int) -> None:
        self._model: Any = base.share_weights()
        self._model.generation_config = GenerationConfig(pad_token_id=0)  # no end of sequence
        width = max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        self._inputs = {
            "input_ids": torch.tensor([[0] * n + p for n, p in zip(pads, prompts, strict=True)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (width - n) for n in pads]),
        }
        self._new_tokens = new_tokens

    def __call__(self) -> float:
        return self._generate()

    def _generate(self, **more: Any) -> float:
        inputs = {name: tensor.to(self._model.device) for name, tensor in self._inputs.items()}
        begun = time.perf_counter()
        with torch.no_grad():
            out = self._model.generate(
                **inputs, max_new_tokens=self._new_tokens, do_sample=False, use_cache=True, **more
            )
        made = out[:, inputs["input_ids"].shape[1] :].tolist()  # waits for an accelerator, too
        return sum(map(len, made)) / (time.perf_counter() - begun)


class Lora(Static):
    """Under peft, every row's adapter another."""

    def __init__(self, base: BaseModel, prompts: Sequence[list[int]], new_tokens: int) -> None:
        from peft import LoraConfig, get_peft_model

        super().__init__(base, prompts, new_tokens)
        config = LoraConfig(
            r=_RANK,
            lora_alpha=_RANK,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        self._names = [f"user{i}" for i in range(len(prompts))]
        torch.manual_seed(0)
        self._model = get_peft_model(self._model, config, adapter_name=self._names[0])
        for name in self._names[1:]:
            self._model.add_adapter(name, config)
        self._model.eval()

    def mixed(self) -> float:
        return self._generate(adapter_names=self._names)

    def base(self) -> float:
        """The same model with nobody's adapter on any row."""
        return self._generate(adapter_names=["__base__"] * len(self._names))
