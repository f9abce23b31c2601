"""Which prompts a task has, and whether a model reads them as text or as chat turns.

The prompts of a LaMP task are OPPU's, which the paper uses, LaMP's own, or a task.json's:

    lamp   what LaMP's `input` says, with the answer's cue after it on the same line; what TASKS hold
    oppu   the same with line breaks between instruction, text and cue, and answers of 200 tokens
           with no stop: the paper's decoding
    task   the folder's task.json
    builtin   perfit's own whatever the folder says: LaMP's for its tasks, as text or as chat turns

Asked for by name, OPPU's and LaMP's are texts, as in the paper; as chat turns LaMP's have no cue.
Models answer them differently, so figures with different prompts are no comparison of methods.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from perfit_shared.errors import InvalidInput
from perfit_shared.tasks import TASKS, Task, load_task

__all__ = ["PROMPTS", "READINGS", "as_read", "asking_for", "load_prompts", "prompts_of", "with_prompts"]

PROMPTS = ("oppu", "lamp", "task", "builtin")
READINGS = {"auto": "auto", "yes": True, "no": False}  # what `--chat` says → Task.chat
_OPPU_TOKENS = 200  # new tokens of an answer, whatever the task
# What OPPU's prompts have in place of LaMP's words.
_OPPU = {
    "news_categorize": ("] article:", "]\n article:"),
    "movie_tagging": ("] description:", "]\n description:"),
    "product_rating": (" score:", "\n score:"),
    "news_headline": (" headline:", "\n headline:"),
    "scholarly_title": ("of a paper:", "of a paper.\n abstract:"),
    "tweet_paraphrase": (
        "the following tweet without any explanation before or after it:",
        "the following text into tweet without any explanation before or after it.\n text:",
    ),
}


def load_prompts(folder: Path, name: str | None, prompts: str | None = None) -> Task:
    """The task of a data folder with these prompts; without any, task.json's, else the built-in ones.

    Raises InvalidInput on prompts that there are not, and what `load_task` raises.
    """
    task = load_task(folder, name)
    if prompts is None:
        return task
    if prompts == "task" and not (folder / "task.json").is_file():
        raise InvalidInput(f"{folder} holds no task.json; try --prompts lamp or oppu")
    return with_prompts(task, prompts)


def with_prompts(task: Task, prompts: str) -> Task:
    """The task with other prompts; its fields, labels and metric stay. Raises InvalidInput."""
    if prompts not in PROMPTS:
        raise InvalidInput(f'no prompts "{prompts[:20]}"; there are {", ".join(PROMPTS)}')
    if prompts == "task":
        return task
    if prompts == "builtin" and task.name in TASKS and task.name not in _OPPU:
        return TASKS[task.name]
    if task.name not in _OPPU:
        whose = "perfit" if prompts == "builtin" else "LaMP"
        raise InvalidInput(f"task {task.name} is none of {whose}'s, so there are no {prompts} prompts for it")
    lamp = TASKS[task.name]

    def worded(template: str) -> str:
        if set(task.labels) != set(lamp.labels):
            template = asking_for(template, task.labels)
        return template.replace(f"{{{lamp.text_field}}}", f"{{{task.text_field}}}")

    asked = replace(
        task,
        template=worded(lamp.template.replace(*_OPPU[task.name]) if prompts == "oppu" else lamp.template),
        answer=lamp.answer.replace(f"{{{lamp.gold_field}}}", f"{{{task.gold_field}}}"),
        history_template=lamp.history_template,
        chat="auto",
        chat_template="" if prompts == "oppu" else worded(lamp.chat_template),
    )
    if prompts != "oppu":
        return asked
    return replace(asked, stop=(), answer_tokens=_OPPU_TOKENS, frequency_penalty=0.0, presence_penalty=0.0)


def as_read(
    task: Task, *, has_template: bool, chat: str | None = None, prompts: str | None = None
) -> tuple[Task, str]:
    """The task as a model with or without a chat template reads it, and a line that says how.

    `chat`: of READINGS; without it LaMP's and OPPU's `prompts` are texts, and others are as their task says.
    """
    if chat not in (None, *READINGS):
        raise InvalidInput(f'no reading "{str(chat)[:20]}"; there are {", ".join(READINGS)}')
    if chat is not None:
        reading, why = READINGS[chat], f"--chat {chat}"
    elif prompts in ("oppu", "lamp"):
        reading, why = False, f"--prompts {prompts}"
    else:
        reading, why = task.chat, "the task says so"
    if reading == "auto":
        reading, why = has_template, f"the model has {'a' if has_template else 'no'} chat template"
    read = replace(task, chat="auto").resolved(bool(reading))
    if read.chat and not has_template:
        why += ", and turns are plain text to a model without a chat template"
    return read, f"reads tasks as {'chat turns' if read.chat else 'text'}: {why}"


def asking_for(template: str, labels: tuple[str, ...]) -> str:
    """The template with these labels in its list, which stands in square brackets."""
    listed = ", ".join(labels).replace("{", "{{").replace("}", "}}")
    return re.sub(r"\[.*?\]", lambda _: f"[{listed}]", template, count=1)


def prompts_of(task: Task) -> str:
    """Which of PROMPTS a task has; "task" where it is neither OPPU's nor LaMP's."""
    for name in ("oppu", "lamp") if task.name in _OPPU else ():
        asked = with_prompts(task, name)
        if task == (asked if task.chat == "auto" else asked.resolved(task.chat)):
            return name
    return "task"
