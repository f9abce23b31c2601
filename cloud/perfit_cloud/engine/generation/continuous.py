"""Continuous batching: answers for many devices from one batch, each with its own shift.

Every pass takes one token of each answer under way and parts of the prompts that are still to be read,
packed without padding. Before a pass the engine gives the hooks the rows of intervened prompt positions,
and whose they are. Decoded tokens are never intervened on, so a pass without prompts runs as if there were
no hooks.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.fairness import PrefillScheduler, round_robin
from perfit_cloud.engine.generation.engine import GenerationRequest, OwnEngine
from perfit_cloud.engine.generation.sampling import draw, forget, likelihoods
from perfit_cloud.engine.interface import GenerationSettings
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import depends_on_length
from perfit_cloud.model.forward import decoder_output, forward
from perfit_cloud.model.interventions import active_interventions, groups_of
from perfit_cloud.model.kv_cache import BatchMetadata, KVCache, Slot, attend_over_cache

__all__ = ["GenerationEngine", "can_share"]

_PROMPTS_A_PASS = 4  # a pass reads this many prompts side by side, where there are as many


class GenerationEngine(OwnEngine):
    """Continuous batching. The model must be one that `can_share`."""

    continuous = True

    def __init__(
        self,
        base: BaseModel,
        artefacts: Mapping[str, Artefact],
        settings: GenerationSettings,
        device_lock: DeviceLock | None = None,
    ) -> None:
        super().__init__(base, artefacts, settings, device_lock)
        self._model = self._hooked(base, artefacts)
        self._state_device = _state_device(base)
        attend_over_cache(self._model)
        self._kv_cache = KVCache(settings.cache_tokens)
        self._slots: dict[GenerationRequest, Slot] = {}  # by request in the batch, oldest first
        # By answer under way: the token that the next pass reads.
        self._newest: dict[GenerationRequest, int] = {}
        self._prefills = PrefillScheduler()
        # With `settings.alone`, `_share` counts the seconds of each owner's passes; else it is not used.

    @property
    def cache_tokens_held(self) -> int:
        return self._kv_cache.held

    def _has_work(self) -> bool:
        return bool(self._waiting or self._slots)

    def _round(self) -> None:
        self._admit()
        plan = self._plan()
        if not plan:
            return
        reading = {request: count for request, count in plan.items() if request not in self._newest}
        begun = time.monotonic()
        logits, sampled = self._forward(plan)
        tokens = draw(logits, [request.sampler for request in sampled])
        known = likelihoods(logits, tokens, [request.sampling.logprobs for request in sampled])
        seconds = time.monotonic() - begun
        read = Counter[str]()
        for request, count in reading.items():
            read[request.owner] += count
        owners = {request.owner for request in self._slots}
        self._prefills.done(read, seconds, decodes=len(reading) < len(plan), owners=owners)
        if self.settings.alone:
            for owner in {request.owner for request in plan}:
                self._share.charge(owner, seconds)
        for request, token, likelihood in zip(sampled, tokens, known, strict=True):
            self._newest[request] = token
            self._produced(request, token, likelihood)

    def _rest(self) -> None:
        super()._rest()
        self._prefills.rest()

    def _drop(self) -> None:
        forget(request.sampler for request in self._slots)
        self._slots.clear()
        self._newest.clear()
        self._kv_cache.clear()

    def _end(self, request: GenerationRequest) -> None:
        self._release(request)
        super()._end(request)

    def _release(self, request: GenerationRequest) -> None:
        self._newest.pop(request, None)
        forget([request.sampler])
        self._kv_cache.free(self._slots.pop(request))

    def _admit(self) -> None:
        """Free the slots of those who left, and admit those who wait while there is room.

        The owner who holds least of the cache is next. Nobody overtakes it when there is no room for it.
        """
        for left in [r for r in self._slots if r.has_left]:
            self._release(left)
        while True:
            request = self._next_waiting(self._slots)
            if request is None:
                return
            # Not under the condition: growing the cache takes time, and callers would wait.
            slot = self._kv_cache.allocate(request.most_tokens)
            if slot is None:
                return
            self._slots[request] = slot
            with self._changed:
                if request in self._waiting:
                    self._waiting.remove(request)
            if request.has_left:
                self._release(request)

    def _plan(self) -> dict[GenerationRequest, int]:
        """How many tokens of each request the next pass takes.

        Every answer under way takes one token. The next prompts share the rest of the pass: a short prompt
        does not wait for a long one, and the long one goes on meanwhile.
        """
        if self.settings.alone:
            return self._plan_for_one()
        plan = dict.fromkeys(self._newest, 1)
        room = max(1, self.settings.batch_tokens - len(plan))
        least = max(1, room // _PROMPTS_A_PASS)
        sampled = {request.owner for request in plan}
        prompts = [request for request in self._slots if request not in plan]
        reading = self._prefills.order(prompts, sampled)
        for number, request in enumerate(reading):
            share = max(least, room // (len(reading) - number))
            count = min(len(request.prompt) - self._slots[request].length, share, room)
            plan[request] = count
            room -= count
            if not room:
                break
        return plan

    def _plan_for_one(self) -> dict[GenerationRequest, int]:
        """The next tokens of one request, as many as if there were no other."""
        self._share.wanted_by(request.owner for request in self._slots)
        for request in round_robin(self._slots, self._share)[:1]:
            self._slots[request] = self._slots.pop(request)  # to the end of its owner's queue
            if request in self._newest:
                return {request: 1}
            left = len(request.prompt) - self._slots[request].length
            return {request: min(left, self.settings.batch_tokens)}
        return {}

    @torch.no_grad()
    def _forward(self, plan: dict[GenerationRequest, int]) -> tuple[torch.Tensor, list[GenerationRequest]]:
        """One pass. Gives logits (n, V), and the n requests whose next token they choose."""
        requests, device = list(plan), self._base.device
        kv_cache = BatchMetadata(
            [self._slots[r] for r in requests], list(plan.values()), device, alone=self.settings.alone
        )
        ids: list[int] = []
        marks: dict[GenerationRequest, list[int]] = {}
        # Who gets a token, and its index in the pass's order.
        sampled: list[tuple[GenerationRequest, int]] = []
        for at, number in enumerate(kv_cache.order):
            request, count = requests[number], plan[requests[number]]
            start, row = self._slots[request].length, len(ids)
            if request in self._newest:
                ids.append(self._newest[request])
                sampled.append((request, at))
                continue
            ids += request.prompt[start : start + count]
            marks[request] = [row + p - start for p in request.shift.positions if start <= p < start + count]
            if start + count == len(request.prompt):
                sampled.append((request, at))
        input_ids = torch.tensor([ids], device=device)
        rows = kv_cache.last[torch.tensor([at for _, at in sampled], dtype=torch.long, device=device)]
        with active_interventions(groups_of(((r.shift, rows) for r, rows in marks.items()), device)):
            logits = self._model(
                input_ids=input_ids,
                position_ids=kv_cache.position_ids,
                use_cache=False,
                logits_to_keep=rows.to(self._state_device),
                kv_cache=kv_cache,
            ).logits[0]
        kv_cache.done()
        input_ids.zero_()
        return logits, [request for request, _ in sampled]


def can_share(base: BaseModel) -> bool:
    """Whether packed requests get from this model what each would get alone.

    Tries it: two prompts in parts, then one token more, must give the model's own logits. The trial is too
    short to see attention windows, so every block must also pass the window of the configuration.
    """
    config = base.model.config.get_text_config()
    if not getattr(base.model, "_supports_attention_backend", False) or depends_on_length(base.model):
        return False
    prompts = [[(7 * i + k) % config.vocab_size for i in range(n)] for k, n in ((3, 24), (5, 9))]
    with torch.no_grad(), suppress(Exception):
        model, kv_cache = base.share_weights(), KVCache(128)
        attend_over_cache(model)
        slots = [kv_cache.allocate(len(prompt)) for prompt in prompts]
        found: list[torch.Tensor] = []
        for cut in (slice(None, -1), slice(-1, None)):
            parts = [prompt[cut] for prompt in prompts]
            step = BatchMetadata(
                [slot for slot in slots if slot is not None], list(map(len, parts)), base.device
            )
            packed = [i for number in step.order for i in parts[number]]
            logits = model(
                input_ids=torch.tensor([packed], device=base.device),
                position_ids=step.position_ids,
                use_cache=False,
                logits_to_keep=step.last.to(_state_device(base)),
                kv_cache=step,
            ).logits[0]
            step.done()
            found = [logits[step.order.index(number)].float() for number in range(len(prompts))]
        if step.windows != _windows(config):
            return False
        for prompt, got in zip(prompts, found, strict=True):
            ids = torch.tensor([prompt], device=base.device)
            want = forward(base.model, base.capabilities.arguments, ids).logits[0, -1].float()
            tolerance = 1e-3 if base.model.dtype == torch.float32 else 3e-2
            if not torch.allclose(got, want, rtol=0, atol=tolerance * float(want.abs().max())):
                return False
        return True
    return False


@torch.no_grad()
def _state_device(base: BaseModel) -> torch.device:
    """Where the hidden state is that the head reads rows of, by a pass over one token."""
    if not base.is_split:
        return base.device
    ids = torch.zeros(1, 1, dtype=torch.long, device=base.device)
    found: torch.Tensor = decoder_output(base.model, base.capabilities.arguments, ids)[0]
    return found.device


def _windows(config: Any) -> dict[int, int | None]:
    """How many tokens each block's attention looks back over, by the configuration. None: all.

    Raises ValueError on attention of another kind.
    """
    window = getattr(config, "sliding_window", None)
    blocks = config.num_hidden_layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"] * blocks
    if getattr(config, "attention_chunk_size", None) or not {*kinds} <= {
        "full_attention",
        "sliding_attention",
    }:
        raise ValueError("neither full nor sliding attention")
    return {layer: window if kind == "sliding_attention" else None for layer, kind in enumerate(kinds)}
