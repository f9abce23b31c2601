"""History files in and out of the vault: formats, what is wrong with them, and forgetting."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.vaults import sealed_rows

from perfit_device import history
from perfit_device.history import HistoryItem
from perfit_device.history.importers import Choices, Report, read_history
from perfit_device.history.items import store as store_item
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidData, InvalidInput, NotFound
from perfit_shared.lamp import item_of
from perfit_shared.tasks import TASKS, Example, load_task

TASK = TASKS["news_headline"]


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with Vault.create(tmp_path / "v.db", "x", kdf=KdfParams(32, 1, 4)) as opened:
        yield opened


def write(tmp_path: Path, name: str, value: Any) -> Path:
    path = tmp_path / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


ROWS = [{"text": f"text {n}", "title": f"title {n}", "date": f"2024-02-0{n + 1}"} for n in range(3)]
CUE = "Generate a headline for the following article: "


def lamp_user(uid: int) -> dict[str, Any]:
    profile = [
        {"id": f"{uid}{n}", "text": f"old {uid} {n}", "title": "t", "date": "2020-01-01"} for n in range(2)
    ]
    query = [{"id": f"q{uid}", "input": f"{CUE}new {uid}", "gold": "g"}]
    return {"user_id": uid, "profile": profile, "query": query}


LAMP = [lamp_user(uid) for uid in (7, 8, 900)]


def test_jsonl_csv_and_json_lists_say_the_same(tmp_path: Path) -> None:
    jsonl = write(tmp_path, "a.jsonl", "\ufeff" + "\n\n".join(json.dumps(r) for r in ROWS) + "\n")
    array = write(tmp_path, "b.json", ROWS)
    table = tmp_path / "c.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["date", "text", "title", "note"])
        writer.writeheader()
        writer.writerows(ROWS)
    read = [read_history(path, TASK) for path in (jsonl, array, table)]
    assert read[0] == read[1] == read[2]
    assert read[0][0].fields == {"text": "text 0", "title": "title 0"}
    assert read[0][0].date == "2024-02-01"


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'text,title\n"one, ""two""\nthree",t\n')
    assert read_history(path, TASK)[0].fields["text"] == 'one, "two"\nthree'


def test_line_separators_inside_a_line_are_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "one\u2028two", "title": "t"}')
    assert read_history(path, TASK)[0].fields["text"] == "one\u2028two"


def test_lamp_files(tmp_path: Path) -> None:
    path = write(tmp_path, "user_top_100_history.json", LAMP)
    items = read_history(path, TASK, choices=Choices(user="8"))
    assert [(i.fields["text"], i.part) for i in items] == [
        ("old 8 0", ""),
        ("old 8 1", ""),
        ("new 8", "test"),
    ]
    assert read_history(path, TASK, choices=Choices(user="2"))[0].fields["text"] == "old 900 0", "an index"
    with pytest.raises(InvalidData, match="3 users; say which with --user"):
        read_history(path, TASK)
    with pytest.raises(InvalidData, match='no user "44"; there are 7, 8, 900'):
        read_history(path, TASK, choices=Choices(user="44"))
    assert len(read_history(write(tmp_path, "one.json", LAMP[:1]), TASK)) == 3


# name → a profile item's fields, query.input before the text, gold, field of the gold
OPPU: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "news_categorize": (
        {"text": "old", "title": "t", "category": "sports"},
        "Which category does this article relate to among the following categories? Just answer with the "
        "category name without further explanation. categories: [sports, travel] article: ",
        "travel",
        "category",
    ),
    "movie_tagging": (
        {"description": "old", "tag": "comedy"},
        "Which tag does this movie relate to among the following tags? Just answer with the tag name without "
        "further explanation. tags: [comedy, classic] description: ",
        "classic",
        "tag",
    ),
    "product_rating": (
        {"text": "old", "score": "4"},
        "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 "
        "without further explanation. review: ",
        "2",
        "score",
    ),
    "news_headline": ({"text": "old", "title": "t"}, CUE, "g", "title"),
    "scholarly_title": (
        {"title": "t", "abstract": "old"},
        "Generate a title for the following abstract of a paper: ",
        "g",
        "title",
    ),
    "tweet_paraphrase": (
        {"text": "old"},
        "Paraphrase the following tweet without any explanation before or after it: ",
        "g",
        "text",
    ),
}


@pytest.mark.parametrize("name", OPPU)
def test_every_task_s_lamp_files(tmp_path: Path, name: str) -> None:
    fields, cue, gold, gold_field = OPPU[name]
    task = TASKS[name]
    user = {
        "user_id": 7,
        "profile": [{"id": "70", "date": "2020-01-01", **fields}],
        "query": [{"id": "q", "input": f"{cue}new", "gold": gold}],
    }
    items = read_history(write(tmp_path, "user_top_100_history.json", [user]), task)
    query = {task.text_field: "new", gold_field: gold}
    assert [i.part for i in items] == ["", "test"]
    # LaMP-7's profiles lack the paraphrases; once the whole file was refused for it.
    known = [key for key in task.field_names if key in fields]
    assert items[0].fields == {key: fields[key] for key in known}
    assert known == (["text"] if name == "tweet_paraphrase" else list(task.field_names))
    assert items[1].fields == query


def test_tweets_are_learned_from_the_cue_alone_and_kept(tmp_path: Path, vault: Vault) -> None:
    task = TASKS["tweet_paraphrase"]
    profile = [{"id": str(n), "text": f"old {n}"} for n in range(12)]
    query = [{"id": "q", "input": f"{OPPU[task.name][1]}new", "gold": "g"}]
    user = {"user_id": 1, "profile": profile, "query": query}
    history.add(vault, read_history(write(tmp_path, "u.json", [user]), task))
    split = history.split(history.load(vault, task.name))
    assert len(split.test) == 1 and len(split.train) + len(split.gate) == 12
    assert task.example(split.train[0].fields) == Example("tweet:", " old 0")
    assert task.prompt(split.test[0].fields) == f"{OPPU[task.name][1]}new tweet:"


def test_profiles_without_the_task_s_fields_leave_the_queries(tmp_path: Path) -> None:
    bare = {**LAMP[0], "profile": [{"id": "70", "text": "no title"}]}
    items = read_history(write(tmp_path, "u.json", [bare]), TASK)
    assert [(i.fields, i.part) for i in items] == [({"text": "new 7", "title": "g"}, "")]


def test_golds_in_a_file_of_their_own(tmp_path: Path) -> None:
    bare = {**LAMP[0], "query": [{"id": "q7", "input": f"{CUE}new 7"}]}
    path = write(tmp_path, "user_top_100_history.json", [bare])
    with pytest.raises(InvalidData, match='query q7: field "gold" is missing, and no label file'):
        read_history(path, TASK)
    golds = {"task": "LaMP_4", "golds": [{"id": "q7", "output": "beside"}]}
    labels = write(tmp_path, "user_top_100_history_label.json", golds)
    assert read_history(path, TASK)[-1].fields["title"] == "beside"
    labels.write_text("<html>")
    with pytest.raises(InvalidData, match=r"_label\.json: an HTML page"):
        read_history(path, TASK)


def test_entries_with_an_empty_field_are_left_out_and_told(tmp_path: Path) -> None:
    user = lamp_user(1)
    user["profile"].append({"id": "x", "text": " ", "title": "t", "date": "2020-01-01"})
    messages: list[str] = []
    assert len(read_history(write(tmp_path, "u.json", [user]), TASK, report=Report(messages.append))) == 3
    assert messages == ["1 entries of the file have an empty field and were left out"]


def test_dates_that_cannot_order_a_profile_are_dropped(tmp_path: Path) -> None:
    """Undated examples count as older than dated ones, so a mixed profile would change its order."""
    user = lamp_user(1)
    user["profile"][1]["date"] = "last spring"
    items = read_history(write(tmp_path, "u.json", [user]), TASK)
    assert [(i.fields["text"], i.date) for i in items[:2]] == [("old 1 0", ""), ("old 1 1", "")]


@pytest.mark.brief
@pytest.mark.parametrize("name", ["news_headline", "news_categorize"])
def test_the_briefs_files(name: str, vault: Vault, brief: Path) -> None:
    folder = brief / "data" / "lamp_news" / name
    task = load_task(folder, name)
    items = read_history(folder / "user_top_100_history.json", task, choices=Choices(user="12"))
    added, known = history.add(vault, items)
    assert added + known == len(items) and added > 70
    split = history.split(history.load(vault, name))
    assert min(len(split.train), len(split.gate), len(split.test)) > 5


def broken_lamp(**changes: Any) -> list[dict[str, Any]]:
    return [{**LAMP[0], **changes}]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("a.json", "<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
        ("a.jsonl", "  <html>", "an HTML page"),
        ("a.jsonl", '{"text": "\\ud800", "title": "x"}', 'line 1: field "text" is no text'),
        ("a.json", [{"text": "x", "title": "\ud800"}], 'item 0: field "title" is no text'),
        ("a.json", '[{"text": "x"', "not JSON"),
        ("a.jsonl", '{"text": "x", "title": "y"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", '{"text": "x"}', 'line 1: field "title" is missing'),
        ("a.jsonl", '{"text": " ", "title": "y"}', 'line 1: field "text" is empty'),
        ("a.jsonl", '{"text": ["x"], "title": "y"}', 'line 1: field "text"'),
        ("a.jsonl", '{"text": true, "title": "y"}', 'line 1: field "text"'),
        ("a.jsonl", '"just text"', "line 1: it should be an object"),
        ("a.jsonl", '{"text": "x", "title": "y", "date": "yesterday"}', 'field "date"'),
        ("a.jsonl", '{"text": "x", "title": "y", "date": 5}', 'field "date"'),
        ("a.jsonl", '{"text": "x", "title": "y", "part": "best"}', 'field "part"'),
        ("a.jsonl", "", "no examples"),
        ("a.json", "[]", "no examples"),
        ("a.json", "[1, 2]", "list of objects"),
        ("a.json", [{"text": "x"}], 'item 0: field "title"'),
        ("a.csv", "text,title\nx\n", "row 2: it has not as many columns"),
        ("a.csv", "text,title\nx,y,z\n", "row 2: it has not as many columns"),
        ("a.csv", 'text,title\n"x,y\n', "not CSV"),
        ("a.csv", "body,title\nx,y\n", "the first row has no column text; it has body, title"),
        ("a.json", broken_lamp(profile={"a": 1}), 'user 7: field "profile" should be a list'),
        (
            "a.json",
            broken_lamp(profile=[{"text": "x", "title": "y"}, {"id": "p1", "text": "x"}]),
            'profile item p1: field "title"',
        ),
        ("a.json", broken_lamp(profile=[{"id": "p1", "text": "x"}], query=[]), 'item p1: field "title"'),
        ("a.json", broken_lamp(query=[{"id": "q1", "input": "x"}]), 'query q1: field "gold"'),
        (
            "a.json",
            broken_lamp(query=[{"id": "q1", "input": "no cue", "gold": "x"}]),
            "query q1: input lacks",
        ),
        ("a.json", "[" * 100_000, "not JSON"),
    ],
)
def test_malformed_files_name_file_item_and_field(tmp_path: Path, name: str, value: Any, says: str) -> None:
    path = write(tmp_path, name, value)
    with pytest.raises(InvalidData) as raised:
        read_history(path, TASK)
    assert str(raised.value).startswith(f"{path}: ") and says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "binary.csv"
    binary.write_bytes(b"text,title\ncaf\x81,x\n")
    for path, says in (
        (binary, "UTF-8"),
        (tmp_path / "none.csv", "No such file"),
        (tmp_path, "a folder of no mail"),
    ):
        with pytest.raises(InvalidData, match=says):
            read_history(path, TASK)


def test_import_is_all_or_nothing_and_never_twice(vault: Vault) -> None:
    items = [HistoryItem.make(TASK, row) for row in ROWS]
    assert history.add(vault, items) == (3, 0)
    assert history.add(vault, items) == (0, 3)

    def breaks() -> Iterator[HistoryItem]:
        yield HistoryItem.make(TASK, {"text": "new", "title": "new"})
        raise InvalidData("the next one is wrong")

    with pytest.raises(InvalidData):
        history.add(vault, breaks())
    assert len(history.load(vault)) == 3


def test_undated_examples_keep_their_order(vault: Vault) -> None:
    for n in (3, 1, 2):
        history.add(vault, [HistoryItem.make(TASK, {"text": f"t{n}", "title": "x"})])
    assert [i.fields["text"] for i in history.load(vault)] == ["t3", "t1", "t2"]


def test_labels_of_ones_own_are_welcome() -> None:
    item = HistoryItem.make(TASKS["news_categorize"], {"text": "x", "category": "tell mom"})
    assert item.fields["category"] == "tell mom"


@pytest.mark.parametrize("number", ["4", "4.0", "4e0", "-0.0", "4.5", "1e16"])
def test_ratings_may_be_numbers_and_are_written_as_in_stage_1(tmp_path: Path, number: str) -> None:
    task = TASKS["product_rating"]
    path = write(tmp_path, "a.jsonl", f'{{"text": "fine", "score": {number}}}')
    (item,) = read_history(path, task)
    assert item.fields == item_of(json.loads(path.read_text()), task)
    if number in ("4", "4.0", "4e0"):
        assert item.fields["score"] == "4"


def test_forgetting_is_by_name_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "v.db"
    with Vault.create(path, "x", kdf=KdfParams(32, 1, 4)) as vault:
        history.add(vault, [HistoryItem.make(TASK, row) for row in ROWS])
        items = history.load(vault)
    sealed = sealed_rows(path, "example")
    with Vault.open(path, "x") as vault:
        assert history.forget(vault, history.find(items, [items[0].short, items[1].name])) == 2
        assert [i.name for i in history.load(vault)] == [items[2].name]
        for prefix, error in (("zzzz", NotFound), (items[0].short, NotFound), ("", NotFound)):
            with pytest.raises(error):
                history.find(history.load(vault), [prefix])
        with pytest.raises(InvalidInput):
            history.find([items[0], items[0]], [items[0].short])
    data = path.read_bytes()
    assert sum(row[:16] in data for row in sealed) == 1


@pytest.mark.parametrize("kind", ["checkpoint", "refused", "finished"])
def test_forgetting_drops_what_saw_it(vault: Vault, kind: str) -> None:
    """Digests of forgotten texts stayed in `refused` and `finished`: guess a text, and they confirm it."""
    history.add(vault, [HistoryItem.make(TASK, row) for row in ROWS])
    vault.put(kind, "cloud/headlines/news_headline", b"x")
    vault.put(kind, "cloud/news_categorize/news_categorize", b"x")
    history.forget(vault, history.load(vault)[:1])
    assert list(vault.list(kind)) == ["cloud/news_categorize/news_categorize"]


def test_the_tasks_are_known_without_the_examples(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ask without --task read the whole history to find the one that it has examples of."""

    def known(*expected: str, reads: int) -> None:
        read: list[str] = []
        listed = vault.list
        with monkeypatch.context() as patched:
            patched.setattr(vault, "list", lambda kind: [read.append(kind), listed(kind)][1])
            assert history.tasks(vault) == {*expected}
        assert len(read) == reads

    known(reads=1)  # nothing
    items = [HistoryItem.make(TASK, row) for row in ROWS]
    history.add(vault, [*items, replace(items[0], task="another")])
    known("another", TASK.name, reads=0)
    history.forget(vault, [item for item in history.load(vault) if item.task == "another"])
    known(TASK.name, reads=0)
    # An earlier perfit adds without a word of the tasks.
    store_item(vault, replace(items[0], task="third"))
    vault.put("counter", "history", b"4")
    known("third", TASK.name, reads=1)
    history.add(vault, items[:1])
    known("third", TASK.name, reads=0)
