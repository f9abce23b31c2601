"""Engines that generate text behind one interface.

`continuous` lets requests join and leave a running batch; `static` serves families whose caches allow no
such thing. `stream` is what the caller reads from, `sampling` how the next token is drawn.
"""
