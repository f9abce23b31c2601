"""Text to token ids and back: prompts, chats and targets, without what tokenizers add at their ends."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterable, Sequence
from typing import Any

from perfit_shared.errors import InvalidData, InvalidPrompt

__all__ = ["TokenCodec", "check_vocabulary", "forget_words"]

_log = logging.getLogger(__name__)
# A continuation is tokenised behind one of these, whose tokens are cut off again. Otherwise a tokenizer that
# puts a space in front of every text would put one in front of every answer.
_ANCHORS = ("\n", ":", "a")
_SHOWN = 5  # tokens that a message names
_TOGETHER = 1024  # parts of a text that are tokenised at once
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))  # bytes that GPT-2 writes as they are
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)  # written as the letters from U+0100 on
_BYTE_LETTERS = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): b for n, b in enumerate(_OTHERS)}


class TokenCodec:
    """One tokenizer, for any number of threads."""

    def __init__(self, tokenizer: Any, embedded: int, context: int = 2**20) -> None:
        """`embedded`: tokens that the model has an embedding for; `context`: the most of a text."""
        self._tokenizer, self._context = tokenizer, context
        # Fast tokenizers fail with "Already borrowed" when two threads enter one.
        self._lock = threading.RLock()
        self._appended = self._ids_behind()
        self._anchors = [(anchor, self._ids(anchor)) for anchor in _ANCHORS]
        self._template = str(getattr(tokenizer, "chat_template", None) or "")
        added = getattr(tokenizer, "added_tokens_decoder", {})
        beyond = {str(token) for number, token in added.items() if number >= embedded}
        self._special = {number for number, token in added.items() if token.special}
        self._letter = self._ids("a")[-1:]
        self._beyond = _any_of(beyond)
        self._guarded = _any_of(beyond | _marks(tokenizer, self._template))
        self._takes_system, self._before_reply, self.turn_end = True, "", None
        if self._template:
            self._try_template()
            self._takes_system = self._writes_system()
            self._before_reply, self.turn_end = self._around_reply(set(added), embedded)

    @property
    def has_template(self) -> bool:
        """Whether chats have a form of the model's own."""
        return bool(self._template)

    def prompt(self, text: str) -> list[int]:
        """The text with what the tokenizer puts in front. An answer follows, so nothing is put behind."""
        return self._prompt(text, self._beyond)

    def plain_prompt(self, text: str) -> list[int]:
        """As `prompt`, but names of special tokens in the text are letters like any others."""
        return self._prompt(text, self._guarded)

    def continuation(self, text: str) -> list[int]:
        """Tokens of a text that follows another one. Names of special tokens in it are letters."""
        return self._following(self._cut(text, self._guarded))

    def reply(self, text: str) -> list[int]:
        """Tokens of a reply behind what `chat` gives, without what ends it.

        Some templates put a space between the two (Mistral, Llama 2), which counts as the reply's.
        """
        return self.continuation(self._before_reply + text)

    def chat(self, turns: list[tuple[str, str]]) -> list[int] | None:
        """(role, content) turns by the tokenizer's template, up to where the reply begins; None without one.

        What the template writes become special tokens, what a content holds never does. Where the template
        has no system turn (Gemma), its text begins the user's first turn.
        """
        if not self._template:
            return None
        if not self._takes_system:
            turns = _folded(turns)
        if not any(self._guarded and self._guarded.search(text) for turn in turns for text in turn):
            with self._lock:
                encoded = self._tokenizer.apply_chat_template(
                    _messages(turns), add_generation_prompt=True, return_dict=True
                )
            return list(encoded["input_ids"])
        mark = _unused("".join(text for turn in turns for text in turn) + self._template)
        cut = [(role, mark.join(self._cut(content, self._guarded))) for role, content in turns]
        with self._lock:
            head, *rest = self._rendered(cut, prompt=True).split(mark)
            return [*self._ids(head), *self._following([part for part in rest if part])]

    def text(self, ids: list[int]) -> str:
        with self._lock:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def token(self, number: int) -> tuple[str, bytes]:
        """(text or name, bytes) of one token by itself; a special token adds no bytes to an answer."""
        with self._lock:
            name = str(self._tokenizer.convert_ids_to_tokens(number) or "")
            if number in self._special:
                return name, b""
            # Behind another token, because tokenizers drop a space in front of a text.
            before, text = (
                self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                for ids in (self._letter, [*self._letter, number])
            )
        text = text[len(before) :]
        data = (_bytes_of(name) if "\ufffd" in text else None) or text.encode()
        return data.decode(errors="replace"), data

    # -- helpers -------------------------------------------------------------------------------

    def _rendered(self, turns: list[tuple[str, str]], *, prompt: bool) -> str:
        """The template's text of these turns; `prompt`: up to where the next reply begins."""
        with self._lock:
            text = self._tokenizer.apply_chat_template(
                _messages(turns), add_generation_prompt=prompt, tokenize=False
            )
        return str(text)

    def _try_template(self) -> None:
        """Raises InvalidData where the template cannot write the shortest chat."""
        try:
            self.chat([("user", "a")])
        except Exception as error:  # a template is a program
            raise InvalidData(
                f"the model's chat template fails on a chat of one turn ({type(error).__name__}); "
                "mend it, or take it out of the tokenizer to use the model with texts"
            ) from error

    def _writes_system(self) -> bool:
        """Whether the template takes a system turn; some refuse it, and some leave it out in silence."""
        mark = _unused(self._template)
        try:
            return mark in self._rendered([("system", mark), ("user", "a")], prompt=True)
        except Exception:
            return False

    def _around_reply(self, added: set[int], embedded: int) -> tuple[str, int | None]:
        """(white space that the template puts before a reply, the token that it ends one with)."""
        mark, user = _unused(self._template), ("user", "a")
        try:
            prompt = self._rendered([user], prompt=True)
            whole = self._rendered([user, ("assistant", mark)], prompt=False)
        except Exception:
            return "", None
        before, found, behind = whole.rpartition(mark)
        space = before.removeprefix(prompt) if before.startswith(prompt) else ""
        ends = (number for number in self._ids(behind if found else "") if number in added)
        end = next((number for number in ends if number < embedded), None)
        return (space if space.isspace() else ""), end

    def _prompt(self, text: str, guarded: re.Pattern[str] | None) -> list[int]:
        head, *rest = self._cut(text, guarded) or [""]
        with self._lock:
            ids = list(self._tokenizer(head)["input_ids"])
        return [*ids[: len(ids) - len(self._appended)], *self._following(rest)]

    def _ids(self, text: str) -> list[int]:
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids_behind(self) -> list[int]:
        """Those that the tokenizer puts behind every text: an end of sequence, a separator."""
        with self._lock:
            whole = list(self._tokenizer("a")["input_ids"])
        own = self._ids("a")
        starts = [at for at in range(len(whole) - len(own) + 1) if whole[at : at + len(own)] == own]
        return whole[starts[-1] + len(own) :] if starts else []

    def _following(self, parts: Sequence[str]) -> list[int]:
        """Token ids of parts that follow each other, after some other text."""
        anchor, before = self._anchors[0]
        ids: list[int] = []
        for start in range(0, len(parts), _TOGETHER):
            some = parts[start : start + _TOGETHER]
            with self._lock:
                encoded = self._tokenizer([anchor + part for part in some], add_special_tokens=False)
            for part, found in zip(some, encoded["input_ids"], strict=True):
                ids += found[len(before) :] if found[: len(before)] == before else self._other_ids(part)
        return ids

    def _cut(self, text: str, guarded: re.Pattern[str] | None) -> list[str]:
        """The text in parts none of which holds a guarded name. Raises InvalidPrompt where too many do."""
        parts: list[str] = []
        start = at = 0
        while guarded is not None and (found := guarded.search(text, at)) is not None:
            at = found.start() + 1
            if found.end() > at:
                parts.append(text[start:at])
                start = at
            if len(parts) > self._context:
                raise InvalidPrompt(f"the text spells more special tokens than the {self._context} that fit")
        return [part for part in (*parts, text[start:]) if part]

    def _other_ids(self, text: str) -> list[int]:
        """As `_following`, of a text that melts into the first anchor."""
        for anchor, before in self._anchors[1:]:
            encoded = self._ids(anchor + text)
            if encoded[: len(before)] == before:
                return encoded[len(before) :]
        return self._ids(text)


def check_vocabulary(tokenizer: Any, codec: TokenCodec, embedded: int, end_ids: Iterable[int]) -> None:
    """Raises InvalidData where prompts or ends need tokens for which the model has no embedding.

    Added tokens beyond the embedding that nothing needs are listed once: a text that spells one is text.
    """
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= embedded)
    added = set(getattr(tokenizer, "added_tokens_decoder", {}))
    own = [pair for pair in beyond if pair[0] not in added]
    if own:
        raise InvalidData(f"the tokenizer is another model's: {_named(own)} are beyond the {embedded:,} rows")
    written = [*codec.prompt("a"), *(codec.chat([("user", "a")]) or ()), *end_ids]
    needed = [(number, token) for number, token in beyond if number in written]
    if needed or any(number >= embedded for number in written):
        raise InvalidData(
            f"prompts of this tokenizer need {_named(needed) or 'tokens'} beyond the model's {embedded:,} "
            "embeddings; use a model that was resized to it, or mend the tokenizer and eos_token_id"
        )
    if beyond:
        _log.warning("%s beyond the model's %d embeddings are read as text", _named(beyond), embedded)


def _named(tokens: Sequence[tuple[int, str]]) -> str:
    shown = ", ".join(f'"{token}" ({number})' for number, token in tokens[:_SHOWN])
    return f"{shown} and {len(tokens) - _SHOWN:,} more" if len(tokens) > _SHOWN else shown


def _bytes_of(name: str) -> bytes | None:
    """What a name in the vocabulary spells: "<0xE2>", or a letter for each byte as GPT-2 writes them."""
    if found := re.fullmatch("<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(found[1])
    values = [_BYTE_LETTERS.get(letter) for letter in name]
    return None if None in values else bytes(value for value in values if value is not None)


def forget_words(tokenizer: Any) -> bool:
    """Turn off the BPE word cache, which holds words of prompts for the life of the process."""
    try:
        tokenizer.backend_tokenizer.model._resize_cache(0)
    except AttributeError:
        return False
    return True


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def _folded(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A first system turn as the beginning of the user's turn after it."""
    if [role for role, _ in turns[:2]] != ["system", "user"]:
        return turns
    (_, system), (role, text), *rest = turns
    return [(role, f"{system}\n\n{text}"), *rest]


def _marks(tokenizer: Any, template: str) -> set[str]:
    """Tokens whose names a text may not spell: special ones, and others that the template writes."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    names = {str(token) for token in added if token.special or str(token) in template}
    return names | set(getattr(tokenizer, "all_special_tokens", ()))


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds the longest of these; runs of spaces, which some tokenizers add, are text."""
    found = sorted((name for name in names if name.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def _unused(text: str) -> str:
    """A private-use character that the text does not have."""
    for code in range(0xE000, 0xF900):
        if chr(code) not in text:
            return chr(code)
    raise InvalidPrompt("the chat uses every character that is for private use")
