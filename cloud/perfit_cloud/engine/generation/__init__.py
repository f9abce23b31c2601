"""Engines that generate text behind one interface.

`continuous` lets requests join and leave a running batch; `static` serves families whose caches allow no
such thing; `offline` answers prompts that are all known beforehand. `stream` is what the caller reads
from, `sampling` how the next token is drawn.
"""
