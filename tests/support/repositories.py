"""Real repositories of git, that no setting of this machine's user touches."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["git", "make_repository", "put"]

_AUTHOR = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Ada"), ("EMAIL", "ada@example.org"))
}


def git(folder: Path, *arguments: str, **environment: str) -> bytes:
    """What git prints; it must succeed."""
    alone = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        env={**os.environ, **alone, **_AUTHOR, **environment},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout


def make_repository(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--initial-branch", "main")
    return folder


def put(folder: Path, name: str | bytes, content: str | bytes) -> None:
    """A file in it, with the folders that it needs."""
    path = folder / os.fsdecode(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
