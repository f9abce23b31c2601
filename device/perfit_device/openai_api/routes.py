"""The paths of OpenAI's API that are served here, and what each does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from perfit_device.answers import Answer, Message
from perfit_device.openai_api import schema
from perfit_device.openai_api.body import Body, Refused, parse, shown
from perfit_device.openai_api.chat import ChatForm, Choice, Form, TextForm, choice_name
from perfit_device.openai_api.guard import Rules, read_body, refused
from perfit_device.openai_api.responses import ID_PREFIX, ResponseForm, kept_response, turns_of
from perfit_device.openai_api.work import Left, Running, Work, refusal_of, while_there
from perfit_device.operations.complete import AnswerChunk, Completion
from perfit_device.operations.endpoint import ListModels, no_model
from perfit_device.operations.feedback import Feedback
from perfit_device.operations.log import LogAnswer
from perfit_device.operations.operation import Operation
from perfit_device.operations.responses import DropResponse, KeepResponse, ReadResponse
from perfit_shared.errors import NotFound, PerfitError

__all__ = ["routes"]

_PREFIXES = ("chatcmpl-", "cmpl-", ID_PREFIX)
_SIDE_BY_SIDE = 4  # choices of one request: a cloud answers a device some questions at once (12 by default)
_EVENTS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
Result = TypeVar("Result")
_Handler = Callable[[Request], Awaitable[Response]]


def routes(work: Work, rules: Rules) -> Starlette:
    paths = _Paths(work, rules)
    table: list[tuple[str, str, _Handler]] = [
        ("GET", "/v1/models", paths.models),
        ("GET", "/v1/models/{name}", paths.model),
        ("POST", "/v1/chat/completions", paths.chat),
        ("POST", "/v1/completions", paths.completions),
        ("POST", "/v1/responses", paths.respond),
        ("GET", "/v1/responses/{name}", paths.response),
        ("DELETE", "/v1/responses/{name}", paths.drop_response),
        ("POST", "/v1/feedback", paths.feedback),
    ]
    return Starlette(
        routes=[Route(path, _guarded(handler), methods=[method]) for method, path, handler in table],
        exception_handlers={404: _no_such_path, 405: _no_such_path},
    )


def _guarded(handler: _Handler) -> _Handler:
    """Every error in OpenAI's shape."""

    async def handling(request: Request) -> Response:
        try:
            return await handler(request)
        except (Left, ClientDisconnect):
            return Response(status_code=499)  # nobody reads it
        except Exception as error:
            return refused(refusal_of(error))

    return handling


async def _no_such_path(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    return refused(
        Refused(
            f'"{shown(request.method)} {shown(request.url.path)}" is not served here: there are chat and '
            "text completions, responses and models, but no embeddings, images, audio or files",
            status=status,
            code="unknown_url",
        )
    )


class _Paths:
    def __init__(self, work: Work, rules: Rules) -> None:
        self._work, self._rules = work, rules

    async def _body(self, request: Request) -> Body:
        return parse(await read_body(request, self._rules))

    # -- models --------------------------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        models = await self._work.perform(ListModels())
        return JSONResponse({"object": "list", "data": [_model(name) for name in models.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        models = await self._work.perform(ListModels())
        if name not in models.names:
            raise no_model(name, models.names)
        return JSONResponse(_model(name))

    # -- completions ---------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        asked = schema.read_chat(await self._body(request))
        return await self._complete(request, ChatForm(asked), asked.n)

    async def completions(self, request: Request) -> Response:
        asked = schema.read_text(await self._body(request))
        return await self._complete(request, TextForm(asked), asked.choices)

    async def _complete(self, request: Request, form: Form, choices: int) -> Response:
        if form.request.stream:
            return await _streamed(request, self._completion_events(form, choices))
        return JSONResponse(form.whole(await while_there(request, self._choices(form, choices))))

    async def _choices(self, form: Form, count: int) -> list[Choice]:
        choices = {}
        async with aclosing(self._chunks(form, count)) as chunks:
            async for choice, chunk in chunks:
                choices[choice.index] = choice
                if chunk is not None:
                    choice.add(chunk)
        return [choices[index] for index in range(count)]

    async def _chunks(
        self, form: Form, count: int
    ) -> AsyncGenerator[tuple[Choice, AnswerChunk | None], None]:
        """Of all choices as they come, a few side by side. None: this choice is whole."""
        said: asyncio.Queue[tuple[Choice, AnswerChunk | Exception | None]] = asyncio.Queue()
        places = asyncio.Semaphore(_SIDE_BY_SIDE)

        async def answer(choice: Choice) -> None:
            try:
                async with places:
                    running = self._work.start(form.request.operation(choice.index))
                    async with aclosing(_chunks(running)) as chunks:
                        async for chunk in chunks:
                            said.put_nowait((choice, chunk))
                choice.completion = running.result
                said.put_nowait((choice, None))
            except Exception as error:
                said.put_nowait((choice, error))

        tasks = [asyncio.ensure_future(answer(Choice(index))) for index in range(count)]
        try:
            while count:
                choice, chunk = await said.get()
                if isinstance(chunk, Exception):
                    raise chunk
                if chunk is None:
                    count -= 1
                    await self._log(form.logged(choice))
                yield choice, chunk
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _log(self, answer: Answer) -> None:
        with suppress(PerfitError):  # the answer was given all the same
            await self._work.perform(LogAnswer(answer))

    async def _completion_events(self, form: Form, count: int) -> AsyncGenerator[bytes, None]:
        begun: dict[int, Choice] = {}
        try:
            async with aclosing(self._chunks(form, count)) as chunks:
                async for choice, chunk in chunks:
                    if choice.index not in begun:
                        begun[choice.index] = choice
                        if (first := form.first(choice.index)) is not None:
                            yield _data(first)
                    if chunk is None:
                        yield _data(form.last(choice))
                    else:
                        choice.add(chunk)
                        yield _data(form.chunk(choice, chunk))
            if form.request.include_usage:
                yield _data(form.usage([begun[index] for index in range(count)]))
        except Exception as error:
            if not begun:
                raise
            yield _data(refusal_of(error).to_json())
            return
        yield b"data: [DONE]\n\n"

    # -- responses -----------------------------------------------------------------------------

    async def respond(self, request: Request) -> Response:
        asked = schema.read_response(await self._body(request))
        form = ResponseForm(asked, await self._turns_before(asked.previous))
        if asked.stream:
            return await _streamed(request, self._response_events(form))

        async def whole() -> None:
            async with aclosing(self._response_chunks(form)) as chunks:
                async for chunk in chunks:
                    form.choice.add(chunk)
            await self._keep(form)

        await while_there(request, whole())
        return JSONResponse(form.object(form.status))

    async def _turns_before(self, previous: str | None) -> tuple[Message, ...]:
        if previous is None:
            return ()
        try:
            return turns_of(await self._work.perform(ReadResponse(previous.removeprefix(ID_PREFIX))))
        except NotFound as error:
            raise Refused(
                str(error), param="previous_response_id", code="previous_response_not_found"
            ) from error

    async def _response_chunks(self, form: ResponseForm) -> AsyncGenerator[AnswerChunk, None]:
        running = self._work.start(form.operation())
        async with aclosing(_chunks(running)) as chunks:
            async for chunk in chunks:
                yield chunk
        form.choice.completion = running.result

    async def _keep(self, form: ResponseForm) -> None:
        if form.request.store:
            await self._work.perform(KeepResponse(form.kept()))
        await self._log(form.logged())

    async def _response_events(self, form: ResponseForm) -> AsyncGenerator[bytes, None]:
        has_begun = False
        try:
            async with aclosing(self._response_chunks(form)) as chunks:
                async for chunk in chunks:
                    if not has_begun:
                        has_begun = True
                        for event in form.opening():
                            yield _event(event)
                    yield _event(form.delta(chunk))
            for event in [] if has_begun else form.opening():
                yield _event(event)
            has_begun = True
            await self._keep(form)
            for event in form.closing():
                yield _event(event)
        except Exception as error:
            if not has_begun:
                raise
            yield _event(form.failed(refusal_of(error)))

    async def response(self, request: Request) -> Response:
        return JSONResponse(kept_response(await self._of_kept(ReadResponse(_name_in(request)))))

    async def drop_response(self, request: Request) -> Response:
        await self._of_kept(DropResponse(_name_in(request)))
        name = f"{ID_PREFIX}{_name_in(request)}"
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    async def _of_kept(self, operation: Operation[Result]) -> Result:
        """What is not found there is no model."""
        try:
            return await self._work.perform(operation)
        except NotFound as error:
            raise Refused(str(error), status=404, code="not_found") from error

    # -- feedback ------------------------------------------------------------------------------

    async def feedback(self, request: Request) -> Response:
        """A thumb for an answer that was kept, and what it should have been."""
        body = await self._body(request)
        rating = body.text("rating")
        if rating not in ("up", "down"):
            raise body.wrong("rating", "up or down")
        given = body.text("answer")
        name = next((given.removeprefix(p) for p in _PREFIXES if given.startswith(p)), given)
        name = choice_name(name, body.whole("choice", 0, schema.CHOICES - 1) or 0)
        correction = None if body.get("correction") is None else body.text("correction")
        await self._of_kept(Feedback(name, "up" if rating == "up" else "down", correction))
        return JSONResponse({"object": "feedback", "answer": given, "rating": rating})


# -- streams -------------------------------------------------------------------------------------


async def _chunks(running: Running[Completion]) -> AsyncGenerator[AnswerChunk, None]:
    try:
        async for event in running:
            if isinstance(event, AnswerChunk):
                yield event
    finally:
        running.leave()


async def _streamed(request: Request, events: AsyncGenerator[bytes, None]) -> Response:
    """A stream that begins with the first event: what fails before it has a status of its own."""

    async def first() -> list[bytes]:
        async for event in events:
            return [event]
        return []

    begun: Iterable[bytes] = await while_there(request, first())

    async def whole() -> AsyncGenerator[bytes, None]:
        try:
            for event in begun:
                yield event
            async for event in events:
                yield event
        finally:
            await events.aclose()

    return StreamingResponse(whole(), media_type="text/event-stream", headers=_EVENTS)


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def _event(value: dict[str, Any]) -> bytes:
    return f"event: {value['type']}\ndata: {json.dumps(value)}\n\n".encode()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "perfit"}


def _name_in(request: Request) -> str:
    name: str = request.path_params["name"]
    return name.removeprefix(ID_PREFIX)
