"""`perfit-cloud lamp prepare`: who is who in LaMP's downloads, what is held out, and what is written."""

from __future__ import annotations

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_prepare import ASK, FILES, call, fails, read, result

from perfit_cloud.lamp import prepare_files
from perfit_shared.errors import InvalidData, InvalidInput, NotFound
from perfit_shared.files import written_whole
from perfit_shared.lamp import read_golds
from perfit_shared.tasks import TASKS

TWEET = "Paraphrase the following tweet without any explanation before or after it: "


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")
    return path


def wrote(person: str, count: int) -> list[dict[str, str]]:
    """What somebody wrote, oldest first."""
    return [
        {
            "text": f"{person} reports on {n}",
            "title": f"{person.title()}'s {n}",
            "date": f"2019-{n // 28 + 1:02}-{n % 28 + 1:02}",
        }
        for n in range(count)
    ]


def asked(name: str, items: list[dict[str, str]], at: int, **more: Any) -> dict[str, Any]:
    """A question on item `at`, in LaMP's form: ids of profile items are the question's and a number."""
    profile = [{"id": f"{name}{n}", **item} for n, item in enumerate(items[:at])]
    random.Random(name).shuffle(profile)
    return {"id": name, "input": ASK + items[at]["text"], "profile": profile, **more}


class Lamp:
    """A download: ann and bob are asked twice in train and once in dev, cid and dee once each."""

    def __init__(self, folder: Path, **named: str) -> None:
        self.folder = folder
        self.work = {
            "ann": wrote("ann", 12),
            "bob": wrote("bob", 30),
            "cid": wrote("cid", 5),
            "dee": wrote("dee", 8),
        }
        train = [
            ("10", "ann", 6),
            ("11", "bob", 20),
            ("12", "ann", 8),
            ("13", "cid", 4),
            ("14", "bob", 22),
            ("15", "dee", 7),
        ]
        dev = [("20", "ann", 11), ("21", "bob", 29)]
        for part, questions in (("train", train), ("dev", dev)):
            more = {p: {"user_id": named[p]} for p in named}
            write(
                folder / f"{part}_questions.json",
                [asked(q, self.work[p], at, **more.get(p, {})) for q, p, at in questions],
            )
            golds = [{"id": q, "output": self.work[p][at]["title"]} for q, p, at in questions]
            write(folder / f"{part}_outputs.json", {"task": "LaMP_4", "golds": golds})
        self.args = ("--task", "news_headline", "--folder", folder)


@pytest.fixture
def lamp(tmp_path: Path) -> Lamp:
    return Lamp(tmp_path / "time")


def test_questions_are_joined_to_people_by_their_profiles(lamp: Lamp, tmp_path: Path) -> None:
    out = tmp_path / "data"
    made = result(*lamp.args, "--out", out, "--users", 2)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES)
    top, others = read(out, FILES[1]), read(out, FILES[0])
    # bob has the longest history, then ann; nobody's three questions stand apart.
    assert [user.user_id for user in top.users] == ["0", "1"] and top.held_out
    bob, ann = top.users
    assert [entry.id for entry in bob.query] == ["11", "14", "21"]
    assert [entry.item["text"] for entry in ann.query] == [f"ann reports on {n}" for n in (6, 8, 11)]
    assert read_golds(out / FILES[2]) == {
        **{q: f"Bob's {n}" for q, n in (("11", 20), ("14", 22), ("21", 29))},
        **{q: f"Ann's {n}" for q, n in (("10", 6), ("12", 8), ("20", 11))},
    }
    # Oldest first, every item once, and none that a held-out query asks about.
    assert [entry.item["text"] for entry in ann.profile] == [
        f"ann reports on {n}" for n in range(11) if n not in (6, 8)
    ]
    assert len(bob.profile) == 29 - 2
    assert [(user.user_id, len(user.profile), len(user.query)) for user in others.users] == [
        ("2", 7, 1),
        ("3", 4, 1),
    ]
    (counts,) = made["tasks"]
    assert counts == {
        "task": "news_headline",
        "folder": str(out),
        "users": 2,
        "history": 9 + 27,
        "shortest_history": 9,
        "queries": 6,
        "others": 2,
        "others_history": 11,
        "others_queries": 2,
        "left_out": {"empty_field": 0},
    }


def test_it_is_the_same_again_and_in_any_order(lamp: Lamp, tmp_path: Path) -> None:
    path = lamp.folder / "train_questions.json"
    questions = json.loads(path.read_text())
    # Two questions at one time: their ids say which comes first.
    questions.append({**questions[2], "id": "16", "input": f"{ASK}something else"})
    write(path, questions)
    golds = json.loads((lamp.folder / "train_outputs.json").read_text())
    golds["golds"].append({"id": "16", "output": "else"})
    write(lamp.folder / "train_outputs.json", golds)
    first = tmp_path / "first"
    result(*lamp.args, "--out", first, "--users", 2)
    for part in ("train", "dev"):
        path = lamp.folder / f"{part}_questions.json"
        write(path, json.loads(path.read_text())[::-1])
    second = tmp_path / "second"
    pairs = [
        a
        for part in ("train", "dev")
        for a in (
            "--questions",
            lamp.folder / f"{part}_questions.json",
            "--outputs",
            lamp.folder / f"{part}_outputs.json",
        )
    ]
    result("--task", "news_headline", *pairs, "--out", second, "--users", 2)
    assert [(first / name).read_bytes() for name in FILES] == [(second / name).read_bytes() for name in FILES]


def test_user_ids_are_kept_where_questions_have_them(tmp_path: Path) -> None:
    names = {"ann": "A7", "bob": "same", "cid": "same", "dee": "D"}
    lamp, out = Lamp(tmp_path / "time", **names), tmp_path / "data"
    result(*lamp.args, "--out", out, "--users", 1)
    assert [user.user_id for user in read(out, FILES[1]).users] == ["same"]
    assert len(read(out, FILES[1]).users[0].query) == 4
    dates = [row["date"] for row in json.loads((out / FILES[1]).read_text())[0]["profile"]]
    assert dates == sorted(dates) and len(dates) == 29 - 2 + 4, "of two people's profiles, by time"
    assert [user.user_id for user in read(out, FILES[0]).users] == ["A7", "D"]
    lamp = Lamp(tmp_path / "some", ann="A7")
    says = fails(InvalidData, *lamp.args, "--out", tmp_path / "none")
    assert says == 'question 11: field "user_id" is missing, and others have it'
    assert not (tmp_path / "none").exists()


def test_ids_of_items_are_no_identity(tmp_path: Path) -> None:
    """Question 1's item 10 and question 11's item 0 are both called "110"."""
    ann, bob = wrote("ann", 13), wrote("bob", 3)
    cid = wrote("cid", 4)
    questions = [asked("1", ann, 12), asked("11", bob, 2), asked("2", cid, 3)]
    folder = tmp_path / "time"
    write(folder / "questions.json", questions)
    golds = [{"id": question["id"], "output": "x"} for question in questions]
    write(folder / "outputs.json", {"task": "LaMP_4", "golds": golds})
    assert {i["id"] for i in questions[0]["profile"]} & {i["id"] for i in questions[1]["profile"]}
    out = tmp_path / "data"
    result("--task", "news_headline", "--folder", folder, "--out", out, "--users", 1)
    assert len(read(out, FILES[0]).users) == 2


def test_tweets_hold_no_question_and_are_held_out_by_their_own_text(tmp_path: Path) -> None:
    said = {p: [f"{p} says {n}!" for n in range(9)] for p in ("ann", "bob")}
    questions, golds = [], []
    for number, (person, tweets) in enumerate(said.items()):
        for at in (5, 8):
            name = f"{number}{at}"
            profile = [
                {"id": f"{name}{n}", "text": text, "date": f"2009-05-0{n + 1}"}
                for n, text in enumerate(tweets[:at])
            ]
            questions.append({"id": name, "input": f"{TWEET}{person} was saying {at}", "profile": profile})
            golds.append({"id": name, "output": tweets[at].upper()})
    write(tmp_path / "dev_questions.json", questions)
    write(tmp_path / "dev_outputs.json", {"task": "LaMP_7", "golds": golds})
    out = tmp_path / "data"
    result("--task", "tweet_paraphrase", "--folder", tmp_path, "--out", out, "--users", 1)
    (ann,) = read(out, FILES[1], TASKS["tweet_paraphrase"]).users
    assert [entry.item for entry in ann.profile] == [
        {"text": f"ann says {n}!"} for n in (0, 1, 2, 3, 4, 6, 7)
    ]
    assert ann.query[0].item == {"input": "ann was saying 5", "text": "ANN SAYS 5!"}
    assert json.loads((out / FILES[2]).read_text())["task"] == "LaMP_7"


def test_other_texts_of_an_item_are_kept(tmp_path: Path) -> None:
    task = TASKS["news_categorize"]
    ask = "categories: [sports, travel] article: "
    questions = [
        {
            "id": str(n),
            "input": f"{ask}{n}",
            "profile": [{"id": f"{n}0", "text": f"old {n}", "title": "T", "category": "sports"}],
        }
        for n in (1, 2)
    ]
    write(tmp_path / "questions.json", questions)
    write(
        tmp_path / "outputs.json",
        {"task": "LaMP_2", "golds": [{"id": str(n), "output": "travel"} for n in (1, 2)]},
    )
    out = tmp_path / "data"
    result("--task", task.name, "--folder", tmp_path, "--out", out, "--users", 1)
    (user,) = json.loads((out / FILES[1]).read_text())
    assert user == {
        "user_id": 0,
        "profile": [{"id": "10", "text": "old 1", "category": "sports", "title": "T"}],
        "query": [{"id": "1", "input": f"{ask}1", "gold": "travel"}],
    }


def test_parts_without_outputs_and_folders_of_parts(lamp: Lamp, tmp_path: Path) -> None:
    (lamp.folder / "dev_outputs.json").unlink()
    done = call(*lamp.args, "--out", tmp_path / "a", "--users", 2)
    assert "dev_questions.json: there are no outputs beside it, so it is left out" in done.stderr
    assert len(read(tmp_path / "a", FILES[1]).users[0].query) == 2
    inner = lamp.folder / "train"
    inner.mkdir()
    for name in ("train_questions.json", "train_outputs.json"):
        (lamp.folder / name).rename(inner / name)
    result(*lamp.args, "--out", tmp_path / "b", "--users", 2)
    assert (tmp_path / "a" / FILES[1]).read_bytes() == (tmp_path / "b" / FILES[1]).read_bytes()
    (inner / "train_outputs.json").unlink()
    assert "holds no train_questions.json" in fails(InvalidData, *lamp.args, "--out", tmp_path / "c")


def test_files_that_are_there_are_not_replaced_unless_told(lamp: Lamp, tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / FILES[1]).write_text("mine")
    says = fails(InvalidInput, *lamp.args, "--out", out, "--users", 2)
    assert f"{out} holds {FILES[1]} already" in says
    assert [path.name for path in out.iterdir()] == [FILES[1]] and (out / FILES[1]).read_text() == "mine"
    result(*lamp.args, "--out", out, "--users", 2, "--force")
    assert len(read(out, FILES[1]).users) == 2
    assert "is a file" in fails(InvalidInput, *lamp.args, "--out", out / FILES[0])


def test_a_failed_write_leaves_the_old_files_and_no_others(
    lamp: Lamp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "data"
    result(*lamp.args, "--out", out, "--users", 2)
    before = {name: (out / name).read_bytes() for name in FILES}
    opened = []

    def fails_at_the_last(path: Path) -> Any:
        opened.append(path.name)
        if len(opened) == len(FILES):
            raise OSError(errno.ENOSPC, "no space left")
        return written_whole(path)

    monkeypatch.setattr(prepare_files, "written_whole", fails_at_the_last)
    done = call(*lamp.args, "--out", out, "--users", 1, "--force")
    assert isinstance(done.exception, OSError) and sorted(opened) == sorted(FILES)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_cohort_leaves_somebody_to_learn_from(lamp: Lamp, tmp_path: Path) -> None:
    out = tmp_path / "data"
    says = fails(InvalidInput, *lamp.args, "--out", out)
    assert "of 4 people 4 have queries and a history of 1 or more; a cohort of 100" in says
    assert "0 have queries" in fails(
        InvalidInput, *lamp.args, "--out", out, "--users", 1, "--min-history", 500
    )
    assert not out.exists()
    done = call(*lamp.args, "--out", out, "--users", 3, "--min-history", 9)
    assert done.exit_code == 0 and "2 people, not 3, have a history of 9 or more" in done.stderr
    assert done.stdout == ""


def test_malformed_downloads_are_named(lamp: Lamp, tmp_path: Path) -> None:
    def says(*args: Any) -> str:
        return fails(InvalidData, *(args or lamp.args), "--out", tmp_path / "data", "--users", 2)

    path, outputs = lamp.folder / "dev_questions.json", lamp.folder / "dev_outputs.json"
    good = path.read_text(), outputs.read_text()
    outputs.write_text("<!DOCTYPE html><html>not here</html>")
    assert (
        says()
        == f"{outputs}: an HTML page, not data: the download went wrong; check its address, fetch it again"
    )
    outputs.write_text(good[1].replace('"20"', '"99"'))
    assert says() == f'{path}: question 20: query 20: field "gold" is missing, and no label file has it'
    outputs.write_text(good[1])
    path.write_text(good[0].replace(ASK, "Write "))
    assert says().startswith(f'{path}: question 20: query 20: input lacks "article:"')
    write(path, [{"user_id": 1, "profile": [], "query": []}])
    assert "these are not LaMP's questions" in says()
    path.write_text(good[0])
    repeated = ["--questions", path, "--outputs", outputs] * 2
    assert (
        says("--task", "news_headline", *repeated) == f"{path}: question 20: an earlier file has this id too"
    )
    assert "no profile item has the fields" in says("--task", "movie_tagging", *lamp_of_movies(tmp_path))
    assert not (tmp_path / "data").exists()


def lamp_of_movies(tmp_path: Path) -> tuple[Any, ...]:
    """Movie tagging whose profiles are those of another task."""
    question = {"id": "1", "input": "tags: [a] description: x", "profile": [{"id": "10", "text": "y"}]}
    write(tmp_path / "movies" / "questions.json", [question])
    write(tmp_path / "movies" / "outputs.json", {"golds": [{"id": "1", "output": "a"}]})
    return "--folder", tmp_path / "movies"


def test_flags_that_do_not_go_together(lamp: Lamp, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "data")
    file = lamp.folder / "dev_questions.json"
    for arguments, kind, says in (
        (lamp.args[2:], InvalidInput, "--task"),
        (("--task", "nothing", *lamp.args[2:]), NotFound, "no task"),
        (lamp.args[:2], InvalidInput, "say what to read"),
        ((*lamp.args, "--news-category", file), InvalidInput, "say what to read"),
        ((*lamp.args, "--questions", file), InvalidInput, "every --questions needs its --outputs"),
        (("--news-category", file, "--task", "chat"), InvalidInput, "leave --task out"),
        ((*lamp.args, "--lamp-labels"), InvalidInput, "--lamp-labels goes with"),
    ):
        assert says in fails(kind, *arguments, *out)
