"""Whether a path is its owner's alone to write: the cloud's state folder and the device's home are looked at.

Whoever can write a folder can swap what lies in it, and whoever can write a folder above can swap the
folder. So every folder and link on the way is looked at, as sshd does it for `authorized_keys`. Access
lists show in the group's bits. Where there are no owners and modes (Windows), nothing is looked at.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from perfit_shared.errors import ConfigError

__all__ = ["check_ownership", "make_private_folder"]

_MOST_LINKS = 40  # followed on one way, as Linux does


def make_private_folder(folder: Path) -> None:
    """Make what is missing of the way to `folder`, for its owner alone. Raises OSError."""
    for part in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
        part.mkdir(mode=0o700, exist_ok=True)


def check_ownership(path: Path, *, trusts_group: bool = False) -> None:
    """Raises ConfigError when somebody else than this user and root could change or replace `path`.

    Everything on the way from the root has to belong to this user or root and to be writable by its owner
    alone. A folder above `path` may be writable by all when it is sticky, like /tmp. `trusts_group`: the
    group's right to write does not matter. What does not exist yet is left out.
    """
    if not hasattr(os, "geteuid"):
        return
    todo = list(reversed(path.expanduser().absolute().parts))
    current, links = Path(todo.pop()), 0
    _check(current, os.lstat(current), is_last=not todo, trusts_group=trusts_group)
    while todo:
        part = todo.pop()
        if part == "..":
            current = current.parent
            continue
        at = current / part
        try:
            found = os.lstat(at)
        except (FileNotFoundError, NotADirectoryError):
            return  # opening it will raise
        except OSError as error:
            raise ConfigError(f"cannot look at {at}: {error.strerror}") from error
        if not stat.S_ISLNK(found.st_mode):
            _check(at, found, is_last=not todo, trusts_group=trusts_group)
            current = at
            continue
        _check_owner(at, found)
        links += 1
        if links > _MOST_LINKS:
            raise ConfigError(f"cannot look at {path}: too many symbolic links")
        target = at.readlink()
        todo.extend(reversed([part for part in target.parts if part != target.anchor]))
        if target.is_absolute():
            current = Path(target.anchor)


def _check_owner(path: Path, found: os.stat_result) -> None:
    me = os.geteuid()
    if found.st_uid not in (0, me):
        raise ConfigError(
            f"{path} belongs to another user (uid {found.st_uid}), who could swap what is in it; run "
            f"chown -h {me} {shlex.quote(str(path))}, or use another folder"
        )


def _check(path: Path, found: os.stat_result, *, is_last: bool, trusts_group: bool) -> None:
    _check_owner(path, found)
    mode = found.st_mode
    others = "o" if mode & stat.S_IWOTH else ""
    group = "g" if mode & stat.S_IWGRP and not trusts_group and not _is_own_group(found) else ""
    if not others and not group:
        return
    if mode & stat.S_ISVTX and stat.S_ISDIR(mode) and not is_last:
        return  # only the owner may rename or remove what lies there
    raise ConfigError(
        f"others can write {path}, and so swap what is in it; run "
        f"chmod {group}{others}-w {shlex.quote(str(path))}, or use another folder"
    )


def _is_own_group(found: os.stat_result) -> bool:
    """Whether the group is the owner's private one: of the same name, and nobody else is in it.

    A group's list names only those who are in it beside their own group, so every user's is looked at. Root's
    is nobody's private one: containers give it to users that are in no list.
    """
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(found.st_uid), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    return (
        group.gr_gid != 0
        and owner.pw_gid == group.gr_gid
        and owner.pw_name == group.gr_name
        and set(group.gr_mem) <= {owner.pw_name}
        and all(user.pw_uid == owner.pw_uid for user in pwd.getpwall() if user.pw_gid == group.gr_gid)
    )
