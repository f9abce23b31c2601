"""Fair shares: everybody who wants something gets as much of it, however often they ask."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol, TypeVar

__all__ = ["FairShare", "PrefillScheduler", "round_robin"]


class FairShare:
    """How much each owner had of something (start-time fair queueing). Whoever had least is next.

    An owner who begins to want it starts level with the least served of the others. So nobody saves up a
    share, and a moment's absence forgives nothing. Not thread-safe.
    """

    def __init__(self) -> None:
        self._had: dict[str, float] = {}
        self._floor = 0.0  # what the least served had

    def had(self, owner: str) -> float:
        return max(self._had.get(owner, 0.0), self._floor)

    def charge(self, owner: str, amount: float) -> None:
        self._had[owner] = self.had(owner) + amount

    def wanted_by(self, owners: Iterable[str]) -> None:
        """Set the owners who want it now, or have it. Call this before `had` when they may have changed."""
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


def round_robin(items: Iterable[_Item], share: FairShare) -> list[_Item]:
    """The first item of each owner, then the second of each, and so on; whoever had least comes first."""
    seen: Counter[str] = Counter()
    keyed: list[tuple[tuple[int, float], _Item]] = []
    for item in items:
        keyed.append(((seen[item.owner], share.had(item.owner)), item))
        seen[item.owner] += 1
    return [item for _, item in sorted(keyed, key=lambda pair: pair[0])]


class PrefillScheduler:
    """Which prompts a pass reads, so that no answer stalls while others' prompts are read.

    A pass with prompts takes longer than one that only decodes. After it, the owners of the prompts wait
    until the answers of others had as much time. Nobody waits when there are no such answers, or when
    prompts cost no time (on a GPU that has room).
    """

    def __init__(self) -> None:
        self._share = FairShare()  # of the tokens of prompts
        self._ahead: dict[str, float] = {}  # seconds that an owner's prompts are ahead of others' answers
        self._decode_seconds = 0.0  # the last pass without a prompt

    def order(self, prompts: Sequence[_Item], sampled: AbstractSet[str]) -> list[_Item]:
        """The prompts that may be read now, in order. `sampled` are the owners of answers under way."""
        self._share.wanted_by(prompt.owner for prompt in prompts)
        may = [p for p in prompts if self._ahead.get(p.owner, 0.0) <= 0 or not sampled - {p.owner}]
        return round_robin(may, self._share)

    def rest(self) -> None:
        """Forget all owners: there is neither a prompt nor an answer."""
        self._share.wanted_by(())
        self._ahead.clear()

    def done(
        self, read: Mapping[str, int], seconds: float, *, decodes: bool, owners: AbstractSet[str]
    ) -> None:
        """Account for a pass. `read`: prompt tokens by owner. `decodes`: whether it went on with answers.

        `owners` are those of all prompts and answers.
        """
        if not read:
            self._decode_seconds = seconds
        decoding = min(seconds, self._decode_seconds) if decodes else 0.0
        ahead = {owner: had - decoding for owner, had in self._ahead.items()}
        for owner, tokens in read.items():
            self._share.charge(owner, tokens)
            taken = (seconds - decoding) * tokens / sum(read.values())
            ahead[owner] = min(seconds, ahead.get(owner, 0.0) + taken)
        self._ahead = {o: had for o, had in ahead.items() if had > 0 and owners - {o}}
