"""The users of LaMP, as OPPU and PerFit store them.

Of a user the profile is history and the queries are the test part. Where no profile of the file has
the task's fields, the queries are the history.
"""

from __future__ import annotations

from perfit_device.history.importers.source import Format, Source
from perfit_device.history.items import HistoryItem
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import is_date
from perfit_shared.lamp import Entry, User, labels_beside, read_golds, users_of
from perfit_shared.tasks import Task

__all__ = ["FORMAT"]


def fits(source: Source) -> bool:
    """Whether some record holds a profile or queries."""
    return isinstance(source.records, list) and any(
        isinstance(record, dict) and ("profile" in record or "query" in record) for record in source.records
    )


def read(source: Source, task: Task) -> list[HistoryItem]:
    """The examples of one user. Raises InvalidData naming user, item and field."""
    labels = labels_beside(source.path)
    golds = {} if labels is None else read_golds(labels)
    found = users_of(source.records, task, golds=golds, source=source.path.name)
    if found.dropped_empty:
        source.report.notify(
            f"{found.dropped_empty} entries of the file have an empty field and were left out"
        )
    return _of_user(_chosen(found.users, source.choices.user), task, queries_are_history=found.no_profiles)


def _chosen(users: tuple[User, ...], user_id: str | None) -> User:
    """The one with the id `user_id`, else at the index from 0."""
    if user_id is None:
        if len(users) == 1:
            return users[0]
        raise InvalidData(f"it holds {len(users)} users; say which with --user ID")
    for user in users:
        if user.user_id == user_id:
            return user
    if user_id.isascii() and user_id.isdigit() and len(user_id) < 10 and int(user_id) < len(users):
        return users[int(user_id)]
    some = ", ".join(user.user_id for user in users[:8])
    raise InvalidData(f'it has no user "{user_id[:40]}"; there are {some}{" …" if len(users) > 8 else ""}')


def _of_user(user: User, task: Task, *, queries_are_history: bool) -> list[HistoryItem]:
    def found(kind: str, entry: Entry, *, dated: bool, part: str = "") -> HistoryItem:
        date = entry.date if dated else ""
        return HistoryItem(task.name, entry.item, date=date, part=part, origin=f"{kind} {entry.id}")

    part = "" if queries_are_history else "test"
    # Dates that cannot order a profile are dropped: the order of adding stands for them.
    history = [found("profile item", entry, dated=user.dated) for entry in user.profile]
    return history + [found("query", entry, dated=is_date(entry.date), part=part) for entry in user.query]


FORMAT = Format("lamp", "a file of LaMP", fits, read, reads=("user",))
