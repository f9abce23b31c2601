"""What a training pass over a frozen base need not do, with the same result but for rounding.

- Blocks up to the first intervened one see nothing that training changes: what comes out of them is
  kept for every example and given back in their place (`keep`).
- Of the last block's MLP only the rows that predict a target token are read (as of the head, which no
  pass of ours runs on more).

Both work by standing in for modules of the model during one pass, so that masks, rotary embeddings
and whatever else a family does stay the family's own. `keep` and `try_rows` check that on real
examples; a family for which it does not hold is run in full.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from perfit_cloud.engine.gradients.batch import Batch, Pair, make_batch, passes, target_log_likelihoods
from perfit_cloud.model.base import BaseModel, block_list
from perfit_cloud.model.blocks import hidden_of, with_hidden
from perfit_cloud.model.capabilities import Batching
from perfit_cloud.model.forward import replaced
from perfit_cloud.model.interventions import ShiftGroup
from perfit_shared.errors import InvalidData
from perfit_shared.positions import Positions

__all__ = ["FrozenBase", "checkpointed"]

_log = logging.getLogger(__name__)
_KEPT_BYTES = 2**30  # of all that is kept; a corpus that needs more is run in full
# Mean difference of log-likelihoods that is rounding, as a share of their mean: float32, and less.
_SAME, _SAME_HALF = 1e-3, 0.05


class _ReachedError(Exception):
    """The output that a pass was made for is in; the blocks above are not run."""


class FrozenBase:
    """Log-likelihoods under shifts whose first intervened block is `first`.

    Nothing else may run on the model during a call, since modules are replaced in it meanwhile.
    """

    def __init__(self, base: BaseModel, first: int) -> None:
        self._base = base
        self._blocks = block_list(base.model)
        self._first = first
        self._kept: dict[tuple[int, ...], Tensor] = {}  # by token ids: (T, d), output of block `first`
        self._form: Any = None  # of what a block gives: a tensor, or several things
        self._rows = False  # whether only the rows that are read are computed

    @property
    def batching(self) -> Batching:
        """Which examples may share a pass."""
        return self._base.capabilities.passes

    def log_likelihoods(self, pairs: Sequence[Pair], batch: Batch, groups: Sequence[ShiftGroup]) -> Tensor:
        """Of all N target tokens of the batch made from `pairs`: (N,), in the order of its labels."""
        with contextlib.ExitStack() as stack:
            if all(_ids(pair) in self._kept for pair in pairs):
                stack.enter_context(self._lower_blocks_give(pairs))
            mlp = getattr(self._blocks[-1], "mlp", None) if self._rows else None
            if mlp is not None:
                # A token is predicted by the position before it; columns count from the right end.
                row, column = F.pad(batch.labels != -100, (0, 1)).nonzero(as_tuple=True)
                stack.enter_context(_only(mlp, (row, column - batch.labels.shape[1] - 1)))
            return target_log_likelihoods(self._base, batch, groups)[batch.labels != -100]

    # -- rows ----------------------------------------------------------------------------------------

    def try_rows(self, pairs: Sequence[Pair]) -> bool:
        """From now on run the last block's MLP on the rows that are read, if it gives `pairs` the same."""
        self._rows = True
        self._rows = self._same(pairs, "the last block's MLP on some rows")
        return self._rows

    # -- lower blocks --------------------------------------------------------------------------------

    def keep(self, pairs: Sequence[Pair], done: Callable[[int], None]) -> bool:
        """Keep what the lower blocks make of these pairs; `done` is told how many after every pass.

        Returns whether it did: not when it takes more than 1 GiB, or when the model does not give
        the same with it. The passes are the same for the same pairs, so an interrupted run that
        goes on finds the same bits.
        """
        size = self._base.model.dtype.itemsize * self._base.hidden_size
        if size * sum(len(prompt) + len(target) for prompt, target in pairs) > _KEPT_BYTES:
            return False
        for chunk in passes(pairs, self.batching):
            chosen = [pairs[i] for i in chunk]
            try:
                lower = self._lower(chosen)
            except Exception as error:  # whatever a family does that this does not know
                _log.warning("all blocks are run in every step: %s", error)
                self._kept.clear()
                return False
            for pair, states in zip(chosen, lower, strict=True):
                ids = _ids(pair)
                self._kept[ids] = states[-len(ids) :].clone()  # off the padding
            done(len(chosen))
        if self._same(pairs, "what the lower blocks gave"):
            return True
        self._kept.clear()
        return False

    def _lower(self, pairs: Sequence[Pair]) -> Tensor:
        """(B, T, d): output of block `first`, with nothing run above."""
        found: list[Tensor] = []

        def stop(_module: nn.Module, _args: Any, output: Any) -> None:
            self._form = [None] * len(output) if isinstance(output, tuple | list) else None
            self._form = tuple(self._form) if isinstance(output, tuple) else self._form
            found.append(hidden_of(output))
            raise _ReachedError

        batch = make_batch(pairs, _ANY, self._base.device)
        handle = self._blocks[self._first].register_forward_hook(stop)
        try:
            with torch.no_grad(), contextlib.suppress(_ReachedError):
                target_log_likelihoods(self._base, batch, [])
        finally:
            handle.remove()
        if found[0].shape[:2] != batch.input_ids.shape:
            raise InvalidData("a block gives more than one hidden state a token")
        return found[0]

    @contextlib.contextmanager
    def _lower_blocks_give(self, pairs: Sequence[Pair]) -> Iterator[None]:
        """In place of what they compute, the blocks up to `first` give what was kept."""
        states = pad_sequence([self._kept[_ids(p)] for p in pairs], batch_first=True, padding_side="left")
        output = with_hidden(self._form, states) if isinstance(self._form, tuple | list) else states
        with replaced(self._blocks[: self._first + 1], lambda _own: lambda *_args, **_more: output):
            yield

    def _same(self, pairs: Sequence[Pair], what: str) -> bool:
        """Whether the first few pairs get the base model's log-likelihoods with `what` is saved."""
        few = [pairs[i] for i in passes(pairs[:8], self.batching)[0]]
        batch = make_batch(few, _ANY, self._base.device)
        with torch.no_grad():
            plain = target_log_likelihoods(self._base, batch, [])[batch.labels != -100]
            try:
                ours = self.log_likelihoods(few, batch, [])
            except Exception as error:  # whatever a family does that this does not know
                _log.warning("%s cannot be used with this model, which is run in full: %s", what, error)
                return False
        rounding = _SAME if self._base.model.dtype == torch.float32 else _SAME_HALF
        alike = bool((ours - plain).abs().mean() <= rounding * plain.abs().mean())
        if not alike:
            _log.warning("%s gives other losses with this model, which is run in full", what)
        return alike


_ANY = Positions(0, 1)  # without a book no row is intervened on


def _ids(pair: Pair) -> tuple[int, ...]:
    return (*pair[0], *pair[1])


# -- standing in for modules -------------------------------------------------------------------------


@contextlib.contextmanager
def _only(module: nn.Module, read: tuple[Tensor, Tensor]) -> Iterator[None]:
    """A module that treats every position alike sees only rows `read` of its (B, T, d), as (1, N, d).

    What it makes of them returns to their places, zeros elsewhere.
    """
    shape = torch.Size()

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal shape
        shape = args[0].shape
        return (args[0][read].unsqueeze(0), *args[1:])

    def scatter(_module: nn.Module, _args: Any, output: Any) -> Any:
        made = output[0] if isinstance(output, tuple) else output  # some experts add their routing
        whole = made.new_zeros(*shape[:2], made.shape[-1]).index_put(read, made[0])
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    handles = [module.register_forward_pre_hook(select), module.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def checkpointed(base: BaseModel, first: int) -> Iterator[None]:
    """Activations inside blocks are computed again in the backward pass instead of being kept.

    Not those of blocks up to `first`, which have none to keep, nor of the last: they are needed
    first and would be back at once. transformers' own switch works in train mode only, which turns
    dropout on too. Non-reentrant, so that frozen inputs still end the backward pass; hooks on a
    block's output lie outside what is repeated.
    """
    blocks = block_list(base.model)[first + 1 : -1]
    with replaced(
        blocks, lambda own: partial(checkpoint, own, use_reentrant=False, preserve_rng_state=False)
    ):
        yield
