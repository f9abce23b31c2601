"""perfit's part of a vLLM worker: prompt rows are shifted, and what ended requests leave is overwritten."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perfit_cloud.engine.generation.vllm.plugin import KEY
from perfit_cloud.engine.generation.vllm.processes import WorkerProcess
from perfit_cloud.engine.generation.vllm.side_channel import Layout, SideChannel
from perfit_cloud.model.interventions import Intervention, Shift, ShiftGroup, groups_of, shifted_rows

__all__ = ["WorkerShifts"]


class _Rewindable(torch.Generator):
    """A generator on the CPU for vLLM's seeded requests; torch's cannot be set back, and vLLM asks for that.

    vLLM takes back what it drew behind part of a prompt. Nothing was drawn before, so this begins again.
    """

    def get_offset(self) -> int:
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        return self.manual_seed(self.initial_seed())


class WorkerShifts:
    """Hooks on one model runner's decoder layers, and the shifts of the requests that it knows.

    A pass without rows to shift finds no active groups, and its hooks return at once. Decoding in CUDA graphs
    replays no Python at all.
    """

    def __init__(self, runner: Any, told: Mapping[str, Any]) -> None:
        """`told`: what the engine put into `additional_config`."""
        self._runner, self._device = runner, torch.device(runner.device)
        layout = Layout.from_json(told["layout"])
        self._channel = SideChannel.open(layout, Path(told["name"]))
        numbers = range(len(layout.shapes))
        self._collective: list[Shift] = [self._channel.collective(n, self._device) for n in numbers]
        self._shifts: dict[str, Intervention] = {}  # by request, until it ends
        self._active: Sequence[ShiftGroup] = ()  # of the pass under way
        self._process: WorkerProcess | None = None  # none: this is the server's
        if not told["is_alone"]:
            self._process = WorkerProcess(self._device)
        self._has_ended = False  # some request did, in the step under way
        layers = _decoder_layers(runner)
        for layer in sorted({layer for shape in layout.shapes for layer in shape.layers}):
            layers[layer].register_forward_hook(self._hook(layer))

    @property
    def is_active(self) -> bool:
        """Whether the pass under way shifts any rows."""
        return bool(self._active)

    # -- requests ------------------------------------------------------------------------------

    def before_update(self, step: Any) -> bool:
        """Read the shifts of new requests, forget those that ended; whether any did.

        Blocks of the KV cache that were freed may belong to another request in this very step. That one has
        written nothing yet, so they can be overwritten now, and at no later time.
        """
        ended = set(step.finished_req_ids)
        freed = ended | set(step.preempted_req_ids or ())
        self._overwrite_blocks(self._runner.requests[name] for name in freed if name in self._runner.requests)
        for name in ended:
            if (shift := self._shifts.pop(name, None)) is not None and shift.personal is not None:
                for phi in shift.personal.values():
                    for tensor in phi:
                        tensor.zero_()
        for new in step.scheduled_new_reqs:
            told = (new.sampling_params.extra_args or {}).get(KEY)
            if told is not None and new.req_id not in self._shifts:
                artefact, slot, *positions = told
                personal = None if slot < 0 else self._channel.personal(slot, artefact, self._device)
                self._shifts[new.req_id] = Intervention(
                    tuple(positions), self._collective[artefact], personal
                )
        self._has_ended = bool(freed)
        return bool(freed)

    def after_update(self, step: Any, ended: bool) -> None:
        """Where requests ended, overwrite the token ids that nobody's row holds any more."""
        self._make_rewindable(new.req_id for new in step.scheduled_new_reqs)
        if not ended:
            return
        batch = self._runner.input_batch
        lengths = batch.num_tokens_no_spec[: batch.num_reqs]
        for row, length in enumerate(lengths.tolist()):
            batch.token_ids_cpu[row, length:] = 0
        batch.token_ids_cpu[batch.num_reqs :] = 0
        if not step.total_num_scheduled_tokens:  # nobody is left: nothing of a pass is in use
            self._overwrite_buffers()

    def _make_rewindable(self, names: Iterable[str]) -> None:
        batch = self._runner.input_batch
        for name in names:
            seeded = self._runner.requests[name].generator
            if seeded is not None and self._device.type == "cpu":
                made = _Rewindable()
                made.manual_seed(seeded.initial_seed())
                self._runner.requests[name].generator = batch.generators[batch.req_id_to_index[name]] = made

    # -- passes --------------------------------------------------------------------------------

    def activate(self, counts: Any) -> None:
        """Say what the next pass shifts: of its rows, prompt positions that a request names.

        `counts` (requests,): how many rows each has in this pass, in the batch's order.
        """
        batch, rows, start = self._runner.input_batch, [], 0
        for at, (name, count) in enumerate(zip(batch.req_ids, np.asarray(counts).tolist(), strict=False)):
            shift = self._shifts.get(name)
            if shift is not None and shift.positions:
                done = int(batch.num_computed_tokens_cpu[at])
                if done <= shift.positions[-1]:
                    mine = [start + p - done for p in shift.positions if done <= p < done + count]
                    rows.append((shift, mine))
            start += count
        self._active = groups_of(rows, self._device) if rows else ()

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Around a pass, and around sampling."""
        if self._process is None:
            yield
            return
        with self._process.hold():
            yield
        if self._has_ended:
            self._has_ended = False
            self._process.call_ended()

    def deactivate(self) -> None:
        """The pass is over."""
        self._active = ()

    def _hook(self, layer: int) -> Any:
        def apply(_module: nn.Module, _args: Any, output: Any) -> None:
            for group in self._active:
                if layer in group.collective:
                    _add_change(output, group, layer)

        return apply

    # -- overwriting ---------------------------------------------------------------------------

    def _overwrite_blocks(self, requests: Iterable[Any]) -> None:
        """Zero the KV pages of these requests."""
        groups: list[set[int]] = [set() for _ in self._runner.kv_cache_config.kv_cache_groups]
        for request in requests:
            for blocks, of_request in zip(groups, request.block_ids, strict=True):
                blocks.update(of_request)
        if not any(groups):
            return
        # Groups share pools of blocks, and a block belongs to one group at a time.
        ids = torch.tensor(sorted(set().union(*groups)), device=self._device)
        count = self._runner.kv_cache_config.num_blocks
        for cache in self._runner.kv_caches:
            for tensor in cache if isinstance(cache, list | tuple) else (cache,):
                tensor.index_fill_(tensor.shape.index(count), ids, 0)

    def _overwrite_buffers(self) -> None:
        """Token ids in the buffers that every pass fills anew."""
        for buffer in (getattr(self._runner, "input_ids", None),):
            for tensor in (getattr(buffer, "cpu", None), getattr(buffer, "gpu", None)):
                if isinstance(tensor, Tensor):
                    tensor.zero_()
        sampled = getattr(self._runner, "sampled_token_ids_pinned_cpu", None)
        if isinstance(sampled, Tensor):
            sampled.zero_()
        self._runner.input_batch.prev_sampled_token_ids = None
        if self._process is not None:
            self._process.overwrite_exchanged()


def _decoder_layers(runner: Any) -> nn.ModuleList:
    """Those of vLLM's model. Raises RuntimeError where there is no list of them."""
    count = runner.model_config.hf_text_config.num_hidden_layers
    lists = (m for m in runner.get_model().modules() if isinstance(m, nn.ModuleList) and len(m) == count)
    found = next(lists, None)
    if found is None:
        raise RuntimeError("this model has no list of decoder layers in vLLM")
    return found


def _add_change(output: Any, group: ShiftGroup, layer: int) -> None:
    """Add φ's change to the rows of the group, in place.

    Most of vLLM's layers give hidden and residual apart, whose sum (T, d) is what the block computes; adding
    to hidden is adding to the sum. Others give the sum alone, (1, T, d) behind the transformers backend.
    """
    hidden, residual = output if isinstance(output, tuple) else (output, None)
    flat = hidden.view(-1, hidden.shape[-1])
    x = flat[group.index]  # (U, k, d)
    if residual is not None:
        x = x + residual.view(-1, hidden.shape[-1])[group.index]
    change = (shifted_rows(x, group, layer).float() - x.float()).to(x.dtype)
    index = group.index
    if group.valid is not None:
        change, index = change[group.valid], index[group.valid]
    flat.index_add_(0, index.reshape(-1), change.reshape(-1, flat.shape[-1]))
