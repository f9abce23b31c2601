"""What stage 1 reads of a file: the items to train on, by user."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from perfit_shared.errors import InvalidInput

__all__ = ["GROUPS", "Items", "first_users", "source_of"]

GROUPS = 5  # of users for Table 15
T = TypeVar("T")


def source_of(path: Path) -> str:
    """A file's name and its folder's: enough to know it by, and no path of a machine."""
    return f"{path.resolve().parent.name}/{path.name}"


@dataclass(frozen=True)
class Items:
    """What a file holds, by user, each user's items oldest first."""

    source: str  # file name and its folder's, no path
    kind: str  # "jsonl", "profile" or "query"
    users: Mapping[str, list[dict[str, str]]]
    dropped_empty: int  # items of the file with an empty field
    # The latest of the profiles where queries are trained on; of a streamed file, of the longest ones.
    profiles: Mapping[str, list[dict[str, str]]] = field(default_factory=dict)
    only_profiles: int = 0  # users left out, since they have no queries and others do
    unnamed: int = 0  # users who are a single line or question without a name

    def history(self, user: str) -> list[dict[str, str]]:
        """What this user's device would hold: the profile or the training items, whichever is longer."""
        return max(self.users[user], self.profiles.get(user, []), key=len)

    def group(self, number: int, seed: int) -> Items:
        """One of the five disjoint groups, of equal size, that `seed` draws (Table 15); 0 to 4.

        Where five do not divide the users, up to four of them are in no group. Raises InvalidInput when
        there is no such group, or nobody for it.
        """
        size = len(self.users) // GROUPS
        if not 0 <= number < GROUPS or size < 1:
            raise InvalidInput(
                f"there are groups 0 to {GROUPS - 1}, each a fifth of the {len(self.users)} users of "
                f"{self.source}"
            )
        return self._of(_shuffled(self.users, seed)[number * size : (number + 1) * size])

    def first_users(self, count: int, seed: int) -> Items:
        """The first `count` users of an order that `seed` shuffles: 10 of a seed are among its 100.

        Raises InvalidInput when the file does not hold as many.
        """
        if not 1 <= count <= len(self.users):
            raise InvalidInput(
                f"{self.source} holds {len(self.users)} users, {count} of them cannot be taken"
            )
        return self._of(first_users(self.users, count, seed))

    def _of(self, names: Collection[str]) -> Items:
        chosen = set(names)
        return replace(
            self,
            users={name: items for name, items in self.users.items() if name in chosen},
            profiles={name: items for name, items in self.profiles.items() if name in chosen},
        )


def first_users(users: Mapping[str, T], count: int, seed: int) -> dict[str, T]:
    """The first `count` of an order that `seed` shuffles, or all; as they were ordered."""
    chosen = set(_shuffled(users, seed)[:count])
    return {name: of for name, of in users.items() if name in chosen}


def _shuffled(users: Collection[str], seed: int) -> list[str]:
    names = sorted(users)
    return [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
