"""The shift that answers go through, encoded once for each version, and gone with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.agents import SECRET
from tests.support.updates import ARTEFACT
from tests.support.vaults import CHEAP, PASSPHRASE

from perfit_device import encoded_shifts, personal
from perfit_device.cloud.codec import ANSWER_DTYPE, LOSS_DTYPE, Artefact, ShiftUse, shift_to_wire
from perfit_device.encoded_shifts import EncodedShifts
from perfit_device.history.importers import read_history
from perfit_device.operations.ask import Ask, Question
from perfit_device.operations.imports import ImportExamples
from perfit_device.operations.update import Update
from perfit_device.profile import Profile
from perfit_device.shift_versions import PersonalShift
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidInput, ShiftMismatch
from perfit_shared.shifts import ShiftTensors
from perfit_shared.tasks import TASKS
from perfit_shared.types import Mode

NAME = ARTEFACT.name


def tensors(number: int) -> ShiftTensors:
    return ShiftTensors.identity(ARTEFACT.spec, ARTEFACT.spec.personal_rank, number)


def add(vault: Vault, number: int, artefact: Artefact = ARTEFACT) -> None:
    personal.store(vault, "cloud", artefact, PersonalShift(tensors(number), number))


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with Vault.create(tmp_path / "vault.db", PASSPHRASE, kdf=CHEAP) as vault:
        add(vault, 1)
        add(vault, 2)
        yield vault


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each time that a shift is read from the vault."""
    said: list[str] = []
    load = personal.load

    def counted(vault: Vault, cloud_id: str, artefact: Artefact) -> PersonalShift | None:
        said.append(artefact.name)
        return load(vault, cloud_id, artefact)

    monkeypatch.setattr(personal, "load", counted)
    return said


def held(shifts: EncodedShifts) -> bytearray:
    return shifts._entries["cloud", NAME].data


CHANGES: dict[str, tuple[Callable[[Vault], object], int | None]] = {
    "new version": (lambda vault: add(vault, 3), 3),
    "undo": (lambda vault: personal.undo(vault, "cloud", NAME), 1),
    "drop another": (lambda vault: personal.drop(vault, "cloud", NAME, 1), 2),
    "drop": (lambda vault: personal.drop(vault, "cloud", NAME, None), None),
    "forget": (lambda vault: personal.forget_examples(vault, {ARTEFACT.task.name}, ["ab" * 32], 1), 2),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shift_is_encoded_once_until_it_changes(vault: Vault, loads: list[str], change: str) -> None:
    shifts = EncodedShifts()
    first = shifts.get(vault, "cloud", ARTEFACT)
    assert first is not None and first.data == tensors(2).to_bytes(dtype=ANSWER_DTYPE)
    assert shifts.get(vault, "cloud", ARTEFACT) == first and len(loads) == 1
    shifts.drop_changed(vault)
    kept = held(shifts)
    assert bytes(kept) == first.data

    apply, number = CHANGES[change]
    apply(vault)
    shifts.drop_changed(vault)
    assert not shifts._entries and not any(kept), "what was dropped is overwritten"
    wanted = None if number is None else tensors(number).to_bytes(dtype=ANSWER_DTYPE)
    now = shifts.get(vault, "cloud", ARTEFACT)
    assert (now and now.data) == wanted
    apply(vault) if change == "new version" else None
    again = shifts.get(vault, "cloud", ARTEFACT)  # also where nobody has dropped it
    assert (again and again.data) == wanted


def test_a_shift_is_given_to_its_own_artefact_alone(
    vault: Vault, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shifts = EncodedShifts()
    shifts.get(vault, "cloud", ARTEFACT)
    with pytest.raises(ShiftMismatch):
        shifts.get(vault, "cloud", replace(ARTEFACT, version="v2"))
    assert shifts.get(vault, "another", ARTEFACT) is None
    monkeypatch.setattr(encoded_shifts, "_MOST", 2)
    oldest = held(shifts)
    for name in ("b", "c"):
        add(vault, 1, replace(ARTEFACT, name=name))
        assert shifts.get(vault, "cloud", replace(ARTEFACT, name=name)) is not None
    assert [name for _, name in shifts._entries] == ["b", "c"] and not any(oldest)


def test_it_is_for_answers_alone(vault: Vault) -> None:
    use = ShiftUse(ARTEFACT, EncodedShifts().get(vault, "cloud", ARTEFACT))
    assert shift_to_wire(use, ANSWER_DTYPE) == shift_to_wire(ShiftUse(ARTEFACT, tensors(2)), ANSWER_DTYPE)
    with pytest.raises(InvalidInput, match="answers alone"):
        shift_to_wire(use, LOSS_DTYPE)


def test_a_profile_that_keeps_its_vault_reads_a_shift_once(
    opened: Profile, history_file: Path, cloud: Any, loads: list[str]
) -> None:
    """And has none once it is locked; one that releases its vault has none between two commands."""
    asking = Ask(Question("The council met.", temperature=0.0), (Mode.PERSONAL,))
    items = read_history(history_file, TASKS["news_headline"])
    opened.perform(ImportExamples(items, offline=True))
    opened.perform(Update(settings={"epochs": 1}))
    opened.perform(asking)
    assert not opened._encoded_shifts._entries
    opened.close()

    with Profile.open(opened.settings, passphrase=lambda: SECRET, keeps_vault=True) as kept:
        shifts, found = kept._encoded_shifts._entries, []
        for _ in range(2):
            del loads[:]
            kept.perform(asking)
            found.append((len(loads), len(shifts)))
        assert found == [(1, 1), (0, 1)]
        kept.perform(Update(settings={"epochs": 2}, again=True))
        assert not shifts, "it made another version"
        kept.perform(asking)
        (entry,) = shifts.values()
        assert any(entry.data)
    assert not shifts and not any(entry.data)
