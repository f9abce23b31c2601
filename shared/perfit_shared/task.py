"""A task: how an item becomes a prompt, what an answer looks like, how it is measured.

History items take the same form as queries, or `history_template`'s where they lack a field.

A plain model reads `template` as text. A model with a chat template reads the task as chat turns, where
`chat` says so: `system`, then `chat_template` as the user's turn; the target is the reply. `resolved`
decides for one model, and artefacts hold resolved tasks alone.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from perfit_shared.errors import InvalidData
from perfit_shared.json_input import is_text
from perfit_shared.metrics import HIGHER_IS_BETTER
from perfit_shared.types import LARGEST_PENALTY, Sampling, are_penalties

__all__ = ["PENALTIES", "TASK_NAME", "Example", "Task"]

PENALTIES = ("frequency_penalty", "presence_penalty")  # fields of a task that `Sampling` has, too
_FIELD_WORDS = 768  # OPPU cuts every field to this many words in training
TASK_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
# Tasks come from clouds and files that may be hostile, so all of it is bounded.
_TEMPLATE_CHARACTERS = 16_384  # of template and answer
_TEMPLATE_FIELDS = 16  # {field}s of a template; every one may be a whole article
_ANSWER_TOKENS = 4096
_STOP_TEXTS, _STOP_BYTES = 8, 64  # what Generate takes
_TEXTS = ("template", "answer", "metric", "marker", "lamp", "history_template", "system", "chat_template")


@dataclass(frozen=True)
class Example:
    """One (input, target) of a user: the prompt as the model reads it, and its continuation."""

    prompt: str
    target: str


@dataclass(frozen=True)
class Task:
    """Raises InvalidData when built with anything that cannot work, of the wrong type or out of bounds."""

    name: str  # "news_headline"
    template: str  # prompt with {field}s of an item
    answer: str  # target, the gold field and what surrounds it: " {title}"
    metric: str  # of perfit_shared.metrics
    marker: str = ""  # in LaMP's query.input, what stands before the text
    labels: tuple[str, ...] = ()  # all valid answers, if they are a closed list
    stop: tuple[str, ...] = ("\n",)  # generation ends before the first of these
    answer_tokens: int = 48  # longest answer asked for
    lamp: str = ""  # LaMP's own name: "LaMP_4"
    chat: bool | Literal["auto"] = False  # the prompt is a chat's turn; "auto": see `resolved`
    history_template: str = ""  # prompt of items that lack fields of the template; "": there are none
    system: str = ""  # first turn of the chat; "": none
    chat_template: str = ""  # the user's turn of the chat, where that is not the template
    frequency_penalty: float = 0.0  # of `Sampling`, where the caller says none
    presence_penalty: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not TASK_NAME.fullmatch(self.name):
            raise InvalidData("a task's name should be lower-case letters, digits and underscores")
        try:
            self._check()
        except InvalidData as error:
            raise InvalidData(f"task {self.name}: {error}") from error
        object.__setattr__(self, "labels", tuple(self.labels))
        object.__setattr__(self, "stop", tuple(self.stop))

    def _check(self) -> None:
        """Types first: JSON may hold anything."""
        for key in _TEXTS:
            if not is_text(getattr(self, key)):
                raise InvalidData(f"its {key} should be text")
        for key in ("labels", "stop"):
            values = getattr(self, key)
            if not isinstance(values, list | tuple) or not all(is_text(v) and v for v in values):
                raise InvalidData(f"its {key} should be a list of texts, none empty")
        if len(self.stop) > _STOP_TEXTS or any(len(s.encode()) > _STOP_BYTES for s in self.stop):
            raise InvalidData(f"there may be {_STOP_TEXTS} stop texts of at most {_STOP_BYTES} bytes")
        if type(self.answer_tokens) is not int or not 1 <= self.answer_tokens <= _ANSWER_TOKENS:
            raise InvalidData(f"its answer_tokens should be a whole number from 1 to {_ANSWER_TOKENS}")
        for key in PENALTIES:
            value = getattr(self, key)
            if type(value) not in (int, float) or not are_penalties(value):
                most = LARGEST_PENALTY
                raise InvalidData(f"its {key} should be a number from -{most} to {most}")
        if self.metric not in HIGHER_IS_BETTER:
            there = ", ".join(HIGHER_IS_BETTER)
            raise InvalidData(f'no metric "{self.metric[:40]}"; there are {there}')
        self._check_templates()
        self._check_chat()

    def _check_templates(self) -> None:
        if max(len(getattr(self, key)) for key in _TEXTS) > _TEMPLATE_CHARACTERS:
            raise InvalidData(f"templates, answer and system may have {_TEMPLATE_CHARACTERS} characters")
        filled = max(len(_fields(self.template)), len(_fields(self.chat_template)))
        if not _fields(self.template) or filled > _TEMPLATE_FIELDS or len(_fields(self.answer)) != 1:
            raise InvalidData(
                f"a template needs a {{field}} and may have {_TEMPLATE_FIELDS}, an answer needs exactly one"
            )
        if self.history_template and not set(self._history_fields) < set(self.field_names):
            # Which of the two templates an item takes shows in the fields it has.
            raise InvalidData(
                "its history_template should need fewer fields than its template, and no others"
            )

    def _check_chat(self) -> None:
        if not isinstance(self.chat, bool) and self.chat != "auto":
            raise InvalidData('its chat should be true, false or "auto"')
        if not self.chat and (self.system or self.chat_template):
            raise InvalidData('its system and chat_template need chat: true or "auto"')
        if self.system and not self.system.strip():
            raise InvalidData("its system should not be blank")
        if self.chat_template and _names(self.chat_template) != _names(self.template):
            raise InvalidData("its chat_template should have the template's fields, in the same order")

    @property
    def field_names(self) -> tuple[str, ...]:
        """What an item holds: the template's fields and the answer's, in order, each once."""
        return _names(self.template, self.answer)

    @property
    def template_fields(self) -> tuple[str, ...]:
        """What a query is asked with."""
        return _names(self.template)

    @property
    def _history_fields(self) -> tuple[str, ...]:
        return _names(self.history_template, self.answer)

    def fields_of(self, item: Collection[str]) -> tuple[str, ...]:
        """The fields that an item with these keys should hold.

        Those of the template and the answer; of the history template and the answer where the item
        lacks one of the template's, as LaMP-7's profiles hold tweets but not what they paraphrase.
        """
        return self.field_names if self._is_whole(item) else self._history_fields

    def _is_whole(self, item: Collection[str]) -> bool:
        return not self.history_template or all(name in item for name in _fields(self.template))

    @property
    def text_field(self) -> str:
        """The first field of the template: what `perfit ask "…"` fills."""
        return self.template_fields[0]

    @property
    def gold_field(self) -> str:
        """The field of an item that holds the right answer."""
        return _fields(self.answer)[0]

    @property
    def is_talk(self) -> bool:
        """Whether the model gets the turns of a talk as they are."""
        return self.chat is True and self.template == f"{{{self.text_field}}}"

    def resolved(self, has_template: bool) -> Task:
        """This task for a model with or without a chat template: `chat` is true or false, not "auto".

        As chat turns its template is the user's turn, and the answer begins without white space, since the
        chat template writes what stands before a reply. As text it has no system turn.
        """
        chat = has_template if self.chat == "auto" else self.chat
        if not chat:
            return replace(self, chat=False, system="", chat_template="")
        template = self.chat_template or self.template
        return replace(self, chat=True, template=template, answer=self.answer.lstrip(), chat_template="")

    def sampling(self, *, most: int = _ANSWER_TOKENS, **settings: Any) -> Sampling:
        """How an answer is asked for: at most `most` tokens of it, greedily, but for what `settings` say.

        A setting of None stands for the task's own.
        """
        own: dict[str, Any] = {"max_new_tokens": self.answer_tokens, "stop": self.stop}
        own |= {key: getattr(self, key) for key in PENALTIES}
        whole = Sampling(**own | {key: value for key, value in settings.items() if value is not None})
        return replace(whole, max_new_tokens=min(whole.max_new_tokens, most))

    def read_as(self, prompt: str) -> str | list[tuple[str, str]]:
        """What the model gets of a filled template: the text, or (role, content) turns of a chat."""
        if self.chat is not True:
            return prompt
        return [*([("system", self.system)] if self.system else []), ("user", prompt)]

    def prompt(self, item: Mapping[str, str], *, cut: bool = False) -> str:
        """Fill the template, or the history template where the item has only its fields.

        `cut` shortens every field to 768 words, as in training.
        """
        return _fill(self.template if self._is_whole(item) else self.history_template, item, cut=cut)

    def target(self, item: Mapping[str, str], *, cut: bool = False) -> str:
        """What should follow the prompt. A chat's reply is never cut: its end is where to stop."""
        return _fill(self.answer, item, cut=cut and self.chat is not True)

    def example(self, item: Mapping[str, str]) -> Example:
        """Raises InvalidData when a field is missing or empty."""
        return Example(self.prompt(item, cut=True), self.target(item, cut=True))

    def parse(self, text: str) -> str:
        """The answer inside generated text: without the cue's white space and anything past a stop."""
        for stop in self.stop:
            text = text.split(stop, maxsplit=1)[0]
        return text.strip()

    def item_from_query(self, text: str, gold: str) -> dict[str, str]:
        """An item from LaMP's `query.input` and `gold`: the article is what follows the marker.

        The marker's last white space may be missing, as LaMP's own extraction has it.
        """
        marker = self.marker.rstrip() or self.marker
        _, found, rest = text.partition(marker) if marker else ("", "x", text)
        if not found:
            raise InvalidData(f'input lacks "{self.marker.strip()}", so it is not of task {self.name}')
        return {self.text_field: rest.strip(), self.gold_field: gold}

    def to_json(self) -> str:
        values = asdict(self)
        for key in ("history_template", "system", "chat_template", *PENALTIES):
            if not values[key]:  # so that readers from before there was one take the rest
                del values[key]
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Raises InvalidData on unknown or missing keys."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidData("not a task: unknown or missing keys") from error


def _names(*templates: str) -> tuple[str, ...]:
    """The fields of these templates, each once."""
    return tuple(dict.fromkeys(name for template in templates for name in _fields(template)))


def _fields(template: str) -> list[str]:
    try:
        parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise InvalidData("a template's braces do not match") from error
    # A format such as {text:>300000000} would make a prompt of that length.
    if not all((name or "").isidentifier() and not spec and not how for _, name, spec, how in parts):
        raise InvalidData("a template's {fields} should be plain names")
    return [str(name) for _, name, _, _ in parts]


def _fill(template: str, item: Mapping[str, str], *, cut: bool = False) -> str:
    values = {}
    for name in _fields(template):
        value = item.get(name)
        if not isinstance(value, str) or not value.strip():
            raise InvalidData(f'field "{name}" is missing or empty')
        words = value.split(maxsplit=_FIELD_WORDS) if cut else []
        values[name] = " ".join(words[:_FIELD_WORDS]) if len(words) > _FIELD_WORDS else value
    return template.format_map(values)
