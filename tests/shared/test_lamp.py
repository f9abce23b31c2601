"""LaMP's files and OPPU's: what is read of them, and what is said about those that are malformed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perfit_shared.errors import InvalidData
from perfit_shared.lamp import Entry, Users, labels_beside, read_golds, read_users, users_of
from perfit_shared.tasks import TASKS, load_task

HEADLINE, RATING, TWEETS = TASKS["news_headline"], TASKS["product_rating"], TASKS["tweet_paraphrase"]
ASK = "Generate a headline for the following article: "
TWEET = "Paraphrase the following tweet without any explanation before or after it: "


def write(path: Path, value: Any) -> Path:
    path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
    return path


def query(name: Any, text: str, gold: Any = None, ask: str = ASK) -> dict[str, Any]:
    return {"id": name, "input": ask + text, **({} if gold is None else {"gold": gold})}


def user(**changes: Any) -> dict[str, Any]:
    profile = [
        {"id": "71", "date": "2020-02-02", "text": "later", "title": "l", "source": "x", "views": 3},
        {"id": "70", "date": "2019", "text": " first\n", "title": "f"},
    ]
    return {"user_id": 7, "profile": profile, "query": [query("q7", "now", "n")], **changes}


def read(records: Any, task: Any = HEADLINE, golds: dict[str, str] | None = None) -> Users:
    return users_of(records, task, golds=golds or {}, source="test")


def test_an_oppu_file(tmp_path: Path) -> None:
    other = user(user_id="8", query=[query(9, "then", "t")], profile=[])
    found = read_users(write(tmp_path / "user_others.json", [user(), other]), HEADLINE)
    assert found.source == f"{tmp_path.name}/user_others.json"
    assert [u.user_id for u in found.users] == ["7", "8"]
    first = found.users[0]
    assert [entry.item for entry in first.profile] == [
        {"text": "first", "title": "f"},
        {"text": "later", "title": "l"},
    ]
    assert first.profile[1] == Entry("71", "2020-02-02", {"text": "later", "title": "l"}, {"source": "x"})
    assert first.query == (Entry("q7", "", {"text": "now", "title": "n"}, {"input": f"{ASK}now"}),)
    assert found.users[1].query[0].id == "9" and found.users[1].dated
    assert (found.dropped_empty, found.held_out, found.no_profiles, found.questions) == (
        0,
        False,
        False,
        False,
    )


def test_lamp_s_own_files(tmp_path: Path) -> None:
    item = {"id": "6000", "text": "old"}
    questions = [
        {**query(n, f"say {n}", ask=TWEET), "profile": [item], **more}
        for n, more in (("600", {}), ("601", {"user_id": 5}))
    ]
    path = write(tmp_path / "train_questions.json", questions)
    golds = [{"id": n, "output": f"said {n}"} for n in ("601", "600")]
    labels = write(tmp_path / "train_outputs.json", {"task": "LaMP_7", "golds": golds})
    assert labels_beside(path) == labels
    found = read_users(path, TWEETS)
    assert found == read_users(path, TWEETS, golds=labels)
    assert found.questions and not found.held_out
    assert [(u.user_id, u.person) for u in found.users] == [("600", None), ("601", 5)]
    assert found.users[0].query[0].item == {"input": "say 600", "text": "said 600"}
    assert found.users[0].profile == (Entry("6000", "", {"text": "old"}),)
    # Merged by LaMP's own script, which calls the gold "output".
    merged = [{**question, "output": "o"} for question in questions]
    assert read(merged, TWEETS).users[1].query[0].item["text"] == "o"


def test_numbers_are_text() -> None:
    items = [
        {"id": n, "text": "fine", "score": score, "date": 2000 - n}
        for n, score in enumerate((4, 5.0, "3", 2.5))
    ]
    ask = "just answer with 1, 2, 3, 4, or 5 without further explanation. review: "
    found = read([{"user_id": 1, "profile": items, "query": [query(1, "good", 5, ask)]}], RATING)
    assert [entry.item["score"] for entry in found.users[0].profile] == ["2.5", "3", "5", "4"]
    assert [entry.date for entry in found.users[0].profile] == ["1997", "1998", "1999", "2000"]
    assert found.users[0].query[0].item == {"text": "good", "score": "5"}


def test_profiles_that_dates_cannot_order_stand_as_they_are() -> None:
    for dates in (("2020-01-02", "2019-01-01", None), ("2020-01-02", "May 2019", "2018-01-01")):
        items = [{"id": n, "text": f"t{n}", "title": "x", "date": date} for n, date in enumerate(dates)]
        found = read([user(profile=items)]).users[0]
        assert [entry.id for entry in found.profile] == ["0", "1", "2"]
        assert not found.dated and found.profile[0].date == "2020-01-02"


def test_entries_with_an_empty_field_are_left_out_and_counted() -> None:
    profile = [
        *user()["profile"],
        {"id": 1, "text": " ", "title": "x"},
        {"id": 2, "text": "x", "title": None},
    ]
    queries = [query("a", "now", "n"), query("b", "", "n"), query("c", "now", " ")]
    found = read([user(profile=profile, query=queries)])
    assert len(found.users[0].profile) == 2 and [entry.id for entry in found.users[0].query] == ["a"]
    assert found.dropped_empty == 4 and [entry.id for entry in found.empty_queries] == ["b", "c"]


def test_labels_and_golds(tmp_path: Path) -> None:
    path = write(
        tmp_path / "user_top_100_history.json", [user(query=[query("1", "a"), query("2", "b", "two")])]
    )
    with pytest.raises(
        InvalidData, match='user 7: query 1: field "gold" is missing, and no label file has it'
    ):
        read_users(path, HEADLINE)
    labels = tmp_path / "elsewhere.json"
    write(labels, {"task": "LaMP_4", "golds": [{"id": 1, "output": " one "}, {"id": "2", "output": "two"}]})
    assert read_golds(labels) == {"1": "one", "2": "two"}
    found = read_users(path, HEADLINE, golds=labels)
    assert [entry.item["title"] for entry in found.users[0].query] == ["one", "two"] and found.held_out
    beside = write(tmp_path / "user_top_100_history_label.json", json.loads(labels.read_text()))
    assert read_users(path, HEADLINE) == found
    beside.write_text(beside.read_text().replace("two", "zwei"))
    with pytest.raises(InvalidData, match='user 7: query 2: field "gold" is not what the label file has'):
        read_users(path, HEADLINE)


def test_what_stage_1_learns_from() -> None:
    silent = user(user_id=8, query=[])
    kind, entries = read([user(), silent]).to_train_on()
    assert kind == "query" and {name: len(found) for name, found in entries.items()} == {"7": 1}
    kind, entries = read([user(), silent], golds={"q7": "n"}).to_train_on()
    assert kind == "profile" and {name: len(found) for name, found in entries.items()} == {"7": 2, "8": 2}
    assert read([silent]).to_train_on()[0] == "profile"
    assert read([]).to_train_on()[1] == {}


def test_profiles_without_the_task_s_fields_are_left_aside_for_queries() -> None:
    bare = {"id": 1, "text": "no title"}
    found = read([user(profile=[bare]), user(user_id=8, profile=[], query=[query(1, "a", "b")])])
    assert found.no_profiles and [len(u.profile) for u in found.users] == [0, 0]
    # Not where another has them, nor where no query could stand in.
    for records in (
        [user(), user(user_id=8, profile=[bare], query=[])],
        [user(user_id=8, profile=[bare], query=[])],
    ):
        with pytest.raises(InvalidData, match='user 8: profile item 1: field "title" is missing'):
            read(records)


def golds(*entries: Any) -> dict[str, Any]:
    return {"task": "LaMP_4", "golds": list(entries)}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("<!DOCTYPE html><html>404</html>", "an HTML page"),
        ("\ufeff\n <html>", "an HTML page"),
        ("", "not JSON (Expecting value, line 1, column 1)"),
        ("[" * 100_000, "not JSON"),
        ("[" + "1" * 5000 + "]", "not JSON"),
        ({"a": 1}, "it should be a list of users"),
        ([1], "it should be a list of users"),
        ([{"profile": []}], 'user number 1: field "user_id" is missing'),
        ([user(user_id=[1])], 'user number 1: field "user_id" should be text'),
        ([user(user_id=True)], 'user number 1: field "user_id" should be text'),
        ([user(user_id=" ")], 'user number 1: field "user_id" should be text'),
        ([user(user_id=None)], 'field "user_id" should be text'),
        ([{"user_id": 3}], 'user 3: field "profile" is missing'),
        ([user(), user(user_id="7", query=[])], "user 7: it is there twice"),
        ([user(), user(user_id=8)], "user 8: query q7: another query of the file has this id"),
        ([user(profile=1)], 'user 7: field "profile" should be a list of objects'),
        ([user(query=[1])], 'user 7: field "query" should be a list of objects'),
        (
            [user(profile=[{"id": "p", "text": "x"}], query=[])],
            'user 7: profile item p: field "title" is missing',
        ),
        (
            [user(profile=[{"id": [], "text": "x", "title": "y"}])],
            'profile item number 1: field "id" should be',
        ),
        (
            [user(profile=[{"text": ["x"], "title": "y"}])],
            'profile item number 1: field "text" should be text',
        ),
        ([user(profile=[{"text": True, "title": "y"}])], 'field "text" should be text'),
        ([user(profile=[{"text": float("inf"), "title": "y"}])], 'field "text" should be text'),
        ([user(profile=[{"text": "\ud800", "title": "y"}])], 'field "text" should be text'),
        ([user(profile=[{"text": "x", "title": "y", "date": 1.5}])], 'field "date" should be text'),
        ([user(query=[{"input": "x", "gold": "y"}])], 'query number 1: field "id" is missing'),
        ([user(query=[{"id": "q", "gold": "y"}])], 'query q: field "input" is missing'),
        ([user(query=[{"id": "q", "input": 3, "gold": "y"}])], "query q: input lacks"),
        (
            [user(query=[{"id": "q", "input": "no cue", "gold": "y"}])],
            'user 7: query q: input lacks "article:"',
        ),
        ([user(query=[query("q", "x", ["y"])])], 'query q: field "gold" should be text'),
        ([{**query("1", "a", "b"), "profile": {}}], 'question 1: field "profile" should be a list'),
        ([{**query("1", "a", "b"), "user_id": []}], 'question 1: field "user_id" should be text'),
        ([query("1", "a", "b"), {"id": "2"}], 'question 2: query 2: field "input" is missing'),
        ([query("1", "a", "b"), query("1", "c", "d")], "question 1: it is there twice"),
        ([user(user_id="a\nb" * 40, profile=1)], "user a ba ba"),
    ],
)
def test_malformed_files_name_file_item_and_field(tmp_path: Path, value: Any, says: str) -> None:
    path = write(tmp_path / "u.json", value)
    with pytest.raises(InvalidData) as raised:
        read_users(path, HEADLINE)
    message = str(raised.value)
    assert message.startswith(f"{path}: ") and says in message
    assert "\n" not in message and len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("<html>", "an HTML page"),
        ([], "it should be {"),
        ({"task": "LaMP_4"}, "it should be {"),
        ({"golds": [1]}, "it should be {"),
        (golds({"id": 1}), 'gold 1: field "output" is missing'),
        (golds({"output": "x"}), 'gold number 1: field "id" is missing'),
        (golds({"id": 1, "output": []}), 'gold 1: field "output" should be text'),
        (golds({"id": 1, "output": "a"}, {"id": "1", "output": "a"}), "gold 1: it is there twice"),
    ],
)
def test_malformed_label_files(tmp_path: Path, value: Any, says: str) -> None:
    path = write(tmp_path / "l.json", value)
    with pytest.raises(InvalidData) as raised:
        read_golds(path)
    assert str(raised.value).startswith(f"{path}: ") and says in str(raised.value)
    # The users' file is not blamed for its labels.
    with pytest.raises(InvalidData) as raised:
        read_users(write(tmp_path / "u.json", [user()]), HEADLINE, golds=path)
    assert str(raised.value).startswith(f"{path}: ")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "b.json").write_bytes(b"[\xff]")
    for name, says in (("b.json", "not UTF-8"), ("none.json", "No such file"), (".", "cannot be read")):
        with pytest.raises(InvalidData, match=says):
            read_users(tmp_path / name, HEADLINE)


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
VALID: dict[str, Any] = {
    "oppu": [user(), user(user_id=8, query=[query("q8", "b", "c")])],
    "lamp": [{**query("1", "a", "g"), "profile": user()["profile"], "user_id": 4}],
    "golds": golds({"id": "q7", "output": "n"}, {"id": "q8", "output": "c"}),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value, itself included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in inner for place in places(child, (*path, key)))]


@st.composite
def mutants(draw: st.DrawFn) -> tuple[str, Any]:
    """A valid file in which one to three values are replaced, deleted or there twice."""
    name = draw(st.sampled_from(sorted(VALID)))
    root = {"file": copy.deepcopy(VALID[name])}
    for _ in range(draw(st.integers(1, 3))):
        *outer, key = draw(st.sampled_from([place for place in places(root) if place]))
        holder: Any = root
        for step in outer:
            holder = holder[step]
        change = draw(st.sampled_from(["replace", "delete", "repeat"]))
        if change == "repeat" and isinstance(holder, list):
            holder.append(holder[key])
        elif change == "delete" and outer:
            del holder[key]
        else:
            holder[key] = draw(ANY)
    return name, root["file"]


@settings(max_examples=80, deadline=None)
@given(mutant=mutants(), task=st.sampled_from([HEADLINE, RATING, TWEETS]))
def test_a_mutated_file_gives_a_result_or_invalid_data(
    tmp_path_factory: pytest.TempPathFactory, mutant: tuple[str, Any], task: Any
) -> None:
    name, value = mutant
    path = tmp_path_factory.getbasetemp() / "mutant.json"
    path.write_text(json.dumps(value), "utf-8")
    try:
        if name == "golds":
            read_golds(path)
            read_users(write(path.with_name("sound.json"), VALID["oppu"]), HEADLINE, golds=path)
        else:
            for one in read_users(path, task).users:
                for entry in (*one.profile, *one.query):
                    task.example(entry.item)
                    json.dumps([one.user_id, entry.id, entry.date, entry.item], ensure_ascii=False).encode()
    except InvalidData as error:
        # Of a label file that contradicts sound queries, the queries' file.
        assert str(error).startswith(f"{path.parent}/")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_mutated_text_gives_a_result_or_invalid_data(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes cut out of a valid file or put in: mostly no JSON, sometimes no UTF-8."""
    raw = json.dumps(VALID[data.draw(st.sampled_from(["oppu", "lamp"]))]).encode()
    start = data.draw(st.integers(0, len(raw)))
    end = data.draw(st.integers(start, min(len(raw), start + 40)))
    path = tmp_path_factory.getbasetemp() / "mutant_bytes.json"
    path.write_bytes(raw[:start] + data.draw(st.binary(max_size=8)) + raw[end:])
    try:
        read_users(path, HEADLINE)
    except InvalidData as error:
        assert str(path) in str(error)


@pytest.mark.brief
@pytest.mark.parametrize(("name", "queries"), [("news_headline", 519), ("news_categorize", 508)])
def test_the_brief_s_files(brief: Path, name: str, queries: int) -> None:
    folder = brief / "data" / "lamp_news" / name
    task = load_task(folder, name)
    top = read_users(folder / "user_top_100_history.json", task)
    assert len(top.users) == 24 and sum(len(u.query) for u in top.users) == queries
    assert top.held_out and top.dropped_empty == 0 and all(u.dated for u in top.users)
    others = read_users(folder / "user_others.json", task)
    assert not others.held_out
    # Here profile repeats query, so it does not matter which of the two is trained on.
    assert all([e.item for e in u.profile] == [e.item for e in u.query] for u in others.users)
