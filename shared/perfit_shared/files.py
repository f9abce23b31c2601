"""Writing a file whole or not at all: temp file, fsync, replace."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["sync_folder", "temporary_name", "write_whole", "written_whole"]


@contextmanager
def written_whole(path: Path, *, mode: int = 0o666, replaces: bool = True) -> Iterator[BinaryIO]:
    """A file to write; when the block ends well, it takes the place of `path`, whole and on disk.

    Until then, and after any error, the old file stays. A kill may leave a `.new` file beside it. `mode` is
    that of the new file, less the umask. Without `replaces` an old file stays in any case, and this raises
    FileExistsError at the end.
    """
    new = temporary_name(path)
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replaces:
            new.replace(path)
        else:
            os.link(new, path)
    finally:
        new.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes, *, mode: int = 0o666, replaces: bool = True) -> None:
    """See `written_whole`. Raises OSError."""
    with written_whole(path, mode=mode, replaces=replaces) as file:
        file.write(data)


def temporary_name(path: Path) -> Path:
    """In the same folder; random, so that two writers do not share one."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
