"""Answers of /v1/chat/completions and /v1/completions, whole and in chunks."""

from __future__ import annotations

import hashlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from perfit_device.answers import Answer, Message
from perfit_device.openai_api.schema import ChatRequest, TextRequest
from perfit_device.operations.complete import AnswerChunk, Completion
from perfit_device.stopping import TokenStarts
from perfit_shared.types import Finish, TokenLogprob, TopLogprob

__all__ = ["ChatForm", "Choice", "Form", "TextForm", "choice_name", "new_name", "token_logprobs", "usage_of"]

FINISHES = {Finish.END: "stop", Finish.LENGTH: "length"}


def new_name() -> str:
    """Of an answer: what stands behind the prefix of its id."""
    return secrets.token_hex(12)


def choice_name(name: str, index: int) -> str:
    """Of a choice, in the log: the first has the answer's own."""
    return hashlib.sha256(f"{name}-{index}".encode()).hexdigest()[: len(name)] if index else name


def token_logprobs(tokens: Sequence[TokenLogprob], top: int) -> list[dict[str, Any]]:
    """As chats and responses write them. The end of an answer, which has no text, is left out."""

    def one(token: Any) -> dict[str, Any]:
        return {"token": token.token, "bytes": list(token.data), "logprob": token.logprob}

    shown = (token for token in tokens if token.data)
    return [one(token) | {"top_logprobs": [one(other) for other in token.top[:top]]} for token in shown]


def usage_of(completions: Sequence[Completion], n: int = 1) -> dict[str, Any] | None:
    """`n` answers in a row share a prompt. None where this device ended an answer: only the cloud counts."""
    if not all(completion.prompt_tokens for completion in completions):
        return None
    prompt = sum(completion.prompt_tokens for completion in completions[::n])
    answer = sum(completion.answer_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


@dataclass
class Choice:
    """One answer, as far as it has come."""

    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)  # of these tokens' texts, in characters
    completion: Completion | None = None
    _counting: TokenStarts = field(default_factory=TokenStarts)

    def add(self, chunk: AnswerChunk) -> None:
        self.text += chunk.text
        self.logprobs += chunk.logprobs
        self.starts += map(self._counting.next, chunk.logprobs)


class Form(ABC):
    """How one kind of answer is written."""

    prefix = kind = chunk_kind = ""

    def __init__(self, request: ChatRequest | TextRequest) -> None:
        self.request = request
        self._name = new_name()
        self._created = int(time.time())

    def first(self, index: int) -> dict[str, Any] | None:
        """What stands before the first text of a choice."""
        return None

    @abstractmethod
    def chunk(self, choice: Choice, chunk: AnswerChunk) -> dict[str, Any]:
        """`chunk` is the newest of `choice`."""

    @abstractmethod
    def last(self, choice: Choice) -> dict[str, Any]:
        """What ends the chunks of a choice."""

    @abstractmethod
    def choice(self, choice: Choice) -> dict[str, Any]:
        """A whole one."""

    def logged(self, choice: Choice) -> Answer:
        """For the log; the choice is whole."""
        operation, done = self.request.operation(choice.index), choice.completion
        return Answer(
            text=choice.text,
            task=done.task if done else "",
            mode=done.mode.value if done else "",
            fields=operation.fields,
            messages=operation.messages or (Message("user", operation.prompt),),
            name=choice_name(self._name, choice.index),
        )

    def usage(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The chunk behind the last one, where a client asks for it."""
        return self._event(None) | {"usage": self._usage(choices)}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        written = [self.choice(choice) for choice in choices]
        return self._object(self.kind, written) | {"usage": self._usage(choices)}

    def _usage(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        completions = [choice.completion for choice in choices if choice.completion is not None]
        return usage_of(completions, self.request.n)

    def _event(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        value = self._object(self.chunk_kind, [] if choice is None else [choice])
        return value | ({"usage": None} if self.request.include_usage else {})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}{self._name}",
            "object": kind,
            "created": self._created,
            "model": self.request.model,
            "choices": choices,
        }


class ChatForm(Form):
    prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def first(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""})

    def chunk(self, choice: Choice, chunk: AnswerChunk) -> dict[str, Any]:
        return self._delta(choice.index, {"content": chunk.text}, logprobs=self._logprobs(chunk.logprobs))

    def last(self, choice: Choice) -> dict[str, Any]:
        return self._delta(choice.index, {}, finish=_finish(choice))

    def choice(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None, "annotations": []},
            "logprobs": self._logprobs(choice.logprobs),
            "finish_reason": _finish(choice),
        }

    def _delta(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        return self._event({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        top = self.request.top_logprobs
        return None if top is None else {"content": token_logprobs(tokens, top), "refusal": None}


class TextForm(Form):
    prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def chunk(self, choice: Choice, chunk: AnswerChunk) -> dict[str, Any]:
        starts = choice.starts[len(choice.starts) - len(chunk.logprobs) :]
        return self._event(self._text(choice.index, chunk.text, chunk.logprobs, starts))

    def last(self, choice: Choice) -> dict[str, Any]:
        return self._event(self._text(choice.index, "", (), (), finish=_finish(choice)))

    def choice(self, choice: Choice) -> dict[str, Any]:
        return self._text(choice.index, choice.text, choice.logprobs, choice.starts, finish=_finish(choice))

    def _text(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenLogprob],
        starts: Sequence[int],
        *,
        finish: str | None = None,
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(tokens, starts),
            "finish_reason": finish,
        }

    def _logprobs(self, tokens: Sequence[TokenLogprob], starts: Sequence[int]) -> dict[str, Any] | None:
        top = self.request.top_logprobs
        if top is None:
            return None
        shown = [token for token in tokens if token.data]
        return {
            "tokens": [_name(token) for token in shown],
            "token_logprobs": [token.logprob for token in shown],
            "top_logprobs": [_likeliest(token, top) for token in shown],
            "text_offset": [start for start, token in zip(starts, tokens, strict=True) if token.data],
        }


def _likeliest(token: TokenLogprob, top: int) -> dict[str, float]:
    """By name. The token that was chosen is always among them."""
    return {_name(other): other.logprob for other in token.top[:top]} | {_name(token): token.logprob}


def _name(token: TokenLogprob | TopLogprob) -> str:
    """OpenAI's own for a part of a character: by the text alone, several tokens would have one name."""
    try:
        return token.data.decode() or token.token
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.data)


def _finish(choice: Choice) -> str | None:
    return FINISHES[choice.completion.finish] if choice.completion is not None else None
