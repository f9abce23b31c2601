"""Answers of /v1/responses: the object, the events of its stream, and the form in which it is kept."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

from perfit_device.answers import Answer, Message
from perfit_device.openai_api.body import Refused
from perfit_device.openai_api.chat import Choice, new_name, token_logprobs, usage_of
from perfit_device.openai_api.schema import ResponseRequest
from perfit_device.operations.complete import AnswerChunk, Complete
from perfit_shared.types import Finish

__all__ = ["ID_PREFIX", "ResponseForm", "kept_response", "turns_of"]

ID_PREFIX = "resp_"


class ResponseForm:
    """One response; `before` are the turns of those that it goes on from."""

    def __init__(self, request: ResponseRequest, before: tuple[Message, ...]) -> None:
        self.request = request
        self.name = new_name()
        self._item = f"msg_{new_name()}"
        self._created = time.time()
        self._turns = (*before, *request.messages)
        self._sequence = 0
        self.choice = Choice(0)

    def operation(self) -> Complete:
        request = self.request
        return Complete(
            messages=self._messages(), fields=request.fields, model=request.model, settings=request.settings
        )

    def _messages(self) -> tuple[Message, ...]:
        instructions = self.request.instructions
        return (*([Message("system", instructions)] if instructions else []), *self._turns)

    # -- events --------------------------------------------------------------------------------

    def opening(self) -> list[dict[str, Any]]:
        """What stands before the first text."""
        response = self.object("in_progress")
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event("response.output_item.added", output_index=0, item=self._message("in_progress")),
            self._part_event("response.content_part.added", part=self._part()),
        ]

    def delta(self, chunk: AnswerChunk) -> dict[str, Any]:
        self.choice.add(chunk)
        return self._part_event(
            "response.output_text.delta", delta=chunk.text, logprobs=self._event_logprobs(chunk.logprobs)
        )

    def closing(self) -> list[dict[str, Any]]:
        status = self.status
        logprobs = self._event_logprobs(self.choice.logprobs)
        text = self.choice.text
        return [
            self._part_event("response.output_text.done", text=text, logprobs=logprobs),
            self._part_event("response.content_part.done", part=self._part()),
            self._event("response.output_item.done", output_index=0, item=self._message(status)),
            self._event(f"response.{status}", response=self.object(status)),
        ]

    def failed(self, why: Refused) -> dict[str, Any]:
        error = {"code": "rate_limit_exceeded" if why.status == 429 else "server_error", "message": str(why)}
        return self._event("response.failed", response=self.object("failed") | {"error": error})

    def _event(self, kind: str, **values: Any) -> dict[str, Any]:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **values}

    def _part_event(self, kind: str, **values: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self._item, output_index=0, content_index=0, **values)

    # -- objects -------------------------------------------------------------------------------

    @property
    def status(self) -> str:
        done = self.choice.completion
        if done is None:
            return "in_progress"
        return "incomplete" if done.finish is Finish.LENGTH else "completed"

    @cached_property
    def _completed_at(self) -> int:
        """When it was first said to be complete: what is kept and what is answered must say the same."""
        return int(time.time())

    def object(self, status: str) -> dict[str, Any]:
        request, done = self.request, self.choice.completion
        usage = None
        if done is not None and (counts := usage_of([done])) is not None:
            usage = {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            }
        return {
            "id": f"{ID_PREFIX}{self.name}",
            "object": "response",
            "created_at": int(self._created),
            "completed_at": self._completed_at if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.settings.max_tokens,
            "model": request.model,
            "output": [] if done is None else [self._message(status)],
            "parallel_tool_calls": True,
            "previous_response_id": request.previous,
            "reasoning": {"effort": None, "summary": None},
            "store": request.store,
            "temperature": request.settings.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",  # tools that were offered are not used
            "tools": [],
            "top_logprobs": request.top_logprobs,
            "top_p": request.settings.top_p,
            "truncation": "auto",
            "usage": usage,
            "user": None,
            "metadata": dict(request.metadata),
        }

    def _message(self, status: str) -> dict[str, Any]:
        content = [] if status == "in_progress" else [self._part()]
        return {
            "id": self._item,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def _part(self) -> dict[str, Any]:
        top = self.request.top_logprobs
        logprobs = [] if top is None else token_logprobs(self.choice.logprobs, top)
        return {"type": "output_text", "text": self.choice.text, "annotations": [], "logprobs": logprobs}

    def _event_logprobs(self, tokens: Any) -> list[dict[str, Any]]:
        top = self.request.top_logprobs
        return [] if top is None else token_logprobs(tokens, top)

    # -- kept ----------------------------------------------------------------------------------

    def kept(self) -> Answer:
        """For the vault. Texts stand where `forget` looks for them, and in the rest none of them."""
        response = self.object(self.status)
        response["output"][0]["content"] = []
        has_instructions = response.pop("instructions") is not None
        extra = {"response": response, "has_instructions": has_instructions}
        done = self.choice.completion
        return Answer(
            text=self.choice.text,
            task=done.task if done else "",
            mode=done.mode.value if done else "",
            fields=dict(self.request.fields),
            messages=self._messages() if self.request.instructions else self._turns,
            is_response=True,
            extra=json.dumps(extra),
            name=self.name,
        )

    def logged(self) -> Answer:
        """For the log, which a response that an app drops stays in."""
        name = new_name() if self.request.store else self.name
        return replace(self.kept(), is_response=False, extra="", name=name)


def kept_response(answer: Answer) -> dict[str, Any]:
    """The object that was kept. Log-probabilities are not kept."""
    extra = json.loads(answer.extra)
    response: dict[str, Any] = extra["response"]
    instructions = answer.messages[0].content if extra["has_instructions"] else None
    part = {"type": "output_text", "text": answer.text, "annotations": [], "logprobs": []}
    response["output"][0]["content"] = [part]
    return response | {"instructions": instructions}


def turns_of(answer: Answer) -> tuple[Message, ...]:
    """The talk that a next response goes on with. Instructions hold for one response alone."""
    turns = answer.messages[1:] if json.loads(answer.extra)["has_instructions"] else answer.messages
    return (*turns, Message("assistant", answer.text))
