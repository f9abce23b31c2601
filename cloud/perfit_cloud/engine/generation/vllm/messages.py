"""vLLM's queues between the server and its worker processes, which hold prompts' and answers' token ids.

A queue is a ring of blocks in shared memory, each overwritten when ten messages more have come, and in part
alone where they are shorter. Here the memory loses its name once all have it mapped, and a message is
overwritten when it has been read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["forget_name_when_ready", "overwrite_as_read", "overwrite_read"]

_SECONDS = 10.0  # that a reader may take; one that is dead takes for ever
_PAUSE_SECONDS = 0.0005


def forget_name_when_ready(queue: Any) -> None:
    """Of a writer: once all readers are there no other process can open its memory."""
    wait = queue.wait_until_ready

    def wait_until_ready() -> None:
        wait()
        forget_name(queue)

    queue.wait_until_ready = wait_until_ready


def forget_name(queue: Any) -> None:
    if queue.buffer.is_creator:
        queue.buffer.shared_memory.unlink()
        queue.buffer.is_creator = False  # or it would unlink it once more at the end


def overwrite_as_read(queue: Any) -> None:
    """Of the only reader: it overwrites each message before the writer hears that it was read."""
    acquire = queue.acquire_read

    @contextmanager
    def acquire_read(*args: Any, **kwargs: Any) -> Iterator[memoryview]:
        with acquire(*args, **kwargs) as block:
            try:
                yield block
            finally:
                _overwrite(block)

    queue.acquire_read = acquire_read


def overwrite_read(queue: Any, *, wait: bool) -> None:
    """Of the writer, in its thread: overwrite what all readers have read; `wait`: for those who have not."""
    until = time.monotonic() + _SECONDS
    for at in range(queue.buffer.max_chunks):
        with queue.buffer.get_metadata(at) as flags:
            while wait and flags[0] and not all(flags[1:]) and time.monotonic() < until:
                time.sleep(_PAUSE_SECONDS)
            if flags[0] and all(flags[1:]):
                with queue.buffer.get_data(at) as block:
                    _overwrite(block)


def _overwrite(block: memoryview) -> None:
    """Zero a message: a byte, the number of parts, and each part behind its size."""
    end = 3
    if not block[0]:  # else the message was too large for the block and went another way
        for _ in range(int.from_bytes(block[1:3], "big")):
            end += 4 + int.from_bytes(block[end : end + 4], "big")
    block[:end] = bytes(end)
