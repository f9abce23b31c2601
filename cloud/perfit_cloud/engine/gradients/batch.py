"""Loss, log-likelihoods and gradients of a batch: pure tensors in and out, nothing kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perfit_cloud.engine.device_lock import DeviceLock, yield_between_blocks
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.capabilities import Batching, left_padded
from perfit_cloud.model.forward import token_losses
from perfit_cloud.model.interventions import (
    Phi,
    Shift,
    ShiftGroup,
    active_interventions,
    install,
    row_index,
    to_torch,
)
from perfit_shared.errors import InvalidInput
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.types import Mode, Score

__all__ = [
    "PASS_TOKENS",
    "Batch",
    "GradientEngine",
    "Pair",
    "make_batch",
    "most_pass_tokens",
    "passes",
    "target_log_likelihoods",
]

Pair = tuple[list[int], list[int]]  # (prompt ids, target ids)
PASS_TOKENS = 8192  # tokens (padding included) of one forward pass
_CPU_PASS_TOKENS = 512  # more makes no pass on a CPU cheaper, and whoever waits for it waits longer


def most_pass_tokens(device: torch.device) -> int:
    """The most of one pass where several users wait for a device."""
    return _CPU_PASS_TOKENS if device.type == "cpu" else PASS_TOKENS


@dataclass(frozen=True)
class Batch:
    """B pairs, padded on the left to T tokens, targets right-aligned."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    position_ids: Tensor  # (B, T)
    labels: Tensor  # (B, K): target ids at the right, −100 elsewhere
    rows: list[list[int]]  # intervened rows of each pair in the flattened (B · T)


def make_batch(pairs: Sequence[Pair], positions: Positions, device: torch.device) -> Batch:
    longest = max(len(p) + len(t) for p, t in pairs)
    keep = max(len(t) for _, t in pairs)
    ids, mask, position_ids = left_padded([[*prompt, *target] for prompt, target in pairs])
    labels = torch.full((len(pairs), keep), -100)
    rows = []
    for b, (prompt, target) in enumerate(pairs):
        start = longest - len(prompt) - len(target)
        labels[b, keep - len(target) :] = torch.tensor(target)
        rows.append([b * longest + start + i for i in positions.indices(len(prompt))])
    return Batch(ids.to(device), mask.to(device), position_ids.to(device), labels.to(device), rows)


def target_log_likelihoods(base: BaseModel, batch: Batch, groups: Sequence[ShiftGroup]) -> Tensor:
    """Log-likelihood of every target token, (B, K), zero where there is none."""
    row, column = (batch.labels != -100).nonzero(as_tuple=True)
    # A token is predicted by the position before it; columns of labels end where those of ids do.
    before = column + batch.input_ids.shape[1] - batch.labels.shape[1] - 1
    with active_interventions(groups):
        losses = token_losses(
            base.model,
            base.capabilities.arguments,
            batch.input_ids,
            rows=(row, before),
            labels=batch.labels[row, column],
            in_slices=base.capabilities.in_slices,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
        )
    return losses.new_zeros(batch.labels.shape).index_put((row, column), -losses)


def group_all(batch: Batch, collective: Shift, personal: Shift | None) -> list[ShiftGroup]:
    """Every row of the batch under one owner's shift."""
    rows = [row for of_pair in batch.rows for row in of_pair]
    if not rows:
        return []
    index, valid = row_index([rows], batch.input_ids.device)
    return [ShiftGroup(index, valid, collective, personal)]


class GradientEngine:
    """Runs forward and backward passes for one base model, for several callers at once. Thread-safe.

    Their passes come one at a time, each of the owner that had the least of the device. While one waits
    `check` is called now and then, and may raise to end it.
    """

    def __init__(
        self, base: BaseModel, device_lock: DeviceLock | None = None, *, pass_tokens: int = PASS_TOKENS
    ) -> None:
        """`turns`: of all engines on the base's device. `pass_tokens`: of one pass, beyond a single pair."""
        self._pass_tokens = min(pass_tokens, most_pass_tokens(base.device))
        self._base = replace(base, model=base.share_weights())
        self._device_lock = device_lock or DeviceLock()
        # On every block: a hook whose layer no open book names does nothing.
        self._handles = install(self._base.model, range(base.blocks))
        self._handles += yield_between_blocks(self._base.model, self._device_lock)

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _groups(self, batch: Batch, use: ShiftUse, personal: Shift | None = None) -> list[ShiftGroup]:
        if use.mode is Mode.BASE or use.artefact is None:
            return []
        device = self._base.device
        if personal is None and use.personal is not None:
            personal = to_torch(use.personal, device)
        return group_all(batch, to_torch(use.artefact.collective, device), personal)

    def score(
        self,
        candidates: Sequence[Pair],
        use: ShiftUse,
        owner: str = "",
        check: Callable[[], None] | None = None,
    ) -> list[Score]:
        """Log-likelihood of each target after its prompt, in the order given."""
        scores: dict[int, Score] = {}
        for chunk in passes(candidates, self._base.capabilities.passes, self._pass_tokens):
            batch = make_batch([candidates[i] for i in chunk], _positions(use), self._base.device)
            with self._device_lock.hold_long({owner: 1.0}, check), torch.no_grad():
                sums = target_log_likelihoods(self._base, batch, self._groups(batch, use)).sum(1)
            for i, total in zip(chunk, sums.tolist(), strict=True):
                scores[i] = Score(total, len(candidates[i][1]))
        return [scores[i] for i in range(len(candidates))]

    def gradient(
        self,
        examples: Sequence[Pair],
        use: ShiftUse,
        owner: str = "",
        check: Callable[[], None] | None = None,
    ) -> Gradient:
        """Mean loss over target tokens, and its gradient for the personal tensors.

        Raises InvalidInput unless `use` is PERSONAL and there is an example.
        """
        if use.artefact is None or use.personal is None or not examples:
            raise InvalidInput("a gradient needs examples and a personal shift")
        personal = {
            layer: Phi(*(t.requires_grad_() for t in p))
            for layer, p in to_torch(use.personal, self._base.device).items()
        }
        leaves = [tensor for p in personal.values() for tensor in p]
        tokens = sum(len(target) for _, target in examples)
        loss, grads = 0.0, [torch.zeros_like(leaf) for leaf in leaves]
        for chunk in passes(examples, self._base.capabilities.passes, self._pass_tokens):
            batch = make_batch([examples[i] for i in chunk], _positions(use), self._base.device)
            with self._device_lock.hold_long({owner: 1.0}, check), torch.enable_grad():
                groups = self._groups(batch, use, personal)
                part = -target_log_likelihoods(self._base, batch, groups).sum() / tokens
                if part.requires_grad:  # not when every prompt is a single token: nothing was intervened on
                    new = torch.autograd.grad(part, leaves)
                    grads = [a + b for a, b in zip(grads, new, strict=True)]
            loss += float(part.detach())
        arrays = iter(g.squeeze(0).cpu().numpy() for g in grads)
        layers = {layer: LayerShift(*(next(arrays) for _ in LayerShift._fields)) for layer in personal}
        return Gradient(loss, tokens, ShiftTensors(layers))


def _positions(use: ShiftUse) -> Positions:
    # In BASE mode no row is intervened on, whatever the positions.
    return Positions.parse(use.artefact.spec.positions if use.artefact else "l1")


def passes(pairs: Sequence[Pair], batching: Batching, most: int = PASS_TOKENS) -> list[list[int]]:
    """Indices of all pairs, shortest first, in forward passes of at most `most` tokens when padded."""
    lengths = [len(prompt) + len(target) for prompt, target in pairs]
    made: list[list[int]] = []
    for i in sorted(range(len(pairs)), key=lengths.__getitem__):
        fits = bool(made) and lengths[i] * (len(made[-1]) + 1) <= most
        if fits and batching.fits([lengths[made[-1][0]], lengths[i]]):
            made[-1].append(i)
        else:
            made.append([i])
    return made
