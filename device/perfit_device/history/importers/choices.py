"""What a person says about an import, and what they are told of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields

from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData

__all__ = ["MOST_BYTES", "MOST_EXAMPLES", "Choices", "Report", "Skipped", "newest"]

_PLACES = 3  # that are named for each reason
MOST_EXAMPLES = 100_000  # of one import
MOST_BYTES = 128 << 20  # of their texts


@dataclass(frozen=True)
class Choices:
    """What is left out is found out from the content. Every format reads some of them."""

    format: str | None = None
    user: str | None = None  # whose history, in a LaMP file of several people
    text_column: str | None = None  # of a table, for the task's text
    answer_column: str | None = None
    role: str | None = None  # of the person, in chats
    me: tuple[str, ...] = ()  # addresses of the person
    author: str | None = None  # of commits
    last: int | None = None  # take the newest ones alone

    def check(self, reads: Iterable[str], kind: str) -> None:
        """Raises InvalidData on a choice that means nothing in a format."""
        for name in (each.name for each in fields(self)):
            if name not in ("format", "last", *reads) and getattr(self, name):
                flag = f"--{name.replace('_', '-')}"
                raise InvalidData(f"this is {kind}, where {flag} means nothing; {_MEANS[name]}")


_MEANS = {
    "user": "--user is for LaMP files",
    "text_column": "--text-column is for tables",
    "answer_column": "--answer-column is for tables",
    "role": "--role is for chats",
    "me": "--me is for mail",
    "author": "--author is for git",
}


@dataclass(frozen=True)
class Skipped:
    """What a source holds that is no example, for one reason."""

    reason: str
    count: int
    places: tuple[str, ...] = ()  # the first few


@dataclass
class Report:
    """Gathers what an importer assumed and left out."""

    notify: Callable[[str], None] = lambda _: None
    format: str = ""  # what the source was read as, for a person
    name: str = ""  # of the format, as --format takes it
    _skipped: dict[str, list[str]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str, place: str) -> None:
        self._counts[reason] = self._counts.get(reason, 0) + 1
        places = self._skipped.setdefault(reason, [])
        if len(places) < _PLACES:
            places.append(place[:80])

    @property
    def skipped(self) -> list[Skipped]:
        """Most frequent reasons first."""
        by_count = sorted(self._counts.items(), key=lambda pair: -pair[1])
        return [Skipped(reason, count, tuple(self._skipped[reason])) for reason, count in by_count]


def newest(items: Iterable[HistoryItem], last: int | None, report: Report) -> list[HistoryItem]:
    """The newest `last` in the order in which they came, or all. Raises InvalidData on too many."""
    found: list[HistoryItem] = []
    size = 0
    for item in items:
        found.append(item)
        size += sum(len(text) for text in item.fields.values())
        if last is not None and len(found) >= 2 * max(last, 500):
            found = _newest(found, last, report)
            size = sum(len(text) for kept in found for text in kept.fields.values())
        if len(found) > MOST_EXAMPLES or size > MOST_BYTES:
            raise InvalidData(
                f"more than {MOST_EXAMPLES} examples or {MOST_BYTES >> 20} MiB of text; "
                "take the newest with --last N"
            )
    return found if last is None else _newest(found, last, report)


def _newest(found: list[HistoryItem], last: int, report: Report) -> list[HistoryItem]:
    order = sorted(range(len(found)), key=lambda at: (found[at].date, at))
    kept = sorted(order[-last:])
    for at in order[:-last]:
        report.skip(f"older than the newest {last}", found[at].origin)
    return [found[at] for at in kept]
