"""Memory that forgets: what a finished call left is overwritten.

`process` hardens the process at its start, `allocator` overwrites what is freed, `stacks` what functions left
on stacks, and `scrubber` what caches of libraries hold. Knows neither grpc nor the engines.
"""
