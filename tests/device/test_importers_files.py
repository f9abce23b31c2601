"""Spreadsheets, chats, ChatGPT's export and Markdown as examples, and files made to hurt."""

from __future__ import annotations

import errno
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest

from perfit_device.history.importers import Choices, Report, read_history, spreadsheet
from perfit_device.history.importers.source import Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import TASKS

HEADLINE, REPLY, CHAT = TASKS["news_headline"], TASKS["reply"], TASKS["chat"]


def fields(items: list[HistoryItem]) -> list[tuple[str, ...]]:
    return [tuple(item.fields.values()) for item in items]


# -- tables and spreadsheets ---------------------------------------------------------------------


def test_columns_of_any_name(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Nr;Message;Their words;REPLY\n1;-;Hello?;Yes\n")
    choices = Choices(text_column="their WORDS")
    assert fields(read_history(path, REPLY, choices=choices)) == [("Hello?", "Yes")]
    with pytest.raises(InvalidData, match="has no column Mail; it has Nr, Message, Their words, REPLY"):
        read_history(path, REPLY, choices=Choices(text_column="Mail"))
    path.write_text('{"message": "x", "reply": "y"}')
    with pytest.raises(InvalidData, match="this is JSON, where --text-column means nothing"):
        read_history(path.rename(tmp_path / "a.jsonl"), REPLY, choices=choices)


def test_a_million_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("message,reply" + ",x" * 1_000_000 + "\na,b\n")
    with pytest.raises(InvalidData, match="the first row has 1000002 columns; there may be 1000"):
        read_history(path, REPLY)
    path.write_text("message,reply\na,b" + ",x" * 1_000_000 + "\n")
    with pytest.raises(InvalidData, match="row 2: it has not as many columns"):
        read_history(path, REPLY)


def sheet(path: Path, rows: list[list[Any]]) -> Path:
    from openpyxl import Workbook

    book = Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def test_a_spreadsheet(tmp_path: Path) -> None:
    from datetime import datetime

    rows = [
        ["Text", "Score", "Date", None],
        [None] * 4,
        ["fine", 4.0, datetime(2024, 5, 1)],
        ["bad", 1, None],
    ]
    path = sheet(tmp_path / "a.bin", rows)
    report = Report()
    items = read_history(path, TASKS["product_rating"], report=report)
    assert fields(items) == [("fine", "4"), ("bad", "1")] and report.format == "a spreadsheet"
    assert [item.date for item in items] == ["2024-05-01", ""]


def test_spreadsheets_that_unpack_to_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sheet(tmp_path / "a.xlsx", [["text", "title"], ["x", "y"]])
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("xl/bomb.xml", b"0" * (65 << 20))
    assert path.stat().st_size < 100_000
    with pytest.raises(InvalidData, match="unpacks to more than 64 MiB"):
        read_history(path, HEADLINE)
    monkeypatch.setattr(spreadsheet, "_CELLS", 1000)
    wide = sheet(tmp_path / "b.xlsx", [["text", "title"], *[["x"] + [None] * 900 + ["y"]] * 2])
    with pytest.raises(InvalidData, match="larger than 200000 rows or 1000 cells"):
        read_history(wide, HEADLINE)


def test_spreadsheets_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.xlsx"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xl/workbook.xml", "<a>" * 100_000)
    with pytest.raises(InvalidData, match="not a whole spreadsheet"):
        read_history(path, HEADLINE)
    monkeypatch.setitem(__import__("sys").modules, "openpyxl", None)
    with pytest.raises(InvalidData, match=r"pip install 'perfit\[xlsx\]'"):
        read_history(path, HEADLINE)


def test_an_archive_with_a_long_list_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conversations.json", "[]")
    data = bytearray(path.read_bytes())
    data[-10:-6] = (5 << 20).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InvalidData, match="a spreadsheet or an archive, not text"):
        read_history(path, REPLY)


# -- chats ---------------------------------------------------------------------------------------


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_chats_of_fine_tuning_and_records_of_talks(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "B"}, {"type": "image_url"}]
    talk = [turn("system", "s"), turn("user", "a"), turn("assistant", parts), turn("user", "c"),
            turn("assistant", "d", weight=0), turn("assistant", None, tool_calls=[])]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": talk, "date": "2024-05-01", "part": "test"}))
    report = Report()
    items = read_history(path, CHAT, report=report)
    assert fields(items) == [("a", "B")] and (items[0].date, items[0].part) == ("2024-05-01", "test")
    assert {each.reason for each in report.skipped} == {
        "marked with weight 0", "without text (a call of a tool, or an image)"
    }  # fmt: skip
    assert fields(read_history(path, CHAT, choices=Choices(role="user"))) == [("B", "c")]
    for bad in ({"messages": [1]}, {"messages": [turn("user", 5)]}, {"messages": [{"content": "x"}]}, {}):
        path.write_text(f"{json.dumps({'messages': talk})}\n{json.dumps(bad)}")
        with pytest.raises(InvalidData, match="line 2: "):
            read_history(path, CHAT)
    with pytest.raises(InvalidData, match="--role should be user or assistant"):
        read_history(path, CHAT, choices=Choices(role="me"))


def conversation(*turns: tuple[str, str], loop: bool = False) -> dict[str, Any]:
    mapping: dict[str, Any] = {"root": {"message": None, "parent": "4" if loop else None}}
    for number, (role, text) in enumerate(turns):
        content = {"content_type": "text", "parts": [text]}
        message = {"author": {"role": role}, "content": content, "create_time": 1_700_000_000.5 + number}
        mapping[str(number)] = {"message": message, "parent": str(number - 1) if number else "root"}
    other = {"author": {"role": "user"}, "content": {"content_type": "text", "parts": ["edited away"]}}
    mapping["x"] = {"message": other, "parent": "0"}
    return {"title": "t", "mapping": mapping, "current_node": str(len(turns) - 1)}


TALK = conversation(
    ("user", "Hi"), ("assistant", "What now?"), ("user", "No, shorter."), ("assistant", "So?"),
    ("user", "```x```"),
)  # fmt: skip


@pytest.mark.parametrize("form", ["file", "zip", "folder"])
def test_an_export_of_chatgpt(tmp_path: Path, form: str) -> None:
    data = json.dumps([TALK, TALK | {"current_node": None}], indent=1)
    path = tmp_path / "export"
    if form == "file":
        path.write_text(data)
    elif form == "folder":
        path.mkdir()
        (path / "conversations.json").write_text(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("me/conversations.json", data)
    report = Report()
    items = read_history(path, REPLY, report=report)
    assert fields(items) == [("What now?", "No, shorter.")] and items[0].date == "2023-11-14T22:13:22Z"
    reasons = {each.reason: each.count for each in report.skipped}
    assert reasons["with a block of code, so pasted at least in part"] == 1
    assert report.name == "chatgpt"


def test_exports_that_go_round_or_break_off(tmp_path: Path) -> None:
    path = tmp_path / "conversations.json"
    turns = [("user" if n % 2 else "assistant", f"text {n}") for n in range(5)]
    path.write_text(json.dumps([conversation(*turns, loop=True)]))
    assert len(read_history(path, REPLY)) == 2
    whole = json.dumps([TALK])
    for bad in (whole[:-5], '[{"mapping": 5}]', '[{"mapping": ' + "[" * 100_000):
        path.write_text(bad)
        with pytest.raises(InvalidData):
            read_history(path, REPLY)


# -- Markdown ------------------------------------------------------------------------------------


def test_a_folder_of_markdown(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / ".obsidian").mkdir()
    (tmp_path / ".obsidian/x.md").write_text("# Hidden\n\nx")
    (tmp_path / "a/one.md").write_text(
        '---\ntitle: "One: first"\ndate: 2024-05-01\ntags: [x]\n---\nBody *one*.\n'
    )
    (tmp_path / "2024-06-01-two.md").write_text("# Two\n\nBody two.\r\n")
    (tmp_path / "three.md").write_text('+++\ntitle = "Three"\n+++\nBody three.')
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "bare.md").write_text("# Only a title\n")
    (tmp_path / "bad.md").write_bytes(b"\x81\x00")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    (tmp_path / "link.md").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.md")
    report = Report()
    items = read_history(tmp_path, HEADLINE, report=report)
    assert [(i.fields["text"], i.fields["title"], i.date) for i in items] == [
        ("Body two.", "Two", "2024-06-01"),
        ("Body three.", "Three", ""),
        ("Body *one*.", "One: first", "2024-05-01"),
    ]
    assert {each.reason: each.count for each in report.skipped} == {
        "a link, or no file": 2, "empty": 1, "without text under the title": 1,
        "not text in an encoding that is known": 1,
    }  # fmt: skip
    assert fields(read_history(tmp_path, CHAT))[0] == ("Two", "Body two.")


def test_front_matter_may_hold_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text("---\ncategory: sports\n---\nSetext\n======\n\nGoal.")
    assert read_history(path, TASKS["news_categorize"])[0].fields == {"text": "Goal.", "category": "sports"}


# -- what it is ----------------------------------------------------------------------------------


def test_the_format_may_be_said(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text('{"messages": [], "prompt": "a", "reply": "b"}')
    assert fields(read_history(path, CHAT, choices=Choices(format="jsonl"))) == [("a", "b")]
    with pytest.raises(InvalidData, match='no format "docx"; there are perfit, mail, chatgpt, git'):
        read_history(path, CHAT, choices=Choices(format="docx"))
    with pytest.raises(InvalidData, match="neither a file nor a folder"):
        os.mkfifo(tmp_path / "pipe")
        read_history(tmp_path / "pipe", CHAT)


def test_the_newest_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"p{n}", "reply": "r", "date": f"20{n % 50:02}"} for n in range(3000)]
    path.write_text("\n".join(map(json.dumps, rows)))
    report = Report()
    items = read_history(path, CHAT, choices=Choices(last=3), report=report)
    assert [item.fields["prompt"] for item in items] == ["p2899", "p2949", "p2999"]
    assert report.skipped[0].count == 2997


def test_an_archive_of_spaces_is_given_up_early(tmp_path: Path) -> None:
    """4 GiB of them fit into a few megabytes, and each was looked at by itself."""
    path = tmp_path / "export.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("conversations.json", b"[" + b" " * (40 << 20) + json.dumps(TALK).encode() + b"]")
    with pytest.raises(InvalidData, match="not JSON, or over 16 MiB at once"):
        read_history(path, REPLY)


def test_a_disk_that_fails_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Source, "open", lambda _: Failing())
    with pytest.raises(InvalidData, match=r"notes\.txt: cannot be read \(Input/output error\)"):
        read_history(tmp_path / "notes.txt", REPLY)
