"""Tasks as chat turns or as text: one task, resolved for a model."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.prompts import as_read, prompts_of, with_prompts
from perfit_shared.tasks import TASKS, Task

AUTO = Task(
    "tickets", "{ticket}\nAnswer:", " {answer}", "rouge_1", chat="auto", chat_template="Say: {ticket}"
)


def test_a_task_is_resolved_for_a_model_with_and_without_a_chat_template() -> None:
    """A chat template writes what stands before a reply, so no white space comes before the answer."""
    item = {"ticket": "x", "answer": "y"}
    spoken = replace(AUTO, system="You are brief.")
    turns, text = spoken.resolved(True), spoken.resolved(False)
    assert turns.read_as(turns.prompt(item)) == [("system", "You are brief."), ("user", "Say: x")]
    assert turns.target(item) == "y"
    assert text.read_as(text.prompt(item)) == "x\nAnswer:" and text.target(item) == " y"
    assert (turns.chat, turns.chat_template, text.chat, text.system) == (True, "", False, "")
    for task in (turns, text):
        assert task.resolved(True) == task.resolved(False) == task
        # A device from before knows no further key; one with a system turn it refuses.
        assert set(json.loads(task.to_json())) - {"system"} == set(json.loads(TASKS["chat"].to_json()))
    assert replace(AUTO, chat_template="").resolved(True).template == AUTO.template


@pytest.mark.parametrize(
    "wrong",
    [
        {"chat": "no"},
        {"chat": 1},
        {"chat": False},
        {"chat_template": "Say: {other}"},
        {"chat_template": "Say: {ticket} {answer}"},
        {"chat_template": "{ticket}" * 17},
        {"chat_template": "x" * 16_385 + "{ticket}"},
        {"chat_template": "{ticket:>9}"},
        {"chat_template": None},
        {"system": " \n"},
        {"system": 4},
        {"system": "x" * 16_385},
        {"system": "\ud800"},
        {"chat": False, "chat_template": "", "system": "x"},
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
def test_chat_turns_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidData, match="task tickets: "):
        replace(AUTO, **wrong)


@pytest.mark.parametrize("name", TASKS)
def test_built_in_tasks_have_the_same_fields_in_both_forms(name: str) -> None:
    task = TASKS[name]
    turns, text = task.resolved(True), task.resolved(False)
    assert (turns.field_names, turns.text_field) == (text.field_names, text.text_field)
    # But for `chat`, whose reply is the same to every model.
    assert name == "chat" or (turns.template != text.template and not turns.template.endswith(":"))
    assert task.item_from_query(f"{task.marker}x", "y") == {task.text_field: "x", task.gold_field: "y"}


def test_how_a_model_reads_a_task_and_why() -> None:
    headline = TASKS["news_headline"]
    turns, text = headline.resolved(True), headline.resolved(False)
    given: dict[str, Any]
    for given, want, why in (
        ({"has_template": True}, turns, "chat turns: the model has a chat template"),
        ({"has_template": False}, text, "text: the model has no chat template"),
        ({"has_template": True, "chat": "no"}, text, "text: --chat no"),
        ({"has_template": True, "prompts": "lamp"}, text, "text: --prompts lamp"),
        ({"has_template": True, "prompts": "lamp", "chat": "auto"}, turns, "the model has a chat template"),
        ({"has_template": True, "prompts": "task"}, turns, "the model has a chat template"),
        ({"has_template": False, "chat": "yes"}, turns, "--chat yes, and turns are plain text to a model"),
    ):
        task, how = as_read(headline, **given)
        assert task == want and how.startswith("reads tasks as ") and why in how
    assert as_read(TASKS["chat"], has_template=True)[1] == "reads tasks as chat turns: the task says so"
    assert as_read(turns, has_template=True, chat="no")[0].chat is False
    with pytest.raises(InvalidInput, match='no reading "maybe"; there are auto, yes, no'):
        as_read(headline, has_template=True, chat="maybe")


@pytest.mark.parametrize("prompts", ["oppu", "lamp"])
def test_prompts_are_known_by_their_words_as_chat_turns_too(prompts: str) -> None:
    asked = with_prompts(TASKS["news_categorize"], prompts)
    for task in (asked, asked.resolved(True), asked.resolved(False)):
        assert prompts_of(task) == prompts
    assert prompts_of(replace(asked.resolved(True), template="{text}")) == "task"


def test_built_in_prompts_whatever_a_folder_s_task_says() -> None:
    own = replace(TASKS["commit_message"], template="{changes}:", chat_template="")
    assert with_prompts(own, "builtin") == TASKS["commit_message"]
    headline = replace(TASKS["news_headline"], template="{text}:", chat_template="")
    found = with_prompts(headline, "builtin")
    assert found == TASKS["news_headline"]
    assert as_read(found, has_template=True, prompts="builtin")[0] == found.resolved(True)
    with pytest.raises(
        InvalidInput, match="task tickets is none of perfit's, so there are no builtin prompts"
    ):
        with_prompts(AUTO, "builtin")
