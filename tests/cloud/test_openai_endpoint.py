"""The endpoint in front of a real cloud: log-probabilities, as every path writes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from tests.support.cloud import Running
from tests.support.endpoint import App, serving
from tests.support.vaults import make_cheap

from perfit_device.operations.enroll import Enroll
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_shared.invites import Invite

PROMPT = "the cat sat on the"
TALK = [{"role": "user", "content": PROMPT}]
SETTINGS = {"model": "base", "temperature": 1.5, "seed": 3, "max_tokens": 20}
INCLUDE = ["message.output_text.logprobs"]


@pytest.fixture
def app(run: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[App]:
    make_cheap(monkeypatch)
    running = run()
    addresses = running.server.addresses
    invite = Invite(addresses.enrol_address, running.authority.server_ca_der, 2**31, running.invite())
    with Profile.create(DeviceSettings("one", tmp_path / "home"), passphrase="sesame") as profile:
        profile.perform(Enroll(invite.encode()))
        with serving(profile) as app:
            yield app


def joined(tokens: list[Any]) -> str:
    return b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace")


def data_of(name: str) -> bytes:
    """Of a token of /v1/completions: a part of a character is named by its bytes."""
    if name.startswith("bytes:"):
        return bytes.fromhex(name.removeprefix("bytes:").replace("\\x", ""))
    return name.encode()


def test_log_probabilities_of_a_chat(app: App) -> None:
    asked = {**SETTINGS, "messages": TALK, "logprobs": True, "top_logprobs": 4}
    whole = app.post("/chat/completions", asked).json
    ChatCompletion.model_validate(whole, strict=True)
    [choice] = whole["choices"]
    tokens = choice["logprobs"]["content"]
    assert 2 < len(tokens) <= whole["usage"]["completion_tokens"]
    assert joined(tokens).lstrip() == choice["message"]["content"]
    for token in tokens:
        likely = [other["logprob"] for other in token["top_logprobs"]]
        assert len(likely) == 4
        assert likely == sorted(likely, reverse=True)
        assert 0 < sum(map(math.exp, likely)) <= 1 + 1e-5
        assert token["logprob"] <= likely[0] + 1e-6
        same = [other["logprob"] for other in token["top_logprobs"] if other["bytes"] == token["bytes"]]
        assert same in ([], [token["logprob"]])

    events = app.post("/chat/completions", asked | {"stream": True}).events[:-1]
    choices = [event["choices"][0] for event in events]
    streamed = [token for one in choices if one["logprobs"] for token in one["logprobs"]["content"]]
    assert streamed == tokens
    for one in choices:
        if one["delta"].get("content") and one["logprobs"]:
            assert one["logprobs"]["content"], "each text comes with its tokens"

    bare = app.post("/chat/completions", {**asked, "top_logprobs": None}).json["choices"][0]["logprobs"]
    assert [token["top_logprobs"] for token in bare["content"]] == [[]] * len(tokens)
    assert [token["logprob"] for token in bare["content"]] == [token["logprob"] for token in tokens]
    assert app.post("/chat/completions", SETTINGS | {"messages": TALK}).json["choices"][0]["logprobs"] is None


def test_log_probabilities_of_texts_to_go_on_with(app: App) -> None:
    asked = {**SETTINGS, "prompt": PROMPT, "logprobs": 3}
    whole = app.post("/completions", asked).json
    Completion.model_validate(whole, strict=True)
    text, told = whole["choices"][0]["text"], whole["choices"][0]["logprobs"]
    count = len(told["tokens"])
    assert b"".join(map(data_of, told["tokens"])).decode(errors="replace") == text
    assert [len(told[key]) for key in ("token_logprobs", "top_logprobs", "text_offset")] == [count] * 3
    for token, at, logprob, likely in zip(
        told["tokens"], told["text_offset"], told["token_logprobs"], told["top_logprobs"], strict=True
    ):
        assert text[at:].startswith(token) or token.startswith("bytes:")
        assert likely[token] == logprob
        assert 3 <= len(likely) <= 4

    events = app.post("/completions", asked | {"stream": True}).events[:-1]
    parts = [event["choices"][0]["logprobs"] for event in events]
    for key, values in told.items():
        assert list(itertools.chain.from_iterable(part[key] for part in parts)) == values, key


def test_log_probabilities_of_a_response(app: App) -> None:
    asked = {"model": "base", "input": PROMPT, "temperature": 0.0, "max_output_tokens": 20}
    for settings, top in (({"include": INCLUDE, "top_logprobs": 2}, 2), ({"include": INCLUDE}, 0)):
        whole = app.post("/responses", asked | settings).json
        Response.model_validate(whole, strict=True)
        [part] = whole["output"][0]["content"]
        assert joined(part["logprobs"]).lstrip() == part["text"]
        assert {len(token["top_logprobs"]) for token in part["logprobs"]} == {top}

        events = app.post("/responses", asked | settings | {"stream": True}).events
        by_kind: dict[str, list[Any]] = {}
        for event in events:
            by_kind.setdefault(event["type"].removeprefix("response."), []).append(event)
        streamed = [token for event in by_kind["output_text.delta"] for token in event["logprobs"]]
        [done], last = by_kind["output_text.done"], events[-1]["response"]
        assert streamed == done["logprobs"] == last["output"][0]["content"][0]["logprobs"]
        assert joined(streamed).lstrip() == done["text"]
    assert app.post("/responses", asked).json["output"][0]["content"][0]["logprobs"] == []


def test_stop_texts_cut_tokens_off_too(app: App) -> None:
    """By the cloud, and by this device: what is more than the cloud takes, and across tokens."""
    asked = {**SETTINGS, "prompt": PROMPT, "logprobs": 1, "temperature": 0.8}
    whole = app.post("/completions", asked).json["choices"][0]
    text, tokens = whole["text"], whole["logprobs"]["tokens"]
    borders = [at for at in whole["logprobs"]["text_offset"][1:] if text[at - 2 : at + 1].isascii()]
    assert len(borders) > 3
    for border in borders:
        stop = text[border - 1 : border + 1]  # across two tokens
        kept = text[: text.index(stop)]
        others = [f"never {n}" for n in range(8)]
        for stops in ([stop], [*others, stop]):
            for stream in (False, True):
                reply = app.post("/completions", asked | {"stop": stops, "stream": stream})
                choices = [e["choices"][0] for e in reply.events[:-1]] if stream else reply.json["choices"]
                assert "".join(one["text"] for one in choices) == kept
                told = [token for one in choices for token in one["logprobs"]["tokens"]]
                begun = [o for o in whole["logprobs"]["text_offset"] if o < len(kept)]
                assert told == tokens[: len(begun)]
                assert choices[-1]["finish_reason"] == "stop"


def test_more_log_probabilities_than_there_are(app: App) -> None:
    """Refused by name; `test_openai_chat` has a cloud that gives fewer."""
    for path, settings in (
        ("/chat/completions", {"messages": TALK, "logprobs": True, "top_logprobs": 21}),
        ("/completions", {"prompt": PROMPT, "logprobs": 21}),
        ("/responses", {"input": PROMPT, "top_logprobs": 21}),
    ):
        reply = app.post(path, {"model": "base", **settings})
        assert (reply.status, reply.error["code"]) == (400, "invalid_value")
        assert reply.error["param"] in ("top_logprobs", "logprobs")
