"""Streams answers: token ids come in from an engine, text goes out to a reader."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Unavailable
from perfit_shared.types import Chunk, Finish, Sampling

__all__ = ["AnswerText", "TextStream", "finish_of"]

_UNFINISHED = "\ufffd"  # what a tokenizer writes for an incomplete character


def finish_of(token: int, count: int, sampling: Sampling, end_ids: frozenset[int]) -> Finish | None:
    """Why the answer ends at this token, its `count`-th. None: it goes on, unless a stop text ends it."""
    if token in end_ids:
        return Finish.END
    return Finish.LENGTH if count >= sampling.max_new_tokens else None


class AnswerText:
    """Turns the token ids of one answer into chunks, and says when the answer is over."""

    def __init__(self, base: BaseModel, prompt_tokens: int, sampling: Sampling) -> None:
        self.ids: list[int] = []  # all tokens so far, the end of sequence included
        self.is_over = False
        self._end_ids = frozenset(base.end_ids)
        self._prompt_tokens = prompt_tokens
        self._sampling = sampling
        self._text = _Text(base)
        self._sent = 0  # characters

    def take(self, new: list[int]) -> Chunk | None:
        """The next chunk, with these tokens. None while there is nothing to send."""
        self.ids += new
        finish = finish_of(self.ids[-1], len(self.ids), self._sampling, self._end_ids)
        text = self._text.extended(new[:-1] if self.ids[-1] in self._end_ids else new)
        cut, stopped = _stop(text, self._sampling.stop, self._sent)
        if stopped:
            finish = Finish.END
        if finish is None:
            # Hold back what may still become another character or a stop text.
            cut = len(text[:cut].rstrip(_UNFINISHED))
            cut -= _overlap(text[:cut], self._sampling.stop)
        unsent = text[self._sent : cut]
        self._sent = max(self._sent, cut)
        if finish is not None:
            self.is_over = True
            return Chunk(unsent, finish, self._prompt_tokens, len(self.ids))
        return Chunk(unsent) if unsent else None


class TextStream(Iterator[Chunk]):
    """The stream of an engine that makes token ids one by one; see `CompletionStream`.

    The engine never waits for a reader: tokens queue up here, and the reader's thread makes text of them.
    """

    def __init__(
        self, base: BaseModel, prompt_tokens: int, sampling: Sampling, leave: Callable[[], None]
    ) -> None:
        """`leave`: frees the request in the engine; may be called more than once."""
        self.log_probabilities: list[float] = []
        self._answer = AnswerText(base, prompt_tokens, sampling)
        self._one_by_one = bool(sampling.stop)
        self._leave = leave
        self._tokens: queue.SimpleQueue[tuple[int, float | None] | None] = queue.SimpleQueue()
        self._is_over = False

    @property
    def ids(self) -> list[int]:
        """All tokens that were read, the end of sequence included."""
        return self._answer.ids

    # -- for the engine ------------------------------------------------------------------------

    def put(self, token: int, log_probability: float | None = None) -> None:
        """The next token."""
        self._tokens.put((token, log_probability))

    def fail(self) -> None:
        """No more tokens will come."""
        self._tokens.put(None)

    # -- for the reader ------------------------------------------------------------------------

    def __next__(self) -> Chunk:
        """Raises Unavailable when the engine stopped or died under it; ends when it was cancelled."""
        while not self._is_over:
            new = self._read()
            if self._is_over:
                break
            if not new:
                self.cancel()
                raise Unavailable("the cloud could not finish this answer; ask again")
            chunk = self._answer.take(new)
            if self._answer.is_over:
                self._is_over = True
                self._leave()
            if chunk is not None:
                return chunk
        self.cancel()
        raise StopIteration

    def cancel(self) -> None:
        """Free the request in the engine. Harmless when the answer is over."""
        self._is_over = True
        self._leave()
        self._tokens.put(None)  # wakes a reader in another thread

    def _read(self) -> list[int]:
        """All tokens that are there, at least one; none when there will be no more.

        One token at a time where a stop text may end the answer: the count of tokens ends there.
        """
        new: list[int] = []
        item = self._tokens.get()
        while item is not None:
            token, log_probability = item
            new.append(token)
            if log_probability is not None:
                self.log_probabilities.append(log_probability)
            if self._one_by_one or self._tokens.empty():
                return new
            item = self._tokens.get()
        if new:
            self._tokens.put(None)  # the next call finds the end again, after these tokens
        return new


class _Text:
    """Token ids to text as they come, at a cost that does not grow with the answer.

    A token may read differently beside others: with a space in front, or as part of a character. So each
    step decodes what is new together with the tokens of the step before.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._settled = ""  # text that no further token can change
        self._ids: list[int] = []  # tokens of the step before, then those that are not settled yet
        self._before = 0  # how many of them belong to the step before

    def extended(self, new: list[int]) -> str:
        """All text so far, with these tokens."""
        self._ids += new
        before = self._base.decode(self._ids[: self._before]) if self._before else ""
        text = self._base.decode(self._ids) if self._ids else ""
        added = text[len(before) :]
        if added and not added.endswith(_UNFINISHED):
            self._settled += added
            self._ids, self._before = self._ids[self._before :], len(self._ids) - self._before
            return self._settled
        return self._settled + added


def _stop(text: str, stops: tuple[str, ...], sent: int) -> tuple[int, bool]:
    """(length of text before the first stop, whether there is one); none lies in what was sent."""
    found = [at for stop in stops if (at := text.find(stop, max(0, sent - len(stop)))) >= 0]
    return (min(found), True) if found else (len(text), False)


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of text that begins a stop."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
