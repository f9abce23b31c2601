"""Who may use the endpoint, and input that means harm."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.endpoint import HELLO, App, serving
from tests.support.fake_cloud import FakeCloud

from perfit_device.cli import serve as command
from perfit_device.openai_api import body as reading
from perfit_device.openai_api import server
from perfit_device.openai_api.guard import Rules
from perfit_device.operations.endpoint import EndpointToken
from perfit_device.profile import Profile


def test_the_token(app: App, compared: list[tuple[bytes, bytes]]) -> None:
    for given in ("", "Bearer ", "Bearer wrong", f"Basic {app.token}", app.token, "Bearer ü"):
        reply = app.get("/models", Authorization=given)
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert app.token not in reply.body.decode()
    assert app.get("/models").status == 200
    assert (app.token.encode(), app.token.encode()) in compared  # in constant time


def test_the_token_survives_until_there_is_a_new_one(opened: Profile) -> None:
    first = opened.perform(EndpointToken()).text
    assert opened.perform(EndpointToken()).text == first
    second = opened.perform(EndpointToken(new=True)).text
    assert second != first
    with serving(opened) as app:
        assert app.token == second
        assert app.get("/models", Authorization=f"Bearer {first}").status == 401


def test_foreign_hosts_and_origins(app: App, opened: Profile) -> None:
    for host in ("evil.example", "localhost.evil.example", "[::2]:80", "", "localhost:80@evil", "[::1"):
        with socket.create_connection(app.address) as raw:
            raw.sendall(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            assert raw.recv(4096).startswith(b"HTTP/1.1 403")
    for host in ("localhost", "127.0.0.1:1", "[::1]:99", "LOCALHOST:80"):
        assert app.get("/models", Host=host).status == 200
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        assert app.get("/models", Origin=origin).error["code"] == "origin_refused"
    assert "access-control-allow-origin" not in app.get("/models").headers
    rules = Rules(hosts=("host.docker.internal",), origins=("http://localhost:3000",))
    with serving(opened, rules=rules) as allowed:
        assert allowed.get("/models", Host="host.docker.internal:8717").status == 200
        page = allowed.get("/models", Origin="http://localhost:3000")
        assert page.headers["access-control-allow-origin"] == "http://localhost:3000"
        asked = allowed.call("OPTIONS", "/models", Origin="http://localhost:3000", Authorization="")
        assert (asked.status, asked.body) == (204, b"")
        assert allowed.call("OPTIONS", "/models", Origin="http://a", Authorization="").status == 403


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"model": NaN}',
        b'{"model": "base", "temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}',
        b"[" * 30_000,
        b'{"a":' * 30_000,
        b'{"model": "\xff"}',
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "base", "n": 1' + b"0" * 10_000 + b"}",
        b'{"model": "base", "n": [' + b"1" * 65 + b"]}",
        b'{"model": "base", "n": 0.' + b"1" * 64 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x", "model": "'
        + b"x" * 10**6
        + b'"}',
    ],
)
def test_bad_json(app: App, cloud: FakeCloud, body: bytes) -> None:
    for path in ("/chat/completions", "/completions", "/responses", "/feedback"):
        reply = app.post(path, body)
        assert (reply.status, reply.error["type"]) == (400, "invalid_request_error")
    assert "Generate" not in cloud.calls


WRONG: list[Any] = [0, -1, 1.5, True, "", "x", "\x00", [], [1], [[]], {}, {"a": 1}, [None], 10**30, "\ud800"]
FIELDS = [
    "model",
    "messages",
    "input",
    "prompt",
    "n",
    "stop",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "frequency_penalty",
    "presence_penalty",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "logprobs",
    "top_logprobs",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "store",
    "metadata",
    "include",
    "previous_response_id",
    "instructions",
    "text",
    "response_format",
    "modalities",
    "fields",
    "echo",
    "suffix",
    "best_of",
    "audio",
]


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_types_in_every_field(app: App, name: str) -> None:
    """Anything is answered, or refused with what is wrong: never a fault, never a broken connection."""
    good = {"model": "base", "messages": HELLO, "prompt": "x", "input": "x", "max_tokens": 2}
    for value in WRONG:
        for path in ("/chat/completions", "/completions", "/responses"):
            reply = app.post(path, json.dumps(good | {name: value}).encode())
            assert reply.status in (200, 400, 404), (path, value, reply.body)
            if reply.status != 200:
                assert reply.error["type"] == "invalid_request_error"
    for value in WRONG:
        messages = [{"role": "user", "content": "x", name: value}, {"role": value, "content": "x"}]
        assert app.post("/chat/completions", {"model": "base", "messages": messages}).status == 400


def test_wrong_messages(app: App) -> None:
    for value in WRONG:
        for message in ({"role": "user", "content": value}, value, {"role": "user", "content": [value]}):
            reply = app.chat([message])
            assert reply.status in (200, 400), reply.body
    assert app.chat([{"role": "user", "content": " "}]).error["code"] == "invalid_prompt"
    named = {"model": "base", "messages": HELLO, "fields": {"x" * 65: "x"}}
    assert app.post("/chat/completions", named).error["param"] == "fields"


MOST = 65_536
PROSE = json.dumps({"model": "base", "messages": HELLO, "user": 'a,b:[{"\\' * MOST})


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (PROSE, 200),
        (json.dumps({"model": "base", "messages": [{"role": "user", "content": "hi"}] * 4096}), 200),
        (json.dumps({f"f{n}": 1 for n in range(600_000)}), 413),
        ("[" + "{}," * MOST + "{}]", 413),
        (json.dumps({"a": ["x"] * (MOST + 1)}), 413),
        (json.dumps({"a": {'"': ["\\\\", []] * (MOST // 2)}}), 413),
        ("[" * (MOST + 1), 413),
        ('"' * 10**6, 413),
    ],
)
def test_values_are_counted_before_they_are_built(
    app: App, monkeypatch: pytest.MonkeyPatch, body: str, status: int
) -> None:
    """600,000 fields kept the event loop from everybody else for seconds."""
    parsed: list[str] = []
    loads = json.loads
    fake = SimpleNamespace(loads=lambda *a, **k: [parsed.append(""), loads(*a, **k)][1])
    monkeypatch.setattr(reading, "json", fake)
    reply = app.post("/chat/completions", body.encode())
    assert (reply.status, len(parsed)) == (status, 1 if status == 200 else 0)
    if status == 413:
        assert reply.error["code"] == "request_too_large" and f"{MOST} values" in reply.error["message"]


def test_large_bodies(app: App, opened: Profile) -> None:
    with serving(opened, rules=Rules(body_bytes=1000)) as small:
        large = json.dumps({"model": "base", "messages": HELLO, "user": "x" * 2000}).encode()
        reply = small.post("/chat/completions", large)
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        with socket.create_connection(small.address) as raw:
            head = (
                f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {small.token}\r\n"
            )
            raw.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            raw.sendall(b"200\r\n" + b"x" * 512 + b"\r\n" + b"200\r\n" + b"x" * 512 + b"\r\n")
            assert raw.recv(4096).startswith(b"HTTP/1.1 413")
    for size in (9, 100):  # MB: whoever sends all of it first learns why, too
        reply = app.post("/chat/completions", b"x" * size * 10**6)
        assert (reply.status, reply.error["message"]) == (413, "the body may have 8 MiB")
    with socket.create_connection(app.address) as raw:  # headers without end
        raw.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 40_000)
        assert raw.recv(4096).startswith(b"HTTP/1.1 400")
    assert app.get("/models").status == 200


def test_whoever_sends_slowly_is_cut_off(opened: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_HEAD_SECONDS", 0.3)
    with serving(opened, rules=Rules(body_seconds=0.3)) as app:
        with socket.create_connection(app.address) as silent, socket.create_connection(app.address) as slow:
            slow.sendall(b"GET /v1/mod")
            silent.settimeout(10)
            slow.settimeout(10)
            assert silent.recv(1) == b""
            assert slow.recv(1) == b""
        with socket.create_connection(app.address) as half:
            half.settimeout(10)
            head = f"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {app.token}\r\n"
            half.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert half.recv(4096).startswith(b"HTTP/1.1 408")


def test_more_requests_than_fit(opened: Profile, cloud: FakeCloud) -> None:
    cloud.pause = 0.3
    with serving(opened, rules=Rules(requests=2)) as app, ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: app.chat(), range(6)))
        assert {reply.status for reply in replies} == {200, 429}
        assert all(reply.headers["retry-after"] == "1" for reply in replies if reply.status == 429)
        assert app.chat().status == 200


def test_many_at_once_get_their_own_answers(app: App) -> None:
    def ask(number: int) -> tuple[int, str]:
        model = ("base", "collective", "personal")[number % 3]
        reply = app.chat(model=model, stream=False)
        return number, reply.json["choices"][0]["message"]["content"].split()[-1]

    with ThreadPoolExecutor(12) as pool:
        for number, mode in pool.map(ask, range(24)):
            assert mode == ("base", "collective", "personal")[number % 3]


def test_nothing_of_a_request_is_logged(app: App, opened: Profile, capsys: Any, monkeypatch: Any) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("canary word")

    app.chat([{"role": "user", "content": "canary question"}])
    monkeypatch.setattr(opened, "perform", broken)
    reply = app.chat([{"role": "user", "content": "canary question"}])
    assert (reply.status, reply.error["code"]) == (500, "internal")
    with socket.create_connection(app.address) as raw:
        raw.sendall(b"canary rubbish\r\n\r\n")
        raw.recv(4096)
    assert "canary" not in reply.body.decode()
    assert capsys.readouterr() == ("", "")


def test_stopping_breaks_answers_off(opened: Profile, cloud: FakeCloud) -> None:
    cloud.answer, cloud.pause = "word " * 400, 0.05
    began = time.monotonic()
    with serving(opened) as app:
        connection = app.connection()
        body = json.dumps({"model": "base", "messages": HELLO, "stream": True})
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {app.token}"})
        connection.getresponse().read(1)
    assert time.monotonic() - began < 15  # of 20 seconds that the answer takes
    assert cloud.cancelled.wait(10)


def test_the_command(enrolled: Perfit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends it, with 0; the token is the same at the next start."""

    def interrupted(endpoint: server.Endpoint) -> None:
        assert App(endpoint.url, endpoint.token).get("/models").status == 200
        raise KeyboardInterrupt

    monkeypatch.setattr(server.Endpoint, "wait", interrupted)
    first = enrolled.json("serve", "--port", "0")
    assert set(first) == {"url", "token"}
    assert enrolled.json("serve", "--port", "0")["token"] == first["token"]
    assert enrolled.json("serve", "--port", "0", "--new-token")["token"] != first["token"]
    _, out, err = enrolled("serve", "--port", "0", "--host", "0.0.0.0")  # noqa: S104
    assert out.startswith("url    http://0.0.0.0:")
    assert "in the open" in err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert "--port 0" in enrolled.fails("serve", "--port", str(taken.getsockname()[1]))
    assert command._is_loopback("127.0.0.2")
