"""Stop texts beyond what a cloud takes: this device ends the answer before them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from perfit_shared.types import TokenLogprob

__all__ = ["StopFilter", "TokenStarts", "split_stops"]

_TEXTS, _BYTES = 8, 64  # what one Generate takes (docs/wire.md)


def split_stops(stops: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(those that the cloud takes, those that are left to this device)."""
    unique = dict.fromkeys(stops)
    sent = [stop for stop in unique if len(stop.encode()) <= _BYTES][:_TEXTS]
    return tuple(sent), tuple(stop for stop in unique if stop not in sent)


class StopFilter:
    """Text as it comes, up to the first stop text; what may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self._starts = TokenStarts()
        self._tokens: list[tuple[int, TokenLogprob]] = []  # of what is held back, with where they begin
        self._shown = 0  # characters
        self.is_over = False  # a stop text was met

    def skip(self, text: str) -> None:
        """Text that is not shown for another reason."""
        self._shown += len(text)

    def feed(self, text: str) -> str:
        """What may be shown now."""
        text = self._held + text
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_over, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def tokens(self, shown: str, new: Sequence[TokenLogprob]) -> tuple[TokenLogprob, ...]:
        """Those that begin in what was shown; `shown` and `new` have come since the last call."""
        self._shown += len(shown)
        self._tokens += [(self._starts.next(token), token) for token in new]
        shows_all = not (self._held or self.is_over)
        count = sum(1 for start, _ in self._tokens if shows_all or start < self._shown)
        taken, self._tokens = self._tokens[:count], self._tokens[count:]
        return tuple(token for _, token in taken)

    def rest(self) -> str:
        """What is still held back, once nothing follows."""
        held, self._held = self._held, ""
        return held


class TokenStarts:
    """Where the text of each token begins in an answer, in characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, token: TokenLogprob) -> int:
        goes_on = token.data[:1] and token.data[0] & 0xC0 == 0x80  # with a character that another began
        self._length += len(self._decoder.decode(b"", final=not goes_on))
        start = self._length
        self._length += len(self._decoder.decode(token.data))
        return start


def _overlap(text: str, stop: str) -> int:
    """How much of the text's end is the beginning of the stop text."""
    most = min(len(text), len(stop) - 1)
    return next((size for size in range(most, 0, -1) if text.endswith(stop[:size])), 0)
