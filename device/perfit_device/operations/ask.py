"""Asking the cloud for an answer, through one's own shift, the collective one, or none."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from perfit_device.operations.operation import Emit, Event, Operation
from perfit_shared.errors import InvalidData, InvalidInput, InvalidPrompt
from perfit_shared.types import Chunk, Finish, Mode, Sampling

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact, Prompt, ShiftUse
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.profile import Profile
    from perfit_shared.tasks import Task

__all__ = [
    "Answer",
    "AnswerPart",
    "Answers",
    "Ask",
    "PreparedQuestion",
    "Question",
    "first_accepted",
    "prepare",
    "shift_use",
]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A text, and how to answer it. None stands for the task's own figure, or a random seed.

    Raises InvalidPrompt on an empty text, InvalidInput on too many examples.
    """

    text: str
    task: str | None = None  # name of an artefact
    fields: Mapping[str, str] = field(default_factory=dict)  # that the task's template has besides the text's
    max_tokens: int | None = None
    temperature: float = 0.1  # 0 is greedy
    top_k: int = 10  # 0 is all tokens
    top_p: float = 0.9
    seed: int | None = None
    logprobs: int = 0  # how many likeliest tokens to name beside each chosen one; 0: no log-probabilities
    frequency_penalty: float | None = None  # taken off a token's logit for each time that the answer has it
    presence_penalty: float | None = None  # taken off it once
    # Own ones that stand before it, those nearest to it. None: as many as the personal shift is used to.
    examples: int | None = None

    def __post_init__(self) -> None:
        from perfit_shared.retrieval import MOST_EXAMPLES

        if not self.text.strip():
            raise InvalidPrompt("the text is empty; give a text to ask about")
        if not 0 <= (self.examples or 0) <= MOST_EXAMPLES:
            raise InvalidInput(f"examples before a question should be from 0 to {MOST_EXAMPLES}")


@dataclass(frozen=True)
class AnswerPart(Event):
    """What the cloud said just now, in one of the modes."""

    mode: Mode
    chunk: Chunk


@dataclass(frozen=True)
class Answer:
    text: str  # as it came
    parsed: str  # as the task reads it
    last: Chunk  # with how it ended, and the counts


@dataclass(frozen=True)
class Answers:
    artefact: str
    by_mode: Mapping[Mode, Answer]


@dataclass(frozen=True)
class Ask(Operation[Answers]):
    """One question in each of the modes, one after the other; the answers come as `AnswerPart`s, too."""

    question: Question
    modes: tuple[Mode, ...] = (Mode.PERSONAL,)

    def run(self, profile: Profile, emit: Emit) -> Answers:
        prepared = prepare(profile, self.question, self.modes)
        profile.release_vault()
        answers = {}
        for mode in self.modes:
            chunks = []
            for chunk in prepared.stream(mode):
                chunks.append(chunk)
                emit(AnswerPart(mode, chunk))
            text = "".join(chunk.text for chunk in chunks)
            last = chunks[-1] if chunks else Chunk("")
            answers[mode] = Answer(text, prepared.artefact.task.parse(text), last)
        return Answers(prepared.artefact.name, answers)


@dataclass(frozen=True)
class PreparedQuestion:
    """A question that is ready to send. It needs no vault."""

    artefact: Artefact
    sampling: Sampling
    _prompts: Mapping[Mode, Callable[[], Iterable[Prompt]]]  # the first that the cloud takes is asked
    _cloud: Cloud
    _uses: Mapping[Mode, ShiftUse]
    _retry_policy: RetryPolicy

    def stream(self, mode: Mode) -> Iterator[Chunk]:
        """The answer of one of the modes it was prepared for, as it comes; counts are on the last chunk.

        It leaves out leading white space, which belongs to the prompt's form.
        """
        is_at_front = True
        use, retry_policy = self._uses[mode], self._retry_policy

        def stream(prompt: Prompt) -> Generator[Chunk, None, None]:
            return retry_policy.stream(lambda: self._cloud.generate(prompt, use, self.sampling))

        answer, _ = first_accepted(stream, ((prompt, None) for prompt in self._prompts[mode]()))
        with closing(answer):
            for chunk in answer:
                text = chunk.text.lstrip() if is_at_front else chunk.text
                is_at_front = is_at_front and not text
                yield replace(chunk, text=text)


def first_accepted(
    stream: Callable[[Prompt], Generator[Chunk, None, None]], prompts: Iterable[tuple[Prompt, _T]]
) -> tuple[Generator[Chunk, None, None], _T]:
    """(the answer to the first of these prompts that the cloud takes, what stands beside that prompt).

    Raises InvalidPrompt where it takes none.
    """
    refused: InvalidPrompt | None = None
    for prompt, about in prompts:
        chunks = stream(prompt)
        try:
            first = next(chunks, Chunk("", Finish.END))
        except InvalidPrompt as error:
            refused = error
        else:
            return _with(first, chunks), about
    raise refused or InvalidPrompt("the prompt is longer than this cloud takes; shorten it")


def _with(first: Chunk, rest: Generator[Chunk, None, None]) -> Generator[Chunk, None, None]:
    with closing(rest):
        yield first
        yield from rest


def prepare(profile: Profile, question: Question, modes: Iterable[Mode]) -> PreparedQuestion:
    """Find artefact, prompts and shifts. Raises InvalidInput on what cannot be asked."""
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.nearest import examples_before

    text = question.text.strip()
    cloud, info = profile.connect()
    artefact = profile.artefact(question.task)
    said = question.examples
    counts = {mode: examples_before(profile, artefact, mode) if said is None else said for mode in modes}
    prompts, before = _prompts(profile, artefact.task, text, question, counts, most=info.limits.prompt_tokens)
    most, longest = info.limits.new_tokens, question.max_tokens
    if longest is not None and longest > most:
        raise InvalidInput(f"this cloud answers with at most {most} tokens")
    info.limits.check_logprobs(question.logprobs)
    sampling = artefact.task.sampling(
        most=most,
        max_new_tokens=longest,
        temperature=question.temperature,
        top_k=question.top_k,
        top_p=question.top_p,
        seed=secrets.randbits(32) if question.seed is None else question.seed,
        logprobs=question.logprobs,
        frequency_penalty=question.frequency_penalty,
        presence_penalty=question.presence_penalty,
    )
    uses = {mode: shift_use(profile, artefact, mode, behind=before[mode]) for mode in prompts}
    return PreparedQuestion(artefact, sampling, prompts, cloud, uses, RetryPolicy(notify=profile.notify))


def _prompts(
    profile: Profile, task: Task, text: str, question: Question, counts: Mapping[Mode, int], *, most: int
) -> tuple[dict[Mode, Callable[[], Iterable[Prompt]]], dict[Mode, int]]:
    """Of each mode, behind so many examples, or as many as there are and fit; and how many that is.

    Where nobody asked for them, the question goes without them if it must.
    """
    from perfit_device.evaluation import prompt_of, prompts_of
    from perfit_device.history import HistoryItem
    from perfit_device.nearest import nearest_examples
    from perfit_device.profile import check_fields

    check_fields(task, question.fields)
    item = HistoryItem(task.name, {task.text_field: text, **question.fields})
    try:
        nearest = nearest_examples(profile, task, item, max(counts.values(), default=0), tokens=most)
        before = {mode: nearest[:count] for mode, count in counts.items()}
    except InvalidData as error:
        raise InvalidInput(
            f"the task {task.name} needs more than the text, its {task.text_field}: {error}; give it with "
            "--field NAME=TEXT"
        ) from error

    def asked(examples: list[Mapping[str, str]]) -> Iterable[Prompt]:
        if question.examples is not None:
            return [prompt_of(task, item, before=examples)]
        return prompts_of(task, item, examples, profile.notify)

    prompts: dict[Mode, Callable[[], Iterable[Prompt]]] = {
        mode: partial(asked, examples) for mode, examples in before.items()
    }
    return prompts, {mode: len(examples) for mode, examples in before.items()}


def shift_use(profile: Profile, artefact: Artefact, mode: Mode, *, behind: int = 0) -> ShiftUse:
    """Which shift answers. A user without one gets the start that suits their examples, and a notice.

    `behind`: so many examples stand before the question; the notice says so.
    """
    from perfit_device.cloud.codec import ShiftUse
    from perfit_device.starts import start_of

    if mode is Mode.BASE:
        return ShiftUse()
    if mode is Mode.COLLECTIVE:
        return ShiftUse(artefact)
    mine = profile.encoded_shift(artefact)
    if mine is not None:
        return ShiftUse(artefact, mine)
    start = start_of(profile, artefact, profile.while_opening())
    profile.notify(
        f"no personal shift for {artefact.name} yet, so this is {start.words}"
        + (f" behind {behind} of your examples" if behind else "")
        + "; `perfit update` trains one"
    )
    return ShiftUse(artefact, start.tensors)
