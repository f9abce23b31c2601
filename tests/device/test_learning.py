"""What a person keeps, corrects or rates becomes an example; what was answered is kept as its owner says."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_device import answers
from perfit_device.answers import Answer, Message
from perfit_device.cli.editor import private_file
from perfit_device.operations import log
from perfit_device.operations.feedback import Feedback
from perfit_device.operations.log import FindAnswer, ReadLog, Record, SetLog
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import NotFound

ANSWER = "Hello world personal"


@pytest.fixture
def profile(enrolled: Perfit) -> Any:
    with Profile.open(DeviceSettings.from_environment(None), passphrase=lambda: "correct horse") as opened:
        yield opened


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def pipe(text: str) -> None:
        """A real pipe for stdin, which ends after the text."""
        reader, writer = os.pipe()
        os.write(writer, text.encode())
        os.close(writer)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(reader, "rb")))

    return pipe


@pytest.fixture
def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def use(script: str) -> Path:
        """An editor that does this to the file "$1"; its name is the folder where it notes things."""
        path = tmp_path / "editor"
        path.write_text(f"#!/bin/sh\nnotes='{tmp_path}'\n{script}\n")
        path.chmod(0o755)
        monkeypatch.delenv("VISUAL", raising=False)
        monkeypatch.setenv("EDITOR", str(path))
        return tmp_path

    return use


def examples(perfit: Perfit) -> list[dict[str, str]]:
    return [item["fields"] for item in perfit.json("history", "list")]


# -- ask -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "stdin", "asked"),
    [
        (["It", "rained."], None, "It rained."),
        (["It rained."], "all day\n", "It rained.\n\nall day"),
        ([], "It rained.\n", "It rained."),
        (["-"], "It rained.\n", "It rained."),
        (["--", "-5 degrees", "--today"], None, "-5 degrees --today"),
        (["It rained."], "", "It rained."),
    ],
)
def test_a_question_is_its_words_and_what_is_piped_in(
    enrolled: Perfit, cloud: Any, piped: Any, words: list[str], stdin: str | None, asked: str
) -> None:
    if stdin is not None:
        piped(stdin)
    assert enrolled.ok("ask", *words).strip() == ANSWER
    assert f" {asked} " in f" {cloud.prompts[-1].text} "


def test_no_question_is_an_error(enrolled: Perfit, piped: Any) -> None:
    for _ in range(2):
        code, _, err = enrolled("ask")
        assert code == 2 and "give a text to ask about" in err
        piped(" \n")


def test_an_answer_that_is_kept_is_an_example_at_once(enrolled: Perfit) -> None:
    code, out, err = enrolled("ask", "It rained.", "--keep")
    assert (code, out.strip()) == (0, ANSWER)
    assert "is an example now, of news_headline" in err
    assert examples(enrolled) == [{"text": "It rained.", "title": ANSWER}]
    assert "was an example already" in enrolled("ask", "It rained.", "--keep")[2]
    assert len(enrolled.json("ask", "It snowed.", "--keep")["example"]) == 8
    assert "leave it or --compare out" in enrolled.fails("ask", "x", "--keep", "--compare")


def test_an_answer_is_given_even_where_it_cannot_be_kept(
    enrolled: Perfit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise NotFound("no room")

    monkeypatch.setattr(answers, "put", fail)
    code, out, err = enrolled("ask", "It rained.")
    assert (code, out.strip()) == (0, ANSWER)
    assert "not kept" in err
    assert "no room" in enrolled("ask", "It rained.", "--log")[2]


# -- the log ---------------------------------------------------------------------------------------


def test_the_newest_answer_alone_is_kept_unless_the_log_is_on(enrolled: Perfit) -> None:
    enrolled.ok("ask", "One.")
    enrolled.ok("ask", "Two.")
    kept = enrolled.json("log", "list")
    assert [a["messages"][0]["content"] for a in kept["answers"]] == ["Two."]
    assert not kept["on"]
    enrolled.ok("log", "on")
    enrolled.ok("ask", "Three.")
    enrolled.ok("ask", "Four.")
    kept = enrolled.json("log", "list")
    assert sorted(a["messages"][0]["content"] for a in kept["answers"]) == ["Four.", "Three."]
    enrolled.ok("log", "off")
    enrolled.ok("ask", "Five.")
    enrolled.ok("ask", "Six.")
    enrolled.ok("ask", "Seven.", "--log")
    texts = {a["messages"][0]["content"]: a for a in enrolled.json("log", "list")["answers"]}
    assert texts.keys() == {"Three.", "Four.", "Seven."}
    shown = enrolled.ok("log", "show", texts["Three."]["name"][:8])
    assert "user: Three." in shown and ANSWER in shown
    assert "type more" not in enrolled.fails("log", "show", "feed")
    enrolled.ok("log", "keep", texts["Four."]["name"][:8])
    assert examples(enrolled) == [{"text": "Four.", "title": ANSWER}]
    assert "forgets all" in enrolled.fails("log", "clear")
    enrolled.ok("log", "clear", "--yes")
    assert not enrolled.json("log", "list")["answers"]
    assert len(examples(enrolled)) == 1


def test_the_log_is_bounded_and_leaves_what_apps_stored(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_LONGEST", 3)
    profile.perform(SetLog(True))
    with profile.vault() as vault:
        answers.put(vault, Answer("stored", is_response=True, date="2020-01-01T00:00:00Z"))
    for day in range(1, 7):
        profile.perform(Record(Answer(f"{day}", date=f"2024-01-0{day}T00:00:00Z")))
    assert [answer.text for answer in profile.perform(ReadLog()).answers] == ["4", "5", "6"]
    with profile.vault() as vault:
        assert [a.text for a in answers.load(vault) if a.is_response] == ["stored"]
    assert profile.perform(FindAnswer()).text == "6"


def test_what_is_kept_is_sealed(enrolled: Perfit, home: Path) -> None:
    enrolled.ok("log", "on")
    enrolled.ok("ask", "Canarybird sang.", "--keep")
    for path in home.rglob("*"):
        assert not path.is_file() or b"anarybird" not in path.read_bytes()


# -- correct and feedback --------------------------------------------------------------------------


def test_a_correction_is_an_example_at_once(enrolled: Perfit, editor: Any) -> None:
    enrolled.ok("ask", "It rained.")
    notes = editor('cp -p "$1" "$notes/seen"; echo "$1" > "$notes/path"; echo "Rain, at last" > "$1"')
    code, _, err = enrolled("correct")
    assert code == 0 and "is an example now" in err
    assert examples(enrolled) == [{"text": "It rained.", "title": "Rain, at last"}]
    assert (notes / "seen").read_text() == f"{ANSWER}\n"
    assert stat.S_IMODE((notes / "seen").stat().st_mode) == 0o600
    assert not Path((notes / "path").read_text().strip()).parent.exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("true", None),
        ("exit 3", "ended with an error; nothing was changed"),
        ("printf '\\377' > \"$1\"", "not text in UTF-8"),
        (': > "$1"', "no example of news_headline can be made"),
        ('rm "$1"', None),
    ],
)
def test_what_is_no_correction_adds_nothing(
    enrolled: Perfit, editor: Any, script: str, message: str | None
) -> None:
    enrolled.ok("ask", "It rained.")
    editor(script)
    code, _, err = enrolled("correct")
    assert (message or ("unchanged" if script == "true" else "perfit: ")) in err
    assert code == (0 if script == "true" else 1)
    assert not examples(enrolled)


def test_without_an_answer_or_an_editor_it_says_so(enrolled: Perfit, editor: Any, monkeypatch: Any) -> None:
    assert "no answer is kept yet" in enrolled.fails("correct")
    enrolled.ok("ask", "It rained.")
    editor("true")
    monkeypatch.setenv("VISUAL", "/no/such/editor --wait")
    assert "cannot be started; set EDITOR" in enrolled.fails("correct")


def test_a_text_for_an_editor_is_overwritten_with_all_its_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with private_file("a secret text") as path:
        assert path.is_relative_to(tmp_path)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        backup = path.with_name("answer.txt~")
        backup.write_text("a secret text")
        held = [p.open("rb") for p in (path, backup)]
    assert not list(tmp_path.iterdir())
    for file in held:  # what the disk still has
        assert file.read() == bytes(13)
        file.close()


def test_thumbs_teach_and_are_noted(profile: Profile) -> None:
    named = profile.perform(Record(Answer("Yes", "news_headline", fields={"text": "A"}), log=True))
    down = profile.perform(Feedback(named.name, "down"))
    assert (down.status, down.example) == ("nothing", "")
    assert json.loads(profile.perform(FindAnswer(named.name)).extra) == {"rating": "down"}
    up = profile.perform(Feedback(named.name, "up"))
    assert up.status == "added"
    again = profile.perform(Feedback(named.name, "up", "Yes"))
    assert (again.status, again.example) == ("known", up.example)
    better = profile.perform(Feedback(named.name, "down", "No"))
    assert better.status == "added" and better.example != up.example
    with pytest.raises(NotFound, match="log on"):
        profile.perform(Feedback("f" * 24, "up"))


def test_of_a_talk_the_newest_question_is_the_prompt(enrolled: Perfit, cloud: Any, profile: Profile) -> None:
    cloud.tasks = ["news_headline", "chat"]
    profile.connect()
    said = (Message("system", "Be kind."), Message("user", "One?"), Message("assistant", "1"))
    named = profile.perform(Record(Answer("2", "chat", messages=(*said, Message("user", "Two?"))), log=True))
    assert profile.perform(Feedback(named.name, "up")).task == "chat"
    from perfit_device import history

    with profile.vault() as vault:
        assert [dict(item.fields) for item in history.load(vault)] == [{"prompt": "Two?", "reply": "2"}]
