"""`perfit-cloud lamp prepare --news-category`: both news tasks from the News Category Dataset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_prepare import ASK, FILES, fails, read, result

from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.lamp import read_users
from perfit_shared.tasks import TASKS, load_task


def article(author: str, n: int, category: str = "POLITICS", **changes: Any) -> dict[str, Any]:
    return {
        "link": "https://example.org",
        "headline": f"{author} asks {n}",
        "category": category,
        "short_description": f"{author} has words on {n}.",
        "authors": author,
        "date": f"2018-{n // 28 + 1:02}-{n % 28 + 1:02}",
        **changes,
    }


def dataset(path: Path, *more: dict[str, Any]) -> Path:
    """Three authors of 40, 20 and 3 articles, newest first as published."""
    rows = [article("Ann Lee", n, "TECH" if n % 4 == 0 else "POLITICS") for n in range(40)]
    rows += [article("Bob Day, Staff", n, "ARTS & CULTURE") for n in range(20)]
    rows += [article("Cid", n, "WEDDINGS") for n in range(3)]
    rows.sort(key=lambda row: row["date"], reverse=True)
    path.write_text("\n".join(json.dumps(row) for row in [*rows, *more]) + "\n\n", "utf-8")
    return path


def test_the_news_category_dataset(tmp_path: Path) -> None:
    repeat = article("Ann Lee", 39, "TECH", date="2022-01-01")
    extra = (article("", 1), article("Dot", 2, short_description=" "), repeat)
    file, out = dataset(tmp_path / "news.json", *extra), tmp_path / "data"
    made = result("--news-category", file, "--out", out, "--users", 2, "--min-history", 10)
    headline, categorize = made["tasks"]
    assert headline["left_out"] == categorize["left_out"] == {"empty_field": 2, "repeated": 1}
    assert (headline["users"], headline["history"], headline["queries"]) == (2, 32 + 16, 8 + 4)
    assert (headline["others"], headline["others_history"], headline["others_queries"]) == (1, 3, 3)
    top = read(out / "news_headline", FILES[1])
    assert top == read_users(
        out / "news_headline" / FILES[1], load_task(out / "news_headline", "news_headline")
    )
    ann = top.users[0]
    assert [entry.item for entry in ann.profile[:1] + ann.query[-1:]] == [
        {"text": "Ann Lee has words on 0.", "title": "Ann Lee asks 0"},
        {"text": "Ann Lee has words on 39.", "title": "Ann Lee asks 39"},
    ]
    assert [entry.date for entry in ann.profile] == sorted(entry.date for entry in ann.profile)
    assert ann.query[0].extra["input"] == f"{ASK}Ann Lee has words on 32."
    assert not {entry.id for entry in ann.profile} & {entry.id for entry in ann.query}
    others = read(out / "news_headline", FILES[0])
    assert [e.item for e in others.users[0].profile] == [e.item for e in others.users[0].query]
    assert "Ann" not in {user.user_id for user in top.users} and top.users[0].user_id == "0"


def test_labels_of_the_news_are_those_that_occur(tmp_path: Path) -> None:
    out = tmp_path / "data"
    result("--news-category", dataset(tmp_path / "news.json"), "--out", out, "--users", 1)
    folder = out / "news_categorize"
    task = load_task(folder, "news_categorize")
    assert task.labels == ("politics", "arts & culture", "tech", "weddings")
    listed = "categories: [politics, arts & culture, tech, weddings]"
    asking = f"{listed} article: Ann Lee asks 1 Ann Lee has words on 1."
    found = read(folder, FILES[1], task).users[0]
    assert task.prompt(found.profile[1].item).endswith(f"{asking} category:")
    assert (
        found.profile[1].item["category"] == "politics"
        and found.profile[1].extra["title"] == "Ann Lee asks 1"
    )
    assert found.query[0].extra["input"] == task.prompt(found.query[0].item).removesuffix(" category:")


def test_only_lamp_s_labels(tmp_path: Path) -> None:
    out = tmp_path / "data"
    file = dataset(tmp_path / "news.json")
    made = result("--news-category", file, "--out", out, "--users", 1, "--min-history", 5, "--lamp-labels")
    assert made["tasks"][1]["left_out"]["other_category"] == 3, "the weddings"
    task = load_task(out / "news_categorize", "news_categorize")
    assert task == TASKS["news_categorize"]
    labels = {
        entry.item["category"]
        for name in FILES[:2]
        for user in read(out / "news_categorize", name, task).users
        for entry in user.profile
    }
    assert labels == {"politics", "science & technology", "culture & arts"}


def test_news_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    file, out = dataset(tmp_path / "news.json"), tmp_path / "data"
    folder = out / "news_categorize"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text("{}")
    arguments = ("--news-category", file, "--out", out, "--users", 1)
    assert "news_categorize holds task.json already" in fails(InvalidInput, *arguments)
    assert not (out / "news_headline").exists()
    result(*arguments, "--force")
    assert load_task(folder, "news_categorize").labels


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([], "it should be an object with headline"),
        ({"headline": "x"}, 'field "short_description" is missing'),
        (article("Dot", 1, category=["TECH"]), 'field "category" should be text'),
        (article("Dot", 1, date="May 26"), 'field "date" should be a date like'),
    ],
)
def test_malformed_news_is_named(tmp_path: Path, row: Any, says: str) -> None:
    file = dataset(tmp_path / "news.json", row)
    assert f"{file}: line 64: {says}" in fails(
        InvalidData, "--news-category", file, "--out", tmp_path / "data"
    )
    file.write_text("<html>")
    assert "an HTML page" in fails(InvalidData, "--news-category", file, "--out", tmp_path / "data")
    assert not (tmp_path / "data").exists()
