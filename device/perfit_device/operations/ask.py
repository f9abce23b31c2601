"""Asking the cloud for an answer, through one's own shift, the collective one, or none."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from perfit_device import personal
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import Artefact, Prompt, ShiftUse
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.evaluation import prompt_of
from perfit_device.history import HistoryItem
from perfit_device.profile import Profile, check_fields
from perfit_shared.errors import InvalidData, InvalidInput, InvalidPrompt
from perfit_shared.tasks import Task
from perfit_shared.types import Chunk, Mode, Sampling

__all__ = ["PreparedQuestion", "Question", "prepare"]


@dataclass(frozen=True)
class Question:
    """A text, and how to answer it. None stands for the task's own figure, or a random seed.

    Raises InvalidPrompt on an empty text.
    """

    text: str
    task: str | None = None  # name of an artefact
    fields: Mapping[str, str] = field(default_factory=dict)  # that the task's template has besides the text's
    max_tokens: int | None = None
    temperature: float = 0.1  # 0 is greedy
    top_k: int = 10  # 0 is all tokens
    top_p: float = 0.9
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise InvalidPrompt("the text is empty; give a text to ask about")


@dataclass(frozen=True)
class PreparedQuestion:
    """A question that is ready to send. It needs no vault."""

    artefact: Artefact
    prompt: Prompt
    sampling: Sampling
    _cloud: Cloud
    _uses: Mapping[Mode, ShiftUse]
    _retry_policy: RetryPolicy

    def stream(self, mode: Mode) -> Iterator[Chunk]:
        """The answer of one of the modes it was prepared for, as it comes; counts are on the last chunk.

        It leaves out leading white space, which belongs to the prompt's form.
        """
        is_at_front = True
        use = self._uses[mode]
        for chunk in self._retry_policy.stream(lambda: self._cloud.generate(self.prompt, use, self.sampling)):
            text = chunk.text.lstrip() if is_at_front else chunk.text
            is_at_front = is_at_front and not text
            yield replace(chunk, text=text)


def prepare(profile: Profile, question: Question, modes: Iterable[Mode]) -> PreparedQuestion:
    """Find artefact, prompt and shifts. Raises InvalidInput on what cannot be asked."""
    text = question.text.strip()
    cloud, info = profile.connect()
    artefact = profile.artefact(question.task)
    prompt = _prompt(artefact.task, text, question.fields)
    most, longest = info.limits.new_tokens, question.max_tokens
    if longest is not None and longest > most:
        raise InvalidInput(f"this cloud answers with at most {most} tokens")
    sampling = Sampling(
        max_new_tokens=min(artefact.task.answer_tokens if longest is None else longest, most),
        temperature=question.temperature,
        top_k=question.top_k,
        top_p=question.top_p,
        seed=secrets.randbits(32) if question.seed is None else question.seed,
        stop=artefact.task.stop,
    )
    uses = {mode: _use(profile, artefact, mode) for mode in modes}
    return PreparedQuestion(artefact, prompt, sampling, cloud, uses, RetryPolicy(notify=profile.notify))


def _prompt(task: Task, text: str, fields: Mapping[str, str]) -> Prompt:
    check_fields(task, fields)
    try:
        return prompt_of(task, HistoryItem(task.name, {task.text_field: text, **fields}))
    except InvalidData as error:
        raise InvalidInput(
            f"the task {task.name} needs more than the text, its {task.text_field}: {error}; give it with "
            "--field NAME=TEXT"
        ) from error


def _use(profile: Profile, artefact: Artefact, mode: Mode) -> ShiftUse:
    """Which shift answers. A user without one gets the seed, and a notice."""
    if mode is Mode.BASE:
        return ShiftUse()
    if mode is Mode.COLLECTIVE:
        return ShiftUse(artefact)
    cloud, info = profile.connect()
    with profile.vault() as vault:
        mine = personal.load(vault, info.cloud_id, artefact)
    if mine is not None:
        return ShiftUse(artefact, mine.tensors)
    profile.notify(
        f"no personal shift for {artefact.name} yet, so this is the seed; `perfit update` trains one"
    )
    return ShiftUse(artefact, profile.while_opening().call(lambda: cloud.fetch_seed(artefact)))
