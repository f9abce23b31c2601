"""PerFit with retrieval: the trained shift answers prompts before which the k nearest own examples stand.

Stages 1 and 2 are PerFit's, on plain prompts, so one shift serves with and without retrieval. Trained
behind examples it learns what they leave to learn, and serves with them alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.methods.interface import FitContext, Fitted, Method, QueryRequest
from perfit_cloud.lamp.methods.perfit import PerFit
from perfit_cloud.lamp.methods.prefixed import examples_as
from perfit_cloud.lamp.methods.rag import OwnExamples, check_k
from perfit_cloud.lamp.people import Learner, Person, Query
from perfit_cloud.lamp.results import Run, UserFolder
from perfit_shared.errors import InvalidData

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["PerFitBehindRag", "PerFitRag", "SeedRag", "parts_of_state"]

_LENGTH_BYTES = 8


def parts_of_state(data: bytes) -> tuple[bytes, bytes]:
    """(the shift's file, the examples) of a state file."""
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    return data[_LENGTH_BYTES:end], data[end:]


@dataclass(frozen=True)
class RetrievingUse(ShiftUse):
    """A personal shift, and the examples that it answers with. A shared state has none."""

    examples: OwnExamples | None = None


class PerFitRag(PerFit):
    name = "perfit+rag"
    options = PerFit.options | {"k"}
    state_file = "personal.bin"

    @classmethod
    def check(cls, request: LampRequest) -> None:
        super().check(request)
        check_k(request)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {**super().settings, "k": self.request.k, "examples_as": examples_as(self.data.task)}

    def fit_cohort(self, people: Sequence[Person], context: FitContext) -> list[Fitted[ShiftUse]]:
        elsewhere = self._fitted_elsewhere(people)
        rest = [person for person in people if person.user_id not in elsewhere]
        trained = super().fit_cohort(rest, context) if rest else []
        fitted = elsewhere | {person.user_id: one for person, one in zip(rest, trained, strict=True)}
        found = []
        for person in people:
            one, own = fitted[person.user_id], OwnExamples.of(self.data.task, person)
            found.append(Fitted[ShiftUse](_retrieving(one.state, own), one.losses, one.seconds))
        return found

    def _fitted_elsewhere(self, people: Sequence[Person]) -> dict[str, Fitted[ShiftUse]]:
        """What PerFit learned for some of these people in the run to reuse, by user id."""
        if self.request.reuse is None:
            return {}
        run = Run.load(self.request.reuse)
        ours = json.loads(json.dumps({**super().settings, "data": self.data.people.digest}))
        alike = {name: run.settings.get(name) for name in ours} == ours
        if run.settings["method"] != PerFit.name or run.settings["histories"] != self.request.histories:
            return {}
        found = {}
        for person in people if alike else ():
            folder = UserFolder(run.folder, person.user_id, PerFit.state_file)
            if folder.has_state:
                state = super().from_bytes(folder.state_path.read_bytes())
                found[person.user_id] = Fitted(state, folder.losses, folder.seconds["fit"])
        return found

    # Who has too few examples to train on answers from the start, with those examples.
    can_fit = Method.can_fit

    def pair(self, request: QueryRequest[ShiftUse], item: Mapping[str, str]) -> Pair:
        examples = request.state.examples if isinstance(request.state, RetrievingUse) else None
        if examples is None:
            return super().pair(request, item)
        return examples.pair(self.data, request.query, self.request.k, item)

    def to_bytes(self, state: ShiftUse) -> bytes:
        tensors = super().to_bytes(state)
        if not isinstance(state, RetrievingUse) or state.examples is None:
            raise InvalidData("a shared state is nobody's own")
        return len(tensors).to_bytes(_LENGTH_BYTES, "big") + tensors + state.examples.to_bytes()

    def from_bytes(self, data: bytes) -> ShiftUse:
        shift, examples = parts_of_state(data)
        return _retrieving(super().from_bytes(shift), OwnExamples.from_bytes(self.data.task, examples))


class PerFitBehindRag(PerFitRag):
    """Stage 2 behind examples, too: each past example is learned behind the k nearest of the others.

    The layers below the first intervened one, and the tokens before the intervened ones, stay as they are, so
    a step costs about what it costs without; only the first reading of each example is longer. The rate is
    that which trials on plain prompts choose.
    """

    name = "perfit_behind+rag"

    def learner(self, person: Person) -> Learner:
        own = OwnExamples.of(self.data.task, person)
        asked = [Query(str(i), "", item) for i, item in enumerate(person.history)]
        pairs = [own.pair(self.data, query, self.request.k, query.item) for query in asked]
        return Learner(person.user_id, tuple(pairs))

    def _fitted_elsewhere(self, people: Sequence[Person]) -> dict[str, Fitted[ShiftUse]]:
        """PerFit learned something else."""
        return {}


class SeedRag(PerFitRag):
    """Stage 1 alone, with own examples before the query: how a device answers before its first update."""

    name = "perfit_stage1+rag"
    parameters = 0

    def fit_cohort(self, people: Sequence[Person], context: FitContext) -> list[Fitted[ShiftUse]]:
        fitted = []
        for person in people:
            context.stop()
            start = self.training.start_of(self._trainer, self.learner(person), self.artefact)
            own = OwnExamples.of(self.data.task, person)
            fitted.append(Fitted[ShiftUse](_retrieving(self._use(start), own)))
            context.done(len(person.history), 1)
        return fitted

    # Nobody is trained, so none of this follows a schedule.
    examples, announce = Method.examples, Method.announce


def _retrieving(use: ShiftUse, examples: OwnExamples) -> RetrievingUse:
    return RetrievingUse(use.mode, use.artefact, use.personal, examples)
