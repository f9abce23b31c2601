"""A user's examples: what a personal shift is trained, gated and tested on.

`items` keeps them in the vault, `imports` remembers what brought them, `split` parts them by time, and
`importers` reads them from files, mail, chats and repositories.
"""

from perfit_device.history.items import (
    HistoryItem,
    add,
    find,
    forget,
    forgotten,
    has_all,
    load,
    problems_of,
    record_tasks,
    tasks,
    usable,
)
from perfit_device.history.split import Split, split

__all__ = [
    "HistoryItem",
    "Split",
    "add",
    "find",
    "forget",
    "forgotten",
    "has_all",
    "load",
    "problems_of",
    "record_tasks",
    "split",
    "tasks",
    "usable",
]
