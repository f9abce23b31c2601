"""`perfit serve`: an endpoint that apps written for OpenAI's API can use."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, say, show

if TYPE_CHECKING:
    from perfit_device.operations.operation import Event

_LOOPBACK = ("localhost", "::1")


def serve(
    context: typer.Context,
    *,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")] = 8717,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to listen.")] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host", metavar="NAME", help="A name that apps may call it by; may be given again."
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-origin", metavar="ORIGIN", help="A web page that may use it; may be given again."
        ),
    ] = None,
    new_token: Annotated[
        bool, typer.Option("--new-token", help="Make a new token; the one before is refused from now on.")
    ] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Let apps on this machine use your model, by OpenAI's API.

    Needs the extra openai: pip install 'perfit[openai]'. Apps get the URL and the token that it shows, and
    name base, collective, personal or a task as the model. Ctrl-C ends it.

    \b
    perfit serve
    perfit serve --port 0 --json                             {"url": …, "token": …} once it is ready
    perfit serve --new-token
    perfit serve --host 0.0.0.0 --allow-host host.docker.internal      for apps in containers
    perfit serve --allow-origin http://localhost:3000        for a web page
    """
    from perfit_device.openai_api.service import Serve, Serving

    session = Session.of(context, profile=profile, json=json)
    names = [*(allow_host or []), *([] if _is_loopback(host) else [host])]
    if not _is_loopback(host):
        say(
            f"listening on {host}: whoever reaches this machine and has the token can use your model, and "
            "what they send goes over the network in the open"
        )

    def shown(event: Event) -> None:
        if not isinstance(event, Serving):
            show(event)
        elif session.json:
            session.emit({"url": event.url, "token": event.token})
        else:
            print(f"url    {event.url}\ntoken  {event.token}", flush=True)

    with contextlib.suppress(KeyboardInterrupt):
        session.perform(Serve(host, port, tuple(names), tuple(allow_origin or []), new_token), shown)


def _is_loopback(host: str) -> bool:
    return host in _LOOPBACK or host.startswith("127.")
