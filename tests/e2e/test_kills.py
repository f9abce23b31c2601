"""A twentieth of the long run of `soak.kills`, and that what it looks for would be found."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import tiny
from local import LocalCloud
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from soak.killing.changes import State, carved, kill_changes, pieces_of
from soak.killing.ownership import Owned, Owner, fault
from soak.kills import run


@pytest.mark.slow
def test_kills(tmp_path: Path) -> None:
    result = run(tmp_path, kills=10, seed=3)
    assert result["wrong"] == []
    assert result["kills"] == 10
    assert set(result["of"]) >= {"changes", "update"}
    assert any(of.startswith(("agent: ", "caller: ")) for of in result["of"])


def test_kills_of_a_vault_that_changes_without_end(tmp_path: Path) -> None:
    rng = random.Random(5)
    assert [kill_changes(tmp_path / str(seed), seed, rng) for seed in range(3)] == [None] * 3


@pytest.mark.slow
def test_kills_of_restoring_unlearning_and_leaving(tmp_path: Path) -> None:
    model = tiny.build(tmp_path / "tiny")
    with LocalCloud(model.model, model.artefacts, tmp_path / "cloud") as cloud:
        owner, rng = Owner(cloud, tmp_path / "owner"), random.Random(1)
        killed = [each for _ in range(8) for each in owner.kill(rng)]
    assert killed and [each for each in killed if each.wrong] == []


def test_half_of_what_an_owner_does_would_be_seen() -> None:
    before, after = Owned(frozenset("ab"), (1,), 1, 1), Owned(frozenset("a"), (2,), 2, 0)
    name = "forget --retrain"
    assert fault(name, before, before, after) is None is fault(name, before, after, after)
    assert fault(name, before, Owned(before.examples, (1, 2), 2, 1), after) is None
    for half in (None, Owned(after.examples, (1,), 1, 0), Owned(after.examples, (1, 2), 2, 0)):
        assert fault(name, before, half, after)
    assert fault("restore", Owned(), Owned(before.examples), before)
    assert fault("unenroll", before, Owned(before.examples), None)


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
