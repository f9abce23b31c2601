"""What stands before every route: who may call, from where, with how much, and how many at once."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from perfit_device.openai_api.body import Refused

__all__ = ["Guard", "Rules", "read_body", "refused"]

_LOCAL = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\[\]:@]+)(:[0-9]*)?")
_DROPPED = 16  # how many times the longest body is read, so that a client learns that its own is too long
_PAUSE_SECONDS = 1.0  # that a client may make meanwhile
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
    "Access-Control-Allow-Headers": "Authorization, Content-Type, *",
    "Access-Control-Max-Age": "600",
}


@dataclass(frozen=True)
class Rules:
    """`hosts` and `origins` beside this machine's own names."""

    hosts: tuple[str, ...] = ()  # names that a Host header may have
    origins: tuple[str, ...] = ()  # of web pages, such as http://localhost:3000
    requests: int = 32  # under way at once
    body_bytes: int = 8 << 20
    body_seconds: float = 30.0  # that a body may take to arrive


class Guard:
    """An ASGI app in front of another. `token` may be changed at any time."""

    def __init__(self, app: ASGIApp, rules: Rules, token: str) -> None:
        self._app, self._rules, self.token = app, rules, token
        self._hosts = {host.lower() for host in (*_LOCAL, *rules.hosts)}
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        request = Request(scope)
        send = self._with_cors(request, send)
        try:
            self._check_origin(request)
            if request.method == "OPTIONS" and "origin" in request.headers:
                await Response(status_code=204, headers=_PREFLIGHT)(scope, receive, send)
                return
            self._check_token(request)
            if self._under_way >= self._rules.requests:
                raise Refused(
                    f"{self._under_way} requests are under way already; try again in a moment",
                    status=429,
                    kind="rate_limit_error",
                    code="busy",
                    headers={"Retry-After": "1"},
                )
        except Refused as error:
            await refused(error)(scope, receive, send)
            return
        self._under_way += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._under_way -= 1

    def _check_origin(self, request: Request) -> None:
        """A web page of elsewhere gets here by the browser of this machine, whatever name it found for it."""
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or _name_of(hosts[0]) not in self._hosts:
            raise Refused(
                "the endpoint answers on this machine's own names; `perfit serve --allow-host NAME` adds one",
                status=403,
                code="host_refused",
            )
        if any(origin not in self._rules.origins for origin in request.headers.getlist("origin")):
            raise Refused(
                "web pages may not use this endpoint; `perfit serve --allow-origin ORIGIN` allows one",
                status=403,
                code="origin_refused",
            )

    def _check_token(self, request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise Refused(
                "the API key should be the token that `perfit serve` shows",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _with_cors(self, request: Request, send: Send) -> Send:
        """The headers that let a page of an allowed origin read the answer; none for anybody else."""
        origin = request.headers.get("origin")
        if origin not in self._rules.origins:
            return send

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                pairs = [(b"access-control-allow-origin", str(origin).encode()), (b"vary", b"Origin")]
                message = {**message, "headers": [*message.get("headers", []), *pairs]}
            await send(message)

        return sending


async def read_body(request: Request, rules: Rules) -> bytes:
    """Raises Refused with 413 on a body that is too large, with 408 on one that does not arrive."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(rules.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > rules.body_bytes:
                    break
                body += part
            else:
                return bytes(body)
    except TimeoutError:
        raise Refused("the body did not arrive in time", status=408, code="timeout") from None
    del body
    # A client that is cut off while it sends gets no answer, so the rest is read, too, and dropped.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(rules.body_seconds):
            while size < _DROPPED * rules.body_bytes:
                message = await asyncio.wait_for(request.receive(), _PAUSE_SECONDS)
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    break
    raise Refused(f"the body may have {rules.body_bytes >> 20} MiB", status=413, code="request_too_large")


def refused(error: Refused) -> Response:
    """OpenAI's error shape."""
    headers = error.headers | ({"Connection": "close"} if error.status in (408, 413) else {})
    return JSONResponse(error.to_json(), status_code=error.status, headers=headers)


def _name_of(host: str) -> str:
    """The name in a Host header, without the port; "" where it is no name."""
    match = _HOST.fullmatch(host)
    return match[1].strip("[]").lower() if match else ""
