"""Which prompt tokens a shift touches: "f7+l7", "l7" or "f3"."""

from __future__ import annotations

import re
from dataclasses import dataclass

from perfit_shared.errors import InvalidInput

_FORM = re.compile(r"^(?:f(?P<f>[1-9]\d{0,2}))?(?:\+?(?<![a-z])l(?P<l>[1-9]\d{0,2}))?$")


@dataclass(frozen=True)
class Positions:
    """The first `first` and the last `last` tokens of a prompt, each halved for short prompts."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Positions:
        """Raises InvalidInput on anything but "fN", "lM" or "fN+lM" with 1 to 999 tokens."""
        match = _FORM.match(text) if text else None
        both = match is not None and match["f"] and match["l"]
        if match is None or ("+" in text) != bool(both):
            raise InvalidInput(f'positions "{text[:40]}" should read like "f7+l7", "f7" or "l7"')
        return cls(int(match["f"] or 0), int(match["l"] or 0))

    def __str__(self) -> str:
        parts = [f"f{self.first}"] * bool(self.first) + [f"l{self.last}"] * bool(self.last)
        return "+".join(parts)

    def indices(self, length: int) -> list[int]:
        """Ascending, distinct token indices in a prompt of `length` tokens.

        n = min(length // 2, first) from the start and m = min(length // 2, last) up to and with
        the last one (PerFit's rule), so a prompt of one token has none.
        """
        n, m = min(length // 2, self.first), min(length // 2, self.last)
        return [*range(n), *range(length - m, length)]
