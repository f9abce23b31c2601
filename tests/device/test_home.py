"""The device's home is its user's alone to write: who can write it could put another vault in its place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from tests.support.device import Perfit

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners and modes here")
VAULT = Path("profiles") / "default" / "vault.db"


def tree(home: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}


@pytest.mark.parametrize("at", [".", "profiles", "profiles/default", VAULT])
def test_what_others_can_write_is_refused_and_stays(enrolled: Perfit, home: Path, at: str) -> None:
    path, before = home / at, tree(home)
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode | 0o002)
    line = enrolled.fails("status")
    assert f"others can write {path.resolve()}" in line
    assert f"run chmod o-w {path.resolve()}" in line
    assert tree(home) == before
    path.chmod(mode)
    enrolled.ok("status")


def test_a_vault_is_not_made_where_others_can_write(perfit: Perfit, home: Path, cloud: object) -> None:
    home.mkdir()
    home.chmod(0o777)
    invite = cloud.invite().encode()  # type: ignore[attr-defined]
    assert "others can write" in perfit.fails("enroll", invite)
    assert tree(home) == {}
    home.chmod(0o700)
    perfit.ok("enroll", invite)  # it was not spent


def test_a_journal_of_somebody_elses_is_refused(enrolled: Perfit, home: Path) -> None:
    """SQLite would play it back."""
    journal = home / "profiles" / "default" / "vault.db-journal"
    journal.write_bytes(b"")
    journal.chmod(0o666)
    assert "vault.db-journal" in enrolled.fails("status")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_what_is_another_users_is_refused(enrolled: Perfit, home: Path) -> None:
    os.chown(home / "profiles", 54321, -1)
    assert "belongs to another user" in enrolled.fails("status")
    os.chown(home / "profiles", 0, -1)
    enrolled.ok("status")
