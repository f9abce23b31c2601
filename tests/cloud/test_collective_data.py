"""What an operator's files may hold, and what is said about those that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perfit_cloud.collective.data import find_data, read_items, tokenise
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import TASKS

HEADLINE = TASKS["news_headline"]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def lines(*items: Any) -> str:
    return "\n".join(json.dumps(item) for item in items) + "\n"


def test_jsonl_with_and_without_users(tmp_path: Path) -> None:
    text = lines(
        {"user_id": 7, "text": "a", "title": "b"}, {"text": "c", "title": "d"},
        {"user_id": 7, "text": "e", "title": " "}, {"user_id": 7, "text": "g", "title": "h", "more": 1},
    )  # fmt: skip
    items = read_items(write(tmp_path / "data.jsonl", text + "\n\n"), HEADLINE)
    assert items.users["7"] == [{"text": "a", "title": "b"}, {"text": "g", "title": "h"}]
    assert len(items.users) == 2 and items.dropped_empty == 1
    assert items.source == f"{tmp_path.name}/data.jsonl"
    assert find_data(tmp_path) == tmp_path / "data.jsonl"


def test_numbers_are_ratings(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", lines({"text": "fine", "score": 4}))
    assert [*read_items(path, TASKS["product_rating"]).users.values()] == [[{"text": "fine", "score": "4"}]]


def test_oppu_profile_sorted_by_date_else_query(tmp_path: Path) -> None:
    profile = [
        {"id": 1, "date": "2020-02-02", "text": "later", "title": "l"},
        {"id": 2, "date": "2019-02-02", "text": "first", "title": "f"},
    ]
    query = [{"id": 9, "input": "Generate a headline for the following article: now", "gold": "n"}]
    path = write(tmp_path / "user_others.json", [{"user_id": 1, "profile": profile, "query": query}])
    items = read_items(path, HEADLINE)
    assert items.kind == "profile"
    assert [item["text"] for item in items.users["1"]] == ["first", "later"]
    bare = [{"id": 1, "text": "no title"}]
    path = write(tmp_path / "user_others.json", [{"user_id": 1, "profile": bare, "query": query}])
    items = read_items(path, HEADLINE)
    assert items.kind == "query" and items.users["1"] == [{"text": "now", "title": "n"}]


GOOD = {"id": "5", "text": "a", "title": "b"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "{\n", "d.jsonl, line 1: not JSON"),
        ("d.jsonl", lines(GOOD, {"text": "a"}), 'd.jsonl, line 2: field "title" is missing'),
        ("d.jsonl", lines({"text": ["a"], "title": "b"}), 'line 1: field "text" should be text'),
        ("d.jsonl", lines([1]), "line 1: should be an object"),
        ("d.jsonl", "", "holds no item"),
        ("d.jsonl", "<!DOCTYPE html><html>404</html>", "is an HTML page"),
        ("u.json", "\n <html>", "is an HTML page"),
        ("u.json", "[", "u.json: not JSON"),
        ("u.json", {"a": 1}, "should be a list of users"),
        ("u.json", [{"profile": []}], 'u.json, user 1: field "user_id" is missing'),
        ("u.json", [{"user_id": 3, "profile": 1}], 'user 3: field "profile" should be a list'),
        (
            "u.json",
            [{"user_id": 3, "profile": [GOOD, {"id": "6", "text": "x"}]}],
            'u.json, user 3, profile item 6: field "title" is missing',
        ),
        (
            "u.json",
            [{"user_id": 3, "profile": [{"id": 1, "x": ""}], "query": [{"id": 8, "input": "i"}]}],
            'user 3, query item 8: field "gold" is missing',
        ),
        (
            "u.json",
            [{"user_id": 3, "profile": [{"id": 1}], "query": [{"id": 8, "input": "i", "gold": "g"}]}],
            'user 3, query item 8: input lacks "article:"',
        ),
    ],
)  # fmt: skip
def test_malformed_files_are_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(InvalidData) as caught:
        read_items(write(tmp_path / name, content), HEADLINE)
    assert message in str(caught.value)


def test_missing_files_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="no file or folder"):
        find_data(tmp_path / "nothing")
    with pytest.raises(InvalidData, match="should hold user_others"):
        find_data(tmp_path)
    (tmp_path / "d.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidData, match="UTF-8"):
        read_items(tmp_path / "d.jsonl", HEADLINE)


def test_split_is_by_user_and_too_long_ones_are_counted(tmp_path: Path, load: Any) -> None:
    base = load("llama")  # context of 256 tokens
    rows = [{"user_id": u, "text": f"cat {u} {i}", "title": "the mat"} for u in range(50) for i in range(10)]
    rows.append({"user_id": 1, "text": "z q x " * 200, "title": "long"})
    items = read_items(write(tmp_path / "d.jsonl", lines(*rows)), HEADLINE)
    corpus = tokenise(items, base=base, task=HEADLINE, seed=0)
    summary = corpus.summary()
    assert summary["dropped"] == {"empty_field": 0, "too_long": 1}
    assert summary["token_cap"] == 256 and summary["examples"] == 500 and summary["users"] == 50
    assert 100 <= len(corpus.validation) <= 150
    assert len(corpus.train) + corpus.validation_users == 50
    assert all(len(pairs) == 10 for pairs in corpus.train.values())
    assert corpus.digest() == tokenise(items, base=base, task=HEADLINE, seed=0).digest()
    assert corpus.digest() != tokenise(items, base=base, task=HEADLINE, seed=1).digest()


def test_one_user_alone_is_split_by_time(tmp_path: Path, load: Any) -> None:
    rows = [{"user_id": 1, "text": f"cat {i}", "title": "mat"} for i in range(20)]
    items = read_items(write(tmp_path / "d.jsonl", lines(*rows)), HEADLINE)
    corpus = tokenise(items, base=load("llama"), task=HEADLINE, seed=0)
    assert (len(corpus.examples()), len(corpus.validation), corpus.validation_users) == (18, 2, 0)
    assert corpus.summary()["users"] == 1
    items = read_items(write(tmp_path / "d.jsonl", lines(rows[0])), HEADLINE)
    with pytest.raises(InvalidData, match="fewer than two"):
        tokenise(items, base=load("llama"), task=HEADLINE, seed=0)


def test_chat_pairs(tmp_path: Path, load: Any) -> None:
    rows = [{"user_id": u, "prompt": "the cat", "reply": "the mat"} for u in range(4)]
    items = read_items(write(tmp_path / "d.jsonl", lines(*rows)), TASKS["chat"])
    base = load("llama")
    corpus = tokenise(items, base=base, task=TASKS["chat"], seed=0)
    assert corpus.examples()[0] == (base.encode_chat([("user", "the cat")]), base.encode_target("the mat"))


@pytest.mark.brief
def test_the_real_files(brief: Path) -> None:
    for name, count in (("news_headline", 5145), ("news_categorize", 4953)):
        items = read_items(brief / "data/lamp_news" / name, TASKS[name])
        assert (items.kind, sum(map(len, items.users.values())), items.dropped_empty) == ("profile", count, 0)
