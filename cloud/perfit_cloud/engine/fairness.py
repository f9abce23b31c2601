"""Who is next, so that everybody who wants something gets as much of it, however often they ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

__all__ = ["FairShare", "Reading", "in_turns"]


class FairShare:
    """How much each owner had of something (start-time fair queueing); whoever had least is next.

    Who begins to want it counts as having had what the least served of the others had: nothing is saved
    up, and nothing is forgiven for a moment's absence. Not thread-safe.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._floor = 0.0  # what the least served had

    def had(self, owner: str) -> float:
        return max(self._had.get(owner, 0.0), self._floor)

    def charge(self, owner: str, amount: float) -> None:
        self._had[owner] = self.had(owner) + amount

    def wanted_by(self, owners: Iterable[str]) -> None:
        """These want it now, or have it. To be said when they may have changed, before `had` is asked."""
        wanting = set(owners)
        self._floor = max(self._floor, min(map(self.had, wanting))) if wanting else 0.0
        self._had = {
            owner: had
            for owner, had in self._had.items()
            if wanting and (owner in wanting or had > self._floor)
        }


class _Owned(Protocol):
    @property
    def owner(self) -> str: ...


_Item = TypeVar("_Item", bound=_Owned)


def in_turns(items: Iterable[_Item], share: FairShare) -> list[_Item]:
    """The first of each owner, then the second of each, and so on; among these, who had least comes first."""
    seen: Counter[str] = Counter()
    keyed: list[tuple[tuple[int, float], _Item]] = []
    for item in items:
        keyed.append(((seen[item.owner], share.had(item.owner)), item))
        seen[item.owner] += 1
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


class Reading:
    """Which prompts a pass reads, so that nobody's answer stands still while others' prompts are read.

    A pass with prompts takes longer than one that only goes on with answers. After it whoever read waits
    until the answers of others had as much time; where there are none, or where prompts cost no time (on a
    GPU that has room), nobody waits.
    """

    def __init__(self) -> None:
        self._share = FairShare()  # of the tokens of prompts
        self._ahead: dict[str, float] = {}  # seconds that its prompts took and others' answers had not yet
        self._speaking_seconds = 0.0  # the last pass without a prompt

    def order(self, prompts: Sequence[_Item], sampled: AbstractSet[str]) -> list[_Item]:
        """Those that may be read now, in the order in which they share a pass; `speaking` own answers."""
        self._share.wanted_by(prompt.owner for prompt in prompts)
        may = [p for p in prompts if self._ahead.get(p.owner, 0.0) <= 0 or not sampled - {p.owner}]
        return in_turns(may, self._share)

    def rest(self) -> None:
        """There is neither a prompt nor an answer: forget whose there were."""
        self._share.wanted_by(())
        self._ahead.clear()

    def done(
        self, read: Mapping[str, int], seconds: float, *, speaks: bool, owners: AbstractSet[str]
    ) -> None:
        """After a pass that read so many tokens of each owner's prompts, and went on with answers or not.

        `owners`: of all prompts and answers there are.
        """
        if not read:
            self._speaking_seconds = seconds
        spoken = min(seconds, self._speaking_seconds) if speaks else 0.0
        ahead = {owner: had - spoken for owner, had in self._ahead.items()}
        for owner, tokens in read.items():
            self._share.charge(owner, tokens)
            taken = (seconds - spoken) * tokens / sum(read.values())
            ahead[owner] = min(seconds, ahead.get(owner, 0.0) + taken)
        self._ahead = {o: had for o, had in ahead.items() if had > 0 and owners - {o}}
