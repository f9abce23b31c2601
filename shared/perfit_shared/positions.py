"""Which prompt tokens a shift touches: "f7+l7", "l7", "f3" or, past an attention sink, "s1+f7+l7".

Many decoders use their first token as an *attention sink*: from some block on its hidden state is
a hundred times as long as any other's and much the same for every prompt, and a change of it changes
everything behind it. A spec of such a model leaves it out: "s1" moves the first tokens one to the right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from perfit_shared.errors import InvalidInput

_FORM = re.compile(
    r"(?:s(?P<s>\d{1,3})\+(?=f))?(?:f(?P<f>[1-9]\d{0,2}))?(?:\+?(?<![a-z])l(?P<l>[1-9]\d{0,2}))?", re.ASCII
)


@dataclass(frozen=True)
class Positions:
    """The first `first` tokens after `skipped` ones, and the last `last`, each fewer in short prompts."""

    first: int
    last: int
    skipped: int = 0  # leading tokens that stay as they are: attention sinks

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Raises InvalidInput on anything but "fN", "lM", "fN+lM", "sK+fN" or "sK+fN+lM" (1 to 999)."""
        match = _FORM.fullmatch(text) if text else None
        both = match is not None and match["f"] and match["l"]
        if match is None or ("+l" in text) != bool(both):
            raise InvalidInput(f'positions "{text[:40]}" should read like "f7+l7", "f7", "l7" or "s1+f7+l7"')
        return cls(int(match["f"] or 0), int(match["l"] or 0), int(match["s"] or 0))

    def __str__(self) -> str:
        parts = [f"s{self.skipped}"] * bool(self.skipped and self.first)
        parts += [f"f{self.first}"] * bool(self.first) + [f"l{self.last}"] * bool(self.last)
        return "+".join(parts)

    def explicit(self) -> str:
        """The text that says how many tokens are skipped even if none is: "s0+f7+l7"."""
        return f"s0+{self}" if self.first and not self.skipped else str(self)

    def indices(self, length: int) -> list[int]:
        """Ascending, distinct token indices in a prompt of `length` tokens.

        n = min(length // 2, first) from the start and m = min(length // 2, last) up to and with
        the last one (PerFit's rule), so a prompt of one token has none. The n begin after the
        `skipped` tokens and end before the last m, so a short prompt has fewer of them.
        """
        n, m = min(length // 2, self.first), min(length // 2, self.last)
        end = length - m
        return [*range(min(self.skipped, end), min(self.skipped + n, end)), *range(end, length)]
