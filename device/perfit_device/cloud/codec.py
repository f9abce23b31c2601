"""Between the device's values and protobuf. Protobuf types stop here and in `client`.

What comes from a cloud is checked: a hostile one may answer anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from perfit_device.cloud.channels import readable
from perfit_shared.errors import InvalidInput, InvalidTensors, PerfitError, from_code
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import Task
from perfit_shared.types import MOST_LOGPROBS, Chunk, Finish, Sampling, Score, TokenLogprob, TopLogprob
from perfit_shared.wire import personalization_pb2 as pb

__all__ = [
    "ANSWER_DTYPE",
    "LOSS_DTYPE",
    "Artefact",
    "CloudInfo",
    "EncodedShift",
    "Limits",
    "Message",
    "ShiftUse",
    "adapt_examples_to_wire",
    "adapt_open_to_wire",
    "adapt_step_to_wire",
    "chunk_from_wire",
    "cloud_info_from_wire",
    "opening_to_wire",
    "part_from_wire",
    "prompt_to_wire",
    "question_to_wire",
    "sampling_to_wire",
    "scores_from_wire",
    "shift_to_wire",
    "tensors_from_wire",
]

# Forms of personal tensors (perfit_shared.shifts; docs/wire.md has what rounding costs). A loss decides
# about a shift, and a gradient is added up over steps: both want more than an answer does.
ANSWER_DTYPE = "int8"
LOSS_DTYPE = "float16"
_FINISHES = {pb.FINISH_REASON_END: Finish.END, pb.FINISH_REASON_LENGTH: Finish.LENGTH}


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # "system", "user" or "assistant"
    content: str


Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Artefact:
    """What a cloud says of one artefact."""

    name: str
    version: str
    spec: ShiftSpec
    task: Task
    learning_rate: float  # peak
    epochs: int
    batch_size: int  # examples a step
    communities: int = 0  # seeds beside the plain one that a shift may start from


@dataclass(frozen=True)
class Limits:
    prompt_tokens: int
    new_tokens: int
    examples: int  # a ComputeGradient, or candidates a Score
    message_bytes: int
    questions: int  # of one Ask at a time; 0: a cloud without Ask
    adapt_examples: int  # of one update; 0: a cloud without Adapt
    call_tokens: int = 0  # of one ComputeGradient or Score together; 0: the cloud does not say
    logprobs: int = 0  # largest Sampling.logprobs; 0: a cloud that gives no log-probabilities
    adapt_tokens: int = 0  # prompt and target tokens of one update; 0: a cloud without Adapt

    def check_logprobs(self, wanted: int) -> None:
        """Raises InvalidInput on more than this cloud gives."""
        if wanted > self.logprobs:
            most = f"of at most {self.logprobs} tokens" if self.logprobs else "of no tokens"
            raise InvalidInput(f"this cloud gives log-probabilities {most}")


@dataclass(frozen=True)
class CloudInfo:
    """What a cloud serves."""

    base_model: str
    fingerprint: str  # sha-256, hex
    cloud_id: str  # hex
    artefacts: tuple[Artefact, ...]
    limits: Limits


@dataclass(frozen=True)
class EncodedShift:
    """Personal tensors in the form of `ANSWER_DTYPE`: encoded once, for many answers."""

    data: bytes

    def to_bytes(self, *, dtype: str) -> bytes:
        """Raises InvalidInput on another form."""
        if dtype != ANSWER_DTYPE:
            raise InvalidInput(f"a shift that is encoded in {ANSWER_DTYPE} answers alone")
        return self.data


@dataclass(frozen=True)
class ShiftUse:
    """Which shift a request goes through. `artefact` is None for the untouched base model,
    `personal` None for the collective shift alone."""

    artefact: Artefact | None = None
    personal: ShiftTensors | EncodedShift | None = None


def prompt_to_wire(prompt: Prompt) -> pb.Prompt:
    if isinstance(prompt, str):
        return pb.Prompt(text=prompt)
    messages = [pb.ChatMessage(role=m.role, content=m.content) for m in prompt]
    return pb.Prompt(chat=pb.Chat(messages=messages))


def shift_to_wire(use: ShiftUse, dtype: str) -> pb.Shift:
    """Personal tensors in the form `dtype` of perfit_shared.shifts."""
    if use.artefact is None:
        return pb.Shift(mode=pb.SHIFT_MODE_BASE)
    shift = pb.Shift(mode=pb.SHIFT_MODE_COLLECTIVE, artefact=use.artefact.name, version=use.artefact.version)
    if use.personal is not None:
        shift.mode = pb.SHIFT_MODE_PERSONAL
        shift.personal = use.personal.to_bytes(dtype=dtype)
    return shift


def sampling_to_wire(sampling: Sampling) -> pb.Sampling:
    return pb.Sampling(
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop=sampling.stop,
        logprobs=sampling.logprobs,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
    )


def chunk_from_wire(response: pb.GenerateResponse) -> Chunk:
    """Raises PerfitError on log-probabilities that cannot be."""
    finish = _FINISHES.get(response.finish)
    logprobs = tuple(_logprob_from_wire(of_token) for of_token in response.logprobs)
    return Chunk(response.text, finish, response.prompt_tokens, response.answer_tokens, logprobs)


def _logprob_from_wire(message: pb.TokenLogprob) -> TokenLogprob:
    known = [message.logprob, *(top.logprob for top in message.top)]
    if len(message.top) > MOST_LOGPROBS or not all(map(math.isfinite, known)):
        raise PerfitError("the cloud answered with log-probabilities that cannot be; tell its operator")
    top = tuple(TopLogprob(t.text, t.data, t.logprob) for t in message.top)
    return TokenLogprob(message.text, message.data, message.logprob, top)


def scores_from_wire(response: pb.ScoreResponse | pb.AdaptResponse, count: int) -> list[Score]:
    """Raises PerfitError unless there are `count` finite scores."""
    scores = [Score(s.log_likelihood, s.tokens) for s in response.scores]
    if len(scores) != count or not all(math.isfinite(s.log_likelihood) and s.tokens > 0 for s in scores):
        raise PerfitError("the cloud answered with scores that cannot be; tell its operator")
    return scores


def opening_to_wire(use: ShiftUse) -> pb.AskRequest:
    """The first message of an Ask stream."""
    return pb.AskRequest(shift=shift_to_wire(use, ANSWER_DTYPE))


def question_to_wire(number: int, prompt: Prompt, sampling: Sampling) -> pb.AskRequest:
    question = pb.Question(number=number, prompt=prompt_to_wire(prompt), sampling=sampling_to_wire(sampling))
    return pb.AskRequest(question=question)


def part_from_wire(response: pb.AskResponse) -> tuple[int, Chunk | PerfitError]:
    """A question's number, and part of its answer or why there is none."""
    if response.WhichOneof("body") == "part":
        return response.number, chunk_from_wire(response.part)
    failure = response.failure
    return response.number, from_code("", failure.code, readable(failure.message), failure.retry_ms)


def adapt_open_to_wire(artefact: Artefact) -> pb.AdaptRequest:
    """The first message of an Adapt stream."""
    return pb.AdaptRequest(open=pb.AdaptOpen(artefact=artefact.name, version=artefact.version))


def adapt_examples_to_wire(
    pairs: Iterable[tuple[Prompt, str]], message_bytes: int
) -> Iterator[pb.AdaptRequest]:
    """The messages that hold these examples, of about `message_bytes` each, made as they are sent."""
    message, size = pb.AdaptRequest(), 0
    for prompt, target in pairs:
        example = pb.Example(prompt=prompt_to_wire(prompt), target=target)
        if size and size + example.ByteSize() > message_bytes:
            yield message
            message, size = pb.AdaptRequest(), 0
        message.examples.examples.append(example)
        size += example.ByteSize()
    yield message


def adapt_step_to_wire(tensors: ShiftTensors, rows: Sequence[int], *, loss_only: bool) -> pb.AdaptRequest:
    personal = tensors.to_bytes(dtype=LOSS_DTYPE)
    return pb.AdaptRequest(step=pb.AdaptStep(personal=personal, rows=rows, loss_only=loss_only))


def cloud_info_from_wire(response: pb.DescribeResponse) -> CloudInfo:
    """Raises PerfitError when the cloud says what this version cannot work with."""
    limits = response.limits
    return CloudInfo(
        base_model=response.base_model,
        fingerprint=response.fingerprint,
        cloud_id=response.cloud_id,
        artefacts=tuple(_artefact_from_wire(artefact) for artefact in response.artefacts),
        limits=Limits(
            prompt_tokens=limits.prompt_tokens,
            new_tokens=max(1, limits.new_tokens),
            examples=max(1, limits.examples),
            message_bytes=limits.message_bytes,
            questions=limits.questions,
            adapt_examples=limits.adapt_examples,
            call_tokens=limits.call_tokens,
            logprobs=limits.logprobs,
            adapt_tokens=limits.adapt_tokens,
        ),
    )


def _artefact_from_wire(artefact: pb.Artefact) -> Artefact:
    try:
        if not artefact.name.isidentifier() or not math.isfinite(artefact.learning_rate):
            raise InvalidInput("name or learning rate")
        task = Task.from_json(artefact.task_json)
        if task.chat == "auto":
            raise InvalidInput("its task does not say how it is read")
        return Artefact(
            name=artefact.name,
            version=artefact.version,
            spec=ShiftSpec(
                layers=tuple(artefact.spec.layers),
                positions=artefact.spec.positions,
                collective_rank=artefact.spec.collective_rank,
                personal_rank=artefact.spec.personal_rank,
                hidden_size=artefact.spec.hidden_size,
            ),
            task=task,
            learning_rate=artefact.learning_rate,
            epochs=max(1, artefact.epochs),
            batch_size=max(1, artefact.batch_size),
            communities=artefact.communities,
        )
    except PerfitError as error:
        raise PerfitError(
            f"the cloud serves an artefact that this version cannot use ({error}); update perfit"
        ) from error


def tensors_from_wire(
    decode: Callable[[bytes, ShiftSpec, int], ShiftTensors], data: bytes, artefact: Artefact, what: str
) -> ShiftTensors:
    """Decoded and checked. Raises PerfitError: what is wrong here is the cloud's doing, not the user's."""
    try:
        return decode(data, artefact.spec, artefact.spec.personal_rank)
    except InvalidTensors as error:
        raise PerfitError(
            f"the cloud sent {what} that cannot be used ({error}); tell its operator"
        ) from error
