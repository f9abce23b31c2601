"""`perfit chat` at a real terminal, and with what is piped in."""

from __future__ import annotations

import io
import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.terminals import Terminal
from tests.support.waiting import wait_for

from perfit_shared.wire import personalization_pb2 as pb

ANSWER = "Hello world personal"


@pytest.fixture
def talking(perfit: Perfit, cloud: Any) -> Perfit:
    cloud.tasks = ["news_headline", "chat"]
    perfit.ok("enroll", cloud.invite().encode())
    return perfit


@pytest.fixture
def chat(talking: Perfit) -> Iterator[Terminal]:
    with Terminal(sys.executable, "-m", "perfit_device.cli", "chat") as terminal:
        terminal.wait_for("> ")
        yield terminal


def turns(prompt: pb.Prompt) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in prompt.chat.messages]


def pipe(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


def test_a_talk_goes_on_from_turn_to_turn(talking: Perfit, cloud: Any, monkeypatch: Any) -> None:
    pipe(monkeypatch, 'Hi!\n\nfirst \\\nsecond\n"""\nthree\n  four\n"""\n//slash\n')
    code, out, err = talking("chat", "--system", "Be brief.")
    assert (code, out.split("\n")[:4]) == (0, [f"{ANSWER} "] * 4)
    assert err.count("no personal shift for chat yet") == 1, "once is enough"
    said = [text for role, text in turns(cloud.prompts[-1]) if role == "user"]
    assert said == ["Hi!", "first \nsecond", "three\n  four", "/slash"]
    assert turns(cloud.prompts[-1])[:3] == [
        ("system", "Be brief."),
        ("user", "Hi!"),
        ("assistant", f"{ANSWER} "),
    ]


def test_turns_can_be_taken_back_asked_again_and_asked_of_others(
    talking: Perfit, cloud: Any, monkeypatch: Any
) -> None:
    pipe(monkeypatch, "One?\nTwo?\n/undo\n/mode base\nThree?\n/retry\n/system Short.\n/retry\n/quit\nFour?\n")
    out = talking.ok("chat").split("\n")
    assert [line.split()[-1] for line in out if line] == ["personal"] * 2 + ["base"] * 3
    asked = [turns(prompt) for prompt in cloud.prompts]
    assert asked[2] == [("user", "One?"), ("assistant", f"{ANSWER} "), ("user", "Three?")]
    assert asked[3] == asked[2]
    assert asked[4] == [("system", "Short."), *asked[2]]


def test_answers_are_kept_as_examples_and_talks_as_files(
    talking: Perfit, tmp_path: Path, monkeypatch: Any
) -> None:
    file = tmp_path / "talk.json"
    pipe(monkeypatch, f"One?\n/keep\nTwo?\n/keep In my words.\n/save {file}\n")
    talking.ok("chat")
    assert [item["fields"] for item in talking.json("history", "list")] == [
        {"prompt": "One?", "reply": ANSWER},
        {"prompt": "Two?", "reply": "In my words."},
    ]
    assert [m["content"] for m in json.loads(file.read_text())["messages"]][::2] == ["One?", "Two?"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    pipe(monkeypatch, f"One?\n/save {file}\n")
    assert "cannot be written" in talking("chat")[2]
    pipe(monkeypatch, "x\n")
    talking.ok("chat")
    assert talking.json("log", "show")["messages"] == [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/undo", "nothing to take back"),
        ("/retry", "nothing to ask again"),
        ("/keep", "no answer yet"),
        ("/mode loud", "a mode is base, collective, personal"),
        ("/dance", "// begins a message"),
        ("/save", "say where"),
    ],
)
def test_what_cannot_be_done_is_an_error(talking: Perfit, monkeypatch: Any, typed: str, message: str) -> None:
    pipe(monkeypatch, f"{typed}\n")
    assert message in talking.fails("chat")


def test_piped_bytes_that_are_no_text_are_an_error(talking: Perfit, monkeypatch: Any) -> None:
    bad = io.TextIOWrapper(io.BytesIO(b"\xff\xfe hi\n"), "utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", bad)
    assert "not text in UTF-8" in talking.fails("chat")


def test_answers_as_json(talking: Perfit, monkeypatch: Any) -> None:
    pipe(monkeypatch, "One?\nTwo?\n")
    lines = [json.loads(line) for line in talking.ok("chat", "--json").splitlines()]
    assert lines == [{"answer": f"{ANSWER} ", "finish": "end"}] * 2


def test_ctrl_c_stops_an_answer_and_not_the_session(chat: Terminal, cloud: Any) -> None:
    cloud.pause, cloud.answer = 0.05, "word " * 400
    chat.type("Tell me\r")
    chat.wait_for("word word word")
    chat.type("\x03")
    chat.wait_for("stopped")
    wait_for(cloud.cancelled.is_set)
    chat.wait_for("> ")
    cloud.pause, cloud.answer = 0.0, "Hello"
    chat.type("Go on\r")
    chat.wait_for("Hello personal")
    chat.wait_for("> ")
    (_, asked), (role, partial), (_, last) = turns(cloud.prompts[-1])
    assert (asked, role, last) == ("Tell me", "assistant", "Go on")
    assert partial.startswith("word word word") and len(partial) < 1000
    chat.type("\x04")
    assert chat.ends_with() == 0


def test_ctrl_c_at_the_prompt_clears_it_and_twice_ends(chat: Terminal, cloud: Any) -> None:
    chat.type("half a thought")
    chat.wait_for("thought")
    chat.interrupt()
    chat.wait_for("> ")
    chat.interrupt()
    chat.wait_for("Ctrl-C again ends")
    chat.wait_for("> ")
    chat.type("Hi\r")
    chat.wait_for(ANSWER)
    chat.wait_for("> ")
    assert turns(cloud.prompts[-1]) == [("user", "Hi")]
    chat.interrupt()
    chat.wait_for("Ctrl-C again ends")
    chat.wait_for("> ")
    chat.interrupt()
    assert chat.ends_with() == 0


def test_an_error_at_a_terminal_ends_nothing(chat: Terminal, cloud: Any) -> None:
    cloud.refuses = lambda text: True
    chat.type("Hi\r")
    chat.wait_for("perfit: the prompt is longer")
    chat.wait_for("> ")
    cloud.refuses = lambda text: False
    chat.type("Hi again\r")
    chat.wait_for(ANSWER)
    assert turns(cloud.prompts[-1]) == [("user", "Hi again")], "the refused turn is gone"


@pytest.mark.slow
def test_pasted_lines_are_one_message(talking: Perfit, cloud: Any) -> None:
    with Terminal(sys.executable, "-m", "perfit_device.cli", "chat", env={"TERM": "xterm"}) as chat:
        chat.wait_for("> ")
        chat.type("\x1b[200~one\ntwo\x1b[201~\r")
        chat.wait_for(ANSWER)
    assert turns(cloud.prompts[-1]) == [("user", "one\ntwo")]


@pytest.mark.slow
def test_a_narrow_terminal_takes_long_lines_and_nothing_is_left_on_the_disk(
    talking: Perfit, cloud: Any, home: Path, tmp_path: Path
) -> None:
    words = (sys.executable, "-m", "perfit_device.cli", "chat")
    with Terminal(*words, columns=20, env={"HOME": str(tmp_path)}) as chat:
        chat.wait_for("> ")
        chat.type("Canarybird " * 30 + "\r")
        chat.wait_for("personal")
        chat.wait_for("> ")
        chat.type("\x04")
        assert chat.ends_with() == 0
    assert turns(cloud.prompts[-1])[0][1].count("Canarybird") == 30
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"Canarybird" not in path.read_bytes()
