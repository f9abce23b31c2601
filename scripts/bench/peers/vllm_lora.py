"""The same requests by vLLM's own multi-LoRA, an adapter for each user, and by the same vLLM without.

Adapters are random, r = 8 on q and v, as peft's in library.py; each user's has a slot, so none is loaded
while requests run. Both sides are vLLM's own front end, told what perfit tells its engine core: passes of as
many tokens, no prefix caching, nothing compiled.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from perfit_cloud.engine.interface import GenerationSettings
from perfit_cloud.model.base import BaseModel

__all__ = ["VllmLora"]

_RANK = 8
_TARGETS = ("q_proj", "v_proj")
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "CRITICAL",
    "TORCHDYNAMO_DISABLE": "1",
}


class VllmLora:
    """Two engines on one model. `plain()` and `mixed()` give new tokens a second."""

    def __init__(
        self, base: BaseModel, prompts: Sequence[list[int]], new_tokens: int, users: int, folder: Path
    ) -> None:
        """`folder` takes the model and the adapters, once."""
        os.environ.update(_ENVIRONMENT)
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        if not (folder / "config.json").exists():
            base.model.save_pretrained(folder)
        self._prompts: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        paths = [_adapter(base, folder / f"user{i}", i) for i in range(users)]
        own = [LoRARequest(path.name, i + 1, str(path)) for i, path in enumerate(paths)]
        self._own = [own[i % users] for i in range(len(prompts))]
        self._answers: dict[str, list[list[int]]] = {}
        longest = max(map(len, prompts)) + new_tokens
        self._plain = _engine(base, folder, len(prompts), longest)
        self._mixed = _engine(
            base,
            folder,
            len(prompts),
            longest,
            enable_lora=True,
            max_loras=users,
            max_cpu_loras=users,
            max_lora_rank=_RANK,
        )

    def plain(self) -> float:
        return self._generate("plain", self._plain, None)

    def mixed(self) -> float:
        return self._generate("mixed", self._mixed, self._own)

    def changed(self) -> int:
        """How many of the last answers an adapter changed."""
        return sum(a != b for a, b in zip(self._answers["plain"], self._answers["mixed"], strict=True))

    def close(self) -> None:
        for engine in (self._plain, self._mixed):
            engine.llm_engine.engine_core.shutdown()

    def _generate(self, side: str, engine: Any, adapters: Any) -> float:
        begun = time.perf_counter()
        made = engine.generate(self._prompts, self._sampling, lora_request=adapters, use_tqdm=False)
        seconds = time.perf_counter() - begun
        self._answers[side] = [list(each.outputs[0].token_ids) for each in made]
        return sum(map(len, self._answers[side])) / seconds


def _engine(base: BaseModel, folder: Path, requests: int, longest: int, **lora: Any) -> Any:
    from vllm import LLM

    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype=str(base.model.dtype).removeprefix("torch."),
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=longest,
        max_num_seqs=requests,
        max_num_batched_tokens=max(GenerationSettings().batch_tokens, requests),
        kv_cache_memory_bytes=2 << 30,
        async_scheduling=False,
        disable_log_stats=True,
        **lora,
    )
    torch.set_num_threads = set_threads  # vLLM's worker takes it away
    torch.set_num_threads(threads)
    return engine


def _adapter(base: BaseModel, folder: Path, seed: int) -> Path:
    """One user's, in peft's form."""
    if folder.exists():
        return folder
    folder.mkdir()
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _RANK, "target_modules": list(_TARGETS)}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"})
    )
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, layer in base.model.named_modules():
        if name.endswith(_TARGETS):
            outputs, inputs = layer.weight.shape
            for part, shape in (("A", (_RANK, inputs)), ("B", (outputs, _RANK))):
                entries = 0.02 * torch.randn(shape, generator=draw)
                tensors[f"base_model.model.{name}.lora_{part}.weight"] = entries.to(layer.weight.dtype)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
