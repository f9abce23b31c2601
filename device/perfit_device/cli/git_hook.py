"""The hooks by which `git commit` begins with a message, and by which what was committed is learned."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from perfit_shared.errors import ConfigError, InvalidInput
from perfit_shared.terminal import one_line

__all__ = ["git", "install", "uninstall"]

_MARK = "# Written by `perfit commit --install`; `perfit commit --uninstall` removes it."
# Git names the source of a message that is there already. An editor called ":" shows it to nobody.
_FILL = '[ -z "$2" ] && [ "$GIT_EDITOR" != : ] && {command} --hook "$1" </dev/null >/dev/null 2>&1'
_LEARN = '[ "$(git config --type=bool perfit.learn)" = true ] && {command} --committed </dev/null'
_HOOKS = {"prepare-commit-msg": _FILL, "post-commit": _LEARN}


def git(*arguments: str) -> str:
    """What git prints, without its end. Raises InvalidInput with what it says."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise ConfigError("git is not installed") from error
    if done.returncode:
        why = one_line(done.stderr.decode(errors="replace"))[:200]
        raise InvalidInput(f"git says: {why or 'no'}")
    return done.stdout.decode(errors="surrogateescape").rstrip("\n")


def install(profile: str | None) -> str:
    """What was done. Raises InvalidInput where somebody else's hook stands there."""
    chosen = ["--profile", profile] if profile else []
    command = shlex.join([sys.executable, "-m", "perfit_device.cli", *chosen, "commit"])
    scripts = {path: _HOOKS[path.name].format(command=command) for path in _paths()}
    for path, script in scripts.items():
        if _is_there(path) and not _is_ours(path):
            raise InvalidInput(
                f"{path} is somebody else's hook, and stays; to have both, add this line to it: {script}"
            )
    for path, script in scripts.items():
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755), "w") as file:
            file.write(f"#!/bin/sh\n{_MARK}\n{script}\nexit 0\n")
    return (
        f"{next(iter(scripts))} gives every `git commit` here a message to begin with; "
        "`git config perfit.learn true` makes what you commit an example"
    )


def uninstall() -> str:
    there = [path for path in _paths() if _is_there(path)]
    ours = [path for path in there if _is_ours(path)]
    if there and not ours:
        raise InvalidInput(f"{there[0]} is somebody else's hook, and stays")
    for path in ours:
        path.unlink()
    return f"{' and '.join(map(str, ours))} gone" if ours else "there is no hook"


def _paths() -> list[Path]:
    """Where git looks for them: worktrees and core.hooksPath are git's own business."""
    folder = Path(git("rev-parse", "--git-path", "hooks")).absolute()
    return [folder / name for name in _HOOKS]


def _is_there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_ours(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and _MARK.encode() in path.read_bytes()
