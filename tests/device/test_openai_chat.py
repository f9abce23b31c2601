"""Chat and text completions of the endpoint, as OpenAI's own types read them."""

from __future__ import annotations

import http.client
import json
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from tests.support.endpoint import HELLO, App
from tests.support.fake_cloud import FakeCloud

from perfit_device.profile import Profile
from perfit_shared.errors import Busy, InvalidPrompt, NotAuthenticated, PerfitError, VaultError
from perfit_shared.tasks import TASKS

SAID = "Hello world base"


def turns(cloud: FakeCloud, number: int = -1) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in cloud.prompts[number].chat.messages]


def with_chat(cloud: FakeCloud) -> None:
    cloud.tasks = ["chat", "news_headline"]
    cloud.own_tasks = {"chat": TASKS["chat"].resolved(True)}


def test_models(app: App, cloud: FakeCloud) -> None:
    listed = app.get("/models").json
    assert [Model.model_validate(m).id for m in listed["data"]] == [
        "base",
        "collective",
        "personal",
        "news_headline",
    ]
    assert app.get("/models/personal").json == listed["data"][2]
    missing = app.get("/models/gpt-9")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")
    assert app.chat(model="gpt-9").error == missing.error


def test_a_whole_answer(app: App, cloud: FakeCloud) -> None:
    whole = ChatCompletion.model_validate(app.chat().json, strict=True)
    [choice] = whole.choices
    assert (choice.message.content, choice.finish_reason) == (f"{SAID} ", "stop")
    assert whole.id.startswith("chatcmpl-")
    assert whole.model == "base"
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (5, 3, 8)


def test_a_stream(app: App) -> None:
    events = app.chat(stream=True, stream_options={"include_usage": True}).events
    assert events.pop() == "[DONE]"
    chunks = [ChatCompletionChunk.model_validate(event, strict=True) for event in events]
    assert len({chunk.id for chunk in chunks}) == 1
    *spoken, last, counts = chunks
    assert spoken[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == f"{SAID} "
    assert all(chunk.choices[0].finish_reason is None and chunk.usage is None for chunk in spoken)
    assert last.choices[0].finish_reason == "stop"
    assert counts.choices == []
    assert counts.usage is not None
    assert counts.usage.total_tokens == 8
    plain = app.chat(stream=True).events
    assert all("usage" not in event for event in plain[:-1])


def test_what_clients_send(app: App, cloud: FakeCloud) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": "three", "name": "ann"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]},
        {"role": "tool", "content": "42", "tool_call_id": "x"},
    ]
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    for choice in ("auto", "none", None):
        reply = app.chat(messages, tools=tools, tool_choice=choice, user="ann", unheard_of={"of": 1})
        assert reply.json["choices"][0]["message"].get("tool_calls") is None
    assert turns(cloud) == [
        ("system", "Be brief.\n\nBe kind."),
        ("user", "One\ntwo\n\nthree"),
        ("assistant", "No"),
        ("user", "42"),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "look"}}},
        {"function_call": {"name": "look"}},
        {"modalities": ["text", "audio"]},
        {"response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
    ],
)
def test_what_is_refused(app: App, cloud: FakeCloud, settings: dict[str, Any]) -> None:
    reply = app.chat(**settings)
    assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert reply.error["code"] == "unsupported_value"
    assert "Generate" not in cloud.calls


def test_log_probabilities_of_a_cloud_that_gives_none(app: App, cloud: FakeCloud) -> None:
    for path, settings in (
        ("/chat/completions", {"messages": HELLO, "logprobs": True}),
        ("/completions", {"prompt": "x", "logprobs": 0}),
        ("/responses", {"input": "x", "top_logprobs": 2, "stream": True}),
    ):
        reply = app.post(path, {"model": "base", **settings})
        assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
        assert "log-probabilities of no tokens" in reply.error["message"]
    assert "Generate" not in cloud.calls


def test_what_is_not_served(app: App) -> None:
    for path in ("/embeddings", "/images/generations", "/audio/speech"):
        reply = app.post(path, {"model": "base", "input": "x"})
        assert (reply.status, reply.error["code"]) == (404, "unknown_url")
        assert "no embeddings, images" in reply.error["message"]
    assert app.get("/chat/completions").status == 405


def test_several_choices_and_stops(app: App, cloud: FakeCloud) -> None:
    two = app.chat(n=2, seed=7).json
    assert [choice["index"] for choice in two["choices"]] == [0, 1]
    assert two["usage"] == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
    # More stop texts than the cloud takes: this device ends the answer before the ninth.
    stops = [f"never {n}" for n in range(8)] + ["wor"]
    cut = app.chat(stop=stops).json
    assert cut["choices"][0]["message"]["content"] == "Hello "
    assert cut["usage"] is None
    long = "ld base" + "!" * 80
    assert app.chat(stop=long).json["choices"][0]["message"]["content"] == f"{SAID} "


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_made_side_by_side(app: App, cloud: FakeCloud, stream: bool) -> None:
    """Four at once; their chunks come mixed."""
    app.chat()
    four = threading.Barrier(4)
    cloud.fail = lambda method: [four.wait(20), None][1] if method == "Generate" else None
    reply = app.chat(n=8, stream=stream, stream_options={"include_usage": True})
    if not stream:
        assert [choice["index"] for choice in reply.json["choices"]] == list(range(8))
        return
    said = dict.fromkeys(range(8), "")
    *events, counts, done = reply.events
    for event in events:
        (choice,) = event["choices"]
        said[choice["index"]] += choice["delta"].get("content", "")
    assert set(said.values()) == {f"{SAID} "}
    assert (counts["usage"]["completion_tokens"], done) == (24, "[DONE]")


def test_a_choice_that_fails_ends_the_others(app: App, cloud: FakeCloud) -> None:
    app.chat()
    cloud.answer, cloud.pause = "word " * 400, 0.05
    cloud.fail = lambda method: (
        InvalidPrompt("too long") if method == "Generate" and cloud.calls.count("Generate") == 3 else None
    )
    assert app.chat(n=2).error["message"] == "too long"
    assert cloud.cancelled.wait(10)


def test_texts_to_go_on_with(app: App, cloud: FakeCloud) -> None:
    reply = app.post("/completions", {"model": "base", "prompt": ["Once", "Twice"], "n": 2})
    whole = Completion.model_validate(reply.json, strict=True)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert {prompt.text for prompt in cloud.prompts} == {"Once", "Twice"}
    events = app.post("/completions", {"model": "base", "prompt": "Once", "stream": True}).events
    assert events.pop() == "[DONE]"
    assert "".join(event["choices"][0]["text"] for event in events).strip() == SAID
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    for wrong in ([1, 2], [], "", {"echo": True}):
        body = {"model": "base", "prompt": wrong} if not isinstance(wrong, dict) else {"prompt": "x", **wrong}
        assert app.post("/completions", {"model": "base", **body}).status == 400


def test_which_shift_answers(app: App, cloud: FakeCloud) -> None:
    """`personal` is the artefact chat where there is one; a task takes the last user message as its text."""
    for model, mode in (
        ("collective", "collective"),
        ("personal", "personal"),
        ("news_headline", "personal"),
    ):
        reply = app.chat([{"role": "system", "content": "x"}, *HELLO], model=model)
        assert reply.json["choices"][0]["message"]["content"] == f"Hello world {mode} "
        assert (
            cloud.prompts[-1].text == "Generate a headline for the following article: Hello there headline:"
        )


def test_a_talk_goes_to_the_chat_artefact(cloud: FakeCloud, app: App) -> None:
    with_chat(cloud)
    assert app.chat(model="personal").json["choices"][0]["message"]["content"] == "Hello world personal "
    assert turns(cloud) == [("user", "Hello there")]


def test_a_task_of_two_fields(app: App, cloud: FakeCloud) -> None:
    two = replace(TASKS["news_headline"].resolved(False), template="{text} in {place}", chat_template="")
    cloud.own_tasks = {"news_headline": two}
    reply = app.chat(model="news_headline")
    assert (reply.status, "place" in reply.error["message"]) == (400, True)
    assert app.chat(model="news_headline", fields={"place": "Rome"}).status == 200
    assert cloud.prompts[-1].text == "Hello there in Rome"


def test_penalties_go_to_the_cloud(app: App, cloud: FakeCloud) -> None:
    """An app's own, 0 among them, over the task's; `/v1/responses` has none, so there the task's count."""
    headline = TASKS["news_headline"].resolved(False)
    cloud.own_tasks = {"news_headline": replace(headline, frequency_penalty=1.5)}

    def sent() -> tuple[float, float]:
        return cloud.samplings[-1].frequency_penalty, cloud.samplings[-1].presence_penalty

    given = {"frequency_penalty": 0.5, "presence_penalty": -1}
    app.chat(**given)
    assert sent() == (0.5, -1.0)
    app.post("/completions", {"model": "base", "prompt": "Once", **given})
    assert sent() == (0.5, -1.0)
    app.respond(**given)
    app.chat()
    assert [(of.frequency_penalty, of.presence_penalty) for of in cloud.samplings[-2:]] == [(0, 0)] * 2
    for settings, wanted in (({}, 1.5), ({"frequency_penalty": None}, 1.5), ({"frequency_penalty": 0}, 0.0)):
        app.chat(model="news_headline", **settings)
        assert sent() == (wanted, 0.0)
    app.respond(model="news_headline", frequency_penalty=0)
    assert sent() == (1.5, 0.0)
    for wrong in (2.1, -2.1, "1", True):
        reply = app.chat(presence_penalty=wrong)
        assert (reply.status, reply.error["param"]) == (400, "presence_penalty")


def test_a_long_talk_loses_its_oldest_turns(app: App, cloud: FakeCloud) -> None:
    cloud.refuses = lambda _: len(cloud.prompts[-1].chat.messages) > 10
    talk = [{"role": "system", "content": "Be brief."}]
    for n in range(20):
        talk += [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}]
    assert app.chat([*talk, *HELLO]).status == 200
    kept = turns(cloud)
    assert kept[0] == ("system", "Be brief.")
    assert kept[1][0] == "user"
    assert kept[-1] == ("user", "Hello there")
    assert 4 < len(kept) <= 10
    cloud.refuses = lambda _: True
    assert app.chat([*talk, *HELLO]).error["code"] == "invalid_prompt"
    assert turns(cloud) == [("system", "Be brief."), ("user", "Hello there")]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Busy("busy", retry_ms=2500), 429, "rate_limit_error"),
        (InvalidPrompt("too long"), 400, "invalid_request_error"),
        (NotAuthenticated("who are you"), 502, "api_error"),
    ],
)
def test_what_the_cloud_refuses(
    app: App, cloud: FakeCloud, error: PerfitError, status: int, kind: str
) -> None:
    app.chat()  # connected
    cloud.fail = lambda method: error if method == "Generate" else None
    for stream in (False, True):
        reply = app.chat(stream=stream)
        assert (reply.status, reply.error["type"], reply.error["message"]) == (status, kind, str(error))
        assert reply.headers.get("retry-after") == ("3" if status == 429 else None)


def test_a_locked_profile(app: App, opened: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: Any) -> Any:
        raise VaultError("locked: perfit unlock")

    monkeypatch.setattr(opened, "perform", locked)
    reply = app.chat()
    assert (reply.status, reply.error["message"]) == (503, "locked: perfit unlock")


def test_a_cloud_that_is_away(app: App, cloud: FakeCloud) -> None:
    cloud.stop()
    reply = app.chat()
    assert (reply.status, reply.error["type"]) == (503, "service_unavailable")
    assert "cannot reach the cloud" in reply.error["message"]


def test_an_answer_ends_at_the_cloud_when_its_app_leaves(app: App, cloud: FakeCloud) -> None:
    cloud.answer, cloud.pause = "word " * 400, 0.05
    connection = app.connection()
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {app.token}"})
    response = connection.getresponse()
    assert response.read(1)
    response.close()
    connection.close()
    assert cloud.cancelled.wait(10)

    cloud.cancelled.clear()
    whole = app.connection()
    whole.request(
        "POST",
        "/v1/chat/completions",
        json.dumps({"model": "base", "messages": HELLO}),
        {"Authorization": f"Bearer {app.token}"},
    )
    while cloud.calls.count("Generate") < 2:
        time.sleep(0.01)
    assert isinstance(whole, http.client.HTTPConnection)
    whole.close()
    assert cloud.cancelled.wait(10)


def test_a_failure_in_mid_stream_is_said(app: App, cloud: FakeCloud) -> None:
    cloud.answer, cloud.pause = "word " * 400, 0.05
    connection = app.connection()
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {app.token}"})
    response = connection.getresponse()
    response.readline()
    cloud.stop()
    rest = response.read().decode()
    assert "[DONE]" not in rest
    assert json.loads(rest.rstrip().rpartition("data: ")[2])["error"]["type"] == "service_unavailable"
