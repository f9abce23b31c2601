"""An answer while it is made: token ids come in from the batch, text goes out to its reader."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from perfit_cloud.engine.interface import Chunk, Finish, Sampling
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import Unavailable

__all__ = ["CompletionStream"]


class CompletionStream(Iterator[Chunk]):
    """Pieces of one answer, blocking for the next. `cancel` ends it from any thread.

    Made by an engine's `submit`. The batch never waits for its reader: tokens queue up here.
    """

    def __init__(
        self,
        base: BaseModel,
        prompt_tokens: int,
        sampling: Sampling,
        *,
        end_ids: frozenset[int],
        leave: Callable[[], None],
    ) -> None:
        """`leave`: frees the place in the batch; may be called more than once."""
        self.ids: list[int] = []  # all tokens that were read, the end of sequence included
        self._end_ids = end_ids
        self._prompt_tokens = prompt_tokens
        self._sampling = sampling
        self._leave = leave
        self._text = _Text(base)
        self._sent = 0  # characters
        self._tokens: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._is_over = False

    # -- for the engine ------------------------------------------------------------------------

    def put(self, token: int) -> None:
        """The next token."""
        self._tokens.put(token)

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
            piece = self._advance(new)
            if piece is not None:
                return piece
        self.cancel()
        raise StopIteration

    def cancel(self) -> None:
        """Free the place in the batch. Harmless when the answer is over."""
        self._is_over = True
        self._leave()
        self._tokens.put(None)  # wakes a reader in another thread

    def _read(self) -> list[int]:
        """All tokens that are there, at least one; none when there will be no more.

        One at a time where a text may stop it: the count of tokens ends with that.
        """
        new, token = [], self._tokens.get()
        while token is not None:
            new.append(token)
            if self._sampling.stop or self._tokens.empty():
                break
            token = self._tokens.get()
        if token is None and new:
            self._tokens.put(None)  # to be met again when these are dealt with
        return new

    def _advance(self, new: list[int]) -> Chunk | None:
        """The next piece; None when there is nothing to send yet."""
        self.ids += new
        ended = self.ids[-1] in self._end_ids
        last = ended or len(self.ids) >= self._sampling.max_new_tokens
        text = self._text.extended(new[:-1] if ended else new)
        cut, stopped = _stop(text, self._sampling.stop, self._sent)
        last = last or stopped
        if not last:  # hold back what may still turn into another character or into a stop text
            cut = len(text[:cut].rstrip("\ufffd"))
            cut -= _overlap(text[:cut], self._sampling.stop)
        piece = text[self._sent : cut]
        if not last and not piece:
            return None
        self._sent = max(self._sent, cut)
        if not last:
            return Chunk(piece)
        self._is_over = True
        self._leave()
        finish = Finish.END if ended or stopped else Finish.LENGTH
        return Chunk(piece, finish, self._prompt_tokens, len(self.ids))


class _Text:
    """Token ids to text as they come, at a cost that does not grow with the answer.

    What a token reads like may hang on those around it (a space in front, a character of several
    tokens). So the last whole stretch is decoded again together with what is new.
    """

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._settled = ""
        self._ids: list[int] = []  # the last whole stretch, then what came since
        self._stretch = 0  # how many of them are that stretch

    def extended(self, new: list[int]) -> str:
        """All text so far, with these tokens."""
        self._ids += new
        before = self._base.decode(self._ids[: self._stretch]) if self._stretch else ""
        text = self._base.decode(self._ids) if self._ids else ""
        tail = text[len(before) :]
        if tail and not tail.endswith("\ufffd"):
            self._settled += tail
            self._ids, self._stretch = self._ids[self._stretch :], len(self._ids) - self._stretch
            return self._settled
        return self._settled + tail


def _stop(text: str, stops: tuple[str, ...], sent: int) -> tuple[int, bool]:
    """(length of text before the first stop, whether there is one); none lies in what was sent."""
    found = [at for stop in stops if (at := text.find(stop, max(0, sent - len(stop)))) >= 0]
    return (min(found), True) if found else (len(text), False)


def _overlap(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of text that begins a stop."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
