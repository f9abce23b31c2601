"""An answer to a talk, to a text as it is, or to one task's fields: what chat and apps ask for."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from perfit_device.answers import Message
from perfit_device.operations.endpoint import model_names, no_model
from perfit_device.operations.operation import Emit, Event, Operation
from perfit_device.stopping import StopFilter, split_stops
from perfit_shared.errors import InvalidInput, InvalidPrompt, NotFound
from perfit_shared.task import Task
from perfit_shared.types import Chunk, Finish, Mode, Sampling, TokenLogprob

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact, CloudInfo, Limits, Prompt
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile

__all__ = ["AnswerChunk", "AnswerSettings", "Complete", "Completion"]

_TALK = "chat"  # the artefact that answers talks
# What an answer is like, where neither the caller nor a task says.
_NO_TASK = Task("text", "{prompt}", "{reply}", "rouge_1", stop=(), answer_tokens=512)


@dataclass(frozen=True)
class AnswerSettings:
    """How an answer is made. None stands for the task's own figure, or a random seed."""

    max_tokens: int | None = None  # no more than the cloud's limit in any case
    temperature: float = 0.1  # 0 is greedy
    top_k: int = 0  # 0 is all tokens
    top_p: float = 0.9
    seed: int | None = None
    stop: tuple[str, ...] = ()  # of any number and length, beside the task's own
    logprobs: int = 0  # how many likeliest tokens to name beside each chosen one
    frequency_penalty: float | None = None  # taken off a token's logit for each time that the answer has it
    presence_penalty: float | None = None  # taken off it once


@dataclass(frozen=True)
class AnswerChunk(Event):
    """What is new of the answer."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Completion:
    text: str
    finish: Finish
    prompt_tokens: (
        int  # both 0 where this device ended the answer at a stop text: the cloud counts at the end
    )
    answer_tokens: int
    task: str = ""  # name of the artefact; "" for the base model alone
    mode: Mode = Mode.BASE
    dropped: int = 0  # oldest turns that were left out, since the talk was too long


@dataclass(frozen=True)
class Complete(Operation[Completion]):
    """Give `messages`, or `prompt`, or `fields`. The answer comes as `AnswerChunk`s, too.

    `model` is base, collective, personal, or the name of a task, which is answered by the personal shift.
    A task that is no talk takes the last user message as its text, and `fields` beside it; it is asked behind
    own examples where `Ask` would be. A talk that the cloud refuses for its length
    loses its oldest turns, but keeps the system turn and the newest one.
    """

    messages: tuple[Message, ...] = ()
    prompt: str = ""  # goes to the model as it is, without a template
    fields: Mapping[str, str] = field(default_factory=dict)
    model: str = Mode.PERSONAL.value
    settings: AnswerSettings = AnswerSettings()

    def run(self, profile: Profile, emit: Emit) -> Completion:
        """Raises NotFound where there is no such model, InvalidPrompt on what the cloud does not take."""
        _, info = profile.connect()
        artefact, mode = _model(profile, info, self.model)
        sampling, stops = _sampling(self.settings, artefact.task if artefact else None, info, self)
        prompts, behind = _prompts(profile, self, artefact, mode, info.limits)
        chunks, dropped = _first_accepted(profile, artefact, mode, prompts, sampling, behind=behind)
        parts: list[str] = []
        last = Chunk("", Finish.END)
        filtered = _filtered(chunks, stops, keeps_space=bool(self.prompt))
        with closing(filtered):
            for last in filtered:
                if last.text or last.logprobs:
                    parts.append(last.text)
                    emit(AnswerChunk(last.text, last.logprobs))
        return Completion(
            text="".join(parts),
            finish=last.finish or Finish.END,
            prompt_tokens=last.prompt_tokens,
            answer_tokens=last.answer_tokens,
            task=artefact.name if artefact else "",
            mode=mode,
            dropped=dropped,
        )


# -- which model ---------------------------------------------------------------------------------


def _model(profile: Profile, info: CloudInfo, model: str) -> tuple[Artefact | None, Mode]:
    if model == Mode.BASE:
        return None, Mode.BASE
    names = [artefact.name for artefact in info.artefacts]
    if model not in (Mode.COLLECTIVE, Mode.PERSONAL):
        if model not in names:
            raise no_model(model, model_names(names))
        return profile.artefact(model), Mode.PERSONAL
    if _TALK in names:
        return profile.artefact(_TALK), Mode(model)
    try:
        return profile.artefact(None), Mode(model)
    except NotFound as error:
        if not names:
            raise
        raise NotFound(
            f"the cloud has several tasks; name one of them as the model: {', '.join(sorted(names))}"
        ) from error


# -- what it reads -------------------------------------------------------------------------------


def _prompts(
    profile: Profile, asked: Complete, artefact: Artefact | None, mode: Mode, limits: Limits
) -> tuple[Iterator[tuple[Prompt, int]], int]:
    """(prompts with how many turns each leaves out, own examples before the first).

    The whole prompt comes first, then ever shorter ones. Raises InvalidPrompt on none.
    """
    from perfit_device.evaluation import prompts_of
    from perfit_device.nearest import examples_before, nearest_examples

    if asked.prompt:
        return iter([(asked.prompt, 0)]), 0
    task = artefact.task if artefact else None
    if artefact is None or task is None or task.is_talk:
        return _talk_prompts(asked, task, limits.message_bytes), 0
    item, count = _item(task, asked), examples_before(profile, artefact, mode)
    before = nearest_examples(profile, task, item, count, tokens=limits.prompt_tokens)
    return ((prompt, 0) for prompt in prompts_of(task, item, before, profile.notify)), len(before)


def _talk_prompts(asked: Complete, task: Task | None, message_bytes: int) -> Iterator[tuple[Prompt, int]]:
    from perfit_device.cloud.codec import Message as Turn

    fields = tuple(Message("user", text) for text in asked.fields.values())  # of a talk there is one
    for turns, dropped in _talks(asked.messages or fields, task.system if task else "", message_bytes):
        yield [Turn(turn.role, turn.content) for turn in turns], dropped


def _item(task: Task, asked: Complete) -> HistoryItem:
    """The question that is asked. Raises InvalidInput on missing fields."""
    from perfit_device.history import HistoryItem
    from perfit_device.profile import check_fields

    fields = dict(asked.fields)
    if asked.messages:
        said = [m.content.strip() for m in asked.messages if m.role == "user" and m.content.strip()]
        if not said:
            raise InvalidPrompt("there is no user message with a text in it")
        check_fields(task, fields)
        fields[task.text_field] = said[-1]
    wanted = task.template_fields
    if missing := [name for name in wanted if not fields.get(name, "").strip()]:
        raise InvalidInput(
            f"the task {task.name} is asked with {', '.join(wanted)}; give {', '.join(missing)} as fields"
        )
    return HistoryItem(task.name, fields)


def _talks(
    messages: Sequence[Message], system: str, message_bytes: int
) -> Iterator[tuple[list[Message], int]]:
    """The turns of a talk, then the same without a quarter of its text or more, down to the newest turn."""
    head, turns = _turns(messages, system)
    if not turns:
        raise InvalidPrompt("there is no message with a text in it")
    dropped = 0
    while True:
        left = [*head, *turns[dropped:]]
        if not message_bytes or sum(len(turn.content.encode()) for turn in left) < message_bytes:
            yield left, dropped
        size, gone = sum(len(turn.content) for turn in turns[dropped:]), 0
        starts = [n for n in range(dropped + 1, len(turns)) if turns[n].role == "user"]
        if not starts:
            break
        for start in starts:  # the first one that is far enough
            gone = sum(len(turn.content) for turn in turns[dropped:start])
            if 4 * gone >= size:
                break
        dropped = start
    if message_bytes and sum(len(turn.content.encode()) for turn in left) >= message_bytes:
        raise InvalidPrompt(f"the messages are longer than the {message_bytes} bytes that this cloud takes")


def _turns(messages: Sequence[Message], system: str) -> tuple[list[Message], list[Message]]:
    """(system turn, other turns): one system turn in front, and turns of one role in a row joined.

    Chat templates refuse anything else.
    """
    said = [m.content.strip() for m in messages if m.role == "system" and m.content.strip()]
    head = [Message("system", "\n\n".join(said) or system)] if said or system else []
    turns: list[Message] = []
    for message in messages:
        if message.role == "system" or not message.content.strip():
            continue
        if turns and turns[-1].role == message.role:
            turns[-1] = replace(turns[-1], content=f"{turns[-1].content}\n\n{message.content}")
        else:
            turns.append(message)
    return head, turns


# -- asking --------------------------------------------------------------------------------------


def _sampling(
    settings: AnswerSettings, task: Task | None, info: CloudInfo, asked: Complete
) -> tuple[Sampling, tuple[str, ...]]:
    """(what the cloud is told, stop texts that are left to this device). Raises InvalidInput."""
    info.limits.check_logprobs(settings.logprobs)
    own = task if task is not None and not asked.prompt else _NO_TASK
    sent, kept = split_stops((*own.stop, *settings.stop))
    sampling = own.sampling(
        most=info.limits.new_tokens,
        max_new_tokens=settings.max_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        seed=secrets.randbits(32) if settings.seed is None else settings.seed,
        stop=sent,
        logprobs=settings.logprobs,
        frequency_penalty=settings.frequency_penalty,
        presence_penalty=settings.presence_penalty,
    )
    return sampling, kept


def _first_accepted(
    profile: Profile,
    artefact: Artefact | None,
    mode: Mode,
    prompts: Iterator[tuple[Prompt, int]],
    sampling: Sampling,
    *,
    behind: int = 0,
) -> tuple[Generator[Chunk, None, None], int]:
    """(the answer to the first prompt that the cloud takes, turns left out of it)."""
    from perfit_device.cloud.codec import ShiftUse
    from perfit_device.operations.ask import first_accepted, shift_use

    cloud, _ = profile.connect()
    use = ShiftUse() if artefact is None else shift_use(profile, artefact, mode, behind=behind)

    def stream(prompt: Prompt) -> Generator[Chunk, None, None]:
        return profile.while_opening().stream(lambda: cloud.generate(prompt, use, sampling))

    return first_accepted(stream, prompts)


def _filtered(
    chunks: Generator[Chunk, None, None], stops: tuple[str, ...], *, keeps_space: bool
) -> Generator[Chunk, None, None]:
    """The chunks up to a stop text, without white space at the front: that belongs to a prompt's form."""
    stopping, is_at_front = StopFilter(stops), not keeps_space
    with closing(chunks):
        for chunk in chunks:
            text = chunk.text.lstrip() if is_at_front else chunk.text
            stopping.skip(chunk.text.removesuffix(text))
            is_at_front = is_at_front and not text
            text = stopping.feed(text)
            if chunk.finish is not None:
                text += stopping.rest()
            logprobs = stopping.tokens(text, chunk.logprobs)
            if stopping.is_over:
                yield Chunk(text, Finish.END, logprobs=logprobs)
                return
            yield replace(chunk, text=text, logprobs=logprobs)
