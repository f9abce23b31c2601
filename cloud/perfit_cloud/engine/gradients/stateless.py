"""Scores and gradients of requests that bring all that they need; nothing is cached between them."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
import torch

from perfit_cloud.engine.device_lock import DeviceLock, yield_between_blocks
from perfit_cloud.engine.gradients.batch import PASS_TOKENS, BatchBudget, Pair, most_pass_tokens
from perfit_cloud.engine.gradients.multi_user import pass_in_full
from perfit_cloud.engine.gradients.requests import (
    GradientRequest,
    PassShare,
    Session,
    Sum,
    add,
    compute,
    users_of,
    working,
)
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.interventions import install
from perfit_cloud.model.partial import Indices
from perfit_shared.errors import InvalidInput
from perfit_shared.types import Mode, Score

__all__ = ["GradientEngine", "StatelessSession"]


class StatelessSession(Session):
    """The examples of one call, under one shift; asked about once."""

    def __init__(
        self,
        engine: GradientEngine,
        pairs: Sequence[Pair],
        use: ShiftUse,
        *,
        device: torch.device,
        left: threading.Event | None,
        owner: str,
    ) -> None:
        artefact = None if use.mode is Mode.BASE else use.artefact
        targets = [len(target) for _, target in pairs]
        super().__init__(engine, artefact, targets, device=device, left=left, owner=owner)
        self._engine, self._pairs, self._personal = engine, pairs, use.personal
        self._lengths = np.array([len(prompt) + len(target) for prompt, target in pairs], dtype=np.int64)

    @property
    def whole(self) -> GradientRequest:
        """The request for all of it."""
        return GradientRequest(self, range(self.examples), self._personal)

    @property
    def shared(self) -> Hashable:
        """Shares passes with nobody."""
        return self

    @property
    def depth(self) -> int:
        return self._engine.blocks

    def sizes(self, which: Indices) -> tuple[Indices, Indices]:
        return self._lengths[which], self._lengths[which]

    def pair(self, which: int) -> Pair:
        return self._pairs[which]


class GradientEngine:
    """Runs the whole model, forward and backward, one pass at a time. Thread-safe."""

    def __init__(
        self, base: BaseModel, device_lock: DeviceLock | None = None, *, pass_tokens: int = PASS_TOKENS
    ) -> None:
        """All engines on the device share `device_lock`. A pass takes `pass_tokens` at most, or one pair."""
        most = min(pass_tokens, most_pass_tokens(base.device))
        self.budget = BatchBudget.of_whole(base.capabilities.passes, most)
        self.blocks = base.blocks
        self._base = replace(base, model=base.share_weights())
        self._device_lock = device_lock or DeviceLock()
        # On every block: a hook does nothing at a layer that no active intervention names.
        self._handles = install(self._base.model, range(base.blocks))
        self._handles += yield_between_blocks(self._base.model, self._device_lock)

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def open(
        self, pairs: Sequence[Pair], use: ShiftUse, *, left: threading.Event | None = None, owner: str = ""
    ) -> StatelessSession:
        """Take what one call asks about. Raises InvalidInput when there is nothing."""
        if not pairs:
            raise InvalidInput("there are no examples")
        return StatelessSession(self, pairs, use, device=self._base.device, left=left, owner=owner)

    def run_pass(self, shares: Sequence[PassShare]) -> None:
        pairs = [total.session.pair(i) for total, which in shares for i in total.examples[which].tolist()]
        owners = np.repeat(np.arange(len(shares)), [len(which) for _, which in shares])
        with working(self._device_lock, shares):
            positions = shares[0][0].session.positions
            outcome = pass_in_full(self._base, pairs, owners, users_of(shares), positions)
        add(shares, outcome)

    def score(
        self,
        candidates: Sequence[Pair],
        use: ShiftUse,
        *,
        left: threading.Event | None = None,
        owner: str = "",
    ) -> list[Score]:
        """Log-likelihood of each target after its prompt, in the order given; computed in this thread."""
        total = Sum(self.open(candidates, use, left=left, owner=owner).whole, differentiate=False)
        compute([total])
        return total.scores()

    def gradient(self, examples: Sequence[Pair], use: ShiftUse) -> Gradient:
        """Mean loss over target tokens, and its gradient for the personal tensors; in this thread.

        Raises InvalidInput unless `use` is PERSONAL and there is an example.
        """
        total = Sum(self.open(examples, use).whole, differentiate=True)
        compute([total])
        return total.gradient()
