"""The words that a task is asked in: OPPU's, LaMP's, and a folder's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from perfit_shared.errors import InvalidInput
from perfit_shared.prompts import PROMPTS, load_prompts, prompts_of, with_prompts
from perfit_shared.tasks import TASKS

LAMP = [name for name, task in TASKS.items() if task.lamp]
NEWS = "travel, education, parents, style & beauty, entertainment, food & drink, science & technology"
# What is said before and after the text, by task.
OPPU = {
    "news_categorize": (
        "among the following categories? Just answer with the category name without further explanation. "
        f"categories: [{NEWS}, business, sports, healthy living, women, politics, crime, culture & arts, "
        "religion]\n article: TEXT category:"
    ),
    "movie_tagging": "social commentary, violence, true story]\n description: TEXT tag:",
    "product_rating": "3, 4, or 5 without further explanation. review: TEXT\n score:",
    "news_headline": "Generate a headline for the following article: TEXT\n headline:",
    "scholarly_title": "Generate a title for the following abstract of a paper.\n abstract: TEXT title:",
    "tweet_paraphrase": (
        "Paraphrase the following text into tweet without any explanation before or after it.\n "
        "text: TEXT tweet:"
    ),
}


@pytest.mark.parametrize("name", LAMP)
def test_oppu_s_prompts_and_the_paper_s_decoding(name: str) -> None:
    lamp, oppu = TASKS[name], with_prompts(TASKS[name], "oppu")
    item = {lamp.text_field: "TEXT", lamp.gold_field: "x"}
    assert oppu.prompt(item).endswith(OPPU[name]) and oppu.target(item) == " x"
    assert (oppu.stop, oppu.answer_tokens, oppu.frequency_penalty) == ((), 200, 0)
    assert oppu.parse(" x\ny ") == "x\ny", "nothing is cut from an answer"
    oppu, lamp = oppu.resolved(False), lamp.resolved(False)
    decoding = {key: getattr(lamp, key) for key in ("stop", "answer_tokens", "frequency_penalty")}
    assert replace(oppu, template=lamp.template, **decoding) == lamp, "and all else stays"
    assert "\n" not in lamp.prompt(item)


@pytest.mark.parametrize("name", LAMP)
def test_prompts_are_known_by_their_words(name: str) -> None:
    task = TASKS[name]
    assert prompts_of(task) == "lamp" and prompts_of(with_prompts(task, "oppu")) == "oppu"
    own = replace(task, template=f"{{{task.text_field}}} so", history_template="")
    assert prompts_of(own) == "task" and with_prompts(own, "task") == own
    assert with_prompts(own, "lamp") == task
    assert prompts_of(TASKS["chat"]) == "task"


def test_a_folder_s_labels_and_fields_stay(tmp_path: Path) -> None:
    own = {"template": "{body}\ncategory:", "answer": " {kind}", "labels": ["a {b}", "c"], "answer_tokens": 5}
    (tmp_path / "task.json").write_text(json.dumps(own))
    item = {"body": "TEXT", "kind": "c"}
    lamp, oppu, task, default = (
        load_prompts(tmp_path, "news_categorize", prompts) for prompts in ("lamp", "oppu", "task", None)
    )
    assert lamp.prompt(item).endswith("categories: [a {b}, c] article: TEXT category:")
    assert oppu.prompt(item).endswith("categories: [a {b}, c]\n article: TEXT category:")
    assert lamp.target(item) == oppu.target(item) == " c"
    assert (lamp.labels, lamp.answer_tokens, oppu.labels) == (("a {b}", "c"), 5, ("a {b}", "c"))
    assert task == default and task.prompt(item) == "TEXT\ncategory:"
    assert [prompts_of(one) for one in (lamp, oppu, task)] == ["lamp", "oppu", "task"]


def test_prompts_that_there_are_not(tmp_path: Path) -> None:
    assert load_prompts(tmp_path, "news_headline") == TASKS["news_headline"]
    with pytest.raises(InvalidInput, match=r"holds no task\.json; try --prompts lamp or oppu"):
        load_prompts(tmp_path, "news_headline", "task")
    with pytest.raises(InvalidInput, match=f'no prompts "mine"; there are {", ".join(PROMPTS)}'):
        with_prompts(TASKS["news_headline"], "mine")
    with pytest.raises(InvalidInput, match="task chat is none of LaMP's"):
        with_prompts(TASKS["chat"], "oppu")
