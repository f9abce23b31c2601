"""Positions, presets and tasks against the paper's and LaMP's own numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perfit_shared.errors import InvalidData, InvalidInput, NotFound
from perfit_shared.positions import Positions
from perfit_shared.presets import PRESETS, preset_for
from perfit_shared.task import PENALTIES
from perfit_shared.tasks import TASKS, Example, Task, load_task, task_named
from perfit_shared.types import Sampling


@pytest.mark.parametrize(
    ("text", "length", "want"),
    [
        ("f7+l7", 20, [*range(7), *range(13, 20)]),
        ("f7+l7", 9, [0, 1, 2, 3, 5, 6, 7, 8]),  # 9 // 2 = 4 of each
        ("f7+l7", 2, [0, 1]),
        ("f7+l7", 1, []),
        ("l7", 10, [5, 6, 7, 8, 9]),
        ("f2", 10, [0, 1]),
        ("s1+f7+l7", 20, [*range(1, 8), *range(13, 20)]),
        ("s1+f7+l7", 9, [1, 2, 3, 4, 5, 6, 7, 8]),
        ("s1+f7+l7", 4, [1, 2, 3]),  # the last ones are the same with and without a sink
        ("s1+f7+l7", 2, [1]),
        ("s1+f7", 2, [1]),
        ("s4+f2", 3, []),
        ("s4+f2+l2", 5, [3, 4]),
        ("s2+f2", 10, [2, 3]),
    ],
)
def test_positions(text: str, length: int, want: list[int]) -> None:
    assert Positions.parse(text).indices(length) == want
    assert str(Positions.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "f7l7",
        "f7+",
        "+l7",
        "l7+f7",
        "f0",
        "l-1",
        "f7+l7 ",
        "f7+l7\n",
        "f1000",
        "f٣",
        "s1",
        "s1+l7",
        "s1f7",
        "f7+s1",
        "s-1+f7",
        "s1+",
        "s٣+f7",
        "s1000+f7",
    ],
)
def test_positions_that_are_none(text: str) -> None:
    with pytest.raises(InvalidInput):
        Positions.parse(text)


def test_no_skipped_token_is_written_as_before() -> None:
    # But where a model's sinks would be left out, it can be said that they are not to be.
    assert [Positions.parse(text).explicit() for text in ("f7+l7", "s1+f7", "l7")] == [
        "s0+f7+l7",
        "s1+f7",
        "l7",
    ]
    assert str(Positions.parse("s0+f7+l7")) == "f7+l7"
    assert Positions.parse("s0+f7+l7") == Positions.parse("f7+l7") == Positions(7, 7)


def test_presets_are_table_9() -> None:
    rows = {
        "news_categorize": (16, 32, (14, 15, 16), "f7+l7", 6),
        "movie_tagging": (32, 4, (14, 15), "f7+l7", 4),
        "product_rating": (32, 4, (14, 15, 16), "l7", 4),
        "news_headline": (32, 4, (14, 15, 16), "l7", 4),
        "scholarly_title": (32, 8, (15,), "f7+l7", 4),
        "tweet_paraphrase": (32, 16, (14, 15), "f7+l7", 4),
    }
    for name, row in rows.items():
        p = preset_for(name)
        assert (p.collective_rank, p.personal_rank, p.paper_layers, p.positions, p.epochs) == row
        assert p.layers_for(32) == p.paper_layers
        for blocks in range(len(p.paper_layers), 81):
            layers = p.layers_for(blocks)
            assert len(set(layers)) == len(p.paper_layers)
            assert list(layers) == sorted(layers)
            assert layers[-1] < blocks
    # Llama-2-7B: 2 layers × 32 × 2·4096 is 0.0078 % of 6.74 billion, as the paper says of LaMP-2M.
    spec = PRESETS["movie_tagging"].spec(blocks=32, hidden_size=4096)
    assert spec.personal_parameters() == 2 * 4 * (2 * 4096 + 1)
    assert 2 * spec.collective_rank * 2 * 4096 / 6.74e9 == pytest.approx(0.0078e-2, rel=0.01)


def test_appendix_e4_has_the_paper_s_layers_for_every_backbone() -> None:
    """They were mapped to depth, as those of Table 9: 6;8;10 on a backbone of 28 blocks."""
    preset = preset_for("appendix_e4")
    for blocks in (12, 16, 28, 32):
        assert preset.layers_for(blocks) == (7, 9, 11)
        line = preset.mapping(preset.spec(blocks=blocks, hidden_size=64), blocks=blocks, given=False)
        assert line == (
            f"layers 7;9;11 of {blocks} (the paper's, for every depth), positions f7+l7, ranks 32/32"
        )
    assert preset.layers_for(8) == (1, 2, 3)
    spec = preset.spec(blocks=8, hidden_size=64)
    assert "of 8 (from 7;9;11 of 32)" in preset.mapping(spec, blocks=8, given=False)
    table_9 = preset_for("movie_tagging")
    assert "layers 7;8 of 16 (from 14;15 of 32)" in table_9.mapping(
        table_9.spec(blocks=16, hidden_size=64), blocks=16, given=False
    )
    assert "(as given)" in preset.mapping(spec, blocks=8, given=True)


def test_presets_say_what_cannot_be() -> None:
    with pytest.raises(NotFound, match="news_headline"):
        preset_for("nothing")
    with pytest.raises(InvalidInput, match="blocks"):
        PRESETS["news_headline"].layers_for(2)
    with pytest.raises(InvalidInput, match="blocks 0 to 5"):
        PRESETS["news_headline"].spec(blocks=6, hidden_size=8, layers=(6,))


def test_tasks_read_lamp_queries_back_into_the_form_of_the_history() -> None:
    gold = {
        "news_categorize": ("category", "sports"),
        "news_headline": ("title", "A Title"),
        "movie_tagging": ("tag", "comedy"),
        "product_rating": ("score", "4"),
        "scholarly_title": ("title", "On X"),
        "tweet_paraphrase": ("text", "hi"),
    }
    for name, (field, answer) in gold.items():
        task = task_named(name)
        item = {task.text_field: "Some text: with a colon.", field: answer}
        prompt = task.prompt(item)
        cue = prompt[prompt.rindex(" ") :]
        query = prompt.removesuffix(cue)  # LaMP's own input has no cue
        assert task.item_from_query(query, answer) == item
        assert task.target(item) == f" {answer}"
        assert task.parse(f" {answer}\nmore") == answer
        assert Task.from_json(task.to_json()) == task
    with pytest.raises(InvalidData, match="article"):
        TASKS["news_headline"].item_from_query("Paraphrase this", "x")


# What LaMP's questions ask: task → input without its article.
ASKED = {
    "news_categorize": "Which category does this article relate to among the following categories? Just "
    "answer with the category name without further explanation. categories: [women, religion] article:",
    "movie_tagging": "Which tag does this movie relate to among the following tags? Just answer with the tag "
    "name without further explanation. tags: [sci-fi, based on a book] description:",
    "product_rating": "What is the score of the following review on a scale of 1 to 5? just answer with 1, "
    "2, 3, 4, or 5 without further explanation. review:",
    "news_headline": "Generate a headline for the following article:",
    "scholarly_title": "Generate a title for the following abstract of a paper:",
    "tweet_paraphrase": "Paraphrase the following tweet without any explanation before or after it:",
}


@pytest.mark.parametrize("name", ASKED)
def test_articles_are_cut_out_of_lamp_s_questions(name: str) -> None:
    task = TASKS[name]
    text = 'An article: "description: none"; review: 5. paper: it.'
    assert task.item_from_query(f"{ASKED[name]} {text}", "g")[task.text_field] == text
    assert task.item_from_query(f"{ASKED[name]}\n{text}", "g")[task.text_field] == text
    assert task.item_from_query(ASKED[name], "g")[task.text_field] == ""


def test_labels_are_lamp_s_and_asked_for() -> None:
    for name, count in (("news_categorize", 15), ("movie_tagging", 15), ("product_rating", 5)):
        task = TASKS[name]
        assert len(set(task.labels)) == count
        if count == 15:
            listed = task.template.split("[")[1].split("]")[0].split(", ")
            assert sorted(listed) == sorted(task.labels)
        for label in task.labels:
            item = dict.fromkeys(task.field_names, label)
            assert task.parse(task.target(item) + "\nanything") == label


def test_fields_are_cut_in_training_only() -> None:
    task = task_named("news_headline")
    item = {"text": "word " * 1000, "title": "t"}
    assert task.example(item).prompt.count("word") == 768
    assert task.prompt(item).count("word") == 1000
    long = {"text": "t", "title": "word " * 1000}
    assert task.example(long).target.count("word") == 768
    assert task.target(long).count("word") == 1000
    # A chat's reply would learn to stop in the middle.
    chat = {"prompt": "word " * 1000, "reply": "word " * 1000}
    example = TASKS["chat"].example(chat)
    assert (example.prompt.count("word"), example.target.count("word")) == (768, 1000)


def test_items_without_the_template_s_fields_take_the_history_s() -> None:
    task = TASKS["tweet_paraphrase"]
    assert task.example({"text": "hi", "title": "x"}) == Example("tweet:", " hi")
    whole = {"input": "hello", "text": "hi"}
    assert task.prompt(whole).endswith("before or after it: hello tweet:")
    assert task.fields_of({"id": 1, **whole}) == ("input", "text")
    assert task.fields_of({"text": "hi"}) == ("text",)
    with pytest.raises(InvalidData, match='"input" is missing or empty'):
        task.prompt({"input": "", "text": "hi"})
    with pytest.raises(InvalidData, match='"text" is missing or empty'):
        task.example({"title": "x"})
    # Only where a task has such a template.
    assert TASKS["news_headline"].fields_of({"title": "x"}) == ("text", "title")
    with pytest.raises(InvalidData, match='"text" is missing'):
        TASKS["news_headline"].example({"title": "x"})


def test_the_history_s_template_travels_and_is_left_out_where_there_is_none() -> None:
    """A device or an artefact.json from before there was one knows the other keys alone."""
    tweets = TASKS["tweet_paraphrase"]
    assert Task.from_json(tweets.to_json()) == tweets
    assert "history_template" not in json.loads(TASKS["news_headline"].to_json())
    before = json.loads(tweets.to_json())
    del before["history_template"]
    assert Task(**before).example({"input": "a", "text": "b"}).prompt.endswith("a tweet:")


def test_tasks_of_artefacts_made_before_are_read() -> None:
    """As version 0.1.0 wrote them into artefact.json."""
    old = {
        "name": "news_categorize",
        "template": "Which category? article: {text} category:",
        "answer": " {category}",
        "metric": "accuracy",
        "marker": "article: ",
        "labels": ["sports", "travel"],
        "stop": ["\n"],
        "answer_tokens": 12,
        "lamp": "LaMP_2N",
        "chat": False,
    }
    assert json.loads(Task.from_json(json.dumps(old)).to_json()) == old


@pytest.mark.parametrize(
    "item", [{}, {"text": " ", "title": "x"}, {"text": "a", "title": None}, {"text": "a", "title": 3}]
)
def test_items_without_their_fields(item: dict[str, str]) -> None:
    with pytest.raises(InvalidData, match="missing or empty"):
        task_named("news_headline").example(item)


@pytest.mark.parametrize(
    "wrong",
    [
        '{"template": "no field"}',
        '{"answer": "{a} {b}"}',
        '{"colour": 1}',
        "[1]",
        "<html>",
        '{"task": "chat"}',
        '{"template": "{0}"}',
        '{"template": "{text!r.__class__}{"}',
        '{"name": "x"}',
        '{"metric": "mae", "metric": "rouge_1"}',
        '{"labels": ["' + "x" * (1 << 20) + '"]}',
    ],
    ids=lambda wrong: wrong[:24],
)
def test_task_files_that_are_wrong_name_the_file(tmp_path: Path, wrong: str) -> None:
    (tmp_path / "task.json").write_text(wrong)
    with pytest.raises(InvalidData, match=r"task\.json"):
        load_task(tmp_path, "news_headline")


def test_a_task_file_says_that_it_is_too_large_or_says_a_thing_twice(tmp_path: Path) -> None:
    for wrong, why in (("x" * (1 << 20) + '"', "1 MiB"), ('mae", "metric": "rouge_1"', "twice")):
        (tmp_path / "task.json").write_text('{"metric": "' + wrong + "}")
        with pytest.raises(InvalidData, match=why):
            load_task(tmp_path, "news_headline")


@pytest.mark.parametrize(
    "wrong",
    [
        {"template": "{text:>300000000}"},
        {"template": "{text!r}"},
        {"template": "{text:{text}}"},
        {"answer": "{title:>9}"},
        {"answer": "{title!s}"},
        {"template": "{}"},
        {"template": "x" * 16_385 + "{text}"},
        {"template": "{text}" * 17},
        {"template": None},
        {"template": 5},
        {"template": "{text} \ud800"},
        {"answer": ["{title}"]},
        {"answer": "{title}" + "x" * 16_385},
        {"marker": None},
        {"marker": 1},
        {"lamp": 4},
        {"lamp": None},
        {"metric": None},
        {"metric": ["mae"]},
        {"labels": "abc"},
        {"labels": [1]},
        {"labels": None},
        {"labels": [""]},
        {"labels": {"a": 1}},
        {"stop": "\n"},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": None},
        {"stop": ["a"] * 9},
        {"stop": ["é" * 33]},
        {"stop": ["\ud800"]},
        {"answer_tokens": 0},
        {"answer_tokens": -1},
        {"answer_tokens": 4097},
        {"answer_tokens": True},
        {"answer_tokens": 4.0},
        {"answer_tokens": "4"},
        {"answer_tokens": None},
        *({key: value} for key in PENALTIES for value in (2.1, -2.1, float("nan"), True, "1", None, [])),
        {"history_template": None},
        {"history_template": 1},
        {"history_template": "{text} {title}"},
        {"history_template": "{text}"},
        {"history_template": "{other}:"},
        {"history_template": "{"},
        {"history_template": "x" * 16_385},
        {"history_template": "{title:>9}"},
        {"chat": 1},
        {"chat": "yes"},
        {"chat": None},
        {"name": None},
        {"name": 5},
        {"name": "news\n"},
    ],
    ids=lambda wrong: json.dumps(wrong)[:40],
)
def test_tasks_of_a_hostile_cloud_are_invalid_data(wrong: dict[str, Any]) -> None:
    """{text:>300000000} made a prompt of 300 MB, and answer_tokens "4" a TypeError in `ask`."""
    values = json.loads(TASKS["news_headline"].to_json()) | wrong
    with pytest.raises(InvalidData):
        Task(**values)
    with pytest.raises(InvalidData):
        Task.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "5", "null", '{"name": 1}', "", "{"])
def test_what_is_no_task_is_invalid_data(text: str) -> None:
    with pytest.raises(InvalidData):
        Task.from_json(text)


def test_tasks_at_their_bounds() -> None:
    full = {"frequency_penalty": 2, "presence_penalty": -2.0}
    full |= {"stop": ["é" * 32] * 8, "answer_tokens": 4096, "template": "{{x}} {text}" + "y" * 16_000}
    task = Task(**json.loads(TASKS["news_headline"].to_json()) | full)
    assert task.stop == ("é" * 32,) * 8
    assert task.prompt({"text": "t"}).startswith("{x} ty")
    assert TASKS["tweet_paraphrase"].field_names == ("input", "text")


def test_a_task_file_overrides(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps({"template": "T: {text}", "labels": ["a", "b"]}))
    task = load_task(tmp_path, "news_categorize")
    assert (task.template, task.labels, task.metric) == ("T: {text}", ("a", "b"), "accuracy")
    (tmp_path / "task.json").write_text(json.dumps({"history_template": "said:"}))
    assert load_task(tmp_path, "tweet_paraphrase").prompt({"text": "hi"}) == "said:"
    assert load_task(tmp_path / "none", "news_categorize") == TASKS["news_categorize"]


def test_an_answer_is_asked_for_as_the_task_and_the_caller_say(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text(json.dumps({"task": "reply", "frequency_penalty": 0.5}))
    task = Task.from_json(load_task(tmp_path).to_json())
    assert task.sampling() == Sampling(128, stop=task.stop, frequency_penalty=0.5)
    assert task.sampling(most=64, max_new_tokens=None, frequency_penalty=None).max_new_tokens == 64
    own = task.sampling(max_new_tokens=9, frequency_penalty=0.0, presence_penalty=1.0, stop=())
    assert own == Sampling(9, presence_penalty=1.0)
    assert "frequency_penalty" not in json.loads(replace(task, frequency_penalty=0.0).to_json())


@pytest.mark.brief
def test_the_brief_s_tasks(brief: Path) -> None:
    folder = brief / "data" / "lamp_news" / "news_categorize"
    task = load_task(folder, "news_categorize")
    assert task.prompt({"text": "x"}) == "description: x\ncategory:"
    assert len(task.labels) == 20
