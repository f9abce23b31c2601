"""History files as spreadsheets, editors and our own listing write them, and what is said of bad ones."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_device.cli import prompts
from perfit_device.history.importers import Report, read_history
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import TASKS

TASK = TASKS["news_headline"]
EXPECTED = [("Überraschung, heute", "Kurz", "2024-05-01"), ("zwei", "Noch; eins", "")]
TABLE = 'text{0}title{0}date\n"Überraschung, heute"{0}Kurz{0}2024-05-01\nzwei{0}"Noch; eins"{0}\n'


def read(path: Path, data: bytes) -> list[tuple[str, str, str]]:
    path.write_bytes(data)
    items = read_history(path, TASK)
    return [(item.fields["text"], item.fields["title"], item.date) for item in items]


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a", "a.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_tables_are_known_by_their_content(tmp_path: Path, name: str, delimiter: str) -> None:
    table = TABLE.format(delimiter)
    assert read(tmp_path / name, table.encode()) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_encodings_of_excel(tmp_path: Path, encoding: str, line_end: str) -> None:
    table = TABLE.format(";").replace("\n", line_end)
    assert read(tmp_path / "a.csv", table.encode(encoding)) == EXPECTED
    assert read(tmp_path / "b.csv", f"sep=;{line_end}{table}".encode(encoding)) == EXPECTED


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (TABLE.format(";").replace("text;title;date", "Text; TITLE ;Date"), "case and spaces"),
        (TABLE.format(";") + ";;\n;;\n", "empty rows at the end"),
        (TABLE.format(";") + "\n\n", "empty lines"),
        ("\n" + TABLE.format(";"), "an empty line at the start"),
        (TABLE.format(";").replace("\n", ";;\n"), "empty columns at the end"),
        (TABLE.format(";").replace("date\n", "date;note\n").replace("-01\n", "-01;x\n") + "", "a note"),
    ],
)
def test_tables_of_people(tmp_path: Path, table: str, why: str) -> None:
    if why == "a note":
        table = table.replace('eins";\n', 'eins";;y\n')
    assert read(tmp_path / "a.csv", table.encode()) == EXPECTED, why


def test_lines_and_lists_without_a_suffix(tmp_path: Path) -> None:
    rows = [{"Text": "a", "title": "b"}, {"text": "c", "title": "d", "date": "2024-05-01"}]
    expected = [("a", "b", ""), ("c", "d", "2024-05-01")]
    assert read(tmp_path / "a", "\n".join(map(json.dumps, rows)).encode()) == expected
    assert read(tmp_path / "a", json.dumps(rows).encode("utf-16")) == expected


def test_a_long_text_in_a_table(tmp_path: Path) -> None:
    """Python's own limit of a field is 131,072 characters."""
    assert len(read(tmp_path / "a.csv", b"text,title\n" + b"word " * 60_000 + b",x\n")) == 1


def test_windows_1252_is_told(tmp_path: Path) -> None:
    messages: list[str] = []
    (tmp_path / "a.csv").write_bytes(TABLE.format(";").encode("cp1252"))
    read_history(tmp_path / "a.csv", TASK, report=Report(messages.append))
    assert messages == ["the file is not UTF-8, so it was read as Windows-1252; check an accent or two"]


@pytest.mark.parametrize("at", [0, 14, 40])
def test_a_bad_byte_in_utf_8_makes_no_file_of_windows_1252(tmp_path: Path, at: int) -> None:
    """It turned every accent of the file into two letters."""
    data = ("text;title\n" + "café;résumé �\n" * 2).encode()
    (tmp_path / "a.csv").write_bytes(data[:at] + b"\xff" + data[at:])
    with pytest.raises(InvalidData, match=f"not whole UTF-8: byte {at} "):
        read_history(tmp_path / "a.csv", TASK)


def test_windows_1252_may_look_like_utf_8_in_places(tmp_path: Path) -> None:
    """A capital with an accent before a closing quotation mark does."""
    data = "text;title\n“le CAFÉ” été;y\n".encode("cp1252")
    assert "CAFÉ” été" in str(read(tmp_path / "a.csv", data))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            b'{"text": "", "date": "soon", "part": 3}',
            'line 1: field "text" is empty; field "title" is missing '
            "(an example of news_headline has text and title); "
            'field "date" should be a date like 2024-05-31; field "part" should be "test" or left out',
        ),
        (b'{"text": ["x"]}\n{"text": "x", "title": "y"}\n{}\n{}', "(2 more are wrong)"),
        (b"body;head\nx;y\n", "the first row has no column text and no column title; it has body, head"),
        (b"text;title;text\nx;y;z\n", "the first row has the column text twice"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0", "a spreadsheet or an archive, not text"),
        (b"PK\x03\x04 spreadsheet", "a spreadsheet or an archive, not text; save it as CSV"),
        (b"text,title\nx\0,y\n", "null characters"),
        ("text,title\nx,y\n".encode("utf-16-le"), "null characters"),
        (b"\xff\xfetext", "not text, though its mark says utf-16-le"),
        (b'{"text": "x", "title": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    ],
)
def test_errors_say_all_that_is_wrong(tmp_path: Path, data: bytes, says: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(data if not data.startswith(b"\xff\xfet") else data + b"x")
    with pytest.raises(InvalidData) as raised:
        read_history(path, TASK)
    assert str(raised.value).startswith(f"{path}: ") and says in str(raised.value)


def test_the_help_names_every_task_s_fields(perfit: Perfit) -> None:
    said = perfit.ok("history", "import", "--help")
    for task in TASKS.values():
        line = next(line for line in said.splitlines() if line.split()[:1] == [task.name])
        for name in task.field_names:
            assert name in line
    assert {"date", "part"} <= {line.split()[0] for line in said.splitlines() if line.strip()}


# -- our own listing -----------------------------------------------------------------------------


def test_a_listing_comes_back_exactly(
    ready: Perfit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: Any
) -> None:
    ready.ok("history", "add", "An undated thing \u2028 of the past", "A Title", "--task", "news_headline")
    file = tmp_path / "chat.jsonl"
    file.write_text('{"text": "x", "category": "sports", "part": "test"}')
    cloud.tasks = ["news_headline", "news_categorize"]
    assert ready("ask", "x", "--task", "news_headline", "--mode", "base")[0] == 0
    ready.ok("history", "import", str(file), "--task", "news_categorize")
    listing = ready.ok("history", "list", "--json")
    (tmp_path / "all.json").write_text(listing)
    again = ready.json("history", "import", str(tmp_path / "all.json"))
    assert (again["task"], again["added"], again["known"]) == ("news_categorize, news_headline", 0, 22)
    ready.ok("history", "forget", "--all", "--yes")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listing.encode())))
    assert ready.json("history", "import", "-")["added"] == 22
    assert ready.ok("history", "list", "--json") == listing
    ready.ok("history", "forget", "--all", "--yes")
    _, _, err = ready("history", "import", str(tmp_path / "all.json"), "--task", "news_categorize")
    assert "left out 21 of another task (item 1, item 2, item 3, …)" in err


@pytest.mark.parametrize(
    "change",
    [
        {"task": 7},
        {"task": "No Task"},
        {"fields": {}},
        {"fields": {"text": ""}},
        {"fields": {"text": "\ud800"}},
        {"task": "poems", "fields": {"text": "\ud800"}},
        {"task": "poems", "fields": {"text": " "}},
        {"date": 5},
        {"part": "x"},
    ],
)
def test_bad_listings_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    sound = {"task": "chat", "fields": {"prompt": "a", "reply": "b"}, "date": "", "part": ""}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([sound, sound | change]))
    with pytest.raises(InvalidData, match="item 1: field"):
        read_history(path, None)


def test_a_listing_must_have_the_fields_of_tasks_that_are_known(ready: Perfit, tmp_path: Path) -> None:
    """With rc 0 it was taken, and ended every later update. Another cloud's task may have any fields."""
    path = tmp_path / "a.json"
    for task in ("news_headline", "chat"):  # the cloud's, and one that only perfit knows
        path.write_text(json.dumps([{"task": task, "fields": {"foo": "x"}}]))
        assert f'{path}: item 0: field "' in ready.fails("history", "import", str(path))
    path.write_text(json.dumps([{"task": "poems", "fields": {"foo": "x"}}]))
    assert ready.json("history", "import", str(path))["added"] == 1


# -- forgetting, and what is too long ---------------------------------------------------------------


def test_forgetting_everything_asks(ready: Perfit, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (["--all"], ["--task", "news_headline"]):
        assert "this forgets 20 examples for good. Say so with --yes" in ready.fails(
            "history", "forget", *flags
        )
    asked: list[str] = []
    monkeypatch.setattr("perfit_device.cli.forget.require_yes", asked.append)
    ready.ok("history", "forget", "--all")
    assert asked == ["this forgets 20 examples for good."]
    assert ready.json("history", "list") == []


def test_only_yes_is_yes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = tmp_path / "terminal"
    monkeypatch.setattr(prompts, "_DEVICE", str(terminal))
    question = "Sure?"
    for answer, is_yes in (("yes\n", True), ("Y\n", True), ("no\n", False), ("\n", False)):
        # What is asked goes over the first bytes of the file, as if it stood on the screen.
        terminal.write_text(" " * len(f"{question} Type yes: ") + answer)
        if is_yes:
            prompts.require_yes(question)
        else:
            with pytest.raises(Exception, match="nothing was changed"):
                prompts.require_yes(question)


def test_unknown_tasks_are_named(ready: Perfit) -> None:
    for command in (["forget", "--task", "poems", "--yes"], ["list", "--task", "poems"]):
        line = ready.fails("history", *command)
        assert 'there is no task "poems"; there are news_headline' in line
    assert ready.json("history", "list", "--task", "chat") == []


def test_examples_too_long_for_the_cloud_are_named_at_import(
    ready: Perfit, tmp_path: Path, cloud: Any
) -> None:
    """By the cloud, which has the tokenizer; the update that follows does not find out again."""
    path = tmp_path / "long.jsonl"
    rows = [{"text": f"{text} {n}", "title": "x"} for n, text in enumerate(["fine", "too long", "short"])]
    path.write_text("\n".join(map(json.dumps, rows)))
    code, _, err = ready("history", "import", str(path), "--dry-run")
    assert code == 0 and "3 examples would be added" in err
    assert "1 are too long for the cloud (line 2); they are kept" in err
    assert len(ready.json("history", "list")) == 20
    _, _, err = ready("history", "import", str(path))
    assert "1 are too long for the cloud (line 2)" in err and "3 examples added" in err
    cloud.calls.clear()
    _, _, err = ready("update", "--epochs", "1")
    assert "1 examples are too long for this cloud and are left out" in err
    assert cloud.calls.count("Adapt") <= 1


def test_without_the_cloud_words_are_counted(ready: Perfit, tmp_path: Path, cloud: Any) -> None:
    """As an update takes them: it cuts a text to 768 words, and a word has a token at least."""
    path = tmp_path / "long.jsonl"
    rows = [{"text": "word " * n, "title": "x"} for n in (300, 20_000, 5)]
    path.write_text("\n".join(map(json.dumps, rows)))
    cloud.calls.clear()
    code, _, err = ready("history", "import", str(path), "--offline")
    assert code == 0 and not cloud.calls
    assert "1 are too long for the cloud (line 2)" in err and "3 examples added" in err
    rows = [{"text": f"{'word ' * 600}{n}", "title": "x"} for n in range(8)]
    path.write_text("\n".join(map(json.dumps, rows)))
    cloud.stop()
    _, _, err = ready("history", "import", str(path))
    assert "the cloud cannot say which examples are too long now" in err
    assert "8 are too long for the cloud (line 1, line 2, line 3, line 4, line 5, …)" in err
