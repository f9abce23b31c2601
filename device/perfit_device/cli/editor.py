"""A text in the person's own editor. Nothing of it is left behind on the disk."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from perfit_shared.errors import ConfigError

__all__ = ["edited", "private_file"]


def edited(text: str, *, suffix: str = ".txt") -> str:
    """What the person saved. Raises ConfigError where no editor runs, or it fails."""
    chosen = os.environ.get("VISUAL") or os.environ.get("EDITOR") or ("notepad" if os.name == "nt" else "vi")
    with private_file(text, suffix=suffix) as path:
        try:
            done = subprocess.run([*shlex.split(chosen), str(path)], check=False)
        except (OSError, ValueError) as error:
            raise ConfigError(f'the editor "{chosen[:64]}" cannot be started; set EDITOR') from error
        if done.returncode:
            raise ConfigError(f'the editor "{chosen[:64]}" ended with an error; nothing was changed')
        try:
            return path.read_text("utf-8-sig")
        except UnicodeError as error:
            raise ConfigError("what was saved is not text in UTF-8; nothing was changed") from error


@contextlib.contextmanager
def private_file(text: str, *, suffix: str = ".txt") -> Iterator[Path]:
    """A file that nobody else can read, in memory where there is such a place; overwritten at the end.

    An editor may put another file in its place, and copies beside it: they go as well.
    """
    folder = Path(tempfile.mkdtemp(prefix="perfit-", dir=_place()))  # 0700
    try:
        path = folder / f"answer{suffix}"
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(text.encode())
        yield path
    finally:
        for left in folder.iterdir():
            _overwrite(left)
        shutil.rmtree(folder, ignore_errors=True)


def _place() -> str | None:
    """A folder in memory, or None for the usual one."""
    for folder in (os.environ.get("XDG_RUNTIME_DIR", ""), "/dev/shm"):  # noqa: S108 (mkdtemp makes its own)
        if folder and Path(folder).is_dir() and os.access(folder, os.W_OK):
            return folder
    return None


def _overwrite(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_file() and not path.is_symlink():
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
