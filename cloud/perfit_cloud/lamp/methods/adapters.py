"""Methods that train added weights: what is alike in LoRA's variants and LoFiT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import safetensors
import safetensors.torch

from perfit_cloud.engine.generation.offline import generate_all
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.measure import score_frozen
from perfit_cloud.lamp.methods.added_weights import (
    AddedWeights,
    Weights,
    WeightTraining,
    mean_loss,
    paper_schedule,
)
from perfit_cloud.lamp.methods.frozen import FrozenMethod
from perfit_cloud.lamp.methods.interface import Done, FitContext, Fitted, QueryRequest
from perfit_cloud.lamp.methods.personal_rate import choose_personal_rate
from perfit_cloud.lamp.people import Learner, Person
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData, UpdateFailed
from perfit_shared.presets import preset_for, preset_name, value_or
from perfit_shared.training import Schedule
from perfit_shared.types import Mode, Score

__all__ = ["PERSONAL_OPTIONS", "AdapterMethod", "in_groups"]

PERSONAL_OPTIONS = frozenset({"preset", "figures", "batch_size", "epochs", "learning_rate"})
_UNSHIFTED = ShiftUse(Mode.BASE)
State = TypeVar("State")
Found = TypeVar("Found")


class AdapterMethod(FrozenMethod[Weights | None]):
    """A state is one person's weights; `None` the untouched model.

    All of a person's weights are overwritten before anybody else's are learned or used.
    """

    options = PERSONAL_OPTIONS
    state_file = "adapter.safetensors"

    added: AddedWeights  # the personal ones, from `prepare` on
    rate: float  # peak of personal training, from `choose_rate` on

    @property
    def parameters(self) -> int:
        return self.added.count

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**self._figures, "learning_rate": self.rate, "schedule": "paper"}

    @cached_property
    def _figures(self) -> dict[str, int]:
        """Epochs and batch size of personal training: Table 9's, or what is asked for."""
        request = self.request
        preset = preset_for(preset_name(self.data.task.name, request.preset))
        epochs, batch_size = request.figures or (preset.epochs, preset.batch_size)
        return {
            "epochs": value_or(request.epochs, epochs),
            "batch_size": value_or(request.batch_size, batch_size),
        }

    @cached_property
    def start(self) -> Weights:
        """A personal adapter that changes nothing yet."""
        return self.added.read()

    # -- one person's own ----------------------------------------------------------------------

    def choose_rate(self, stop: Callable[[], bool]) -> float:
        """Set `rate`, the one asked for or the best for others; returns the seconds that took."""

        def trial(train: Sequence[Pair], test: Sequence[Pair], rate: float | None, stepped: Done) -> float:
            self.added.write(self.start)
            if rate is not None:
                self.learn(train, rate, stepped)
            return mean_loss(self.added.base, test)

        self.rate, seconds = choose_personal_rate(
            self.request,
            self.data,
            trial,
            stop,
            work=lambda pairs: self.work(len(pairs)),
            depends={"trains": self.name, **self._figures, **self.rate_depends},
        )
        return seconds

    @property
    def rate_depends(self) -> Mapping[str, Any]:
        """What else the best rate depends on, plain JSON values."""
        return {}

    def fit(self, person: Person, context: FitContext) -> Fitted[Weights | None]:
        def stepped(examples: int) -> None:
            context.done(examples, 0)
            context.stop()

        self.added.write(self.start)
        try:
            parts = self.learn(Learner.of(person, self.data.encoder).history, self.rate, stepped)
        except UpdateFailed as error:
            raise UpdateFailed(f"user {person.user_id}: {error}") from error
        context.done(0, 1)
        losses = tuple(loss for part in parts for loss in part.losses)
        return Fitted(self.added.read(), losses, sum(part.seconds for part in parts))

    def learn(self, pairs: Sequence[Pair], rate: float, stepped: Done) -> list[WeightTraining]:
        """Train `added`, which is at its start; `stepped` gets the examples of each step, and may raise."""
        training = WeightTraining(self.added, pairs, self.schedule(pairs, rate))
        training.run(stepped)
        return [training]

    def schedule(self, pairs: Sequence[Pair], rate: float) -> Schedule:
        return paper_schedule(pairs, **self._figures, learning_rate=rate, seed=self.request.seed)

    def work(self, examples: int) -> int:
        """Examples that learning from so many goes through."""
        return examples * self._figures["epochs"]

    def examples(self, person: Person) -> int:
        return self.work(len(person.history))

    # -- answers -------------------------------------------------------------------------------

    def answer(self, requests: Sequence[QueryRequest[Weights | None]], done: Done) -> list[str]:
        def of_state(part: Sequence[QueryRequest[Weights | None]]) -> list[str]:
            prompts = [prompt for prompt, _ in self.pairs(part)]
            base, _ = self._under(part[0].state)
            return generate_all(
                base, prompts, [_UNSHIFTED] * len(part), [one.sampling for one in part], done=done
            )

        return in_groups(requests, lambda one: id(one.state), of_state)

    def score(
        self, requests: Sequence[QueryRequest[Weights | None]], answers: Sequence[str] | None = None
    ) -> list[Score]:
        pairs = self.pairs(requests, answers)

        def of_state(part: Sequence[int]) -> list[Score]:
            _, engine = self._under(requests[part[0]].state)
            owners = [requests[i].user_id for i in part]
            return score_frozen(engine, [pairs[i] for i in part], [_UNSHIFTED] * len(part), owners=owners)

        return in_groups(range(len(requests)), lambda i: id(requests[i].state), of_state)

    def _under(self, state: Weights | None) -> tuple[BaseModel, GradientEngine]:
        """The model that answers with this state, until the next call."""
        if state is None:
            return self.data.base, self._scorer
        self.added.write(state)
        return self.added.base, self._engine

    @cached_property
    def _engine(self) -> GradientEngine:
        """Over a tree with the very parameters of `added`."""
        engine = GradientEngine(self.added.base)
        self._engines.callback(engine.close)
        return engine

    def to_bytes(self, state: Weights | None) -> bytes:
        if state is None:
            raise InvalidData("a shared state is nobody's own")
        return safetensors.torch.save(dict(state))

    def from_bytes(self, data: bytes) -> Weights:
        try:
            found: Weights = safetensors.torch.load(data)
        except safetensors.SafetensorError as error:
            raise InvalidData("not the weights of an adapter") from error
        self.added.write(found)  # raises on another adapter's
        return found


def in_groups(
    members: Sequence[State], key: Callable[[State], Any], run: Callable[[Sequence[State]], Sequence[Found]]
) -> list[Found]:
    """`run` on the members of each key, and what it finds in the members' order."""
    groups: dict[Any, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(key(member), []).append(i)
    found = {
        i: one
        for which in groups.values()
        for i, one in zip(which, run([members[i] for i in which]), strict=True)
    }
    return [found[i] for i in range(len(members))]
