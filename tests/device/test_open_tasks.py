"""Tasks that the device does not know by itself: it takes them from the cloud's description."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit

from perfit_shared.tasks import TASKS, Task

TICKETS = Task(
    "tickets",
    "Answer this ticket about {product}: {ticket}",
    "{answer}",
    "rouge_l",
    chat=True,
    system="You are brief.",
    stop=(),
)


@pytest.fixture
def tickets(cloud: Any, perfit: Perfit) -> Perfit:
    """Enrolled with a cloud whose only task is its operator's own."""
    cloud.tasks, cloud.own_tasks = ["tickets"], {"tickets": TICKETS}
    perfit.ok("enroll", cloud.invite().encode())
    return perfit


def turns(cloud: Any) -> list[tuple[str, str]]:
    """Of the last question."""
    return [(m.role, m.content) for m in cloud.prompts[-1].chat.messages]


def test_an_operator_s_task_is_asked_as_chat_turns_with_its_system_turn(tickets: Perfit, cloud: Any) -> None:
    tickets.ok("ask", "Web", "--field", "ticket=The page stays white.")
    assert turns(cloud) == [
        ("system", "You are brief."),
        ("user", "Answer this ticket about Web: The page stays white."),
    ]
    said = tickets.fails("ask", "Web")
    assert 'field "ticket" is missing' in said and "--field NAME=TEXT" in said
    said = tickets.fails("ask", "Web", "--field", "colour=red")
    assert 'no further field "colour" in tickets' in said and "it has ticket" in said
    for wrong in (["colour"], ["ticket=a", "--field", "ticket=b"]):
        assert "should be NAME=TEXT, each name once" in tickets.fails("ask", "Web", "--field", *wrong)


def test_examples_of_an_operator_s_task(tickets: Perfit, tmp_path: Path) -> None:
    tickets.ok("history", "add", "Web", "Clear the cache.", "--field", "ticket=White page.")
    said = tickets.fails("history", "add", "Web", "Clear the cache.")
    assert 'field "ticket" is missing' in said
    rows = [{"product": "Web", "ticket": f"No {n} fails.", "answer": f"Do {n}."} for n in range(19)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    done = tickets.json("history", "import", str(path))
    assert (done["task"], done["added"], done["known"]) == ("tickets", 19, 0)
    assert len(tickets.json("history", "list", "--task", "tickets")) == 20
    path.write_text(json.dumps({"product": "Web", "answer": "x"}))
    said = tickets.fails("history", "import", str(path), "--task", "tickets")
    assert 'field "ticket" is missing' in said and "product and ticket and answer" in said


def test_an_operator_s_task_is_trained_and_evaluated(tickets: Perfit, cloud: Any, tmp_path: Path) -> None:
    rows = [{"product": "Web", "ticket": f"No {n} fails.", "answer": f"Do {n}."} for n in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tickets.ok("history", "import", str(tmp_path / "mine.jsonl"))
    assert tickets.json("update")["task"] == "tickets"
    assert tickets.json("evaluate")["metric"]["name"] == "rouge_l"
    assert turns(cloud)[0] == ("system", "You are brief.")


def test_the_cloud_s_task_counts_not_perfit_s_of_that_name(cloud: Any, perfit: Perfit) -> None:
    """A cloud may word a built-in task in its own way, with fields of its own."""
    cloud.tasks = ["reply"]
    cloud.own_tasks = {"reply": Task("reply", "Mail: {mail}\nAnswer:", " {mine}", "rouge_1")}
    perfit.ok("enroll", cloud.invite().encode())
    perfit.ok("ask", "Hello?")
    assert cloud.prompts[-1].text == "Mail: Hello?\nAnswer:"
    perfit.ok("history", "add", "Hello?", "Hi!")
    (item,) = perfit.json("history", "list")
    assert item["fields"] == {"mail": "Hello?", "mine": "Hi!"}


def test_a_task_s_penalties_count_where_none_is_given(cloud: Any, perfit: Perfit, monkeypatch: Any) -> None:
    cloud.tasks = ["chat"]
    chat = TASKS["chat"].resolved(True)
    cloud.own_tasks = {"chat": replace(chat, frequency_penalty=0.5, presence_penalty=-1)}
    perfit.ok("enroll", cloud.invite().encode())
    for command in (("ask", "What should I cook?"), ("chat",)):
        for flags, wanted in (
            ((), (0.5, -1.0)),
            (("--frequency-penalty", "0"), (0.0, -1.0)),
            (("--presence-penalty", "1.5", "--frequency-penalty", "-2"), (-2.0, 1.5)),
        ):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"What should I cook?")))
            perfit.ok(*command, *flags)
            sent = cloud.samplings[-1]
            assert (sent.frequency_penalty, sent.presence_penalty) == wanted, (command, flags)
    assert "from -2 to 2" in perfit.fails("ask", "x", "--frequency-penalty", "2.5")


def test_replies_and_chats_are_asked_by_name(cloud: Any, perfit: Perfit) -> None:
    cloud.tasks = ["chat", "reply"]
    cloud.own_tasks = {"reply": TASKS["reply"].resolved(True)}
    perfit.ok("enroll", cloud.invite().encode())
    perfit.ok("ask", "--task", "reply", "Friday?")
    assert turns(cloud) == [("user", "Write a reply to this message: Friday?")]
    perfit.ok("ask", "--task", "chat", "What should I cook?")
    assert turns(cloud) == [("user", "What should I cook?")]


def test_a_task_that_does_not_say_how_it_is_read_is_refused(cloud: Any, enrolled: Perfit) -> None:
    """Text or chat turns: a wrong guess would be another prompt than the shift was trained on."""
    cloud.own_tasks = {"news_headline": TASKS["news_headline"]}
    assert "does not say how it is read" in enrolled.fails("ask", "x")


def test_before_enrolment_a_cloud_s_own_task_is_not_known(perfit: Perfit, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("{}")
    said = perfit.fails("history", "import", str(tmp_path / "mine.jsonl"), "--task", "tickets")
    assert "profile" in said or "before `perfit enroll`" in said
