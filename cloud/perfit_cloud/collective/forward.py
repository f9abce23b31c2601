"""Losses of examples under φ₁ and φ₂, and their gradients for both: what every step of stage 1 runs.

`PartialForward` computes only what the shifts can change: blocks above the first intervened one, from the
first intervened token on, and the head on target tokens. The rest it takes from a cache, or computes
without gradients where nothing is cached. `FullForward` runs whole sequences through all blocks, for the
families that the partial decoder does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch

from perfit_cloud.engine.gradients.activation_cache import (
    ActivationCache,
    Examples,
    build_cache,
    cache_bytes,
    join,
)
from perfit_cloud.engine.gradients.batch import (
    BatchBudget,
    Pair,
    group_all,
    make_batch,
    passes,
    target_log_likelihoods,
)
from perfit_cloud.engine.gradients.example_cache import CachedBlock, ExampleCache
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_cloud.model.forward import recomputed
from perfit_cloud.model.interventions import Shift, hooked
from perfit_cloud.model.partial import Indices, PartialDecoder, supports
from perfit_shared.positions import Positions
from perfit_shared.shifts import ShiftSpec

__all__ = ["Forward", "FullForward", "PairKey", "PartialForward", "forward_for", "pair_key"]

_CACHE_BYTES = 4 << 30  # of activations on the model's device, as `lamp run` keeps for personal training
_SPILL_BYTES = 8 << 30  # beyond that in host memory, where the model is not on the host
PairKey = tuple[tuple[int, ...], tuple[int, ...]]
_BLOCK_PASSES = 4  # passes whose examples are cached together, between two checks for a stop


class Forward(Protocol):
    """What `Losses` needs of a model. One thread at a time."""

    model: Any  # whose modules run
    caches_activations: bool  # whether `cache` saves work

    def loss(
        self, pairs: Sequence[Pair], collective: Shift | None, personal: Shift | None, weight: float | None
    ) -> float:
        """−log p of all target tokens, nats; without shifts the base model's.

        With `weight`, the gradient of weight · loss is added to the shifts' leaves.
        """

    def cache(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> None:
        """Compute what no shift changes of these pairs; `done` gets their number, now and then.

        The passes are the same for the same pairs, so an interrupted run that goes on finds the same bits.
        """

    def recomputing(self) -> AbstractContextManager[None]:
        """Activations inside blocks are computed again in the backward pass instead of being held."""


def forward_for(base: BaseModel, spec: ShiftSpec, *, processes: int = 1) -> Forward:
    """The cheapest that is right for the base's family. Its modules and their hooks stay as they are.

    `processes`: of this run, which share a host's memory where they train on its CPUs.
    """
    if not supports(base.model):
        return FullForward(base, spec)
    if base.device.type == "cpu":  # where spilling would save nothing
        return PartialForward(base, spec, cache_bytes=_CACHE_BYTES // processes)
    return PartialForward(base, spec, cache_bytes=_CACHE_BYTES, spill_bytes=_SPILL_BYTES)


class PartialForward:
    """Of families that the partial decoder knows."""

    caches_activations = True

    def __init__(self, base: BaseModel, spec: ShiftSpec, *, cache_bytes: int, spill_bytes: int = 0) -> None:
        """What exceeds `cache_bytes` on the model's device goes to `spill_bytes` of host memory.

        The rest is computed anew in every step.
        """
        self.model = base.share_weights()  # these modules alone run
        self._decoder = PartialDecoder(self.model)
        self._device = base.device
        self._layer = spec.layers[0]
        self._positions = Positions.parse(spec.positions)
        self._budget = BatchBudget.of(base.device)
        self._budgets = (cache_bytes, spill_bytes)
        self._cache: ExampleCache | None = None
        self._rows: dict[PairKey, int] = {}  # of each cached pair

    def loss(
        self, pairs: Sequence[Pair], collective: Shift | None, personal: Shift | None, weight: float | None
    ) -> float:
        cache, which = self._find(pairs)
        marked = cache.examples.marked[which] > 0
        total = self._passes(cache, which[marked], collective or {}, personal, weight)
        # A prompt of a single token may have no intervened one: nothing changes its loss.
        return total + self._passes(cache, which[~marked], {}, None, None)

    def _passes(
        self,
        cache: ExampleCache,
        which: Indices,
        collective: Shift,
        personal: Shift | None,
        weight: float | None,
    ) -> float:
        examples, total = cache.examples, 0.0
        for chunk in self._budget.cut(examples.rows[which], examples.lengths[which]):
            parts = list(cache.parts(which[chunk], lambda missing: self._compute(examples, missing)))
            joined = join(parts, [0] * len(parts), self._device)
            with torch.set_grad_enabled(weight is not None):
                hidden = joined.run(self._decoder, collective, personal)
            weights = None if weight is None else torch.full_like(joined.labels, weight, dtype=torch.float32)
            losses, gradient = self._decoder.losses(hidden.detach(), joined.labels, weights)
            if weight is not None:
                hidden.backward(gradient)  # type: ignore[no-untyped-call]
            total += float(losses.double().sum())
        return total

    def cache(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> None:
        distinct = list({pair_key(pair): pair for pair in pairs}.values())
        examples = Examples(distinct, self._positions, self._device)
        self._cache = ExampleCache(examples)
        self._rows = {pair_key(pair): row for row, pair in enumerate(distinct)}
        sizes = cache_bytes(self._decoder, examples, self._layer)
        left = np.argsort(sizes, kind="stable")  # the smallest first: most examples for the memory
        for where, budget in enumerate(self._budgets):
            which = left[sizes[left].cumsum() <= budget]
            left = left[len(which) :]
            blocks = -(-int(examples.lengths[which].sum()) // (_BLOCK_PASSES * self._budget.rows))
            for of_block in np.array_split(which, min(blocks, len(which))) if len(which) else ():
                activations = self._compute(examples, of_block, spill=bool(where))
                self._cache.add(CachedBlock(where, activations, of_block, int(sizes[of_block].sum())))
                done(len(of_block))

    def recomputing(self) -> AbstractContextManager[None]:
        return recomputed(block_list(self.model)[self._layer + 1 : -1])

    def _find(self, pairs: Sequence[Pair]) -> tuple[ExampleCache, Indices]:
        """Where these pairs lie. Those that `cache` did not see get a cache that holds nothing of them."""
        rows = [self._rows.get(pair_key(pair)) for pair in pairs]
        if self._cache is not None and None not in rows:
            return self._cache, np.array(rows, dtype=np.int64)
        return ExampleCache(Examples(pairs, self._positions, self._device)), np.arange(len(pairs))

    def _compute(self, examples: Examples, which: Indices, *, spill: bool = False) -> ActivationCache:
        """Activations before φ₁, which is trained."""
        return build_cache(
            self._decoder, examples, which, self._layer, self._budget, collective=None, spill=spill
        )


class FullForward:
    """Of any family."""

    caches_activations = False

    def __init__(self, base: BaseModel, spec: ShiftSpec) -> None:
        self._base, self._spec = base, spec
        self.model = base.model
        self._positions = Positions.parse(spec.positions)

    def loss(
        self, pairs: Sequence[Pair], collective: Shift | None, personal: Shift | None, weight: float | None
    ) -> float:
        total = 0.0
        for chunk in passes(pairs, self._base.capabilities.passes):
            batch = make_batch([pairs[i] for i in chunk], self._positions, self._base.device)
            groups = [] if collective is None else group_all(batch, collective, personal)
            with hooked(self._base.model, self._spec.layers), torch.set_grad_enabled(weight is not None):
                part = -target_log_likelihoods(self._base, batch, groups).sum()
                if weight is not None and part.requires_grad:  # not when every prompt is a single token
                    (weight * part).backward()  # type: ignore[no-untyped-call]
            total += float(part.detach())
        return total

    def cache(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> None:
        """Nothing is cached."""

    def recomputing(self) -> AbstractContextManager[None]:
        return recomputed(block_list(self.model)[self._spec.layers[0] + 1 : -1])


def pair_key(pair: Pair) -> PairKey:
    """A hashable key of a pair."""
    return tuple(pair[0]), tuple(pair[1])
