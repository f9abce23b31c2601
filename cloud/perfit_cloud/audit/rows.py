"""What the looks of an audit found, and whether that will do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

__all__ = ["Row", "forms_found", "passed", "unseen"]

# Families that a look need not find: a device never sends its key, and a server holds the ids of a prompt
# side by side only during the one pass that reads them, and those of an answer never. Needles of ids have
# their control in those of examples, which are made in the same way.
_UNCONTROLLED = ("device key", "prompt ids", "answer ids")


@dataclass(frozen=True)
class Row:
    """What one look found."""

    hardening: str  # "on" or "off"
    rpc: str
    ending: str
    moment: str  # "before", "during", "after" or "closed"
    found: dict[str, tuple[str, ...]]  # where, by kind of needle
    sought: tuple[str, ...]  # kinds of needles
    searched: int  # bytes
    unreadable: tuple[str, ...]

    @property
    def fault(self) -> str:
        """What is wrong with it; empty: nothing."""
        if self.moment == "before" and self.found:
            return "found what was never sent: these needles prove nothing"
        # A server holds examples as ids only, once it has read them.
        has_words = _holds(self.found, "text") or _holds(self.found, "ids")
        if self.moment == "during" and not (_holds(self.found, "tensor") and has_words):
            return "found no tensors or no words while the server worked on them: a blind scanner"
        if self.moment == "closed" and self.hardening == "on" and self.found:
            return "not forgotten"
        return ""

    def joined(self, other: Row) -> Row:
        """With what another look at the same moment of the same call found."""
        found = {
            kind: tuple(dict.fromkeys((*self.found.get(kind, ()), *other.found.get(kind, ()))))
            for kind in self.sought
            if kind in self.found or kind in other.found
        }
        unreadable = tuple(dict.fromkeys((*self.unreadable, *other.unreadable)))
        return replace(self, found=found, searched=self.searched + other.searched, unreadable=unreadable)


def passed(rows: Sequence[Row]) -> bool:
    """Whether the promise was kept, and every control found what it should."""
    closed = [row for row in rows if row.moment == "closed"]
    could_find = any(row.found for row in closed if row.hardening == "off")
    has_looked = any(row.hardening == "on" for row in closed)
    return could_find and has_looked and not unseen(rows) and not any(row.fault for row in rows)


def unseen(rows: Sequence[Row]) -> list[str]:
    """The families of needles of which no look found any form, so their absence proves nothing."""
    seen = forms_found(rows)
    return [
        family for family, forms in seen.items() if family not in _UNCONTROLLED and not any(forms.values())
    ]


def forms_found(rows: Sequence[Row]) -> dict[str, dict[str, bool]]:
    """By family ("tensor", "prompt text"): each form that was sought ("fp32", "utf-8"), and whether found.

    Found by any look since its call began: a form in which the server never holds a secret is not.
    """
    found = {kind for row in rows if row.moment != "before" for kind in row.found}
    families: dict[str, dict[str, bool]] = {}
    for kind in dict.fromkeys(kind for row in rows for kind in row.sought):
        words = kind.split()
        length = 1 if words[0] in ("tensor", "gradient") else 2
        forms = families.setdefault(" ".join(words[:length]), {})
        forms[" ".join(words[length:]) or "as sent"] = kind in found
    return families


def _holds(kinds: Iterable[str], word: str) -> bool:
    return any(word in kind.split() for kind in kinds)
