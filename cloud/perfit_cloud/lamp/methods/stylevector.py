"""StyleVector (Zhang et al., 2025): one direction in activation space tells a person from the model.

Of every past example (x, y) the model answers x itself, greedily: ŷ. With h(·) the hidden state of a text's
last token behind block l, the person's vector is the mean of h(x ⊕ y) − h(x ⊕ ŷ) (mean difference). An
answer is made with α times the vector added behind block l, from the prompt's last token on.

l is block 15 of 32, unless --layers names another. α, unless --strength gives it, is the one of _STRENGTHS
with the lowest loss on the latest part of the history, under the vector of the earlier part. The paper has no
code out. A reproduction with its model, Llama-2-7B-chat (github.com/Slok9931/Stylevector), chose the 16th of
32 layers and α of 0.02 (LaMP-4 and 5) and 0.5 (LaMP-7) on validation data, so weak ones are tried too.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perfit_cloud.engine.generation.offline import generate_all
from perfit_cloud.engine.gradients.batch import Pair, make_batch, passes, target_log_likelihoods
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.methods.frozen import FrozenMethod
from perfit_cloud.lamp.methods.interface import Done, FitContext, Fitted, QueryRequest
from perfit_cloud.lamp.people import Person
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.steering import last_states, steered
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.positions import Positions
from perfit_shared.types import Mode, Score

if TYPE_CHECKING:
    from perfit_cloud.lamp.request import LampRequest

__all__ = ["Style", "StyleVector"]

_DEPTH = 15 / 32
_STRENGTHS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0)
_HELD_OUT = 5  # every so many examples one judges α
_PASS_TOKENS = 2048
_NOWHERE = Positions.parse("l1")  # batches want positions; here nothing is shifted


@dataclass(frozen=True)
class Style:
    """α and a vector (d,) of floats. The untouched model has strength 0."""

    strength: float
    vector: tuple[float, ...]


class StyleVector(FrozenMethod[Style]):
    name = "stylevector"
    options = frozenset({"layers", "strength"})
    state_file = "style.json"

    @classmethod
    def check(cls, request: LampRequest) -> None:
        if request.layers is not None and len(request.layers) != 1:
            raise InvalidInput(f"{cls.name} steers one layer; give --layers one number")
        if request.strength is not None and not math.isfinite(request.strength):
            raise InvalidInput("--strength should be a number")

    @property
    def parameters(self) -> int:
        return self.data.base.hidden_size

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"blocks": self.data.base.blocks, "layers": [self._layer], "strength": self.request.strength}

    def prepare(self, stop: Callable[[], bool]) -> float:
        if self._layer >= self.data.base.blocks:
            last = self.data.base.blocks - 1
            raise InvalidInput(f"layer {self._layer} asked for, but the model has blocks 0 to {last}")
        return 0.0

    @property
    def _layer(self) -> int:
        given = self.request.layers
        return round(_DEPTH * self.data.base.blocks) if given is None else given[0]

    @property
    def start(self) -> Style:
        return Style(0.0, (0.0,) * self.data.base.hidden_size)

    @property
    def shared(self) -> Mapping[str, Style]:
        return {"base": self.start}

    # -- one person's vector -------------------------------------------------------------------

    def fit(self, person: Person, context: FitContext) -> Fitted[Style]:
        context.stop()
        began = time.monotonic()
        own = self._own(person)
        differences = self._differences(own, self._neutral(own))
        strength = self.request.strength
        if strength is None:
            strength = self._chosen(own, differences)
        vector = tuple(_mean(differences).tolist())
        context.done(len(person.history), 1)
        return Fitted(Style(strength, vector), seconds=time.monotonic() - began)

    def _own(self, person: Person) -> list[Pair]:
        """(x, y) of the history, with room for the model's answer in y's place."""
        task, encode = self.data.task, self.data.encoder.encode
        examples = [task.example(item) for item in person.history]
        found = [encode(one.prompt, one.target, task.answer_tokens) for one in examples]
        return [one.pair for one in found if one is not None]

    def _neutral(self, own: Sequence[Pair]) -> list[Pair]:
        """(x, ŷ): what the untouched model answers to every x."""
        base, task = self.data.base, self.data.task
        sampling = task.sampling()
        prompts = [prompt for prompt, _ in own]
        uses, samplings = [ShiftUse(Mode.BASE)] * len(prompts), [sampling] * len(prompts)
        answers = [task.parse(text) for text in generate_all(base, prompts, uses, samplings)]
        written = [task.target({task.gold_field: answer}) if answer else "" for answer in answers]
        chat = task.chat is True
        targets = [base.encode_target(text, chat=chat) if text else [] for text in written]
        return list(zip(prompts, targets, strict=True))

    def _differences(self, own: Sequence[Pair], neutral: Sequence[Pair]) -> Tensor:
        """h(x ⊕ y) − h(x ⊕ ŷ) of every example: (n, d)."""
        base = self.data.base
        texts = [_without_end(base, pair) for pair in (*own, *neutral)]
        states = torch.zeros(len(texts), base.hidden_size)
        for chosen in passes([(text, []) for text in texts], base.capabilities.passes, _PASS_TOKENS):
            states[chosen] = last_states(base, [texts[i] for i in chosen], self._layer).cpu()
        ours, models = states.chunk(2) if texts else (states, states)
        return ours - models

    def _chosen(self, own: Sequence[Pair], differences: Tensor) -> float:
        """The strength that suits the latest part of a history, which gives the vector nothing."""
        held_out = len(own) // _HELD_OUT
        if not held_out:
            return 1.0
        vector, latest = _mean(differences[:-held_out]), own[-held_out:]

        def loss(strength: float) -> float:
            return -sum(score.log_likelihood for score in self._scores(latest, strength * vector))

        return min(_STRENGTHS, key=loss)

    def to_bytes(self, state: Style) -> bytes:
        return json.dumps({"strength": state.strength, "vector": state.vector}).encode()

    def from_bytes(self, data: bytes) -> Style:
        try:
            raw = json.loads(data)
            state = Style(float(raw["strength"]), tuple(map(float, raw["vector"])))
        except (ValueError, TypeError, KeyError) as error:
            raise InvalidData("not a person's style") from error
        if len(state.vector) != self.data.base.hidden_size:
            raise InvalidData("a style of another model")
        return state

    # -- answers -------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> Any:
        """A module tree of its own, for hooks."""
        return self.data.base.share_weights()

    def answer(self, requests: Sequence[QueryRequest[Style]], done: Done) -> list[str]:
        prompts = [prompt for prompt, _ in self.pairs(requests)]
        texts = [""] * len(prompts)
        for rows in self._alike(requests):
            # Where `generate` caches nothing, every pass reads prompt and answer anew.
            batches = [rows] if self.data.base.capabilities.caches else [[row] for row in rows]
            for batch in batches:
                columns = partial(self._from_prompt_end, len(prompts[batch[0]]))
                with steered(self._model, self._layer, _scaled(requests[batch[0]].state), columns):
                    answers = generate_all(
                        self.data.base,
                        [prompts[i] for i in batch],
                        [ShiftUse(Mode.BASE)] * len(batch),
                        [requests[i].sampling for i in batch],
                        done=done,
                        model=self._model,
                    )
                for i, text in zip(batch, answers, strict=True):
                    texts[i] = text
        return texts

    def _from_prompt_end(self, prompt: int, width: int) -> Tensor:
        """Columns that a pass of `generate` steers: its last, or all from the prompt's last token on."""
        return torch.tensor([[1 if self.data.base.capabilities.caches else width - prompt + 1]])

    def score(
        self, requests: Sequence[QueryRequest[Style]], answers: Sequence[str] | None = None
    ) -> list[Score]:
        pairs, scores = self.pairs(requests, answers), list[Score]()
        for rows in self._alike(requests):
            scores += self._scores([pairs[i] for i in rows], _scaled(requests[rows[0]].state))
        return scores

    @staticmethod
    def _alike(requests: Sequence[QueryRequest[Style]]) -> Iterator[list[int]]:
        """Neighbours of one person and state."""
        key = lambda i: (requests[i].user_id, id(requests[i].state))  # noqa: E731
        return (list(rows) for _, rows in groupby(range(len(requests)), key=key))

    def _scores(self, pairs: Sequence[Pair], vector: Tensor) -> list[Score]:
        """Log-likelihood of every target with the vector from the prompt's last token on."""
        base = replace(self.data.base, model=self._model)
        scores = [Score(0.0, len(target)) for _, target in pairs]
        for chosen in passes(pairs, base.capabilities.passes, _PASS_TOKENS):
            of_pass = [pairs[i] for i in chosen]
            lengths = torch.tensor([[len(target) + 1] for _, target in of_pass])
            batch = make_batch(of_pass, _NOWHERE, base.device)
            with torch.no_grad(), steered(base.model, self._layer, vector, lambda _: lengths):  # noqa: B023
                sums = target_log_likelihoods(base, batch, []).double().sum(1).tolist()
            for i, value in zip(chosen, sums, strict=True):
                scores[i] = Score(value, len(pairs[i][1]))
        return scores


def _scaled(style: Style) -> Tensor:
    return style.strength * torch.tensor(style.vector)


def _mean(differences: Tensor) -> Tensor:
    return differences.mean(0) if len(differences) else differences.new_zeros(differences.shape[1])


def _without_end(base: BaseModel, pair: Pair) -> list[int]:
    """Prompt and answer as one text; the token that ends a sequence is no part of a style."""
    prompt, target = pair
    return [*prompt, *(target[:-1] if target[-1:] and target[-1] in base.end_ids else target)]
