"""What clients of OpenAI's API send, as values: chats, texts to go on with, and responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from perfit_device.answers import Message
from perfit_device.openai_api.body import Body, Refused, shown
from perfit_device.operations.complete import AnswerSettings, Complete
from perfit_shared.json_input import is_text
from perfit_shared.types import LARGEST_PENALTY

__all__ = [
    "CHOICES",
    "ChatRequest",
    "ResponseRequest",
    "TextRequest",
    "read_chat",
    "read_response",
    "read_text",
]

CHOICES = 16  # of one request
_MESSAGES = 4096
_STOPS, _STOP_CHARACTERS = 64, 1024
_LOGPROBS = 20
_TOKENS = 1 << 20  # anything above cannot be meant; the cloud's own limit is lower
_NAME_CHARACTERS = 256  # of a model; every part of a streamed answer says it
_FIELDS, _FIELD_CHARACTERS = 16, 1 << 20
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",  # what a tool said in an earlier turn, of another model perhaps
    "function": "user",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_NO_CALLS = "the models here call no tools; leave tool_choice out, or make it auto or none"
_NO_JSON = "the models here cannot promise JSON; leave the format out, or make it text"
_LEFT_OUT = ("reasoning", "function_call", "custom_tool_call", "local_shell_call", "web_search_call")
_TOOL_OUTPUTS = ("function_call_output", "custom_tool_call_output", "local_shell_call_output")


@dataclass(frozen=True)
class ChatRequest:
    model: str
    messages: tuple[Message, ...]
    fields: Mapping[str, str]
    settings: AnswerSettings
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None  # None: no log-probabilities are wanted

    def operation(self, index: int) -> Complete:
        settings = _reseeded(self.settings, index)
        return Complete(messages=self.messages, fields=self.fields, model=self.model, settings=settings)


@dataclass(frozen=True)
class TextRequest:
    """Texts to go on with, and `n` answers to each."""

    model: str
    prompts: tuple[str, ...]
    settings: AnswerSettings
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None

    def operation(self, index: int) -> Complete:
        settings = _reseeded(self.settings, index % self.n)
        return Complete(prompt=self.prompts[index // self.n], model=self.model, settings=settings)

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n


@dataclass(frozen=True)
class ResponseRequest:
    model: str
    instructions: str | None
    messages: tuple[Message, ...]  # of this turn alone
    settings: AnswerSettings
    stream: bool = False
    store: bool = False
    previous: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    top_logprobs: int | None = None
    fields: Mapping[str, str] = field(default_factory=dict)


def read_chat(body: Body) -> ChatRequest:
    """Raises Refused."""
    if not isinstance(body.get("messages"), list) or not body.items("messages"):
        raise body.wrong("messages", "a list of at least one message")
    if "audio" in body.items("modalities") or body.get("audio") is not None:
        raise body.refuse("modalities", "the models here answer in text alone; leave audio out")
    _refuse_tools(body)
    _refuse_formats(body, body.object("response_format"), "response_format")
    wanted = body.whole("top_logprobs", 0, _LOGPROBS)
    top = (wanted or 0) if body.flag("logprobs") else None
    return ChatRequest(
        model=_model(body),
        messages=_messages(body, "messages"),
        fields=body.texts("fields", _FIELDS, _FIELD_CHARACTERS),
        settings=_settings(body, ("max_completion_tokens", "max_tokens"), top),
        n=body.whole("n", 1, CHOICES) or 1,
        stream=body.flag("stream"),
        include_usage=body.object("stream_options").flag("include_usage"),
        top_logprobs=top,
    )


def read_text(body: Body) -> TextRequest:
    """Raises Refused."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) else [prompt]
    if not prompts or not all(is_text(one) and one.strip() for one in prompts):
        raise body.wrong("prompt", "text, or a list of texts, none empty (lists of token ids are not read)")
    if body.flag("echo") or body.get("suffix") or (body.whole("best_of", 1, CHOICES) or 1) > 1:
        raise body.refuse("echo", "echo, suffix and best_of are not done here; leave them out")
    n = body.whole("n", 1, CHOICES) or 1
    if len(prompts) * n > CHOICES:
        raise body.wrong("prompt", f"at most {CHOICES} texts, n times each")
    top = body.whole("logprobs", 0, _LOGPROBS)
    return TextRequest(
        model=_model(body),
        prompts=tuple(prompts),
        settings=_settings(body, ("max_tokens",), top),
        n=n,
        stream=body.flag("stream"),
        include_usage=body.object("stream_options").flag("include_usage"),
        top_logprobs=top,
    )


def read_response(body: Body) -> ResponseRequest:
    """Raises Refused."""
    given = body.get("input")
    messages = (Message("user", body.text("input")),) if isinstance(given, str) else _input(body)
    if body.flag("background") or body.get("conversation") is not None:
        raise body.refuse("background", "background work and conversations are not done here; leave them out")
    _refuse_tools(body)
    _refuse_formats(body, body.object("text").object("format"), "text.format")
    wanted = body.whole("top_logprobs", 0, _LOGPROBS)
    has_logprobs = "message.output_text.logprobs" in body.items("include") or bool(wanted)
    top = (wanted or 0) if has_logprobs else None
    previous = body.get("previous_response_id")
    return ResponseRequest(
        model=_model(body),
        instructions=None if body.get("instructions") is None else body.text("instructions"),
        messages=messages,
        settings=_settings(body, ("max_output_tokens",), top, has_penalties=False),
        stream=body.flag("stream"),
        store=body.flag("store"),
        previous=None if previous is None else body.text("previous_response_id"),
        metadata=body.texts("metadata", 16, 512),
        top_logprobs=top,
        fields=body.texts("fields", _FIELDS, _FIELD_CHARACTERS),
    )


# -- parts of them -------------------------------------------------------------------------------


def _model(body: Body) -> str:
    name = body.text("model", "")
    if not 0 < len(name) <= _NAME_CHARACTERS:
        raise Refused("model should name one of those that /v1/models lists", param="model")
    return name


def _settings(
    body: Body, longest: tuple[str, ...], top: int | None, *, has_penalties: bool = True
) -> AnswerSettings:
    """`has_penalties`: whether this request has OpenAI's two; None stands for the task's own."""
    usual = AnswerSettings()
    limits = [body.whole(key, 1, _TOKENS) for key in longest]
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else body.items("stop")
    if len(stops) > _STOPS or not all(is_text(s) and 0 < len(s) <= _STOP_CHARACTERS for s in stops):
        raise body.wrong(
            "stop", f"a text or at most {_STOPS} of them, each of 1 to {_STOP_CHARACTERS} characters"
        )
    return AnswerSettings(
        max_tokens=next((limit for limit in limits if limit is not None), None),
        temperature=body.number("temperature", 0, 2, usual.temperature),
        top_k=body.whole("top_k", 0, 1_000_000) or 0,
        top_p=body.number("top_p", 0, 1, usual.top_p),
        seed=_seed(body),
        stop=tuple(stops),
        logprobs=0 if top is None else max(1, top),
        frequency_penalty=_penalty(body, "frequency_penalty") if has_penalties else None,
        presence_penalty=_penalty(body, "presence_penalty") if has_penalties else None,
    )


def _penalty(body: Body, key: str) -> float | None:
    given = body.get(key)
    return None if given is None else body.number(key, -LARGEST_PENALTY, LARGEST_PENALTY, 0.0)


def _seed(body: Body) -> int | None:
    """OpenAI's seeds may be negative; the cloud's are not."""
    seed = body.whole("seed", -(2**63), 2**63 - 1)
    return None if seed is None else seed % 2**64


def _reseeded(settings: AnswerSettings, index: int) -> AnswerSettings:
    """Another answer for every choice."""
    return settings if settings.seed is None else replace(settings, seed=(settings.seed + index) % 2**64)


def _messages(body: Body, key: str) -> tuple[Message, ...]:
    if len(body.items(key)) > _MESSAGES:
        raise body.wrong(key, f"at most {_MESSAGES} messages")
    return tuple(_message(body.element(key, n)) for n in range(len(body.items(key))))


def _message(message: Body) -> Message:
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise message.wrong("role", f"one of {', '.join(_ROLES)}")
    return Message(_ROLES[role], _content(message, "content"))


def _content(message: Body, key: str) -> str:
    """Text, or the texts of a list of parts. Null, as beside a call of a tool, is no text."""
    content = message.get(key)
    if not isinstance(content, list):
        return message.text(key, "")
    texts = []
    for number in range(len(content)):
        part = message.element(key, number)
        kind = part.get("type")
        if kind == "refusal":
            texts.append(part.text("refusal"))
        elif kind in _TEXT_PARTS:
            texts.append(part.text("text"))
        else:
            raise part.refuse("type", f'the models here read text alone, no "{shown(kind)}"; leave it out')
    return "\n".join(texts)


def _input(body: Body) -> tuple[Message, ...]:
    """The items of a response's input. Calls of tools, and what was thought, are left out."""
    items = body.items("input")
    if not items or len(items) > _MESSAGES:
        raise body.wrong("input", f"text, or a list of 1 to {_MESSAGES} items")
    messages = []
    for number in range(len(items)):
        item = body.element("input", number)
        kind = item.get("type")
        if kind in (None, "message"):
            messages.append(_message(item))
        elif kind in _TOOL_OUTPUTS:
            messages.append(Message("user", _content(item, "output")))
        elif kind not in _LEFT_OUT:
            raise item.refuse("type", f'an item of type "{shown(kind)}" is not read here; send messages')
    return tuple(messages)


def _refuse_tools(body: Body) -> None:
    """Offers of tools are taken and not used; a demand for a call cannot be met."""
    body.items("tools")
    choice = body.get("tool_choice")
    if isinstance(choice, dict) and choice.get("type") == "allowed_tools":
        choice = choice.get("mode", body.object("tool_choice").object("allowed_tools").get("mode"))
    if choice not in (None, "auto", "none"):
        raise body.refuse("tool_choice", _NO_CALLS)
    if body.get("function_call") not in (None, "auto", "none"):
        raise body.refuse("function_call", _NO_CALLS)


def _refuse_formats(body: Body, form: Body, key: str) -> None:
    if form.get("type") not in (None, "text"):
        raise body.refuse(key, _NO_JSON)
