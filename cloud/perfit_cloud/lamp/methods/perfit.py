"""PerFit, and what its ablations leave of it: φ₁ alone, or φ₂ alone at one rank or at both ranks' sum.

A state is the shift that answers: `ShiftUse`, the personal tensors of which are saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from perfit_cloud.collective.blank import RATE
from perfit_cloud.collective.data import TRIAL_USERS
from perfit_cloud.collective.personal import mean_loss, train_people
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp import stage1, stage2
from perfit_cloud.lamp.methods.frozen import FrozenMethod
from perfit_cloud.lamp.methods.interface import Done, FitContext, Fitted, TaskData
from perfit_cloud.lamp.methods.personal_rate import choose_personal_rate
from perfit_cloud.lamp.people import Learner, Person
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.optimizer import RATE_GROWTH
from perfit_shared.presets import PRESETS, value_or
from perfit_shared.prompts import prompts_of
from perfit_shared.shifts import ShiftTensors
from perfit_shared.starts import LEAST_TO_CHOOSE
from perfit_shared.tasks import Task
from perfit_shared.training import Schedule, Training
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["BothRanks", "CollectiveOnly", "PerFit", "PersonalOnly"]

_STAGE_1 = frozenset(
    {"collective_users", "collective_group", "collective_epochs", "collective_learning_rate"}
)
_SHIFTS = frozenset({"preset", "layers", "positions", "collective_rank", "personal_rank"})
_STAGE_2 = frozenset({"schedule", "batch_size", "epochs", "learning_rate", "figures", "keep_bytes"})


class PerFit(FrozenMethod[ShiftUse]):
    """Stage 1 for everybody, stage 2 for each person on top of it."""

    name = "perfit"
    options = _STAGE_1 | _SHIFTS | _STAGE_2 | {"artefact"}
    shared_modes: ClassVar[tuple[str, ...]] = ("base", "collective", "seed")
    state_file = "personal.safetensors"

    artefact: Artefact  # from `prepare` on
    rate: float  # peak of stage 2, from `prepare` on

    def __init__(self, request: LampRequest, data: TaskData) -> None:
        super().__init__(request, data)
        self._schedules: dict[str, Schedule] = {}  # by user

    @classmethod
    def check(cls, request: LampRequest) -> None:
        given = [name for name in sorted(_STAGE_1) if getattr(request, name) is not None]
        if "artefact" in cls.options and request.artefact is not None and given:
            names = ", ".join(name.replace("_", " ") for name in given)
            raise InvalidInput(f"{names}: an artefact is given, so there is no stage 1 to train")

    # -- what everybody shares -----------------------------------------------------------------

    def prepare(self, stop: Callable[[], bool]) -> float:
        self.artefact = stage1.collective_artefact(self.request, self.data.task, self.data.base, stop)
        return float(self.artefact.card.get("seconds", 0.0)) + self._choose_rate(stop)

    @property
    def rate_is_the_artefacts(self) -> bool:
        """Which is chosen for devices, whose steps are more; trials choose one for the paper's schedule."""
        return self.request.schedule == Schedule.name or not self.parameters

    @property
    def rate_depends(self) -> Mapping[str, Any]:
        """What the best rate depends on, plain JSON values."""
        figures = {k: v for k, v in asdict(self._training(RATE)).items() if k != "learning_rate"}
        return {"trains": PerFit.name, "artefact": self.artefact.version, **figures}

    def _choose_rate(self, stop: Callable[[], bool]) -> float:
        """Set `rate`; returns the seconds that took."""
        request, artefact, seed = self.request, self.artefact, self.artefact.seed
        if self.rate_is_the_artefacts:
            self.rate = value_or(request.learning_rate, artefact.learning_rate)
            return 0.0

        def trial(train: Sequence[Pair], test: Sequence[Pair], rate: float | None, stepped: Done) -> float:
            if rate is None:
                return mean_loss(self._trainer, artefact, test, seed)
            learner = Learner("of a trial", tuple(train))
            trainings = [Training.start(self._training(rate).schedule_for(learner), seed)]
            for moved in train_people(self._trainer, artefact, [train], trainings):
                stepped(sum(trainings[i].schedule.work_of(trainings[i].step - 1) for i in moved))
            return mean_loss(self._trainer, artefact, test, trainings[0].outcome(seed) or seed)

        def work(pairs: Sequence[Pair]) -> int:
            return self._training(RATE).schedule_for(Learner("of a trial", tuple(pairs))).work

        self.rate, seconds = choose_personal_rate(
            request,
            self.data,
            trial,
            stop,
            work=work,
            depends=self.rate_depends,
            users=TRIAL_USERS,
            fallback=artefact.learning_rate,
        )
        return seconds

    @property
    def start(self) -> ShiftUse:
        """φ₂∘φ₁ as stage 1 left them."""
        return ShiftUse(Mode.PERSONAL, self.artefact, self.artefact.seed)

    @property
    def shared(self) -> Mapping[str, ShiftUse]:
        collective = ShiftUse(Mode.COLLECTIVE, self.artefact)
        return {"base": ShiftUse(Mode.BASE), "collective": collective, "seed": self.start}

    @property
    def parameters(self) -> int:
        return self.artefact.spec.personal_parameters()

    @cached_property
    def training(self) -> stage2.Stage2Settings:
        return self._training(self.rate)

    def _training(self, rate: float) -> stage2.Stage2Settings:
        request = self.request
        epochs, batch_size = request.figures or _figures(request, self.data.task, self.artefact)
        if request.schedule == Schedule.name:  # which fits unset values to the history
            return stage2.Stage2Settings(
                epochs, rate, batch_size, request.seed, request.schedule, request.epochs, request.batch_size
            )
        epochs, batch_size = value_or(request.epochs, epochs), value_or(request.batch_size, batch_size)
        return stage2.Stage2Settings(epochs, rate, batch_size, request.seed, request.schedule)

    @property
    def settings(self) -> Mapping[str, Any]:
        request, artefact, spec = self.request, self.artefact, self.artefact.spec
        communities = artefact.communities if self.training.on_device else ()
        return {
            "blocks": self.data.base.blocks,
            "hidden_size": spec.hidden_size,
            "layers": list(spec.layers),
            "positions": spec.positions,
            "collective_rank": spec.collective_rank,
            "personal_rank": spec.personal_rank,
            **asdict(self.training),
            "rate_growth": RATE_GROWTH if self.training.on_device else None,
            "collective_users": request.collective_users,
            "collective_group": request.collective_group,
            "collective_epochs": request.collective_epochs,
            "collective_learning_rate": request.collective_learning_rate,
            "preset": request.preset,
            "communities": len(communities),
            "community_seeds": _digest(communities) if communities else None,
            "artefact": artefact.version,
            "artefact_task": artefact.task.name,
            "artefact_prompts": prompts_of(artefact.task),
        }

    # -- one person's own ----------------------------------------------------------------------

    @property
    def together(self) -> int:
        return self.request.users_together

    def fit(self, person: Person, context: FitContext) -> Fitted[ShiftUse]:
        return self.fit_cohort([person], context)[0]

    def fit_cohort(self, people: Sequence[Person], context: FitContext) -> list[Fitted[ShiftUse]]:
        learners = [self.learner(person) for person in people]
        starts = [self.training.start_of(self._trainer, each, self.artefact) for each in learners]
        fitted = [Fitted(self._use(start), (), 0.0) for start in starts]
        training = [i for i, person in enumerate(people) if self.training.trains(person)]
        trainings = stage2.train(
            self._trainer,
            [learners[i] for i in training],
            self.artefact,
            self.training,
            starts=[starts[i] for i in training],
            checkpoint=context.checkpoint,
            resumed=context.resumed,
            progress=context.done,
            stop=context.stop,
        )
        for i, t in zip(training, trainings, strict=True):
            fitted[i] = Fitted(self._use(t.outcome(starts[i]) or starts[i]), t.losses, t.seconds)
        return fitted

    def learner(self, person: Person) -> Learner:
        """What a person trains on."""
        return Learner.of(person, self.data.encoder)

    def can_fit(self, person: Person) -> bool:
        return self.training.trains(person) or self._chooses(person)

    def _chooses(self, person: Person) -> bool:
        """Whether a start is chosen for somebody, who may have too few examples to train on."""
        known = self.training.on_device and self.artefact.communities
        return bool(known) and len(person.history) >= LEAST_TO_CHOOSE

    def examples(self, person: Person) -> int:
        return self._schedule(person).work if self.training.trains(person) else 0

    def announce(self, people: Sequence[Person]) -> str:
        steps = [self._schedule(person).steps for person in people if self.training.trains(person)] or [0]
        return f"stage 2 by the {self.training.schedule} schedule: {min(steps)} to {max(steps)} steps a user"

    def _schedule(self, person: Person) -> Schedule:
        if person.user_id not in self._schedules:
            learner = self.learner(person)
            self._schedules[person.user_id] = self.training.schedule_for(learner)
        return self._schedules[person.user_id]

    def _use(self, tensors: ShiftTensors) -> ShiftUse:
        return ShiftUse(Mode.PERSONAL, self.artefact, tensors)

    def to_bytes(self, state: ShiftUse) -> bytes:
        if state.personal is None:
            raise InvalidData("a shared state is nobody's own")
        return state.personal.to_bytes()

    def from_bytes(self, data: bytes) -> ShiftUse:
        spec = self.artefact.spec
        return self._use(ShiftTensors.from_bytes(data, spec, spec.personal_rank))

    def use(self, state: ShiftUse) -> ShiftUse:
        return state

    @cached_property
    def _trainer(self) -> UpdateEngine:
        engine = UpdateEngine(self.data.base, keep_bytes=self.request.keep_bytes)
        self._engines.callback(engine.close)
        return engine


class CollectiveOnly(PerFit):
    """Stage 1 alone."""

    name = "perfit_stage1"
    learns = False
    parameters = 0


class PersonalOnly(PerFit):
    """Stage 2 alone, from the identity, at the personal rank."""

    name = "perfit_stage2"
    options = _SHIFTS | _STAGE_2
    shared_modes: ClassVar[tuple[str, ...]] = ("base",)
    sums_ranks: ClassVar[bool] = False

    def prepare(self, stop: Callable[[], bool]) -> float:
        self.artefact = stage1.identity_artefact(self.request, self.data, sums_ranks=self.sums_ranks)
        return self._choose_rate(stop)

    @property
    def rate_is_the_artefacts(self) -> bool:
        """Nothing has chosen that of the identity."""
        return False

    @property
    def shared(self) -> Mapping[str, ShiftUse]:
        return {"base": ShiftUse(Mode.BASE)}

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, "collective_rank": 0}


class BothRanks(PersonalOnly):
    """Stage 2 alone, with as many numbers as both stages have."""

    name = "perfit_stage2_sum"
    sums_ranks = True


def _digest(shifts: Sequence[ShiftTensors]) -> str:
    """An artefact's version leaves its communities out."""
    return hashlib.sha256("".join(shift.digest() for shift in shifts).encode()).hexdigest()[:16]


def _figures(request: LampRequest, task: Task, artefact: Artefact) -> tuple[int, int]:
    """(epochs, batch size) that stage 2 starts from.

    The paper's schedule takes Table 9's, and the artefact's for a task that the table lacks. A device
    takes the artefact's; another task's brings its shift and rate, but not how long this task trains.
    """
    row = PRESETS.get(request.preset or task.name)
    on_device = request.schedule == Schedule.name
    takes_artefact = artefact.task.name == task.name if on_device else row is None or not row.from_paper
    found = artefact if takes_artefact or row is None else row
    return found.epochs, found.batch_size
