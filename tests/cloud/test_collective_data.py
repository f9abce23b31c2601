"""What an operator's files may hold, and what is said about those that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perfit_cloud.collective.data import find_data, read_items, tokenise
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.tasks import TASKS

HEADLINE = TASKS["news_headline"]


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def lines(*items: Any) -> str:
    return "\n".join(json.dumps(item) for item in items) + "\n"


def test_jsonl_with_and_without_users(tmp_path: Path) -> None:
    text = lines(
        {"user_id": 7, "text": "a", "title": "b"},
        {"text": "c", "title": "d"},
        {"user_id": 7, "text": "e", "title": " "},
        {"user_id": 7, "text": "g", "title": "h", "more": 1},
    )
    items = read_items(write(tmp_path / "data.jsonl", text + "\n\n"), HEADLINE)
    assert items.users["7"] == [{"text": "a", "title": "b"}, {"text": "g", "title": "h"}]
    assert len(items.users) == 2 and items.dropped_empty == 1 and items.unnamed == 1
    assert items.source == f"{tmp_path.name}/data.jsonl"
    assert find_data(tmp_path) == tmp_path / "data.jsonl"


def test_numbers_are_ratings(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", lines({"text": "fine", "score": 4}))
    assert [*read_items(path, TASKS["product_rating"]).users.values()] == [[{"text": "fine", "score": "4"}]]


def query(name: Any, text: str, gold: str) -> dict[str, Any]:
    return {"id": name, "input": f"Generate a headline for the following article: {text}", "gold": gold}


def test_oppu_files_train_on_queries_else_on_profiles(tmp_path: Path) -> None:
    profile = [
        {"id": 1, "date": "2020-02-02", "text": "later", "title": "l"},
        {"id": 2, "date": "2019-02-02", "text": "first", "title": "f"},
    ]
    user = {"user_id": 1, "profile": profile, "query": [query(9, "now", "n")]}
    path = write(tmp_path / "user_others.json", [user])
    items = read_items(tmp_path, HEADLINE)
    assert items.kind == "query" and items.users == {"1": [{"text": "now", "title": "n"}]}
    # Queries with a label file beside are held out to test on.
    path = write(tmp_path / "user_top_100_history.json", [user])
    labels = {"task": "LaMP_4", "golds": [{"id": "9", "output": "n"}]}
    write(tmp_path / "user_top_100_history_label.json", labels)
    items = read_items(path, HEADLINE)
    assert items.kind == "profile"
    assert [item["text"] for item in items.users["1"]] == ["first", "later"]
    items = read_items(write(tmp_path / "p.json", [{"user_id": 1, "profile": profile}]), HEADLINE)
    assert items.kind == "profile" and len(items.users["1"]) == 2


def test_users_whose_profiles_are_left_aside_are_counted(tmp_path: Path, load: Any) -> None:
    profile = [{"id": 1, "text": "first", "title": "f"}]
    users: list[dict[str, Any]] = [{"user_id": n, "profile": profile, "query": []} for n in range(3)]
    path = write(tmp_path / "user_others.json", users)
    assert (read_items(path, HEADLINE).kind, read_items(path, HEADLINE).only_profiles) == ("profile", 0)
    users += [{"user_id": n, "query": [query(n, f"now {n}", "n")]} for n in (8, 9)]
    items = read_items(write(path, users), HEADLINE)
    assert set(items.users) == {"8", "9"} and items.only_profiles == 3
    corpus = tokenise(items, base=load("llama"), task=HEADLINE, seed=0)
    assert corpus.summary()["dropped"]["users_without_queries"] == 3


def test_lamp_s_own_files(tmp_path: Path) -> None:
    profile = [{"id": "100", "text": "old", "title": "o"}]
    questions = [{**query(f"{n}", f"now {n}", ""), "profile": profile} for n in (10, 11)]
    for question in questions:
        del question["gold"]
    path = write(tmp_path / "train_questions.json", questions)
    golds = [{"id": f"{n}", "output": f"t{n}"} for n in (11, 10)]
    write(tmp_path / "train_outputs.json", {"task": "LaMP_4", "golds": golds})
    items = read_items(path, HEADLINE)
    assert items.users == {
        "10": [{"text": "now 10", "title": "t10"}],
        "11": [{"text": "now 11", "title": "t11"}],
    }


def test_some_of_the_users(tmp_path: Path) -> None:
    rows = [{"user_id": f"u{n}", "text": f"a{n}", "title": "b"} for n in range(50)]
    items = read_items(write(tmp_path / "d.jsonl", lines(*rows)), HEADLINE)
    ten, twenty = items.first_users(10, seed=3), items.first_users(20, seed=3)
    assert len(ten.users) == 10 and set(ten.users) < set(twenty.users)
    assert ten.users == items.first_users(10, seed=3).users != items.first_users(10, seed=4).users
    assert list(ten.users) == [name for name in items.users if name in ten.users], "in the file's order"
    assert items.first_users(50, seed=0).users == items.users
    for count in (0, 51):
        with pytest.raises(InvalidInput, match="holds 50 users"):
            items.first_users(count, seed=0)


def test_line_separators_inside_a_line_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "one\u2028two", "title": "t"}')
    assert [*read_items(path, HEADLINE).users.values()] == [[{"text": "one\u2028two", "title": "t"}]]


GOOD = {"id": "5", "text": "a", "title": "b"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", "{\n", "d.jsonl: line 1: not JSON"),
        ("d.jsonl", "[" * 100_000, "d.jsonl: line 1: not JSON"),
        ("d.jsonl", lines(GOOD, {"text": "a"}), 'd.jsonl: line 2: field "title" is missing'),
        ("d.jsonl", lines({"text": ["a"], "title": "b"}), 'line 1: field "text" should be text'),
        ("d.jsonl", lines({**GOOD, "user_id": [1]}), 'line 1: field "user_id" should be text'),
        ("d.jsonl", lines([1]), "line 1: it should be an object"),
        ("d.jsonl", "", "holds no item"),
        ("d.jsonl", "<!DOCTYPE html><html>404</html>", "d.jsonl: an HTML page"),
        ("u.json", "\n <html>", "u.json: an HTML page"),
        ("u.json", "[", "u.json: not JSON"),
        ("u.json", {"a": 1}, "should be a list of users"),
        ("u.json", [], "holds no item"),
        ("u.json", [{"user_id": 3, "profile": 1}], 'u.json: user 3: field "profile" should be a list'),
    ],
)
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


def test_split_is_by_user_and_long_ones_are_cut(tmp_path: Path, load: Any) -> None:
    base = load("llama")  # context of 256 tokens
    rows = [{"user_id": u, "text": f"cat {u} {i}", "title": "the mat"} for u in range(50) for i in range(10)]
    rows.append({"user_id": 1, "text": " ".join(["z q x"] * 200), "title": "long"})
    rows.append({"user_id": 1, "text": "the cat", "title": "z q x " * 100})
    items = read_items(write(tmp_path / "d.jsonl", lines(*rows)), HEADLINE)
    corpus = tokenise(items, base=base, task=HEADLINE, seed=0)
    summary = corpus.summary()
    assert summary["dropped"] == {"empty_field": 0, "too_long": 1, "users_without_queries": 0}
    assert summary["shortened"] == 1
    assert summary["token_cap"] == 256 and summary["examples"] == 501 and summary["users"] == 50
    assert 100 <= len(corpus.validation) <= 150
    assert len(corpus.train) + corpus.validation_users == 50
    pairs = corpus.examples() + corpus.validation
    prompt, target = max(pairs, key=lambda pair: len(pair[0]))
    assert len(prompt) + len(target) == 256 and target == base.encode_target(" long")
    whole = base.encode(HEADLINE.prompt(rows[-2]))
    assert prompt[:10] == whole[:10] and prompt[-10:] == whole[-10:], "instruction and cue stay"
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
        assert (items.kind, sum(map(len, items.users.values())), items.dropped_empty) == ("query", count, 0)
