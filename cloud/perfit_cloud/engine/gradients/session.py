"""Updates: sessions whose examples stay cached between steps, as far as no user's tensors change them.

A step then runs the blocks above the first intervened one, from the first intervened token on, and the head
on the target tokens: `multi_user`, on what `activation_cache` holds. Families that `model/partial.py` does
not know run in full, several users together all the same.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from perfit_cloud.engine.device_lock import DeviceLock, yield_between_blocks
from perfit_cloud.engine.gradients.activation_cache import (
    ActivationCache,
    Examples,
    Part,
    build_cache,
    cache_bytes,
)
from perfit_cloud.engine.gradients.batch import PASS_TOKENS, BatchBudget, Pair
from perfit_cloud.engine.gradients.example_cache import ON_DEVICE, SPILLED, CachedBlock, ExampleCache
from perfit_cloud.engine.gradients.multi_user import pass_from_cache
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
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.partial import Indices, PartialDecoder, supports
from perfit_shared.errors import InvalidInput
from perfit_shared.types import Mode, Score

__all__ = ["GradientRequest", "UpdateEngine", "UpdateSession"]


_BLOCKS = 8  # most blocks of a session's examples; blocks are dropped one by one


class UpdateSession(Session):
    """The session of one update. Made by UpdateEngine.open; `close` overwrites what it holds."""

    def __init__(
        self,
        engine: UpdateEngine,
        artefact: Artefact,
        pairs: Sequence[Pair],
        *,
        device: torch.device,
        left: threading.Event | None,
        owner: str,
    ) -> None:
        targets = [len(target) for _, target in pairs]
        super().__init__(engine, artefact, targets, device=device, left=left, owner=owner)
        self._engine = engine
        self.layer = min(self.collective)  # the first intervened block
        self.arrays = Examples(pairs, self.positions, device)
        self.is_constant = self.arrays.marked == 0  # a prompt without an intervened token
        self.cache = ExampleCache(self.arrays)  # changed under the engine's lock
        self.cached_bytes = [0, 0]  # on the device and in host memory, blocks still to be filled included

    @property
    def shared(self) -> Hashable:
        """Whoever updates under the same artefact."""
        return id(self.artefact)

    @property
    def depth(self) -> int:
        return self._engine.depth_above(self.layer)

    def sizes(self, which: Indices) -> tuple[Indices, Indices]:
        return self.arrays.rows[which], self.arrays.lengths[which]

    def costs(self, which: Indices) -> Indices:
        """What is not cached is computed from its first token on."""
        rows, lengths = self.sizes(which)
        found: Indices = np.where(self.cache.is_cached(which), rows, lengths)
        return found

    def pair(self, which: int) -> Pair:
        return self.arrays.pair(which)

    def close(self) -> None:
        """Overwrite and drop. Waits for a pass at work on it; later steps are refused. Harmless twice."""
        super().close()
        self._engine.release(self)

    def drop_last(self, where: int) -> int:
        """Overwrite the newest block there, and say how many bytes it had; 0 when there is none."""
        numbers = [number for number, block in self.cache.blocks.items() if block.where == where]
        if not numbers:
            return 0
        block = self.cache.drop(numbers[-1])
        self.cached_bytes[where] -= block.size
        return block.size

    def erase(self) -> None:
        """Overwrite the tokens and the losses."""
        self.arrays.ids.zero_()
        self.constants.fill(0)


class UpdateEngine:
    """Update sessions over one base model. One pass at a time; thread-safe."""

    def __init__(
        self,
        base: BaseModel,
        *,
        keep_bytes: int,
        spill_bytes: int = 0,
        device_lock: DeviceLock | None = None,
        pass_tokens: int = PASS_TOKENS,
        parts: int = 0,
    ) -> None:
        """`keep_bytes` bounds what all open sessions together cache on the model's device.

        Owners share it. One alone may take all; a later one takes from those who have more than an even
        part. With `parts` it is cut into so many equal parts, and every session has one.

        `spill_bytes` bounds what sessions cache in host memory because the device had no room. Each step
        copies it to the device. The rest is computed anew, through the same code. The past of a long prompt
        is the largest part. All engines on the device share `device_lock`. A pass takes `pass_tokens` at
        most, or one example.
        """
        self._base = base
        self._device_lock = device_lock or DeviceLock()
        self.stateless = GradientEngine(base, self._device_lock, pass_tokens=pass_tokens)
        self.budget = self.stateless.budget
        self._decoder: PartialDecoder | None = None
        if supports(base.model):
            own = base.share_weights()
            self._decoder = PartialDecoder(own)
            yield_between_blocks(own, self._device_lock)
            self.budget = BatchBudget.of(base.device).within(pass_tokens)
        self._room = [keep_bytes, spill_bytes]
        self._all_room = (keep_bytes, spill_bytes)
        self._room_parts = parts
        self._state = threading.Lock()  # guards what follows, _room, and the blocks of every session
        self._open: set[UpdateSession] = set()

    @property
    def caches_activations(self) -> bool:
        """Whether steps run from cached activations. Families that cannot do so run in full."""
        return self._decoder is not None

    @property
    def moved(self) -> float:
        """When the model's device last changed hands, by the monotonic clock."""
        return self._device_lock.moved

    def depth_above(self, layer: int) -> int:
        """Blocks that a row of a step runs through; the last block's output still goes to the head."""
        return self._base.blocks if self._decoder is None else max(1, self._base.blocks - layer - 1)

    def bytes_held(self) -> tuple[int, int]:
        """Bytes that all open sessions cache on the model's device, and in host memory."""
        device, host = (whole - left for whole, left in zip(self._all_room, self._room, strict=True))
        return device, host

    def close(self) -> None:
        """Close every open session."""
        for session in list(self._open):
            session.close()
        self.stateless.close()

    def open(
        self,
        examples: Sequence[Pair],
        artefact: Artefact,
        *,
        left: threading.Event | None = None,
        owner: str = "",
    ) -> UpdateSession:
        """Take the examples of an update. Raises InvalidInput when there is none or one is empty.

        Once `left` is set, from any thread, no pass begins for the session; it must be closed all the same.
        The sessions of one `owner` share the device's time and memory. Without one, a session is its own.
        """
        if not examples or not all(prompt and target for prompt, target in examples):
            raise InvalidInput("an update needs examples, each with a prompt and a target")
        left = left or threading.Event()
        session = UpdateSession(self, artefact, examples, device=self._base.device, left=left, owner=owner)
        with self._state:
            self._open.add(session)
        try:
            self._compute_constants(session, left)
            if self._decoder is not None:
                self._fill(session, self._decoder)
        except BaseException:
            session.close()
            raise
        return session

    def gradients(self, steps: Sequence[GradientRequest]) -> list[Gradient]:
        """Each step's mean loss over its target tokens, and its gradient, as if it were alone.

        Computed in this thread. Steps under one artefact share passes. Raises InvalidInput on unknown rows
        and on a closed session, InvalidTensors on tensors of other shapes than the artefact's.
        """
        sums = [Sum(step, differentiate=True) for step in steps]
        compute(sums)
        return [total.gradient() for total in sums]

    def losses(self, steps: Sequence[GradientRequest]) -> list[tuple[float, int]]:
        """Each step's mean loss over its target tokens (nats a token), and how many those are."""
        sums = [Sum(step, differentiate=False) for step in steps]
        compute(sums)
        return [(found.loss, found.tokens) for found in (total.gradient() for total in sums)]

    def scores(self, steps: Sequence[GradientRequest]) -> list[list[Score]]:
        """The scores of each step's examples."""
        sums = [Sum(step, differentiate=False) for step in steps]
        compute(sums)
        return [total.scores() for total in sums]

    def run_pass(self, shares: Sequence[PassShare]) -> None:
        if self._decoder is None:
            self.stateless.run_pass(shares)
            return
        with working(self._device_lock, shares):
            ordered: list[PassShare] = []
            parts: list[Part] = []
            owners: list[int] = []
            for u, (total, which) in enumerate(shares):
                session = cast("UpdateSession", total.session)  # no other sessions are ours
                compute_now = partial(self._activations, self._decoder, session)
                of_user = list(session.cache.parts(total.examples[which], compute_now))
                parts += of_user
                owners += [u] * len(of_user)
                ordered.append((total, _in_order_of(of_user, which, total.examples[which])))
            outcome = pass_from_cache(self._decoder, parts, owners, users_of(shares))
        add(ordered, outcome)

    def _activations(
        self, decoder: PartialDecoder, session: UpdateSession, which: Indices, **options: Any
    ) -> ActivationCache:
        """Activations of these examples behind φ₁; `options` are those of `build_cache`."""
        shift = session.collective
        return build_cache(
            decoder, session.arrays, which, session.layer, self.budget, collective=shift, **options
        )

    # -- opening and closing -------------------------------------------------------------------

    def _compute_constants(self, session: UpdateSession, left: threading.Event) -> None:
        constant = np.flatnonzero(session.is_constant)
        if len(constant):
            pairs = [session.pair(i) for i in constant.tolist()]
            found = self.stateless.score(pairs, ShiftUse(Mode.BASE), left=left, owner=session.owner)
            session.constants[constant] = [-score.log_likelihood for score in found]

    def _fill(self, session: UpdateSession, decoder: PartialDecoder) -> None:
        """Cache as many examples as there is room for, the cheapest first."""
        arrays = session.arrays
        costs = cache_bytes(decoder, arrays, session.layer)
        changing = np.flatnonzero(~session.is_constant)
        order = changing[np.argsort(costs[changing], kind="stable")]
        for where in (ON_DEVICE, SPILLED):
            room = self._room_for(session, where, int(costs[order].sum()))
            with self._state:
                session.check_open()
                room = min(room, self._room[where])  # others may have taken some meanwhile
                which = order[costs[order].cumsum() <= room]
                session.cached_bytes[where] = int(costs[which].sum())
                self._room[where] -= session.cached_bytes[where]
            order = order[len(which) :]
            count = int(np.clip(arrays.lengths[which].sum() // self.budget.rows, 1, _BLOCKS))
            for part in np.array_split(which, min(count, len(which))) if len(which) else ():
                self._fill_block(session, decoder, part, where, int(costs[part].sum()))

    def _fill_block(
        self, session: UpdateSession, decoder: PartialDecoder, which: Indices, where: int, size: int
    ) -> None:
        working = partial(self._filling, session)
        activations = self._activations(decoder, session, which, working=working, spill=where == SPILLED)
        with self._state:
            try:
                session.check_open()
            except InvalidInput:
                activations.erase()
                raise
            session.cache.add(CachedBlock(where, activations, which, size))

    @contextmanager
    def _filling(self, session: UpdateSession) -> Iterator[None]:
        """One pass that fills a block."""
        with self._device_lock.hold_long({session.owner: 1.0}), session.at_work():
            yield

    def _room_for(self, session: UpdateSession, where: int, wanted: int) -> int:
        """Bytes that the session may take: what is free, and what others give up above an even part."""
        with self._state:
            if self._room_parts:
                return min(self._room[where], self._all_room[where] // self._room_parts)
            if wanted <= self._room[where] or not self._all_room[where]:
                return min(wanted, self._room[where])
        # With the lock held, no pass reads what is dropped.
        with self._device_lock.hold_long({session.owner: 1.0}, session.check_open), self._state:
            held: Counter[str] = Counter()
            for each in self._open:
                held[each.owner] += each.cached_bytes[where]
            part = self._all_room[where] // len(held)
            most = max(self._room[where], min(wanted, part - held[session.owner]))
            for other in sorted(self._open, key=lambda each: held[each.owner], reverse=True):
                while self._room[where] < most and held[other.owner] > part:
                    freed = other.drop_last(where)
                    if not freed:
                        break
                    held[other.owner] -= freed
                    self._room[where] += freed
            return most

    def release(self, session: UpdateSession) -> None:
        """Overwrite a closed session, and take back its room."""
        with self._state:
            if session not in self._open:
                return
            self._open.discard(session)
            session.erase()
            for where in (ON_DEVICE, SPILLED):
                while freed := session.drop_last(where):
                    self._room[where] += freed
                self._room[where] += session.cached_bytes[where]  # of blocks that were never filled


def _in_order_of(parts: Sequence[Part], which: Indices, examples: Indices) -> Indices:
    """`which` in the order in which the parts have their `examples`; one may be there twice."""
    found = np.empty_like(which)
    in_parts = np.concatenate([part.which for part in parts])
    found[np.argsort(in_parts, kind="stable")] = which[np.argsort(examples, kind="stable")]
    return found
