"""The prompts of a LaMP task: OPPU's, which the paper uses, LaMP's own, or a task.json's.

    lamp   what LaMP's `input` says, with the answer's cue after it on the same line; what TASKS hold
    oppu   the same with line breaks between instruction, text and cue, and answers of 200 tokens
           with no stop: the paper's decoding
    task   the folder's task.json

Models answer them differently, so figures with different prompts are no comparison of methods.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from perfit_shared.errors import InvalidInput
from perfit_shared.tasks import TASKS, Task, load_task

__all__ = ["PROMPTS", "asking_for", "load_prompts", "prompts_of", "with_prompts"]

PROMPTS = ("oppu", "lamp", "task")
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


def load_prompts(folder: Path, name: str, prompts: str | None = None) -> Task:
    """The task of a data folder with these prompts; without any, task.json's, else LaMP's.

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
    if task.name not in _OPPU:
        raise InvalidInput(f"task {task.name} is none of LaMP's, so there are no {prompts} prompts for it")
    lamp = TASKS[task.name]
    template = lamp.template
    if set(task.labels) != set(lamp.labels):
        template = asking_for(template, task.labels)
    if prompts == "oppu":
        template = template.replace(*_OPPU[task.name])
    asked = replace(
        task,
        template=template.replace(f"{{{lamp.text_field}}}", f"{{{task.text_field}}}"),
        answer=lamp.answer.replace(f"{{{lamp.gold_field}}}", f"{{{task.gold_field}}}"),
        history_template=lamp.history_template,
    )
    return replace(asked, stop=(), answer_tokens=_OPPU_TOKENS) if prompts == "oppu" else asked


def asking_for(template: str, labels: tuple[str, ...]) -> str:
    """The template with these labels in its list, which stands in square brackets."""
    listed = ", ".join(labels).replace("{", "{{").replace("}", "}}")
    return re.sub(r"\[.*?\]", lambda _: f"[{listed}]", template, count=1)


def prompts_of(task: Task) -> str:
    """Which of PROMPTS a task has; "task" where it is neither OPPU's nor LaMP's."""
    known = [name for name in ("oppu", "lamp") if task.name in _OPPU and with_prompts(task, name) == task]
    return known[0] if known else "task"
