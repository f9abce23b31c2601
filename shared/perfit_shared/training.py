"""Personal training (PerFit, stage 2): by which schedule, and the one loop that takes the steps.

Whoever computes the gradients calls it: a device over the wire, the research pipeline and the trials
of learning rates in process.

    schedule = schedule_for("device", artefact, len(examples), held_out=len(gate))
    trainings = [Training.start(schedule, tensors)]
    for stepped in train(trainings, gradients=…, losses=…):
        …                     # progress, checkpoints, a stop

A `Training` is never changed, so an interrupt between two lines leaves the old one or the new one.
The order of examples is a function of seed and epoch, so a resumed run takes the very steps that an
uninterrupted one would have taken.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from itertools import chain, islice
from typing import Any, Generic, NamedTuple, Self, TypeVar

import safetensors
import safetensors.numpy

from perfit_shared.errors import Diverged, InvalidData, PerfitError, UpdateFailed
from perfit_shared.mixes import between
from perfit_shared.optimizer import StiefelAdamW
from perfit_shared.schedules import Figures, Overrides, PaperSchedule, Schedule, schedule_for
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Score
from perfit_shared.validation import Comparison, chosen_by_others, mean_loss

__all__ = [
    "Figures",
    "Overrides",
    "PaperSchedule",
    "Request",
    "Schedule",
    "Track",
    "Training",
    "schedule_for",
    "train",
]

_PATIENCE = 0.3  # of all epochs: training ends that long after the best one
_SHARE = 0.75  # of the way from the start to the best epoch (docs/updates-in-small.md, "Not all the way")


S = TypeVar("S", bound=Schedule)


@dataclass(frozen=True)
class Track:
    """Tensors on their way, with their moments."""

    tensors: ShiftTensors
    optimizer: StiefelAdamW

    def stepped(self, gradient: ShiftTensors) -> Track:
        optimizer = self.optimizer.copy()
        return Track(optimizer.step(self.tensors, gradient), optimizer)


class Judgement(NamedTuple):
    """The held-out examples at an epoch's end, or before the first step."""

    step: int
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Training(Generic[S]):
    """Where a run stands: tensors, moments, losses, and the best epoch where epochs are judged."""

    schedule: S
    track: Track
    folds: tuple[Track, ...] = ()
    losses: tuple[float, ...] = ()  # by step, nats a token
    seconds: float = 0.0  # the caller's clock
    judgements: tuple[Judgement, ...] = ()
    best_step: int = 0  # of the judgement with the lowest loss
    best: ShiftTensors | None = None

    @classmethod
    def start(cls, schedule: S, tensors: ShiftTensors) -> Self:
        track = Track(tensors, StiefelAdamW(schedule.optimizer()))
        return cls(schedule, track, (track,) * schedule.folds)

    @property
    def tensors(self) -> ShiftTensors:
        return self.track.tensors

    @property
    def comparison(self) -> Comparison:
        """The start and the epoch to take, on the examples that judge; of each third the others choose it.

        All choose the one that is taken. On the very examples that choose it, its gain would flatter.
        """
        found = [judgement.scores for judgement in self.judgements]
        return Comparison(found[0], chosen_by_others(found) if self.best_step else found[0])

    def outcome(self, start: ShiftTensors) -> ShiftTensors | None:
        """The last tensors; where epochs are judged `ending`, or None when the best one is not better.

        Better than the start, that is, by more than chance explains.
        """
        if not self.schedule.judged:
            return self.tensors
        return self.ending(start) if self.comparison.is_better else None

    def ending(self, start: ShiftTensors) -> ShiftTensors:
        """Three quarters of the way from the start to the best epoch, which alone goes too far.

        The start where no epoch has a lower loss.
        """
        return start if self.best is None else between(start, self.best, _SHARE)

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    @property
    def judged(self) -> int:
        """The step that held-out examples were last scored after, or -1."""
        return self.judgements[-1].step if self.judgements else -1

    @property
    def done(self) -> bool:
        """Whether all steps are taken, or the best epoch lies so far back that none will be better."""
        waited = self.judged - self.best_step
        patience = math.ceil(_PATIENCE * self.schedule.epochs) * self.schedule.steps_per_epoch
        return self.step >= self.schedule.steps or waited > patience

    @property
    def rows(self) -> list[int]:
        """The examples of the next step."""
        return self.schedule.batch(self.step)

    @property
    def next_step(self) -> list[tuple[Sequence[int], ShiftTensors]]:
        """The rows and tensors to differentiate: the training's own, and each fold's."""
        tracks = (self.track, *self.folds)
        batches = self.schedule.batches(self.step)
        return [(rows, track.tensors) for rows, track in zip(batches, tracks, strict=True)]

    @property
    def at_judgement(self) -> bool:
        """Whether an epoch ended here that `judge` has not seen."""
        if not self.schedule.judged or self.step <= self.judged:
            return False
        every = self.schedule.judgement_epochs * self.schedule.steps_per_epoch
        return self.step % every == 0 or self.step == self.schedule.steps

    @property
    def next_judgement(self) -> list[tuple[Sequence[int], ShiftTensors]]:
        """The rows and tensors to score: each fold's own part, or what is held out."""
        tracks = self.folds or (self.track,)
        return [(rows, t.tensors) for rows, t in zip(self.schedule.judged, tracks, strict=True)]

    def stepped(
        self,
        loss: float,
        gradient: ShiftTensors,
        *,
        folds: Sequence[tuple[float, ShiftTensors]] = (),
        seconds: float = 0.0,
    ) -> Self:
        """After one step. Raises UpdateFailed when a loss or gradient is no number."""
        for each_loss, each in ((loss, gradient), *folds):
            if not math.isfinite(each_loss) or not math.isfinite(each.norm()):
                raise UpdateFailed(
                    f"the loss is no longer a number at step {self.step + 1}; "
                    f"try --lr {self.schedule.learning_rate / 3:.2g}"
                )
        return replace(
            self,
            track=self.track.stepped(gradient),
            folds=tuple(t.stepped(each) for t, (_, each) in zip(self.folds, folds, strict=True)),
            losses=(*self.losses, loss),
            seconds=self.seconds + seconds,
        )

    def judge(self, scores: Sequence[Score]) -> Self:
        """After scoring the held-out examples at an epoch's end; keeps the best epoch's tensors.

        A later epoch may have learned the training examples by heart.
        """
        found = Judgement(self.step, tuple(scores))
        judged = replace(self, judgements=(*self.judgements, found))
        if self.judgements and mean_loss(found.scores) < min(mean_loss(j.scores) for j in self.judgements):
            return replace(judged, best_step=self.step, best=self.tensors)
        return judged

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All of it, exactly."""
        header = {
            "plan": asdict(self.schedule),
            "losses": self.losses,
            "seconds": self.seconds,
            "judgements": [(step, [astuple(score) for score in scores]) for step, scores in self.judgements],
            "best_step": self.best_step,
        }
        parts = [json.dumps(header).encode()]
        for track in (self.track, *self.folds):
            parts += [track.tensors.to_bytes(), track.optimizer.to_bytes()]
        if self.best is not None:
            parts.append(self.best.to_bytes())
        return b"".join(item for part in parts for item in (len(part).to_bytes(8, "big"), part))

    @classmethod
    def from_bytes(cls, data: bytes, schedule: type[S]) -> Self:
        """Raises InvalidData. One of before epochs were judged by example has a schedule without judges."""
        try:
            parts, at = [], 0
            while at < len(data):
                start = at + 8
                at = start + int.from_bytes(data[at:start], "big")
                parts.append(data[start:at])
            header: dict[str, Any] = json.loads(parts[0])
            tracks = 1 + header["plan"].get("folds", 0)
            starts = range(1, 2 * tracks + 1, 2)
            last = starts[-1] + 2
            track, *folds = (Track(_tensors(parts[i]), StiefelAdamW.from_bytes(parts[i + 1])) for i in starts)
            return cls(
                schedule=schedule(**header["plan"]),
                track=track,
                folds=tuple(folds),
                losses=tuple(header["losses"]),
                seconds=header["seconds"],
                judgements=tuple(
                    Judgement(step, tuple(Score(*score) for score in scores))
                    for step, scores in header.get("judgements", ())
                ),
                best_step=header.get("best_step", 0),
                best=_tensors(parts[last]) if len(parts) > last else None,
            )
        except (
            PerfitError,
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            safetensors.SafetensorError,
        ) as error:
            raise InvalidData("not the state of a training run") from error


def _tensors(data: bytes) -> ShiftTensors:
    return ShiftTensors.from_named(safetensors.numpy.load(data))


# -- the loop ------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What the loop asks for: about these rows, at these tensors."""

    owner: int  # index of the training
    rows: Sequence[int]
    tensors: ShiftTensors


# Each sends the requests; the result waits for the answers.
Gradients = Callable[[Sequence[Request]], Callable[[], Sequence[tuple[float, ShiftTensors]]]]
Losses = Callable[[Sequence[Request]], Callable[[], Sequence[Sequence[Score]]]]


def train(trainings: list[Training[S]], *, gradients: Gradients, losses: Losses) -> Iterator[list[int]]:
    """Take all trainings to their end, a step of each in every round; yields which took one.

    `gradients` gives each request's mean loss and gradient, `losses` the scores of each one's rows.

    It replaces the elements of `trainings` one by one, so an interrupt leaves each before a step or after
    it. It requests the next round before it yields one, so the caller's work overlaps the wait. Raises
    Diverged.
    """
    clocked = time.monotonic()
    current = _next_round(trainings, gradients, losses)
    while current is not None:
        found = iter(current.gradients())
        seconds, clocked = _seconds_each(clocked, current.stepped)
        for i in current.stepped:
            loss, gradient = next(found)
            folds = list(islice(found, len(trainings[i].folds)))
            try:
                trainings[i] = trainings[i].stepped(loss, gradient, folds=folds, seconds=seconds)
            except UpdateFailed as error:
                raise Diverged(str(error), i) from error
        scores = iter(current.losses())
        for i in current.judged:
            parts = islice(scores, len(trainings[i].schedule.judged))
            trainings[i] = trainings[i].judge(list(chain.from_iterable(parts)))
        stepped = current.stepped
        current = _next_round(trainings, gradients, losses)
        yield stepped


@dataclass(frozen=True)
class _Round:
    """One round: which trainings step, which judge an epoch, and what waits for the answers."""

    stepped: list[int]
    judged: list[int]
    gradients: Callable[[], Sequence[tuple[float, ShiftTensors]]]
    losses: Callable[[], Sequence[Sequence[Score]]]


def _next_round(trainings: Sequence[Training[S]], gradients: Gradients, losses: Losses) -> _Round | None:
    """Request the next round; None when there is none."""
    judged = [i for i, training in enumerate(trainings) if training.at_judgement]
    stepped = [i for i, training in enumerate(trainings) if i not in judged and not training.done]
    if not judged and not stepped:
        return None
    steps = [Request(i, *each) for i in stepped for each in trainings[i].next_step]
    judgements = [Request(i, *each) for i in judged for each in trainings[i].next_judgement]
    return _Round(
        stepped, judged, gradients(steps) if steps else list, losses(judgements) if judgements else list
    )


def _seconds_each(clocked: float, steps: Sequence[object]) -> tuple[float, float]:
    """(seconds a step, now); without steps the time counts to the next round."""
    now = time.monotonic()
    return ((now - clocked) / len(steps), now) if steps else (0.0, clocked)
