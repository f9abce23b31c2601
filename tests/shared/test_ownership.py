"""Folders that others can write: who could swap what lies in them, and what is said about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from perfit_shared.errors import ConfigError
from perfit_shared.ownership import check_ownership

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes here")
as_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away"
)
SOMEBODY = 54321


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "above" / "state"
    made.mkdir(parents=True)
    made.chmod(0o700)
    made.parent.chmod(0o755)
    return made


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o2700, 0o1755])
def test_what_its_owner_alone_writes_is_fine(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    check_ownership(folder)
    check_ownership(folder / "not" / "yet" / "there")


@pytest.mark.parametrize(("mode", "fix"), [(0o777, "o-w"), (0o702, "o-w"), (0o1777, "o-w"), (0o1702, "o-w")])
def test_what_others_write_is_refused_with_the_fix(folder: Path, mode: int, fix: str) -> None:
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=f"run chmod g?{fix} {folder}"):
        check_ownership(folder)


def test_files_are_looked_at_as_well(folder: Path) -> None:
    (folder / "file").write_bytes(b"x")
    (folder / "file").chmod(0o644)
    check_ownership(folder / "file")
    (folder / "file").chmod(0o646)
    with pytest.raises(ConfigError, match=r"others can write .*file"):
        check_ownership(folder / "file")


def test_folders_above_are_looked_at(folder: Path) -> None:
    """Whoever writes there puts another folder in its place."""
    folder.parent.chmod(0o777)
    with pytest.raises(ConfigError, match=f"others can write {folder.parent},"):
        check_ownership(folder)
    folder.parent.chmod(0o1777)  # like /tmp, where nobody moves what is another's
    check_ownership(folder)


def test_a_link_is_followed_and_its_own_place_looked_at(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    link = tmp_path / "open" / "link"
    link.symlink_to(folder)
    check_ownership(link / "file")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigError, match="open"):
        check_ownership(link)
    (tmp_path / "open").chmod(0o755)
    link.unlink()
    link.symlink_to("../above/state")
    check_ownership(link)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="state"):
        check_ownership(link)
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(ConfigError, match="too many"):
        check_ownership(tmp_path / "round")


@as_root
def test_what_belongs_to_somebody_else_is_refused_with_the_fix(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    for mine in (folder, folder.parent, tmp_path / "link"):
        os.chown(mine, SOMEBODY, -1, follow_symlinks=False)
        with pytest.raises(ConfigError, match=f"another user .*chown -h 0 {mine}"):
            check_ownership(tmp_path / "link")
        os.chown(mine, 0, -1, follow_symlinks=False)
    check_ownership(tmp_path / "link")


@as_root
def test_a_group_may_write_where_that_is_asked_for(folder: Path) -> None:
    os.chown(folder, -1, SOMEBODY)
    folder.chmod(0o2770)
    with pytest.raises(ConfigError, match="chmod g-w"):
        check_ownership(folder)
    check_ownership(folder, trusts_group=True)
    folder.chmod(0o2777)
    with pytest.raises(ConfigError, match="chmod o-w"):
        check_ownership(folder, trusts_group=True)


@as_root
@pytest.mark.parametrize(
    ("gid", "members", "others", "is_own"),
    [
        (SOMEBODY, [], [], True),
        (SOMEBODY, ["me"], [SOMEBODY + 1], True),
        (SOMEBODY, ["me", "eve"], [], False),
        (SOMEBODY, [], [SOMEBODY], False),  # a group's list does not name whose own group it is
        (0, [], [], False),  # nor whoever a container runs as, in root's
    ],
)
def test_a_group_of_ones_own_is_nobody_else(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    gid: int,
    members: list[str],
    others: list[int],
    is_own: bool,
) -> None:
    """As many systems give every user, with a umask of 002."""
    import grp
    import pwd

    def user(name: str, uid: int, of: int) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", uid, of, "", "/", "/bin/sh"))

    me = user("me", 0, gid)
    monkeypatch.setattr(pwd, "getpwuid", lambda _uid: me)
    monkeypatch.setattr(pwd, "getpwall", lambda: [me, *(user("eve", 7, of) for of in others)])
    monkeypatch.setattr(grp, "getgrgid", lambda _gid: grp.struct_group(("me", "x", gid, members)))
    os.chown(folder, -1, gid)
    folder.chmod(0o770)
    if is_own:
        check_ownership(folder)
    else:
        with pytest.raises(ConfigError, match="chmod g-w"):
            check_ownership(folder)
