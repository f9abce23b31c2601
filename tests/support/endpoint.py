"""An app in front of the endpoint: plain HTTP, and OpenAI's own types over what comes back."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from perfit_device.openai_api.server import Endpoint, EndpointSettings
from perfit_device.operations.endpoint import EndpointToken
from perfit_device.operations.operation import Performer

SECONDS = 30
HELLO = [{"role": "user", "content": "Hello there"}]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """In OpenAI's shape, whole."""
        error: dict[str, Any] = self.json["error"]
        assert set(self.json) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert not error["message"].endswith(".")
        return error

    @property
    def events(self) -> list[Any]:
        """The data of an event stream; its end as "[DONE]"."""
        assert self.headers["content-type"].startswith("text/event-stream")
        blocks = [block for block in self.body.decode().split("\n\n") if block]
        data = [line[6:] for block in blocks for line in block.split("\n") if line.startswith("data: ")]
        assert len(data) == len(blocks)
        return [one if one == "[DONE]" else json.loads(one) for one in data]


@dataclass
class App:
    url: str
    token: str
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.address, timeout=SECONDS)

    def call(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """`body`: bytes as they are, anything else as JSON. A header of "" is left out."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        given |= self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
        connection = self.connection()
        try:
            given = {name: value for name, value in given.items() if value}
            connection.request(method, f"/v1{path}", data, given)
            response = connection.getresponse()
            received = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, received, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.call("GET", path, **headers)

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        return self.call("POST", path, body, **headers)

    def chat(self, messages: Any = HELLO, **settings: Any) -> Reply:
        return self.post("/chat/completions", {"model": "base", "messages": messages, **settings})

    def respond(self, given: Any = "Hello there", **settings: Any) -> Reply:
        return self.post("/responses", {"model": "base", "input": given, **settings})


@contextmanager
def serving(performer: Performer, **settings: Any) -> Iterator[App]:
    token = performer.perform(EndpointToken()).text
    with Endpoint(performer, EndpointSettings(port=0, **settings), token) as endpoint:
        yield App(endpoint.url, token)
