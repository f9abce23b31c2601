"""Streams answers: token ids come in from an engine, text goes out to a reader."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from perfit_cloud.engine.generation.sampling import Likelihood
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Unavailable
from perfit_shared.types import Chunk, Finish, Sampling, TokenLogprob, TopLogprob

__all__ = ["AnswerText", "TextStream", "WholeText", "finish_of"]

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
        self._logprobs = _Logprobs(base)

    def take(self, new: list[int], likelihood: Likelihood | None = None) -> Chunk | None:
        """The next chunk, with these tokens. None while there is nothing to send.

        `likelihood`, where it is asked for: of the one new token.
        """
        self.ids += new
        finish = finish_of(self.ids[-1], len(self.ids), self._sampling, self._end_ids)
        text = self._text.extended(new[:-1] if self.ids[-1] in self._end_ids else new)
        if likelihood is not None:
            self._logprobs.add(new[0], likelihood, text)
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
            shown = self._logprobs.take(cut if stopped else None)
            return Chunk(unsent, finish, self._prompt_tokens, len(self.ids), shown)
        return Chunk(unsent, logprobs=self._logprobs.take(cut)) if unsent else None


class TextStream(Iterator[Chunk]):
    """The stream of an engine that makes token ids one by one; see `CompletionStream`.

    The engine never waits for a reader: tokens queue up here, and the reader's thread makes text of them.
    """

    def __init__(
        self, base: BaseModel, prompt_tokens: int, sampling: Sampling, leave: Callable[[], None]
    ) -> None:
        """`leave`: frees the request in the engine; may be called more than once."""
        self._answer = AnswerText(base, prompt_tokens, sampling)
        self._one_by_one = bool(sampling.stop or sampling.logprobs)
        self._leave = leave
        self._tokens: queue.SimpleQueue[tuple[int, Likelihood | None] | None] = queue.SimpleQueue()
        self._is_over = False

    @property
    def ids(self) -> list[int]:
        """All tokens that were read, the end of sequence included."""
        return self._answer.ids

    # -- for the engine ------------------------------------------------------------------------

    def put(self, token: int, likelihood: Likelihood | None = None) -> None:
        """The next token."""
        self._tokens.put((token, likelihood))

    def fail(self) -> None:
        """No more tokens will come."""
        self._tokens.put(None)

    # -- for the reader ------------------------------------------------------------------------

    def __next__(self) -> Chunk:
        """Raises Unavailable when the engine stopped or died under it; ends when it was cancelled."""
        while not self._is_over:
            new, likelihood = self._read()
            if self._is_over:
                break
            if not new:
                self.cancel()
                raise Unavailable("the cloud could not finish this answer; ask again")
            chunk = self._answer.take(new, likelihood)
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

    def _read(self) -> tuple[list[int], Likelihood | None]:
        """All tokens that are there, at least one; none when there will be no more.

        One token at a time where a stop text may end the answer, since the count of tokens ends there, and
        where the text of each token is told apart. Then with its likelihood.
        """
        new: list[int] = []
        item = self._tokens.get()
        while item is not None:
            token, likelihood = item
            new.append(token)
            if self._one_by_one or self._tokens.empty():
                return new, likelihood
            item = self._tokens.get()
        if new:
            self._tokens.put(None)  # the next call finds the end again, after these tokens
        return new, None


class WholeText:
    """An answer of which nobody reads a part: its text is there at the end."""

    def __init__(
        self,
        base: BaseModel,
        prompt_tokens: int,
        sampling: Sampling,
        leave: Callable[[], None] = lambda: None,
    ) -> None:
        """`leave`: frees the request in its engine, when the answer is over."""
        self.text = ""
        self._answer = AnswerText(base, prompt_tokens, sampling)
        self._end_ids = frozenset(base.end_ids)
        self._sampling, self._leave = sampling, leave
        self._unread: list[int] = []  # tokens not decoded yet

    @property
    def is_over(self) -> bool:
        return self._answer.is_over

    def put(self, token: int, _likelihood: Likelihood | None = None) -> None:
        """The next token."""
        self._unread.append(token)
        count = len(self._answer.ids) + len(self._unread)
        # Without stop texts one look at the end is enough.
        if self._sampling.stop or finish_of(token, count, self._sampling, self._end_ids):
            chunk = self._answer.take(self._unread)
            self._unread = []
            self.text += "" if chunk is None else chunk.text
        if self.is_over:
            self._leave()

    def fail(self) -> None:
        """No more tokens will come; what is there is all."""


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


class _Logprobs:
    """Log-probabilities of tokens, held back until the text of these is sent."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._unsent: list[tuple[int, TokenLogprob]] = []  # (where the text of a token begins, the token)
        self._length = 0  # of the text so far, without an incomplete character

    def add(self, token: int, likelihood: Likelihood, text: str) -> None:
        """The next token; `text`: of the answer, with it."""
        top = tuple(TopLogprob(*self._base.token(id_), logprob) for id_, logprob in likelihood.top)
        named = TokenLogprob(*self._base.token(token), likelihood.chosen, top)
        self._unsent.append((self._length, named))
        self._length = len(text.rstrip(_UNFINISHED))

    def take(self, cut: int | None) -> tuple[TokenLogprob, ...]:
        """Those of the text before `cut`, which is sent. None: all."""
        count = sum(1 for start, _ in self._unsent if cut is None or start < cut)
        taken, self._unsent = self._unsent[:count], self._unsent[count:]
        return tuple(token for _, token in taken)


def _stop(text: str, stops: tuple[str, ...], sent: int) -> tuple[int, bool]:
    """(length of text before the first stop, whether there is one); none lies in what was sent."""
    found = [at for stop in stops if (at := text.find(stop, max(0, sent - len(stop)))) >= 0]
    return (min(found), True) if found else (len(text), False)


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of text that begins a stop."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
