"""The two calls that hold state for the length of one stream: `ask` and `adapt`.

What they hold dies with the stream, however it ends.
"""
