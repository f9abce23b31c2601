"""Tasks: how an item becomes a prompt, what an answer looks like, how it is measured.

The instruction texts are LaMP's own, with the answer's cue after them; OPPU's, which the paper uses,
are in `prompts`. History items take the same form as queries, or `history_template`'s where they
lack a field. A dataset folder's `task.json` overrides template, answer and labels.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from perfit_shared.errors import InvalidData, NotFound
from perfit_shared.json_input import is_text
from perfit_shared.metrics import HIGHER_IS_BETTER

__all__ = ["TASKS", "TASK_NAME", "Example", "Task", "load_task", "task_named"]

_FIELD_WORDS = 768  # OPPU cuts every field to this many words in training
TASK_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
# Tasks come from clouds and files that may be hostile, so all of it is bounded.
_TEMPLATE_CHARACTERS = 16_384  # of template and answer
_TEMPLATE_FIELDS = 16  # {field}s of a template; every one may be a whole article
_ANSWER_TOKENS = 4096
_STOP_TEXTS, _STOP_BYTES = 8, 64  # what Generate takes


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
    chat: bool = False  # the prompt is the user's turn of a chat
    history_template: str = ""  # prompt of items that lack fields of the template; "": there are none

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
        for key in ("template", "answer", "metric", "marker", "lamp", "history_template"):
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
        if not isinstance(self.chat, bool):
            raise InvalidData("its chat should be true or false")
        if self.metric not in HIGHER_IS_BETTER:
            raise InvalidData(f'no metric "{self.metric[:40]}"')
        if max(map(len, (self.template, self.answer, self.history_template))) > _TEMPLATE_CHARACTERS:
            raise InvalidData(f"templates and answer may have {_TEMPLATE_CHARACTERS} characters")
        if not 1 <= len(_fields(self.template)) <= _TEMPLATE_FIELDS or len(_fields(self.answer)) != 1:
            raise InvalidData(
                f"a template needs a {{field}} and may have {_TEMPLATE_FIELDS}, an answer needs exactly one"
            )
        if self.history_template and not set(self._history_fields) < set(self.field_names):
            # Which of the two templates an item takes shows in the fields it has.
            raise InvalidData(
                "its history_template should need fewer fields than its template, and no others"
            )

    @property
    def field_names(self) -> tuple[str, ...]:
        """What an item holds: the template's fields and the answer's, in order, each once."""
        return tuple(dict.fromkeys(_fields(self.template) + _fields(self.answer)))

    @property
    def _history_fields(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_fields(self.history_template) + _fields(self.answer)))

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
        return _fields(self.template)[0]

    @property
    def gold_field(self) -> str:
        """The field of an item that holds the right answer."""
        return _fields(self.answer)[0]

    def prompt(self, item: Mapping[str, str], *, cut: bool = False) -> str:
        """Fill the template, or the history template where the item has only its fields.

        `cut` shortens every field to 768 words, as in training.
        """
        return _fill(self.template if self._is_whole(item) else self.history_template, item, cut=cut)

    def target(self, item: Mapping[str, str], *, cut: bool = False) -> str:
        """What should follow the prompt. A chat's reply is never cut: its end is where to stop."""
        return _fill(self.answer, item, cut=cut and not self.chat)

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
        if not self.history_template:  # so that readers from before there was one take the rest
            del values["history_template"]
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Task:
        """Raises InvalidData on unknown or missing keys."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidData("not a task: unknown or missing keys") from error


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


_NEWS = (
    "food & drink",
    "sports",
    "education",
    "parents",
    "religion",
    "travel",
    "business",
    "crime",
    "science & technology",
    "culture & arts",
    "entertainment",
    "politics",
    "women",
    "style & beauty",
    "healthy living",
)
# The same in the order of OPPU's instruction.
_NEWS_ASKED = (
    "travel",
    "education",
    "parents",
    "style & beauty",
    "entertainment",
    "food & drink",
    "science & technology",
    "business",
    "sports",
    "healthy living",
    "women",
    "politics",
    "crime",
    "culture & arts",
    "religion",
)
_TAGS = (
    "sci-fi",
    "based on a book",
    "comedy",
    "action",
    "twist ending",
    "dystopia",
    "dark comedy",
    "classic",
    "psychology",
    "fantasy",
    "romance",
    "thought-provoking",
    "social commentary",
    "violence",
    "true story",
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "news_categorize",
            "Which category does this article relate to among the following categories? Just answer "
            "with the category name without further explanation. categories: "
            f"[{', '.join(_NEWS_ASKED)}] article: {{text}} category:",
            " {category}",
            "accuracy",
            "article: ",
            _NEWS,
            answer_tokens=12,
            lamp="LaMP_2N",
        ),
        Task(
            "movie_tagging",
            "Which tag does this movie relate to among the following tags? Just answer with the tag "
            "name without further explanation. tags: "
            f"[{', '.join(_TAGS)}] description: {{description}} tag:",
            " {tag}",
            "accuracy",
            "description: ",
            _TAGS,
            answer_tokens=12,
            lamp="LaMP_2M",
        ),
        Task(
            "product_rating",
            "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, "
            "3, 4, or 5 without further explanation. review: {text} score:",
            " {score}",
            "mae",
            "review: ",
            ("1", "2", "3", "4", "5"),
            answer_tokens=4,
            lamp="LaMP_3",
        ),
        Task(
            "news_headline",
            "Generate a headline for the following article: {text} headline:",
            " {title}",
            "rouge_1",
            "article: ",
            lamp="LaMP_4",
        ),
        Task(
            "scholarly_title",
            "Generate a title for the following abstract of a paper: {abstract} title:",
            " {title}",
            "rouge_1",
            "paper: ",
            answer_tokens=64,
            lamp="LaMP_5",
        ),
        Task(
            "tweet_paraphrase",
            "Paraphrase the following tweet without any explanation before or after it: {input} tweet:",
            " {text}",
            "rouge_1",
            "after it: ",
            answer_tokens=96,
            lamp="LaMP_7",
            history_template="tweet:",
        ),
        Task("chat", "{prompt}", "{reply}", "rouge_1", stop=(), answer_tokens=256, chat=True),
    )
}


def task_named(name: str) -> Task:
    """Raises NotFound and lists what there is."""
    if name not in TASKS:
        raise NotFound(f'no task "{name[:40]}"; there are {", ".join(TASKS)}')
    return TASKS[name]


def load_task(folder: Path, name: str) -> Task:
    """The task called `name`, with what `folder/task.json` overrides, if that file is there.

    Raises InvalidData naming the file when it is malformed or for another task.
    """
    task, path = task_named(name), folder / "task.json"
    if not path.is_file():
        return task
    try:
        overrides = json.loads(path.read_text("utf-8"))
        if overrides.pop("task", name) != name:
            raise InvalidData("it is for another task")
        if not set(overrides) <= {f.name for f in fields(Task)} - {"name"}:
            raise InvalidData("unknown keys")
        return replace(task, **overrides)
    except (ValueError, AttributeError, TypeError, RecursionError, InvalidData) as error:
        raise InvalidData(f"{path}: {error}") from error
