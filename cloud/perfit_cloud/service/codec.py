"""Protobuf messages to and from what the engine takes and gives; protobuf stops here.

`decode_…` checks everything that a device sent before it is used; `encode_…` is the way back. Error
messages say what to change; they hold no text of a prompt and no number of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.bounds import CHARACTERS_A_TOKEN, STOP_BYTES, STOP_TEXTS
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.limits import Limits
from perfit_shared.errors import InvalidInput, InvalidPrompt, InvalidTensors, NotFound, ShiftMismatch
from perfit_shared.shifts import ShiftSpec, ShiftTensors, gradient_to_bytes, wire_dtype
from perfit_shared.types import (
    LARGEST_PENALTY,
    MOST_LOGPROBS,
    Chunk,
    Finish,
    Mode,
    Sampling,
    Score,
    are_penalties,
)
from perfit_shared.wire import personalization_pb2 as pb

__all__ = [
    "PromptReader",
    "decode_sampling",
    "decode_shift",
    "decode_step",
    "encode_chunk",
    "encode_description",
    "encode_gradient",
    "encode_scores",
    "encode_seed",
    "encode_spec",
    "encode_step",
    "find_artefact",
    "find_version",
]

_ROLES = ("system", "user", "assistant")
_TEMPERATURE_CAP = 10.0
_TOP_K_CAP = 1_000_000

_MODES = {
    pb.SHIFT_MODE_BASE: Mode.BASE,
    pb.SHIFT_MODE_COLLECTIVE: Mode.COLLECTIVE,
    pb.SHIFT_MODE_PERSONAL: Mode.PERSONAL,
}
_FINISHES = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    Finish.END: pb.FINISH_REASON_END,
    Finish.LENGTH: pb.FINISH_REASON_LENGTH,
}


# -- prompts -------------------------------------------------------------------------------------


class PromptReader:
    """Prompts and targets to token ids, within the limits. Thread-safe, as the base is."""

    def __init__(self, base: BaseModel, limits: Limits) -> None:
        self._base = base
        self._limits = limits

    def prompt(self, message: pb.Prompt) -> list[int]:
        """Raises InvalidPrompt when it is missing, empty or too long, InvalidInput on an unknown role."""
        limit = self._limits.prompt_tokens
        form = message.WhichOneof("form")
        if form == "text":
            _check_characters([message.text], limit)
            ids = self._base.encode(message.text)
        elif form == "chat":
            if len(message.chat.messages) > limit:  # a turn takes a token at least
                raise InvalidPrompt(f"the chat has more than the {limit} turns that this cloud takes")
            turns = [(m.role, m.content) for m in message.chat.messages]
            if any(role not in _ROLES for role, _ in turns):
                raise InvalidInput(f"the role of a chat message should be {', '.join(_ROLES)}")
            _check_characters([text for _, text in turns], limit)
            ids = self._chat(turns)
        else:
            raise InvalidPrompt("the prompt is empty")
        if not ids:
            raise InvalidPrompt("the prompt is empty")
        if len(ids) > limit:
            raise InvalidPrompt(
                f"the prompt has {len(ids)} tokens and this cloud takes at most {limit}; shorten it"
            )
        return ids

    def candidates(self, candidates: Sequence[pb.Candidate]) -> list[Pair]:
        """(prompt ids, answer ids) of each.

        Raises InvalidInput when there are none or too many, InvalidPrompt when one does not fit.
        """
        self._check_count(len(candidates))
        return self._read(((c.prompt, c.answer) for c in candidates), self._limits.call_tokens)

    def examples(self, examples: Sequence[pb.Example]) -> list[Pair]:
        """(prompt ids, target ids) of each. Raises as `candidates`."""
        self._check_count(len(examples))
        return self._read(((e.prompt, e.target) for e in examples), self._limits.call_tokens)

    def _check_count(self, count: int) -> None:
        if not count:
            raise InvalidInput("the call holds no examples")
        if count > self._limits.examples:
            raise InvalidInput(
                f"the call holds {count} examples and this cloud takes at most {self._limits.examples}; "
                "send fewer at a time"
            )

    def update(self, examples: Iterable[pb.Example]) -> list[Pair]:
        """(prompt ids, target ids) of the examples of an update, read as they come.

        Raises InvalidInput when there are too many, InvalidPrompt when one does not fit.
        """
        limits = self._limits
        pairs = ((e.prompt, e.target) for e in examples)
        return self._read(pairs, limits.adapt_tokens, limits.adapt_examples)

    def _read(
        self, pairs: Iterable[tuple[pb.Prompt, str]], tokens: int, examples: int | None = None
    ) -> list[Pair]:
        limits, total = self._limits, 0
        read: list[Pair] = []
        for number, (prompt, target) in enumerate(pairs, 1):
            if examples is not None and number > examples:
                raise InvalidInput(f"this cloud takes at most {examples} examples in one update")
            try:
                ids = self.prompt(prompt)
                target_ids = self._target(target, chat=prompt.WhichOneof("form") == "chat")
            except InvalidPrompt as error:
                raise InvalidPrompt(f"example {number}: {error}") from None
            if len(ids) + len(target_ids) > limits.context:
                raise InvalidPrompt(
                    f"example {number} has {len(ids) + len(target_ids)} tokens and the model takes at most "
                    f"{limits.context}; shorten it"
                )
            total += len(ids) + len(target_ids)
            if total > tokens:
                raise InvalidInput(
                    f"the examples hold more than {tokens} tokens together; send fewer at a time"
                )
            read.append((ids, target_ids))
        return read

    def _target(self, text: str, *, chat: bool) -> list[int]:
        limit = self._limits.new_tokens
        if not text.strip():
            raise InvalidPrompt("the answer is empty")
        if len(text) <= limit * CHARACTERS_A_TOKEN:
            ids = self._base.encode_target(text, chat=chat)
            if 0 < len(ids) <= limit:
                return ids
        raise InvalidPrompt(f"the answer is longer than the {limit} tokens that this cloud takes; shorten it")

    def _chat(self, turns: list[tuple[str, str]]) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self._base.encode_chat(turns)
        except TemplateError:
            # The template's own words may quote the messages.
            raise InvalidPrompt(
                "the model's chat template refuses these messages; user and assistant should alternate"
            ) from None


def _check_characters(texts: Iterable[str], tokens: int) -> None:
    characters = sum(len(text) for text in texts)
    if characters > tokens * CHARACTERS_A_TOKEN:
        raise InvalidPrompt(
            f"the prompt has {characters} characters and this cloud takes at most {tokens} tokens; shorten it"
        )


# -- shifts --------------------------------------------------------------------------------------


def decode_shift(message: pb.Shift, artefacts: Mapping[str, Artefact]) -> ShiftUse:
    """Which shift a request uses, its tensors checked against the artefact's spec.

    Raises InvalidInput, InvalidTensors, NotFound or ShiftMismatch.
    """
    mode = _MODES.get(message.mode)
    if mode is None:
        raise InvalidInput("the shift mode should be base, collective or personal")
    if mode is Mode.BASE:
        if message.artefact or message.version or message.personal:
            raise InvalidInput("base mode takes no artefact and no tensors")
        return ShiftUse(mode)
    if mode is Mode.COLLECTIVE and not message.version:  # only tensors depend on a version
        artefact = find_artefact(message.artefact, artefacts)
    else:
        artefact = find_version(message.artefact, message.version, artefacts)
    if mode is Mode.COLLECTIVE:
        if message.personal:
            raise InvalidInput("collective mode takes no tensors")
        return ShiftUse(mode, artefact)
    if not message.personal:
        raise InvalidTensors("personal mode needs the tensors of a personal shift")
    spec = artefact.spec
    return ShiftUse(mode, artefact, ShiftTensors.from_bytes(message.personal, spec, spec.personal_rank))


def find_artefact(name: str, artefacts: Mapping[str, Artefact]) -> Artefact:
    """Raises NotFound and lists what there is."""
    try:
        return artefacts[name]
    except KeyError:
        there = f"there are {', '.join(sorted(artefacts))}" if artefacts else "it serves none"
        raise NotFound(f'this cloud has no artefact "{name[:64]}"; {there}') from None


def find_version(name: str, version: str, artefacts: Mapping[str, Artefact]) -> Artefact:
    """The artefact that tensors were trained against. Raises NotFound, ShiftMismatch."""
    artefact = find_artefact(name, artefacts)
    if version != artefact.version:
        raise ShiftMismatch(
            f'the cloud serves another version of artefact "{artefact.name}"; run `perfit update` to train '
            "this device's shift on it"
        )
    return artefact


def decode_step(message: pb.AdaptStep, spec: ShiftSpec, examples: int) -> tuple[list[int], ShiftTensors]:
    """Which examples of an update a step takes, and at which tensors. Raises InvalidInput, InvalidTensors."""
    rows = list(message.rows) if len(message.rows) <= examples else []
    if not rows or max(rows) >= examples or len(set(rows)) < len(rows):
        raise InvalidInput(f"the rows of a step should be distinct, and each from 0 to {examples - 1}")
    return rows, ShiftTensors.from_bytes(message.personal, spec, spec.personal_rank)


def encode_spec(spec: ShiftSpec) -> pb.ShiftSpec:
    return pb.ShiftSpec(
        layers=spec.layers,
        positions=spec.positions,
        collective_rank=spec.collective_rank,
        personal_rank=spec.personal_rank,
        hidden_size=spec.hidden_size,
    )


# -- sampling ------------------------------------------------------------------------------------


def decode_sampling(message: pb.Sampling, *, prompt_tokens: int, limits: Limits) -> Sampling:
    """Raises InvalidInput when a setting is out of bounds or prompt and answer exceed the context."""
    new = message.max_new_tokens
    if not 1 <= new <= limits.new_tokens:
        raise InvalidInput(f"max_new_tokens should be 1 to {limits.new_tokens}")
    if prompt_tokens + new > limits.context:
        raise InvalidPrompt(
            f"the prompt has {prompt_tokens} tokens, which with {new} new ones exceeds the {limits.context} "
            "that the model takes; shorten the prompt or ask for a shorter answer"
        )
    if not (math.isfinite(message.temperature) and 0 <= message.temperature <= _TEMPERATURE_CAP):
        raise InvalidInput(f"temperature should be 0 to {_TEMPERATURE_CAP:g}")
    if not 0 <= message.top_p <= 1:  # NaN fails this, too
        raise InvalidInput("top_p should be 0 to 1")
    if message.top_k > _TOP_K_CAP:
        raise InvalidInput(f"top_k should be 0 to {_TOP_K_CAP}")
    if len(message.stop) > STOP_TEXTS or any(not 0 < len(s.encode()) <= STOP_BYTES for s in message.stop):
        raise InvalidInput(f"there may be {STOP_TEXTS} stop texts of 1 to {STOP_BYTES} bytes")
    if message.logprobs > MOST_LOGPROBS:
        raise InvalidInput(f"logprobs should be 0 to {MOST_LOGPROBS}")
    if not are_penalties(message.frequency_penalty, message.presence_penalty):
        raise InvalidInput(f"penalties should be -{LARGEST_PENALTY} to {LARGEST_PENALTY}")
    return Sampling(
        max_new_tokens=new,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p or 1.0,
        seed=message.seed,
        stop=tuple(message.stop),
        logprobs=message.logprobs,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
    )


# -- answers -------------------------------------------------------------------------------------


def encode_chunk(chunk: Chunk) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        text=chunk.text,
        finish=_FINISHES[chunk.finish],
        prompt_tokens=chunk.prompt_tokens,
        answer_tokens=chunk.answer_tokens,
        logprobs=[
            pb.TokenLogprob(
                text=of.token,
                data=of.data,
                logprob=of.logprob,
                top=[pb.TopLogprob(text=t.token, data=t.data, logprob=t.logprob) for t in of.top],
            )
            for of in chunk.logprobs
        ],
    )


def encode_scores(scores: Sequence[Score]) -> pb.ScoreResponse:
    return pb.ScoreResponse(scores=_candidate_scores(scores))


def _candidate_scores(scores: Sequence[Score]) -> list[pb.CandidateScore]:
    return [pb.CandidateScore(log_likelihood=s.log_likelihood, tokens=s.tokens) for s in scores]


def encode_gradient(gradient: Gradient, personal: bytes) -> pb.ComputeGradientResponse:
    """In float32 where the tensors came so (`personal`), in float16 where they came rounded.

    Raises InvalidTensors when the numbers overflowed on the way.
    """
    _check_loss(gradient)
    return pb.ComputeGradientResponse(
        loss=gradient.loss, tokens=gradient.tokens, gradient=_gradient_bytes(gradient, personal)
    )


def encode_step(gradient: Gradient, personal: bytes, *, loss_only: bool) -> pb.AdaptResponse:
    """As `encode_gradient`; with `loss_only` the score of each example in place of a gradient."""
    _check_loss(gradient)
    response = pb.AdaptResponse(loss=gradient.loss, tokens=gradient.tokens)
    if loss_only:
        response.scores.extend(_candidate_scores(gradient.scores))
    else:
        response.gradient = _gradient_bytes(gradient, personal)
    return response


def _check_loss(gradient: Gradient) -> None:
    if not math.isfinite(gradient.loss):
        raise InvalidTensors("with these tensors the loss is not a number")


def _gradient_bytes(gradient: Gradient, personal: bytes) -> bytes:
    return gradient_to_bytes(gradient.tensors, "float32" if wire_dtype(personal) == "float32" else "float16")


def encode_seed(artefact: Artefact) -> pb.FetchSeedResponse:
    return pb.FetchSeedResponse(
        version=artefact.version,
        seed=artefact.seed.to_bytes(),
        communities=[seed.to_bytes() for seed in artefact.communities],
    )


def encode_description(
    catalog: Catalog, *, continuous: bool, caches_activations: bool
) -> pb.DescribeResponse:
    limits = catalog.limits
    return pb.DescribeResponse(
        base_model=catalog.base.name,
        fingerprint=catalog.base.fingerprint,
        artefacts=[
            pb.Artefact(
                name=artefact.name,
                version=artefact.version,
                spec=encode_spec(artefact.spec),
                task_json=artefact.task.to_json(),
                learning_rate=artefact.learning_rate,
                epochs=artefact.epochs,
                batch_size=artefact.batch_size,
                communities=len(artefact.communities),
            )
            for artefact in catalog.artefacts.values()
        ],
        limits=pb.Limits(
            prompt_tokens=limits.prompt_tokens,
            new_tokens=limits.new_tokens,
            examples=limits.examples,
            message_bytes=limits.message_bytes,
            adapt_examples=limits.adapt_examples,
            adapt_tokens=limits.adapt_tokens,
            questions=limits.questions,
            context=limits.context,
            call_tokens=limits.call_tokens,
            logprobs=MOST_LOGPROBS,
        ),
        cloud_id=catalog.cloud_id,
        continuous=continuous,
        keeps=caches_activations,
    )
