"""/v1/responses of the endpoint, as OpenAI's own types read them; and thumbs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tests.support.device import Perfit
from tests.support.endpoint import App, serving
from tests.support.fake_cloud import FakeCloud

from perfit_device import answers
from perfit_device.operations.examples import FindExamples
from perfit_device.operations.log import ClearLog, LogAnswer, ReadLog, SetLog
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_shared.errors import Unavailable, VaultError
from perfit_shared.types import Finish

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ORDER = ["created", "in_progress", "output_item.added", "content_part.added"]
END = ["output_text.done", "content_part.done", "output_item.done", "completed"]


def text_of(response: Any) -> str:
    text: str = response["output"][0]["content"][0]["text"]
    return text


def turns(cloud: FakeCloud) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in cloud.prompts[-1].chat.messages]


def test_a_whole_response(app: App) -> None:
    reply = app.respond(instructions="Be brief.", metadata={"app": "test"}, max_output_tokens=30)
    response = Response.model_validate(reply.json, strict=True)
    assert response.output_text == "Hello world base "
    assert (response.status, response.instructions) == ("completed", "Be brief.")
    assert reply.json["store"] is False
    assert response.metadata == {"app": "test"}
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (5, 3)


def test_a_stream_of_events(app: App) -> None:
    events = app.respond(stream=True).events
    read = [EVENT.validate_python(event, strict=True) for event in events]
    kinds = [event.type.removeprefix("response.") for event in read]
    deltas = [event for event in read if event.type == "response.output_text.delta"]
    assert kinds == [*ORDER, *["output_text.delta"] * len(deltas), *END]
    assert [event.sequence_number for event in read] == list(range(len(read)))
    assert "".join(event.delta for event in deltas) == read[-1].response.output_text == "Hello world base "
    assert len({event.item_id for event in deltas} | {read[-1].response.output[0].id}) == 1
    assert read[0].response.id == read[-1].response.id
    raw = app.respond(stream=True).body.decode()
    assert raw.startswith("event: response.created\ndata: ")
    assert "[DONE]" not in raw


def test_what_codex_sends(app: App, cloud: FakeCloud) -> None:
    """Items of many kinds, tools that it always offers, and settings of models that think."""
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Sandbox: on"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "One"}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"type": "function_call", "call_id": "c", "name": "shell", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "done"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Two", "annotations": []}]},
        {"role": "user", "content": "Three"},
    ]
    settings = {
        "tools": [{"type": "function", "name": "shell"}, {"type": "web_search"}],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "store": False,
        "instructions": "You are an agent.",
        "text": {"verbosity": "low"},
    }
    assert app.respond(items, stream=True, **settings).events[-1]["type"] == "response.completed"
    assert turns(cloud) == [
        ("system", "You are an agent.\n\nSandbox: on"),
        ("user", "One\n\ndone"),
        ("assistant", "Two"),
        ("user", "Three"),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "name": "look"}},
        {"text": {"format": {"type": "json_object"}}},
        {"background": True},
        {"conversation": "conv_1"},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        {"input": [{"type": "item_reference", "id": "x"}]},
    ],
)
def test_what_is_refused(app: App, settings: dict[str, Any]) -> None:
    reply = app.respond(**({"given": settings.pop("input")} if "input" in settings else {}), **settings)
    assert (reply.status, reply.error["code"]) == (400, "unsupported_value")


def test_a_talk_that_is_kept(app: App, opened: Profile, cloud: FakeCloud) -> None:
    first = app.respond("One", store=True, instructions="Be brief.").json
    assert first["store"] is True
    assert app.get(f"/responses/{first['id']}").json == first
    second = app.respond("Two", previous_response_id=first["id"], store=True, stream=True)
    assert second.events[-1]["response"]["previous_response_id"] == first["id"]
    # Instructions hold for one response alone.
    assert turns(cloud) == [("user", "One"), ("assistant", "Hello world base "), ("user", "Two")]
    third = app.respond("Three", previous_response_id=second.events[-1]["response"]["id"]).json
    assert [content for _, content in turns(cloud)][::2] == ["One", "Two", "Three"]
    assert app.get(f"/responses/{third['id']}").status == 404  # an absent store is false

    with opened.vault() as vault:
        kept = answers.load(vault)
        assert [answer.is_response for answer in kept] == [True, True]
        assert all(answers.texts_of(answer) >= {"One", "Hello world base"} for answer in kept)
        for answer in kept:
            assert not any(text in answer.extra for text in ("One", "Two", "Hello", "Be brief"))
    dropped = app.call("DELETE", f"/responses/{first['id']}")
    assert dropped.json == {"id": first["id"], "object": "response", "deleted": True}
    gone = app.respond("Two", previous_response_id=first["id"])
    assert (gone.status, gone.error["code"]) == (400, "previous_response_not_found")
    assert app.call("DELETE", f"/responses/{first['id']}").status == 404


def test_a_talk_goes_on_after_a_restart(enrolled: Perfit, home: Path, cloud: FakeCloud) -> None:
    """Of the endpoint, and of the process that has the vault."""
    previous, said = None, []
    for text in ("One", "Two"):
        settings = DeviceSettings("default", home)
        with Profile.open(settings, passphrase=lambda: "correct horse") as opened, serving(opened) as app:
            reply = app.respond(text, store=True, previous_response_id=previous)
            previous = reply.json["id"]
            said.append(turns(cloud))
    assert said[0] == [("user", "One")]
    assert said[1] == [("user", "One"), ("assistant", "Hello world base "), ("user", "Two")]


def test_what_the_log_kept_is_no_response(app: App, opened: Profile) -> None:
    answer = answers.Answer("mine", messages=(answers.Message("user", "secret"),))
    with opened.vault() as vault:
        answers.put(vault, answer)
    assert app.get(f"/responses/{answer.name}").status == 404
    assert app.call("DELETE", f"/responses/{answer.name}").status == 404


def test_an_answer_of_full_length(app: App, opened: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake cloud never reaches max_tokens."""
    from perfit_device.operations import complete

    done = complete.Completion("short", Finish.LENGTH, 5, 3)
    monkeypatch.setattr(complete.Complete, "run", lambda self, profile, emit: done)
    event = app.respond(stream=True).events[-1]
    assert event["type"] == "response.incomplete"
    assert EVENT.validate_python(event).response.incomplete_details.reason == "max_output_tokens"
    assert app.respond().json["status"] == "incomplete"
    assert app.chat().json["choices"][0]["finish_reason"] == "length"


def test_a_failure_in_mid_stream(app: App, cloud: FakeCloud) -> None:
    cloud.answer, cloud.pause = "word " * 400, 0.05
    connection = app.connection()
    body = json.dumps({"model": "base", "input": "One", "stream": True})
    connection.request("POST", "/v1/responses", body, {"Authorization": f"Bearer {app.token}"})
    response = connection.getresponse()
    response.readline()
    cloud.stop()
    last = json.loads(response.read().decode().rstrip().rpartition("data: ")[2])
    assert EVENT.validate_python(last).type == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"


def test_a_failure_before_the_first_event_has_a_status(app: App, cloud: FakeCloud) -> None:
    cloud.fail = lambda method: Unavailable("stopping") if method == "Generate" else None
    assert app.respond(stream=True).status == 503


def examples(opened: Profile) -> list[str]:
    return [item.fields["title"] for item in opened.perform(FindExamples())]


@pytest.mark.parametrize("stream", [False, True])
def test_answers_to_apps_are_in_the_log_where_that_is_on(app: App, opened: Profile, stream: bool) -> None:
    def ask_all() -> list[str]:
        """Ids."""
        text = {"model": "news_headline", "prompt": "Once", "stream": stream}
        replies = [
            app.chat(model="news_headline", n=2, stream=stream),
            app.post("/completions", text),
            app.respond(model="news_headline", stream=stream),
            app.respond(model="news_headline", stream=stream, store=True),
        ]
        first = [reply.events[0] if stream else reply.json for reply in replies]
        return [one["response"]["id"] if "response" in one else one["id"] for one in first]

    ids = ask_all()
    for not_kept in (*ids[:3], "chatcmpl-", "last", ids[3][:12]):
        reply = app.post("/feedback", {"answer": not_kept, "rating": "up"})
        assert (reply.status, reply.error["code"]) == (404, "not_found")
        assert "`perfit log on`" in reply.error["message"]
    assert opened.perform(ReadLog()).answers == ()
    assert app.post("/feedback", {"answer": ids[3], "rating": "up"}).status == 200, "a stored response"

    opened.perform(SetLog(True))
    ids = ask_all()
    logged = opened.perform(ReadLog()).answers
    assert len(logged) == 5
    assert {(a.task, a.mode, a.is_response) for a in logged} == {("news_headline", "personal", False)}
    assert {a.messages[-1].content for a in logged} == {"Hello there", "Once"}
    assert {a.text.strip() for a in logged} == {"Hello world personal"}
    for number, id_ in enumerate(ids):
        given = {"answer": id_, "rating": "down", "correction": f"Better {number}"}
        assert app.post("/feedback", given).json["rating"] == "down"
    given = {"answer": ids[0], "choice": 1, "rating": "up", "correction": "Better yet"}
    assert app.post("/feedback", given).status == 200
    assert app.post("/feedback", given | {"choice": 2}).status == 404
    better = [*(f"Better {number}" for number in range(4)), "Better yet"]
    assert sorted(examples(opened)) == sorted(["Hello world personal", *better])
    assert app.call("DELETE", f"/responses/{ids[3]}").status == 200
    assert opened.perform(ClearLog()) == 5


def test_an_answer_is_given_where_it_cannot_be_logged(
    app: App, opened: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise VaultError("the disk is full")

    monkeypatch.setattr(LogAnswer, "run", full)
    assert app.chat().status == app.respond().status == 200
    assert app.chat(stream=True).events[-1] == "[DONE]"


def test_wrong_feedback(app: App) -> None:
    good = {"answer": "a", "rating": "up"}
    for wrong in ({"rating": "so"}, {"rating": None}, {"answer": None}, {"correction": 1}, {"choice": -1}):
        assert app.post("/feedback", good | wrong).status == 400
