"""A user's examples: what a personal shift is trained, gated and tested on.

`items` keeps them in the vault, `split` parts them by time, `importers` reads them from files.
"""

from perfit_device.history.items import HistoryItem, add, find, forget, forgotten, load, problems_of, usable
from perfit_device.history.split import Split, split

__all__ = [
    "HistoryItem",
    "Split",
    "add",
    "find",
    "forget",
    "forgotten",
    "load",
    "problems_of",
    "split",
    "usable",
]
