"""Files read person by person give stage 1 what the whole reader gives it."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import TASK, write_files

from perfit_cloud.collective import data, streaming
from perfit_cloud.collective.data import read_items, tokenise
from perfit_cloud.collective.items import Items
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import load_task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "lamp")


def both(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Items, Items]:
    task = load_task(path.parent, TASK)
    whole = read_items(path, task)
    monkeypatch.setattr(data, "_WHOLE_BYTES", 0)
    return whole, read_items(path, task)


def change(path: Path, how: Callable[[list[dict[str, Any]]], Any]) -> None:
    records = json.loads(path.read_text())
    how(records)
    path.write_text(json.dumps(records))


def no_queries(records: list[dict[str, Any]]) -> None:
    for record in records:
        record["query"] = []


def useless_profiles(records: list[dict[str, Any]]) -> None:
    for record in records:
        record["profile"] = [{"id": "1", "other": "x"}]


def late_queries(records: list[dict[str, Any]]) -> None:
    for record in records[:3]:
        record["query"] = []
    records[5]["query"][0]["gold"] = ""
    records[6]["profile"][0]["text"] = " "


@pytest.mark.parametrize("how", [lambda _records: None, no_queries, useless_profiles, late_queries])
def test_person_by_person_is_the_same(
    how: Callable[[Any], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "user_others.json"
    change(path, how)
    whole, streamed = both(path, monkeypatch)
    assert streamed == whole and list(streamed.users) == list(whole.users)
    assert streamed.only_profiles == (3 if how is late_queries else 0)


def few_queries(records: list[dict[str, Any]]) -> None:
    """As in LaMP-3, 5 and 7: a long profile, and hardly a query."""
    for record in records:
        record["profile"] = [{**record["profile"][0], "id": f"{n}", "title": f"t{n}"} for n in range(70)]
        record["query"] = record["query"][:1]


def test_the_people_that_updates_are_tried_on_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch, load: Any
) -> None:
    path = folder / "user_others.json"
    change(path, few_queries)
    whole, streamed = both(path, monkeypatch)
    assert streamed == whole and {len(profile) for profile in streamed.profiles.values()} == {64}
    task = load_task(folder, TASK)
    corpora = [tokenise(items, base=load("llama"), task=task, seed=0) for items in (whole, streamed)]
    assert corpora[0].histories == corpora[1].histories
    assert len(corpora[1].histories) == 8 and corpora[1].held_out_histories >= 1


def test_only_the_longest_profiles_are_kept_to_try_updates_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder / "user_others.json"

    def unlike(records: list[dict[str, Any]]) -> None:
        few_queries(records)
        for number, record in enumerate(records):
            record["profile"] = record["profile"][: (5 * number) % 13]  # 0 for the first

    change(path, unlike)
    monkeypatch.setattr(streaming, "_PROFILES", 3)
    whole, streamed = both(path, monkeypatch)
    assert sorted(len(profile) for profile in streamed.profiles.values()) == [10, 11, 12]
    assert all(whole.profiles[user] == profile for user, profile in streamed.profiles.items())


def test_a_byte_order_mark_is_no_content(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "user_others.json"
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    whole, streamed = both(path, monkeypatch)
    assert streamed == whole and streamed.users


def test_questions_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path)  # its task.json
    asked = {"input": "article: now", "output": "n", "profile": [{"id": "1", "text": "a", "title": "b"}]}
    (tmp_path / "train_questions.json").write_text(json.dumps([{"id": "1", **asked}, {"id": "2", **asked}]))
    whole, streamed = both(tmp_path / "train_questions.json", monkeypatch)
    assert streamed == whole and streamed.unnamed == 2 and streamed.only_profiles == 0


def test_people_who_are_tested_on_give_their_profiles(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, streamed = both(folder / "user_top_100_history.json", monkeypatch)
    assert streamed == whole and streamed.kind == "profile"


@pytest.mark.parametrize(
    "how",
    [
        lambda records: records.append(records[0]),
        lambda records: records[3]["query"].append(records[2]["query"][0]),
        lambda records: records[4]["query"][0].pop("gold"),
        lambda records: records.append(7),
    ],
)
def test_what_is_malformed_is_refused(
    how: Callable[[Any], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder / "user_others.json", how)
    monkeypatch.setattr(data, "_WHOLE_BYTES", 0)
    with pytest.raises(InvalidData, match=r"user_others\.json"):
        read_items(folder / "user_others.json", load_task(folder, TASK))


@pytest.mark.parametrize("content", [b"[{]", b"<html>", b"\xff\xfe", b"[]", b"{}"])
def test_what_is_no_list_of_people_is_refused(
    content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "user_others.json").write_bytes(content)
    monkeypatch.setattr(data, "_WHOLE_BYTES", 0)
    with pytest.raises(InvalidData):
        read_items(folder / "user_others.json", load_task(folder, TASK))
