"""Gradient steps that compute only what a user's tensors can change, for several users in one pass.

An *adaptation* holds the examples of one update and, of each, what no user's tensors can change
(engine/kept.py). A step then runs the blocks above the first intervened one, from the first
intervened token on, and the head on the target tokens (engine/joint.py). Families that
model/tail.py does not know are run in full, several users together all the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Self

import numpy as np
import torch

from perfit_cloud.engine.gradients import (
    PASS_TOKENS,
    Pair,
    make_batch,
    passes,
    target_log_likelihoods,
)
from perfit_cloud.engine.joint import Outcome, Users, pass_from_kept, pass_in_full
from perfit_cloud.engine.kept import Caps, Examples, Kept, Part, keep, kept_bytes
from perfit_cloud.engine.turns import Turns, breathe_between_blocks
from perfit_cloud.engine.types import Gradient
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.shifts import install, to_torch
from perfit_cloud.model.tail import Indices, Tail, supports
from perfit_shared.errors import InvalidInput, InvalidTensors
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors

__all__ = ["Adaptation", "AdaptationEngine", "Step"]


_IN_FULL = Caps(8192, 8192, 2**62)  # what no part is kept of is padded as a whole
_ON_DEVICE, _SPILLED, _NOWHERE = 0, 1, -1  # where an example is kept


class Adaptation:
    """The examples of one update, and all of them that no user's tensors can change.

    Made by AdaptationEngine.open; `close`, or the end of a `with`, overwrites what it holds.
    """

    def __init__(
        self, engine: AdaptationEngine, artefact: Artefact, pairs: Sequence[Pair], device: torch.device,
        left: threading.Event,
    ) -> None:  # fmt: skip
        self.examples = len(pairs)
        self.target_tokens = tuple(len(target) for _, target in pairs)  # of each example
        self._engine, self._artefact, self._left = engine, artefact, left
        self._positions = Positions.parse(artefact.spec.positions)
        self._collective = to_torch(artefact.collective, device)
        self._arrays = Examples(pairs, self._positions, device)
        self._stores: list[Kept] = []  # on the device, and in host memory
        self._taken = [0, 0]  # bytes of these
        self._where = np.full(self.examples, _NOWHERE)  # of each example: on the device, spilled or nowhere
        self._places = np.zeros(self.examples, dtype=np.int64)  # in its store
        # −log p of the target where the prompt has no intervened token, which nothing changes.
        self._constants = np.zeros(self.examples)

    @property
    def kept_examples(self) -> int:
        """How many are kept on the model's device. What is neither kept nor spilled is computed anew."""
        return int((self._where == _ON_DEVICE).sum())

    @property
    def spilled_examples(self) -> int:
        """How many are kept in host memory."""
        return int((self._where == _SPILLED).sum())

    @property
    def kept_bytes(self) -> int:
        return self._taken[_ON_DEVICE]

    @property
    def spilled_bytes(self) -> int:
        return self._taken[_SPILLED]

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


@dataclass(frozen=True)
class Step:
    """One gradient that one user asks for: of examples `rows` of an adaptation, at these tensors."""

    adaptation: Adaptation
    rows: Sequence[int]
    personal: ShiftTensors


class AdaptationEngine:
    """Adaptations of one base model. One pass at a time; thread-safe."""

    def __init__(
        self,
        base: BaseModel,
        *,
        keep_bytes: int,
        spill_bytes: int = 0,
        turns: Turns | None = None,
        pass_tokens: int = PASS_TOKENS,
    ) -> None:
        """`keep_bytes`: what all open adaptations together may keep on the model's device.

        What does not fit when its adaptation opens is kept in host memory as long as `spill_bytes`
        last, and copied to the device at every step that has it (of no use where the device is the
        host). The rest is computed anew, through the same code. The past of a long prompt is the
        big part. `turns`: of all engines on the device. `pass_tokens`: of one pass, beyond one example.
        """
        self._base = base
        self._turns = turns or Turns()
        self._own = self._whole = replace(base, model=base.twin())
        if supports(base.model):
            self._tail: Tail | None = Tail(self._own.model)
            self._whole = replace(base, model=base.twin())
            breathe_between_blocks(self._whole.model, self._turns)
        else:
            self._tail = None
            install(self._own.model, range(base.blocks))
        breathe_between_blocks(self._own.model, self._turns)
        self._pass_tokens = pass_tokens
        in_full = _IN_FULL._replace(batching=base.capabilities.passes)
        self._caps = (in_full if self._tail is None else Caps.of(base.device)).within(pass_tokens)
        self._room = [keep_bytes, spill_bytes]
        self._all_room = (keep_bytes, spill_bytes)
        self._state = threading.Condition()  # of what follows and of _room
        self._open: set[Adaptation] = set()
        self._at_work: set[Adaptation] = set()

    @property
    def keeps(self) -> bool:
        """Whether steps of this model run from what is kept; those of other families run in full."""
        return self._tail is not None

    @property
    def moved(self) -> float:
        """When the model's device last changed hands, by the monotonic clock."""
        return self._turns.moved

    def bytes_held(self) -> tuple[int, int]:
        """What all open adaptations keep on the model's device, and in host memory."""
        device, host = (whole - left for whole, left in zip(self._all_room, self._room, strict=True))
        return device, host

    @property
    def pass_rows(self) -> int:
        """Rows that one pass takes on."""
        return self._caps.rows

    def pass_rows_of(self, step: Step) -> Indices:
        """Rows that each example of a step brings to a pass.

        Raises InvalidInput or InvalidTensors where `gradients` would.
        """
        rows = _checked(step)
        arrays, where = step.adaptation._arrays, step.adaptation._where
        found: Indices = np.where(where[rows] == _NOWHERE, arrays.lengths[rows], arrays.rows[rows])
        return found

    def close(self) -> None:
        """Close every adaptation that is still open."""
        for adaptation in list(self._open):
            adaptation.close()

    def open(
        self, examples: Sequence[Pair], artefact: Artefact, *, left: threading.Event | None = None
    ) -> Adaptation:
        """Take the examples of an update. Raises InvalidInput when there is none or one is empty.

        Whoever sets `left`, from any thread, has no pass begin for it from then on; it is to be
        closed all the same.
        """
        if not examples or not all(prompt and target for prompt, target in examples):
            raise InvalidInput("an update needs examples, each with a prompt and a target")
        adaptation = Adaptation(self, artefact, examples, self._base.device, left or threading.Event())
        with self._state:
            self._open.add(adaptation)
        try:
            self._fill(adaptation)
        except BaseException:
            adaptation.close()
            raise
        return adaptation

    def gradients(self, steps: Sequence[Step]) -> list[Gradient]:
        """Each step's mean loss over its target tokens, and its gradient, as if it were alone.

        Steps under one artefact share passes. Raises InvalidInput on rows that are not there and on
        an adaptation that is closed, InvalidTensors on tensors that are not of the artefact's shapes.
        """
        sums = self._run(steps, differentiate=True)
        return [Gradient(s.loss / s.tokens, s.tokens, ShiftTensors(s.gradient)) for s in sums]

    def losses(self, steps: Sequence[Step]) -> list[tuple[float, int]]:
        """Each step's mean loss over its target tokens (nats a token), and how many those are."""
        return [(s.loss / s.tokens, s.tokens) for s in self._run(steps, differentiate=False)]

    # -- opening and closing -------------------------------------------------------------------

    def _fill(self, adaptation: Adaptation) -> None:
        """Compute constants, and keep as many examples as there is room for, the cheapest first."""
        arrays, working = adaptation._arrays, partial(self._working, [adaptation])
        constant = np.flatnonzero(arrays.marked == 0)
        pairs = [arrays.pair(int(i)) for i in constant]
        for chunk in passes(pairs, self._base.capabilities.passes, self._pass_tokens):
            batch = make_batch([pairs[i] for i in chunk], Positions(0, 1), self._base.device)
            with working(), torch.no_grad():
                likelihoods = target_log_likelihoods(self._whole, batch, []).sum(1)
            adaptation._constants[constant[chunk]] = -likelihoods.cpu().numpy()
        if self._tail is None:
            return
        collective = adaptation._collective
        costs = kept_bytes(self._tail, arrays, min(collective))
        order = np.argsort(np.where(arrays.marked > 0, costs, np.inf), kind="stable")
        order = order[: np.count_nonzero(arrays.marked)]
        for where in (_ON_DEVICE, _SPILLED):
            with self._state:
                adaptation._check_open()
                which = order[costs[order].cumsum() <= self._room[where]]
                adaptation._taken[where] = int(costs[which].sum())
                self._room[where] -= adaptation._taken[where]
            order = order[len(which) :]
            kept = keep(self._tail, arrays, which, collective, working=working, spill=where == _SPILLED)
            with self._state:
                if adaptation._left.is_set():
                    kept.erase()
                adaptation._check_open()
                adaptation._stores.append(kept)
                adaptation._places[which] = np.arange(len(which))
                adaptation._where[which] = where

    def _close(self, adaptation: Adaptation) -> None:
        with self._state:
            adaptation._left.set()
            self._state.wait_for(lambda: adaptation not in self._at_work)
            if adaptation not in self._open:
                return
            self._open.discard(adaptation)
            adaptation._arrays.ids.zero_()
            adaptation._constants.fill(0)
            for kept in adaptation._stores:
                kept.erase()
            adaptation._stores.clear()
            for where, taken in enumerate(adaptation._taken):
                self._room[where] += taken

    @contextmanager
    def _working(self, adaptations: Sequence[Adaptation]) -> Iterator[None]:
        """One pass over these. Raises InvalidInput when one of them is closed."""
        with self._turns.take_long():
            with self._state:
                for adaptation in adaptations:
                    adaptation._check_open()
                self._at_work.update(adaptations)
            try:
                yield
            finally:
                with self._state:
                    self._at_work.clear()  # passes exclude each other
                    self._state.notify_all()

    # -- passes --------------------------------------------------------------------------------

    def _run(self, steps: Sequence[Step], *, differentiate: bool) -> list[_Sum]:
        sums = [_Sum(step) for step in steps]
        by_artefact: dict[int, list[_Sum]] = {}
        for total in sums:
            if len(total.changing):
                by_artefact.setdefault(id(total.adaptation._artefact), []).append(total)
        for members in by_artefact.values():
            for shares in _cut(members, self._caps):
                outcome = self._pass(shares, differentiate=differentiate)
                for u, (total, _) in enumerate(shares):
                    total.add(outcome, u)
        return sums

    def _pass(self, shares: Sequence[_Share], *, differentiate: bool) -> Outcome:
        first = shares[0][0].adaptation
        users = Users(
            first._collective,
            [total.personal for total, _ in shares],
            [1 / total.tokens for total, _ in shares] if differentiate else None,
        )
        with self._working([total.adaptation for total, _ in shares]):
            if self._tail is None:
                pairs = [total.adaptation._arrays.pair(i) for total, which in shares for i in which]
                owners = [u for u, (_, which) in enumerate(shares) for _ in which]
                return pass_in_full(self._own, pairs, owners, users, first._positions)
            parts = [
                (u, part)
                for u, (total, which) in enumerate(shares)
                for part in self._parts(self._tail, total.adaptation, which)
            ]
            return pass_from_kept(self._tail, [part for _, part in parts], [u for u, _ in parts], users)

    def _parts(self, tail: Tail, adaptation: Adaptation, which: Indices) -> Iterator[Part]:
        """What is kept of some examples, and the same of the others, computed now."""
        arrays, where, device = adaptation._arrays, adaptation._where[which], self._base.device
        for store, kept in enumerate(adaptation._stores):
            there = which[where == store]
            places = adaptation._places[there]
            if len(there) and store == _ON_DEVICE:
                yield Part(arrays, there, kept, places)
            elif len(there):
                moved = kept.moved(places, arrays.rows[there], arrays.starts[there], device)
                yield Part(arrays, there, moved, np.arange(len(there)))
        missing = which[where == _NOWHERE]
        if len(missing):
            now = keep(tail, arrays, missing, adaptation._collective)
            yield Part(arrays, missing, now, np.arange(len(missing)))


class _Sum:
    """What passes have found of one step so far."""

    def __init__(self, step: Step) -> None:
        """Raises InvalidInput, InvalidTensors."""
        self.adaptation, self.personal = step.adaptation, step.personal
        arrays, rows = step.adaptation._arrays, _checked(step)
        self.changing = rows[arrays.marked[rows] > 0]  # examples that the tensors change the loss of
        self.tokens = int(arrays.targets[rows].sum())
        self.loss = float(step.adaptation._constants[rows].sum())  # nats
        self.gradient = {
            layer: LayerShift(*map(np.zeros_like, shift)) for layer, shift in step.personal.layers.items()
        }

    def add(self, outcome: Outcome, owner: int) -> None:
        self.loss += float(outcome.sums[owner])
        for layer, stacks in outcome.gradients.items():
            for array, stack in zip(self.gradient[layer], stacks, strict=True):
                np.add(array, stack[owner], out=array)


_Share = tuple[_Sum, Indices]  # whose, and which of their examples a pass takes on


def _checked(step: Step) -> Indices:
    """The rows of a step that can be taken. Raises InvalidInput, InvalidTensors."""
    step.adaptation._check_open()  # a step may need no pass, which checks again
    rows = np.array(step.rows, dtype=np.int64)
    if not len(rows) or rows.min() < 0 or rows.max() >= step.adaptation.examples:
        raise InvalidInput("a step needs examples of its adaptation")
    spec = step.adaptation._artefact.spec
    rank, d = spec.personal_rank, spec.hidden_size
    shapes = {layer: tuple(t.shape for t in shift) for layer, shift in step.personal.layers.items()}
    if shapes != dict.fromkeys(spec.layers, ((rank, d), (rank, d), (rank,))):
        raise InvalidTensors("the tensors are not of the shapes that the artefact's spec names")
    return rows


def _cut(members: Sequence[_Sum], caps: Caps) -> list[list[_Share]]:
    """Passes over all that these steps ask for, examples of like length together whoever owns them."""
    owners = np.repeat(np.arange(len(members)), [len(m.changing) for m in members])
    examples = np.concatenate([m.changing for m in members])
    rows = np.concatenate([m.adaptation._arrays.rows[m.changing] for m in members])
    lengths = np.concatenate([m.adaptation._arrays.lengths[m.changing] for m in members])
    made = []
    for piece in caps.cut(rows, lengths):
        shares = ((u, examples[piece[owners[piece] == u]]) for u in np.unique(owners[piece]))
        made.append([(members[u], which) for u, which in shares])
    return made
