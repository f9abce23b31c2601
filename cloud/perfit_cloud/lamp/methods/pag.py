"""Profile-augmented generation (Richardson et al., 2023): a text on the person stands before every query.

A model of choice writes it from the person's history alone. A state is that text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from perfit_cloud.engine.generation.offline import generate_all
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.methods.frozen import FrozenMethod
from perfit_cloud.lamp.methods.interface import FitContext, Fitted, QueryRequest
from perfit_cloud.lamp.methods.prefixed import prefixed_pair
from perfit_cloud.lamp.people import Person
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.errors import InvalidData
from perfit_shared.retrieval import entry_text
from perfit_shared.types import Mode, Sampling

__all__ = ["Pag"]

_ITEMS = 24  # the latest of a history that the writer reads
_WORDS = 64  # of each of their fields
_TOKENS = 96  # of a profile at most
_ASKED = (
    "Examples of one person:\n{examples}\nDescribe in two sentences this person's topics, choices and style."
)
_CUE = "\nDescription:"  # for a model that reads texts, not chats


class Pag(FrozenMethod[str]):
    name = "pag"
    options = frozenset({"profile_model"})
    state_file = "profile.txt"
    parameters = 0
    _writer: BaseModel  # from `prepare` on

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"profile_model": self._writer.name, "profile_fingerprint": self._writer.fingerprint}

    def prepare(self, stop: Callable[[], bool]) -> float:
        request = self.request
        if request.profile_model is None:
            self._writer = self.data.base
        else:
            self._writer = load_base(request.profile_model, dtype=request.dtype, device=request.device)
        return 0.0

    @property
    def start(self) -> str:
        return ""

    @property
    def shared(self) -> Mapping[str, str]:
        return {"base": ""}

    def fit(self, person: Person, context: FitContext) -> Fitted[str]:
        context.stop()
        began, prompt = time.monotonic(), self._asked(person)
        answers = [] if prompt is None else self._written(prompt)
        context.done(len(person.history), 1)
        return Fitted(" ".join("".join(answers).split()), seconds=time.monotonic() - began)

    @property
    def _sampling(self) -> Sampling:
        """Greedy: one history, one profile."""
        return Sampling(max_new_tokens=min(_TOKENS, self._writer.context // 4), stop=("\n\n",))

    def _written(self, prompt: list[int]) -> list[str]:
        uses = [ShiftUse(Mode.BASE)]
        return generate_all(self._writer, [prompt], uses, [self._sampling])

    def _asked(self, person: Person) -> list[int] | None:
        """Token ids of what the writer is asked, with the latest examples that fit; None if none does."""
        latest = [entry_text(self.data.task, item, words=_WORDS) for item in person.history[-_ITEMS:]]
        writer = self._writer
        for first in range(len(latest)):
            text = _ASKED.format(examples="\n".join(latest[first:]))
            ids = writer.encode_prompt([("user", text)] if writer.has_chat_template else text + _CUE)
            if len(ids) + self._sampling.max_new_tokens <= writer.context:
                return ids
        return None

    def pair(self, request: QueryRequest[str], item: Mapping[str, str]) -> Pair:
        return prefixed_pair(self.data, [f"profile: {request.state}"] if request.state else [], item)

    def to_bytes(self, state: str) -> bytes:
        return state.encode()

    def from_bytes(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise InvalidData("not a profile's text") from error
