"""A twentieth of the long run of `soak.kills`, and that what it looks for would be found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from soak.killing.changes import State, carved, kill_changes, pieces_of
from soak.kills import run


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    result = run(tmp_path, kills=10, seed=3)
    assert result["wrong"] == []
    assert result["kills"] == 10
    assert set(result["of"]) >= {"changes", "update"}


def test_kills_of_a_vault_that_changes_without_end(tmp_path: Path) -> None:
    rng = random.Random(5)
    assert [kill_changes(tmp_path / str(seed), seed, rng) for seed in range(3)] == [None] * 3


def test_the_outcome_of_changes_is_known(tmp_path: Path) -> None:
    """Or else a state that a kill left behind is compared with another one's."""
    state = State.start(1)
    path = tmp_path / "vault.db"
    with Vault.create(path, state.passphrase, kdf=KdfParams(32, 1, 4)) as vault, vault.transaction():
        for (kind, name), data in state.rows.items():
            vault.put(kind, name, data)
    with Vault.open(path, state.passphrase) as vault:
        for _ in range(40):
            state = state.next()
            state.make(vault)
    with Vault.open(path, state.passphrase) as vault:
        for kind in {kind for kind, _ in state.rows}:
            assert vault.list(kind) == {name: data for (k, name), data in state.rows.items() if k == kind}


def test_what_was_removed_is_found_where_it_stays(tmp_path: Path) -> None:
    with Vault.create(tmp_path / "vault.db", "x", kdf=KdfParams(32, 1, 4)) as vault:
        vault.put("example", "a", b"z" * 300)
    seen = pieces_of(tmp_path / "vault.db")
    assert carved(tmp_path, seen) is None
    left = (tmp_path / "vault.db").read_bytes()
    with Vault.open(tmp_path / "vault.db", "x") as vault:
        vault.delete("example", "a")
    assert carved(tmp_path, seen) is None
    (tmp_path / "left").write_bytes(left)
    assert carved(tmp_path, seen) == "left still holds bytes of a row that was removed"
