"""Many questions over one stream: the shift goes up once, and the answers come as they are made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any

from perfit_device.cloud.client import ANSWER_CHARACTERS, Cloud
from perfit_device.cloud.codec import Prompt, ShiftUse, opening_to_wire, part_from_wire, question_to_wire
from perfit_device.cloud.retry import NO_RETRIES, TRANSIENT, RetryPolicy
from perfit_shared.errors import InvalidPrompt, PerfitError, Unavailable
from perfit_shared.types import Chunk, Sampling

__all__ = ["ask_all"]

_STREAM_SECONDS = 600.0  # then another stream asks for what is left


def ask_all(
    cloud: Cloud,
    use: ShiftUse,
    questions: Sequence[tuple[Prompt, Sampling]],
    *,
    in_flight: int,
    retry_policy: RetryPolicy = NO_RETRIES,
    refused: dict[int, InvalidPrompt] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The answers in the order of the questions, `in_flight` at a time.

    `in_flight` is 0 where the cloud has no Ask: then each question is a call of its own.

    `retry_policy` repeats what a busy or absent cloud left unanswered. Any other failure ends it; but
    where `refused` is given, it takes the prompts that the cloud refuses, by number, and their answers
    are empty. `progress` gets the number of answers so far.
    """
    answers = _Answers(refused, progress)
    if in_flight < 1:
        for number, question in enumerate(questions):
            try:
                answers.put(number, _alone(cloud, use, *question, retry_policy))
            except InvalidPrompt as error:
                answers.refuse(number, error)

    def ask() -> None:
        before = len(answers.texts)
        try:
            cloud.renewing(lambda: _Round(questions, answers).run(cloud, use, in_flight))
        except TRANSIENT:
            if len(answers.texts) == before:
                raise

    while len(answers.texts) < len(questions):
        retry_policy.call(ask)
    return [answers.texts[number] for number in range(len(questions))]


def _alone(cloud: Cloud, use: ShiftUse, prompt: Prompt, sampling: Sampling, retry_policy: RetryPolicy) -> str:
    return "".join(chunk.text for chunk in retry_policy.stream(lambda: cloud.generate(prompt, use, sampling)))


class _Answers:
    """What is done, by the numbers of the questions."""

    def __init__(self, refused: dict[int, InvalidPrompt] | None, progress: Callable[[int], None]) -> None:
        self.texts: dict[int, str] = {}
        self._refused = refused
        self._progress = progress

    def put(self, number: int, text: str) -> None:
        self.texts[number] = text
        self._progress(len(self.texts))

    def refuse(self, number: int, error: InvalidPrompt) -> None:
        """Raises the error where there is no `refused` to take it."""
        if self._refused is None:
            raise error
        self._refused[number] = error
        self.put(number, "")


class _Round:
    """One stream, which adds to `answers` what it can of the missing ones."""

    def __init__(self, questions: Sequence[tuple[Prompt, Sampling]], answers: _Answers) -> None:
        self._questions = questions
        self._answers = answers
        self._waiting = deque(number for number in range(len(questions)) if number not in answers.texts)
        self._texts: dict[int, str] = {}  # answers so far, of the questions in flight
        self._outbox: SimpleQueue[Any] = SimpleQueue()  # None: no more

    def run(self, cloud: Cloud, use: ShiftUse, in_flight: int) -> None:
        """Raises one of TRANSIENT when the stream broke, or when the cloud turned the last questions away."""
        refused: PerfitError | None = None
        self._outbox.put(opening_to_wire(use))
        for _ in range(in_flight):
            self._ask()
        try:
            # gRPC reads the outbox in a thread of its own.
            with closing(cloud.stream("Ask", iter(self._outbox.get, None), _STREAM_SECONDS)) as responses:
                for response in responses:
                    refused = self._receive(*part_from_wire(response)) or refused
                    if not self._texts:
                        break
        finally:
            self._outbox.put(None)
        if self._texts:
            raise Unavailable("the cloud broke off its answers; try again later")
        if refused is not None and self._waiting:
            raise refused

    def _ask(self) -> None:
        """Ask the next question, if there is one."""
        if self._waiting:
            number = self._waiting.popleft()
            self._texts[number] = ""
            self._outbox.put(question_to_wire(number, *self._questions[number]))

    def _receive(self, number: int, part: Chunk | PerfitError) -> PerfitError | None:
        """The transient error of a question that the cloud turned away: then fewer are in flight."""
        if number not in self._texts:
            raise PerfitError("the cloud answers what was not asked; tell its operator")
        if isinstance(part, TRANSIENT):
            del self._texts[number]
            self._waiting.append(number)
            return part
        if isinstance(part, InvalidPrompt):
            del self._texts[number]
            self._answers.refuse(number, part)
            self._ask()
            return None
        if isinstance(part, PerfitError):
            raise part
        self._texts[number] += part.text
        if len(self._texts[number]) > ANSWER_CHARACTERS:
            raise PerfitError("the cloud sends without end; the answer was cut off")
        if part.finish:
            self._answers.put(number, self._texts.pop(number))
            self._ask()
        return None
