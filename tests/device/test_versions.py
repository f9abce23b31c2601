"""The versions of a personal shift: ten are kept, undo goes back through them, and what goes is gone."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.limited import run_limited
from tests.support.old_files import KEPT_OF_1, TWO, header_of, versions
from tests.support.old_files import PASSPHRASE as KEPT_PASSPHRASE
from tests.support.updates import ARTEFACT, make_split, plan_for, prepared
from tests.support.vaults import CHEAP, PASSPHRASE

from perfit_device import history, personal
from perfit_device.history import HistoryItem
from perfit_device.personal import MOST_VERSIONS
from perfit_device.shift_versions import PersonalShift, TrainingSummary, Versions
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidInput, NotFound
from perfit_shared.shifts import ShiftTensors
from perfit_shared.validation import mean_loss

NAME = ARTEFACT.name


def shift(number: int, forgotten: int = 0) -> PersonalShift:
    tensors = ShiftTensors.identity(ARTEFACT.spec, ARTEFACT.spec.personal_rank, number)
    return PersonalShift(tensors, number, forgotten)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A vault with three versions."""
    path = tmp_path / "vault.db"
    with Vault.create(path, PASSPHRASE, kdf=CHEAP) as vault:
        for number in (1, 2, 3):
            personal.store(vault, "cloud", ARTEFACT, shift(number))
        for number in range(40):
            vault.put("other", str(number), bytes(100 + 10 * number))
    return path


@pytest.fixture
def vault(path: Path) -> Iterator[Vault]:
    with Vault.open(path, PASSPHRASE) as opened:
        yield opened


def read(vault: Vault) -> Versions:
    found = personal.read_versions(vault, "cloud", NAME)
    assert found is not None
    return found


def numbers(vault: Vault) -> list[int]:
    return [version.number for version in read(vault).kept]


def current(vault: Vault) -> int:
    """The number of updates of the current version, once its tensors are found to be those."""
    mine = personal.load(vault, "cloud", ARTEFACT)
    assert mine is not None
    assert mine.tensors.digest() == shift(mine.updates).tensors.digest()
    return mine.updates


def test_undo_goes_back_again_and_again(vault: Vault) -> None:
    assert [personal.undo(vault, "cloud", NAME).updates for _ in range(2)] == [2, 1]
    assert current(vault) == 1
    with pytest.raises(NotFound, match="no earlier version"):
        personal.undo(vault, "cloud", NAME)
    assert personal.undo(vault, "cloud", NAME, to=3).updates == 3
    assert (current(vault), numbers(vault)) == (3, [1, 2, 3])
    with pytest.raises(InvalidInput, match="the current one already"):
        personal.undo(vault, "cloud", NAME, to=3)
    with pytest.raises(NotFound, match="version 4 of news_headline is not kept"):
        personal.undo(vault, "cloud", NAME, to=4)
    with pytest.raises(NotFound, match="no personal shift"):
        personal.undo(vault, "cloud", "poems")


def test_an_update_keeps_what_was_undone_and_follows_what_was_current(vault: Vault) -> None:
    personal.undo(vault, "cloud", NAME)
    personal.store(vault, "cloud", ARTEFACT, shift(4))
    assert (current(vault), numbers(vault)) == (4, [1, 2, 3, 4])
    assert personal.undo(vault, "cloud", NAME).number == 2
    assert len(vault.list("version")) == 4


def test_the_version_before_stays_although_it_is_the_oldest_of_ten(vault: Vault) -> None:
    """An update after going back to the first of ten removed the one that it went on from."""
    for number in range(4, 11):
        personal.store(vault, "cloud", ARTEFACT, shift(number))
    personal.undo(vault, "cloud", NAME, to=1)
    personal.store(vault, "cloud", ARTEFACT, shift(11))
    assert numbers(vault) == [1, *range(3, 12)]
    assert personal.undo(vault, "cloud", NAME).number == 1


def test_the_last_ten_are_kept(vault: Vault) -> None:
    for number in range(4, 16):
        personal.store(vault, "cloud", ARTEFACT, shift(number))
    assert numbers(vault) == list(range(6, 16))
    assert len(vault.list("version")) == MOST_VERSIONS
    while read(vault).before is not None:
        personal.undo(vault, "cloud", NAME)
    assert current(vault) == 6


def test_a_shift_that_unlearned_keeps_no_way_back(vault: Vault) -> None:
    personal.store(vault, "cloud", ARTEFACT, shift(4, forgotten=1))
    assert numbers(vault) == [4]
    personal.store(vault, "cloud", ARTEFACT, shift(5, forgotten=1))
    assert numbers(vault) == [4, 5]


def test_forgetting_leaves_the_current_version_alone(vault: Vault) -> None:
    items = [HistoryItem.make(ARTEFACT.task, {"text": "a", "title": "b"})]
    history.add(vault, items)
    personal.undo(vault, "cloud", NAME)
    history.forget(vault, items)
    assert (current(vault), numbers(vault)) == (2, [2])


def test_forgetting_drops_only_versions_that_know_the_example(vault: Vault) -> None:
    """All versions but the current one went, whether they knew it or not."""
    one, two = (HistoryItem.make(ARTEFACT.task, {"text": text, "title": text}) for text in "ab")
    history.add(vault, [one, two])
    personal.drop(vault, "cloud", NAME, None)
    for number, known in enumerate(([one], [one, two], [one]), start=1):
        marks = personal.marks_of(item.name for item in known)
        personal.store(vault, "cloud", ARTEFACT, replace(shift(number), trained=marks))
    assert [(v.number, sure) for _, v, sure in personal.knowing(vault, {two.task}, [two.name])] == [(2, True)]
    history.forget(vault, [two])
    assert (current(vault), numbers(vault)) == (3, [1, 3])
    assert history.forgotten(vault, two.task) == 1
    assert [version.forgotten for version in read(vault).kept] == [1, 1]
    personal.store(vault, "cloud", ARTEFACT, shift(4, forgotten=1))
    assert numbers(vault) == [1, 3, 4], "none of them has anything to unlearn"
    history.forget(vault, [one])
    personal.store(vault, "cloud", ARTEFACT, shift(5, forgotten=2))
    assert numbers(vault) == [5]
    assert len(vault.list("version")) == len(vault.list("trained")) + 1 == 1


def test_a_continued_version_knows_what_the_one_before_knew(vault: Vault) -> None:
    split = make_split()
    names = [item.name for item in split.train]
    older = replace(shift(1), trained=personal.marks_of(["ab" * 32]))
    assert prepared(vault, current=older, names=names).run().gate.accepted
    made = personal.load(vault, "cloud", ARTEFACT)
    assert made is not None and made.trained == personal.marks_of([*names, "ab" * 32])
    fresh = prepared(vault, plan=plan_for(split, fresh=True, seed=1), current=older, names=names, anyway=True)
    fresh.run()
    made = personal.load(vault, "cloud", ARTEFACT)
    assert made is not None and made.trained == personal.marks_of(names)


def test_dropping_is_for_good_and_not_for_the_current_one(vault: Vault) -> None:
    with pytest.raises(InvalidInput, match="the current one"):
        personal.drop(vault, "cloud", NAME, 3)
    with pytest.raises(NotFound, match="version 9"):
        personal.drop(vault, "cloud", NAME, 9)
    assert personal.drop(vault, "cloud", NAME, 2) == 1
    assert (numbers(vault), len(vault.list("version"))) == ([1, 3], 2)
    assert personal.undo(vault, "cloud", NAME).number == 1, "what it followed is gone"
    assert personal.drop(vault, "cloud", NAME, None) == 2
    assert not vault.list("version") and not personal.artefacts(vault)


def test_an_update_says_what_the_version_was_made_of(vault: Vault) -> None:
    mine = personal.load(vault, "cloud", ARTEFACT)
    result = prepared(vault, current=mine).run()
    assert result.gate.accepted
    now = read(vault).now
    gate = (mean_loss(scores) for scores in (result.gate.start.before, result.gate.start.after))
    assert now.learned == TrainingSummary(len(make_split().train), result.loss_first, result.loss_last, *gate)
    assert (now.number, now.updates, now.artefact_version) == (4, 4, "v1")
    assert len(now.date) == len("2024-01-01T00:00:00Z")


# -- on the disk -------------------------------------------------------------------------------


def pieces(path: Path, number: int) -> set[bytes]:
    """Runs of 16 bytes of the sealed row that holds one version's tensors."""
    with Vault.open(path, PASSPHRASE) as vault:
        row = vault._key.row_id("version", f"cloud/{NAME}/{number}")
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT wrapped_key, sealed FROM rows WHERE id = ?", (row,)).fetchone()
    connection.close()
    return {part[at : at + 16] for part in found for at in range(0, len(part) - 15, 16)} if found else set()


def add_version(path: Path) -> None:
    """The eleventh, for a vault with ten."""
    with Vault.open(path, PASSPHRASE) as vault:
        personal.store(vault, "cloud", ARTEFACT, shift(read(vault).current + 1))


def migrate(path: Path) -> None:
    Vault.open(path, KEPT_PASSPHRASE).close()


@pytest.fixture
def full(path: Path) -> Path:
    while True:
        with Vault.open(path, PASSPHRASE) as vault:
            if len(numbers(vault)) == MOST_VERSIONS:
                return path
        add_version(path)


def rows(path: Path) -> set[bytes]:
    """Runs of 16 bytes of every sealed row."""
    connection = sqlite3.connect(path)
    found = connection.execute("SELECT wrapped_key, sealed FROM rows").fetchall()
    connection.close()
    return {part[at : at + 16] for row in found for part in row for at in range(0, len(part) - 15, 16)}


def test_what_makes_room_for_the_eleventh_is_overwritten(full: Path) -> None:
    """Of the version and of the lists before: SQLite moves rows, and leaves copies of them behind."""
    first, seen = pieces(full, 1), rows(full)
    data = full.read_bytes()
    found = sum(piece in data for piece in seen)
    assert first and first < seen and found > 0.9 * len(seen), "the scan finds nothing, so it proves nothing"
    for _ in range(4):
        add_version(full)
        seen |= rows(full)
    assert not first & rows(full)
    gone = seen - rows(full)
    for file in full.parent.iterdir():
        data = file.read_bytes()
        assert not any(piece in data for piece in gone), file.name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "refused"])
def test_a_new_version_is_there_or_not_whenever_it_ends(full: Path, tmp_path: Path, how: str) -> None:
    """And the one that it took the place of is there, or nowhere."""
    first, size, rng = pieces(full, 1), full.stat().st_size, random.Random(6)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(full, source / "vault.db")
    limits = [rng.randrange(start, start + size // 12) for start in range(0, 2 * size, size // 12)]
    vaults, _ = run_limited(f"{__name__}:add_version", source, tmp_path / "work", how=how, limits=limits)
    seen = set()
    for found in vaults:
        with Vault.open(found, PASSPHRASE) as vault:
            kept = tuple(numbers(vault))
            assert current(vault) == kept[-1]
            assert len(vault.list("version")) == MOST_VERSIONS
        seen.add(kept)
        assert bool(pieces(found, 1)) == (kept[0] == 1)
        data = found.read_bytes()
        assert all((piece in data) == (kept[0] == 1) for piece in first)
    assert seen == {tuple(range(1, 11)), tuple(range(2, 12))}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["killed", "refused"])
def test_a_migration_is_done_or_not_whenever_it_ends(tmp_path: Path, how: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(KEPT_OF_1, source / "vault.db")
    size, rng = KEPT_OF_1.stat().st_size, random.Random(7)
    limits = [rng.randrange(start, start + size // 12) for start in range(0, 2 * size, size // 12)]
    vaults, _ = run_limited(f"{__name__}:migrate", source, tmp_path / "work", how=how, limits=limits)
    formats = set()
    for found in vaults:
        formats.add(header_of(found).format)  # of what SQLite makes of it
        with Vault.open(found, KEPT_PASSPHRASE) as vault:
            assert versions(vault) == TWO
            assert not vault.list("previous")
        assert header_of(found).format == 2
    assert formats == {1, 2}
