"""Gradient steps that compute only what a user's tensors can change, for several users in one pass.

An *adaptation* holds the examples of one update and, of each, what no user's tensors can change
(engine/gradients/activation_cache.py). A step then runs the blocks above the first intervened one, from the first
intervened token on, and the head on the target tokens (engine/gradients/multi_user.py). Families that
model/partial.py does not know are run in full, several users together all the same.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from perfit_cloud.engine.device_lock import DeviceLock, yield_between_blocks
from perfit_cloud.engine.example_cache import ON_DEVICE, SPILLED, CachedBlock, ExampleCache
from perfit_cloud.engine.gradients.activation_cache import (
    ActivationCache,
    BatchBudget,
    Examples,
    keep,
    kept_bytes,
)
from perfit_cloud.engine.gradients.batch import (
    PASS_TOKENS,
    Pair,
    make_batch,
    most_pass_tokens,
    passes,
    target_log_likelihoods,
)
from perfit_cloud.engine.gradients.multi_user import PassResult, UserBatch, pass_from_kept, pass_in_full
from perfit_cloud.engine.gradients.requests import (
    GradientRequest,
    PassShare,
    Sum,
    checked_rows,
    cut_into_passes,
)
from perfit_cloud.engine.interface import Gradient
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.interventions import install, to_torch
from perfit_cloud.model.partial import Indices, PartialDecoder, supports
from perfit_shared.errors import InvalidInput
from perfit_shared.positions import Positions
from perfit_shared.shifts import ShiftTensors

__all__ = ["GradientRequest", "UpdateEngine", "UpdateSession"]


_BLOCKS = 8  # into which an adaptation's examples are cut at most, to be dropped one by one


class UpdateSession:
    """The examples of one update, and all of them that no user's tensors can change.

    Made by UpdateEngine.open; `close`, or the end of a `with`, overwrites what it holds.
    """

    def __init__(
        self,
        engine: UpdateEngine,
        artefact: Artefact,
        pairs: Sequence[Pair],
        *,
        device: torch.device,
        left: threading.Event,
        owner: str,
    ) -> None:
        self.owner = owner or f"adaptation {id(self)}"
        self.examples = len(pairs)
        self.target_tokens = tuple(len(target) for _, target in pairs)  # of each example
        self._engine, self._artefact, self._left = engine, artefact, left
        self._positions = Positions.parse(artefact.spec.positions)
        self._collective = to_torch(artefact.collective, device)
        self._arrays = Examples(pairs, self._positions, device)
        self._cache = ExampleCache(self._arrays)
        self._taken = [0, 0]  # bytes on the device and in host memory, of blocks that are being filled too
        # −log p of the target where the prompt has no intervened token, which nothing changes.
        self._constants = np.zeros(self.examples)

    @property
    def cached_examples(self) -> int:
        """How many are kept on the model's device. What is neither kept nor spilled is computed anew."""
        return self._cache.count(ON_DEVICE)

    @property
    def spilled_examples(self) -> int:
        """How many are kept in host memory."""
        return self._cache.count(SPILLED)

    @property
    def kept_bytes(self) -> int:
        return self._taken[ON_DEVICE]

    @property
    def spilled_bytes(self) -> int:
        return self._taken[SPILLED]

    def close(self) -> None:
        """Overwrite and drop. Waits for a pass at work on it; later steps are refused. Harmless twice."""
        self._engine._close(self)

    def _check_open(self) -> None:
        """Raises InvalidInput."""
        if self._left.is_set():
            raise InvalidInput("this adaptation is closed; open another")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class UpdateEngine:
    """Adaptations of one base model. One pass at a time; thread-safe."""

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
        """`keep_bytes`: what all open adaptations together may keep on the model's device.

        Owners share it: one alone may take all, and who comes later takes of those who have more than an
        even part. With `parts` it is cut into so many, and an adaptation has one, whoever else is there.

        What does not fit when its adaptation opens is kept in host memory as long as `spill_bytes`
        last, and copied to the device at every step that has it (of no use where the device is the
        host). The rest is computed anew, through the same code. The past of a long prompt is the
        big part. `turns`: of all engines on the device. `pass_tokens`: of one pass, beyond one example.
        """
        self._base = base
        self._device_lock = device_lock or DeviceLock()
        self._own = self._whole = replace(base, model=base.share_weights())
        if supports(base.model):
            self._tail: PartialDecoder | None = PartialDecoder(self._own.model)
            self._whole = replace(base, model=base.share_weights())
            yield_between_blocks(self._whole.model, self._device_lock)
        else:
            self._tail = None
            install(self._own.model, range(base.blocks))
        yield_between_blocks(self._own.model, self._device_lock)
        self._pass_tokens = most = min(pass_tokens, most_pass_tokens(base.device))
        # What no part is kept of is padded as a whole.
        in_full = BatchBudget(most, most, 2**62, base.capabilities.passes)
        self._caps = in_full if self._tail is None else BatchBudget.of(base.device).within(pass_tokens)
        self._room = [keep_bytes, spill_bytes]
        self._all_room = (keep_bytes, spill_bytes)
        self._room_parts = parts
        self._state = threading.Condition()  # of what follows and of _room
        self._open: set[UpdateSession] = set()
        self._at_work: set[UpdateSession] = set()

    @property
    def keeps(self) -> bool:
        """Whether steps of this model run from what is kept; those of other families run in full."""
        return self._tail is not None

    @property
    def moved(self) -> float:
        """When the model's device last changed hands, by the monotonic clock."""
        return self._device_lock.moved

    def bytes_held(self) -> tuple[int, int]:
        """What all open adaptations keep on the model's device, and in host memory."""
        device, host = (whole - left for whole, left in zip(self._all_room, self._room, strict=True))
        return device, host

    @property
    def pass_rows(self) -> int:
        """Rows that one pass takes on."""
        return self._caps.rows

    def pass_rows_of(self, step: GradientRequest) -> Indices:
        """Rows that each example of a step brings to a pass.

        Raises InvalidInput or InvalidTensors where `gradients` would.
        """
        rows = checked_rows(step)
        arrays, cached = step.session._arrays, step.session._cache.is_cached(rows)
        found: Indices = np.where(cached, arrays.rows[rows], arrays.lengths[rows])
        return found

    def close(self) -> None:
        """Close every adaptation that is still open."""
        for session in list(self._open):
            session.close()

    def open(
        self,
        examples: Sequence[Pair],
        artefact: Artefact,
        *,
        left: threading.Event | None = None,
        owner: str = "",
    ) -> UpdateSession:
        """Take the examples of an update. Raises InvalidInput when there is none or one is empty.

        Whoever sets `left`, from any thread, has no pass begin for it from then on; it is to be
        closed all the same. All of one `owner` share the device's time and memory; without one it is its own.
        """
        if not examples or not all(prompt and target for prompt, target in examples):
            raise InvalidInput("an update needs examples, each with a prompt and a target")
        left = left or threading.Event()
        session = UpdateSession(self, artefact, examples, device=self._base.device, left=left, owner=owner)
        with self._state:
            self._open.add(session)
        try:
            self._fill(session)
        except BaseException:
            session.close()
            raise
        return session

    def gradients(self, steps: Sequence[GradientRequest]) -> list[Gradient]:
        """Each step's mean loss over its target tokens, and its gradient, as if it were alone.

        Steps under one artefact share passes. Raises InvalidInput on rows that are not there and on
        an adaptation that is closed, InvalidTensors on tensors that are not of the artefact's shapes.
        """
        sums = self._run(steps, differentiate=True)
        return [Gradient(s.loss / s.tokens, s.tokens, ShiftTensors(s.gradient)) for s in sums]

    def losses(self, steps: Sequence[GradientRequest]) -> list[tuple[float, int]]:
        """Each step's mean loss over its target tokens (nats a token), and how many those are."""
        return [(s.loss / s.tokens, s.tokens) for s in self._run(steps, differentiate=False)]

    # -- opening and closing -------------------------------------------------------------------

    def _fill(self, session: UpdateSession) -> None:
        """Compute constants, and keep as many examples as there is room for, the cheapest first."""
        arrays, working = session._arrays, partial(self._working, [(session, 1)])
        constant = np.flatnonzero(arrays.marked == 0)
        pairs = [arrays.pair(int(i)) for i in constant]
        for chunk in passes(pairs, self._base.capabilities.passes, self._pass_tokens):
            batch = make_batch([pairs[i] for i in chunk], Positions(0, 1), self._base.device)
            with working(), torch.no_grad():
                likelihoods = target_log_likelihoods(self._whole, batch, []).sum(1)
            session._constants[constant[chunk]] = -likelihoods.cpu().numpy()
        if self._tail is None:
            return
        costs = kept_bytes(self._tail, arrays, min(session._collective))
        order = np.argsort(np.where(arrays.marked > 0, costs, np.inf), kind="stable")
        order = order[: np.count_nonzero(arrays.marked)]
        for where in (ON_DEVICE, SPILLED):
            room = self._room_for(session, where, int(costs[order].sum()))
            with self._state:
                session._check_open()
                room = min(room, self._room[where])  # which others may have taken of meanwhile
                which = order[costs[order].cumsum() <= room]
                session._taken[where] = int(costs[which].sum())
                self._room[where] -= session._taken[where]
            order = order[len(which) :]
            count = int(np.clip(arrays.lengths[which].sum() // self._caps.rows, 1, _BLOCKS))
            for part in np.array_split(which, min(count, len(which))) if len(which) else ():
                kept = self._compute(self._tail, session, part, working=working, spill=where == SPILLED)
                with self._state:
                    if session._left.is_set():
                        kept.erase()
                    session._check_open()
                    session._cache.add(CachedBlock(where, kept, part, int(costs[part].sum())))

    def _room_for(self, session: UpdateSession, where: int, wanted: int) -> int:
        """Bytes that it may take: what is free, or what others have above an even part and now give up."""
        with self._state:
            if self._room_parts:
                return min(self._room[where], self._all_room[where] // self._room_parts)
            if wanted <= self._room[where] or not self._all_room[where]:
                return min(wanted, self._room[where])
        # No pass reads what is dropped.
        with self._device_lock.hold_long({session.owner: 1.0}, session._check_open), self._state:
            held: Counter[str] = Counter()
            for each in self._open:
                held[each.owner] += each._taken[where]
            part = self._all_room[where] // len(held)
            most = max(self._room[where], min(wanted, part - held[session.owner]))
            for other in sorted(self._open, key=lambda each: held[each.owner], reverse=True):
                for number in reversed([n for n, b in other._cache.blocks.items() if b.where == where]):
                    if most <= self._room[where] or held[other.owner] <= part:
                        break
                    held[other.owner] -= other._cache.blocks[number].size
                    self._drop(other, number)
            return most

    def _drop(self, session: UpdateSession, number: int) -> None:
        """Overwrite a block, whose examples are computed anew from then on; called under the lock."""
        block = session._cache.drop(number)
        session._taken[block.where] -= block.size
        self._room[block.where] += block.size

    def _close(self, session: UpdateSession) -> None:
        with self._state:
            session._left.set()
            self._state.wait_for(lambda: session not in self._at_work)
            if session not in self._open:
                return
            self._open.discard(session)
            session._arrays.ids.zero_()
            session._constants.fill(0)
            for number in list(session._cache.blocks):
                self._drop(session, number)
            for where, taken in enumerate(session._taken):  # for blocks that never came to be
                self._room[where] += taken

    @contextmanager
    def _working(self, parts: Sequence[tuple[UpdateSession, int]]) -> Iterator[None]:
        """One pass over so many examples of each of these. Raises InvalidInput when one is closed."""
        owners: Counter[str] = Counter()
        for session, examples in parts:
            owners[session.owner] += examples
        with self._device_lock.hold_long(owners):
            with self._state:
                for session, _ in parts:
                    session._check_open()
                self._at_work.update(session for session, _ in parts)
            try:
                yield
            finally:
                with self._state:
                    self._at_work.clear()  # passes exclude each other
                    self._state.notify_all()

    # -- passes --------------------------------------------------------------------------------

    def _run(self, steps: Sequence[GradientRequest], *, differentiate: bool) -> list[Sum]:
        sums = [Sum(step) for step in steps]
        by_artefact: dict[int, list[Sum]] = {}
        for total in sums:
            if len(total.changing):
                by_artefact.setdefault(id(total.session._artefact), []).append(total)
        for members in by_artefact.values():
            for shares in cut_into_passes(members, self._caps):
                outcome = self._pass(shares, differentiate=differentiate)
                for u, (total, _) in enumerate(shares):
                    total.add(outcome, u)
        return sums

    def _pass(self, shares: Sequence[PassShare], *, differentiate: bool) -> PassResult:
        first = shares[0][0].session
        users = UserBatch(
            first._collective,
            [total.personal for total, _ in shares],
            [1 / total.tokens for total, _ in shares] if differentiate else None,
        )
        at_work = [(total.session, len(which)) for total, which in shares]
        with self._working(at_work):
            if self._tail is None:
                pairs = [total.session._arrays.pair(i) for total, which in shares for i in which]
                owners = [u for u, (_, which) in enumerate(shares) for _ in which]
                return pass_in_full(self._own, pairs, owners, users, first._positions)
            parts = [
                (u, part)
                for u, (total, which) in enumerate(shares)
                for part in total.session._cache.parts(
                    which, partial(self._compute, self._tail, total.session)
                )
            ]
            return pass_from_kept(self._tail, [part for _, part in parts], [u for u, _ in parts], users)

    def _compute(
        self, tail: PartialDecoder, session: UpdateSession, which: Indices, **options: Any
    ) -> ActivationCache:
        """Activations of these examples, behind φ₁; `options` are those of `keep`."""
        shift = session._collective
        return keep(tail, session._arrays, which, min(shift), self._caps, collective=shift, **options)
