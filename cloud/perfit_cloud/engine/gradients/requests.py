"""Requests for gradients and scores: how they are cut into passes, and how results are summed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch

from perfit_cloud.engine.device_lock import DeviceLock
from perfit_cloud.engine.gradients.batch import BatchBudget, Pair
from perfit_cloud.engine.gradients.multi_user import Floats, PassResult, UserBatch
from perfit_cloud.engine.interface import Gradient
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.interventions import to_torch
from perfit_cloud.model.partial import Indices
from perfit_shared.errors import InvalidInput, InvalidTensors
from perfit_shared.positions import Positions
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.types import Score

__all__ = [
    "GradientRequest",
    "PassShare",
    "Session",
    "Sum",
    "add",
    "compute",
    "cut_into_passes",
    "users_of",
    "working",
]


class PassEngine(Protocol):
    """What runs the passes of a session's requests."""

    budget: BatchBudget

    def run_pass(self, shares: Sequence[PassShare]) -> None:
        """Run one pass for requests of equal `shared` sessions, and add to their sums."""


class Session(ABC):
    """The examples that one caller's requests are about.

    `close`, or the end of a `with`, ends it: it waits for a pass at work on it, and no other begins.
    """

    def __init__(
        self,
        engine: PassEngine,
        artefact: Artefact | None,
        targets: Sequence[int],
        *,
        device: torch.device,
        left: threading.Event | None,
        owner: str,
    ) -> None:
        """Once `left` is set, from any thread, no pass begins."""
        self.engine = engine
        self.artefact = artefact
        self.owner = owner or f"session {id(self)}"
        self.examples = len(targets)
        self.target_tokens = tuple(targets)  # of each example
        self.positions = Positions.parse(artefact.spec.positions) if artefact else Positions(0, 1)
        self.collective = to_torch(artefact.collective, device) if artefact else {}
        self.is_constant = np.zeros(self.examples, dtype=bool)  # examples that need no pass
        self.constants = np.zeros(self.examples)  # their −log p, nats
        self._left = left or threading.Event()
        self._changed = threading.Condition()
        self._is_at_work = False

    @property
    @abstractmethod
    def shared(self) -> Hashable:
        """Requests of sessions that are equal here can share a pass."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """Blocks that a row of a pass runs through."""

    @abstractmethod
    def sizes(self, which: Indices) -> tuple[Indices, Indices]:
        """Rows and tokens of these examples in a pass, as `BatchBudget.cut` takes them."""

    def costs(self, which: Indices) -> Indices:
        """Rows to compute for these examples, including those computed before their pass."""
        return self.sizes(which)[0]

    @abstractmethod
    def pair(self, which: int) -> Pair: ...

    def check_open(self) -> None:
        """Raises InvalidInput."""
        if self._left.is_set():
            raise InvalidInput("this session is closed; open another")

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Hold while a pass reads the session's data. Passes exclude each other. Raises InvalidInput."""
        with self._changed:
            self.check_open()
            self._is_at_work = True
        try:
            yield
        finally:
            with self._changed:
                self._is_at_work = False
                self._changed.notify_all()

    def close(self) -> None:
        """Harmless twice."""
        self._left.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._is_at_work)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class GradientRequest:
    """One request: about examples `rows` of a session, at these tensors."""

    session: Session
    rows: Sequence[int]
    personal: ShiftTensors | None  # None: at the collective shift alone, or at none

    def checked_rows(self) -> Indices:
        """The rows, if the request can be computed. Raises InvalidInput, InvalidTensors."""
        self.session.check_open()  # a request may need no pass, which checks again
        rows = np.array(self.rows, dtype=np.int64)
        if not len(rows) or rows.min() < 0 or rows.max() >= self.session.examples:
            raise InvalidInput("a step needs examples of its session")
        if self.personal is not None and self.session.artefact is not None:
            spec = self.session.artefact.spec
            rank, d = spec.personal_rank, spec.hidden_size
            shapes = {layer: tuple(t.shape for t in shift) for layer, shift in self.personal.layers.items()}
            if shapes != dict.fromkeys(spec.layers, ((rank, d), (rank, d), (rank,))):
                raise InvalidTensors("the tensors are not of the shapes that the artefact's spec names")
        return rows


class Sum:
    """The sum of what passes found for one request so far."""

    def __init__(self, step: GradientRequest, *, differentiate: bool) -> None:
        """Raises InvalidInput, InvalidTensors."""
        session = step.session
        self.session, self.personal, self.differentiate = session, step.personal, differentiate
        self.examples = step.checked_rows()
        if differentiate and (step.personal is None or session.artefact is None):
            raise InvalidInput("a gradient needs a personal shift")
        self.losses: Floats = session.constants[self.examples]  # −log p of each example so far, nats
        # Which of its examples passes compute; a request may name one twice.
        self.pending: Indices = np.flatnonzero(~session.is_constant[self.examples])
        self.target_tokens = [session.target_tokens[i] for i in self.examples.tolist()]
        self.tokens = sum(self.target_tokens)
        asked = step.personal.layers if differentiate and step.personal is not None else {}
        self._tensors = {layer: LayerShift(*map(np.zeros_like, shift)) for layer, shift in asked.items()}

    @property
    def kind(self) -> Hashable:
        """Requests of one kind can share a pass."""
        return self.session.shared, self.differentiate, self.personal is None

    def add(self, which: Indices, losses: Floats, gradients: dict[int, LayerShift]) -> None:
        """Add the losses of examples `which` of the request, and their part of the gradient."""
        self.losses[which] = losses
        for layer, found in gradients.items():
            for array, part in zip(self._tensors[layer], found, strict=True):
                np.add(array, part, out=array)

    def gradient(self) -> Gradient:
        """Mean loss, and its gradient; no tensors where none was asked for."""
        loss = float(self.losses.sum()) / self.tokens
        return Gradient(loss, self.tokens, ShiftTensors(self._tensors), self.scores())

    def scores(self) -> list[Score]:
        """Of each example."""
        return [Score(-loss, n) for loss, n in zip(self.losses.tolist(), self.target_tokens, strict=True)]


PassShare = tuple[Sum, Indices]  # a request, and which of its examples a pass takes


def compute(sums: Iterable[Sum]) -> None:
    """Run these requests; those of one kind share passes."""
    by_kind: dict[Hashable, list[PassShare]] = {}
    for total in sums:
        by_kind.setdefault(total.kind, []).append((total, total.pending))
    for shares in by_kind.values():
        for of_pass in cut_into_passes(shares):
            of_pass[0][0].session.engine.run_pass(of_pass)


def cut_into_passes(shares: Sequence[PassShare]) -> Iterator[list[PassShare]]:
    """Cut shares of one kind into passes, with examples of like length together whoever asks."""
    whose = np.repeat(np.arange(len(shares)), [len(which) for _, which in shares])
    members = np.concatenate([which for _, which in shares])
    sizes = [total.session.sizes(total.examples[which]) for total, which in shares]
    rows, lengths = (np.concatenate(of_all) for of_all in zip(*sizes, strict=True))
    for chunk in shares[0][0].session.engine.budget.cut(rows, lengths):
        yield [(shares[u][0], members[chunk[whose[chunk] == u]]) for u in np.unique(whose[chunk]).tolist()]


def users_of(shares: Sequence[PassShare]) -> UserBatch:
    """Whose tensors a pass for these requests runs with."""
    first = shares[0][0]
    return UserBatch(
        first.session.collective,
        [total.personal for total, _ in shares],
        [1 / total.tokens for total, _ in shares] if first.differentiate else None,
    )


def add(shares: Sequence[PassShare], outcome: PassResult) -> None:
    """Add what a pass found to the sums of its shares, which have its examples in order."""
    at = 0
    for u, (total, which) in enumerate(shares):
        gradients = {layer: LayerShift(*(t[u] for t in found)) for layer, found in outcome.gradients.items()}
        total.add(which, outcome.losses[at : at + len(which)], gradients)
        at += len(which)


@contextmanager
def working(device_lock: DeviceLock, shares: Sequence[PassShare]) -> Iterator[None]:
    """Hold the device for one pass. Raises InvalidInput when one of the sessions is closed."""
    owners: Counter[str] = Counter()
    for total, which in shares:
        owners[total.session.owner] += len(which)
    with device_lock.hold_long(owners), ExitStack() as stack:
        for session in dict.fromkeys(total.session for total, _ in shares):
            stack.enter_context(session.at_work())
        yield
