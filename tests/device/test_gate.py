"""What the gate compares with, what is kept of the version before, and when there is nothing to learn."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit
from tests.support.updates import ARTEFACT, SEED, TASK, make_split, plan_for, prepared, scored

from perfit_device import history, personal, shift_files
from perfit_device.history import HistoryItem
from perfit_device.shift_versions import PersonalShift, TrainingSummary
from perfit_device.training.update import Result
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Score

GOOD = ShiftTensors.identity(ARTEFACT.spec, ARTEFACT.spec.personal_rank, 5)
FRESH = plan_for(make_split(), fresh=True)


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with Vault.create(tmp_path / "v.db", "x", kdf=KdfParams(32, 1, 4)) as opened:
        yield opened


def losses(good: float, seed: float, new: float) -> Callable[..., Callable[[], list[Score]]]:
    known = {GOOD.digest(): good, SEED.digest(): seed}
    return lambda rows, tensors: lambda: scored(rows, lambda row: known.get(tensors.digest(), new))


def figures(result: Result) -> tuple[float, float, bool]:
    return result.gate.before, result.gate.after, result.gate.accepted


def digest_of(vault: Vault) -> str:
    shift = personal.load(vault, "cloud", ARTEFACT)
    assert shift is not None
    return shift.tensors.digest()


def can_undo(vault: Vault) -> bool:
    versions = personal.read_versions(vault, "cloud", ARTEFACT.name)
    return versions is not None and versions.before is not None


def store(vault: Vault, tensors: ShiftTensors, updates: int = 1, forgotten: int = 0) -> PersonalShift:
    shift = PersonalShift(tensors, updates, forgotten)
    personal.store(vault, "cloud", ARTEFACT, shift)
    return shift


def test_fresh_training_must_beat_the_current_shift(vault: Vault) -> None:
    """It had to beat the seed alone, and replaced a good shift by a bad one: 3.36 became 4.82."""
    current = store(vault, GOOD)
    result = prepared(vault, plan=FRESH, current=current, evaluate=losses(3.36, 5.0, 4.82)).run()
    assert figures(result) == pytest.approx((3.36, 4.82, False))
    assert digest_of(vault) == GOOD.digest()
    better = prepared(vault, plan=FRESH, current=current, evaluate=losses(3.36, 5.0, 3.3)).run()
    assert figures(better) == pytest.approx((3.36, 3.3, True))


def test_anyway_takes_what_is_worse(vault: Vault) -> None:
    current = store(vault, GOOD)
    run = prepared(vault, plan=FRESH, current=current, evaluate=losses(3.36, 5.0, 4.82), anyway=True)
    assert run.run().gate.accepted
    assert digest_of(vault) != GOOD.digest()


def test_what_was_forgotten_does_not_come_back(vault: Vault) -> None:
    """The version before knows it, and would be a way back to it."""
    items = [HistoryItem.make(TASK, {"text": f"text {n}", "title": "t"}) for n in range(2)]
    history.add(vault, items)
    store(vault, SEED)
    current = store(vault, GOOD, 2)
    history.forget(vault, items[:1])
    assert not can_undo(vault)
    forgotten = history.forgotten(vault, TASK.name)
    run = prepared(vault, plan=FRESH, current=current, forgotten=forgotten, evaluate=losses(3.0, 5.0, 2.0))
    assert run.run().gate.accepted
    assert not can_undo(vault)
    # What goes on from it knows no more than it does.
    later = prepared(vault, current=personal.load(vault, "cloud", ARTEFACT), forgotten=forgotten)
    assert later.run().gate.accepted
    assert can_undo(vault)


def test_a_version_records_the_loss_of_all_folds_not_of_the_few_examples_that_were_new(vault: Vault) -> None:
    """The last three were easy; the update after that had to beat their mean on all, and was kept out."""
    count = len(make_split().train) + len(make_split().gate)
    folds = plan_for(make_split(), examples=count, held_out=0, folds=3)
    learned = TrainingSummary(examples=count - 3, gate_after=3.0)
    current = PersonalShift(GOOD, 1, learned=learned)
    personal.store(vault, "cloud", ARTEFACT, current)

    def evaluate(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], list[Score]]:
        gain = {SEED.digest(): 0.0, GOOD.digest(): 0.4}.get(tensors.digest(), 0.5)
        return lambda: scored(rows, lambda row: (1.0 if row >= count - 3 else 4.0) - gain)

    result = prepared(vault, plan=folds, current=current, evaluate=evaluate).run()
    assert figures(result) == pytest.approx((0.6, 0.5, True))
    current = personal.load(vault, "cloud", ARTEFACT)
    assert current is not None
    assert current.learned.gate_after == pytest.approx((3 * 0.5 + (count - 3) * 3.5) / count)
    again = prepared(vault, plan=replace(folds, seed=1), current=current, evaluate=evaluate).run()
    assert again.gate.accepted


# -- as commands -------------------------------------------------------------------------------


def test_undo_and_what_the_gate_kept_out(ready: Perfit, cloud: Any) -> None:
    assert "no personal shift yet" in ready.fails("undo")
    assert ready.json("update")["gate"]["accepted"]
    assert "no earlier version" in ready.fails("undo")
    assert ready.json("status")["tasks"]["news_headline"]["can_undo"] is False
    code, _, err = ready("update", "--fresh", "--epochs", "1", "--lr", "1e-6")
    assert code == 5
    assert "with your shift as it was" in err and "with the new one; your shift stays" in err
    assert ready("update", "--fresh", "--epochs", "1", "--lr", "1e-6", "--anyway")[0] == 0
    assert ready.json("status")["tasks"]["news_headline"]["can_undo"] is True
    cloud.stop()
    assert ready.json("undo") == {"task": "news_headline", "updates": 1, "number": 1}
    assert "no earlier version" in ready.fails("undo")
    assert "your shift is version 2 again" in ready("undo", "--to", "2")[2]
    assert "version 3 of news_headline is not kept" in ready.fails("undo", "--to", "3")
    assert 'no personal shift for "poems"; there is one for news_headline' in ready.fails(
        "undo", "--task", "poems"
    )


def test_undo_shows_the_versions(ready: Perfit, cloud: Any) -> None:
    assert "no personal shift yet" in ready.fails("undo", "--list")
    first = ready.json("update", "--epochs", "2")
    ready.ok("update", "--epochs", "3")
    cloud.stop()
    ready.ok("undo")
    listed = ready.json("undo", "--list")
    assert listed["task"] == "news_headline"
    assert [(v["number"], v["updates"], v["current"]) for v in listed["versions"]] == [
        (1, 1, True),
        (2, 2, False),
    ]
    assert listed["versions"][0]["learned"] == {
        "examples": 16,
        "train_before": first["loss_first"],
        "train_after": first["loss_last"],
        "gate_before": first["gate"]["before"],
        "gate_after": first["gate"]["after"],
    }
    head, one, two = ready.ok("undo", "--list").splitlines()
    assert head.split()[:2] == ["date", "examples"]
    gate = first["gate"]
    assert one.startswith("*    1  20") and f"{gate['before']:.4f} → {gate['after']:.4f}" in one
    assert two.startswith("     2  20")
    assert "--list changes nothing" in ready.fails("undo", "--list", "--to", "1")
    shown = ready("status")[1]
    assert "version 1, of 1 updates, 2 kept" in shown
    assert json.loads(ready("status", "--json")[1])["tasks"]["news_headline"]["current"] == 1


def test_an_update_with_nothing_new_does_not_train(ready: Perfit, cloud: Any) -> None:
    ready.ok("update", "--epochs", "2")
    cloud.calls.clear()
    done = ready.json("update", "--epochs", "2")
    assert (done["nothing_new"], done["steps"]) == (True, 0)
    assert "nothing is new since the last update of news_headline" in ready("update", "--epochs", "2")[2]
    assert set(cloud.calls) == {"Describe"}
    assert ready.json("update", "--epochs", "2", "--again")["steps"] > 0
    assert ready.json("update", "--epochs", "3")["steps"] > 0, "other settings"
    ready.ok("history", "add", "One more.", "More", "--task", "news_headline")
    assert ready.json("update", "--epochs", "3")["steps"] > 0, "another history"
    cloud.version = "v2"
    assert ready.json("update", "--epochs", "3", "--fresh")["steps"] > 0, "another artefact"


def test_an_update_that_was_undone_can_be_made_again(ready: Perfit) -> None:
    """It said that nothing was new since the last update, which was accepted; that one was not in use."""
    ready.ok("update", "--epochs", "2")
    ready.ok("update", "--epochs", "3")
    ready.ok("undo")
    assert ready.json("update", "--epochs", "3")["steps"] > 0


def test_export_needs_no_cloud(ready: Perfit, cloud: Any, tmp_path: Path) -> None:
    assert "no personal shift yet" in ready.fails("export", "--shift", str(tmp_path / "none"))
    ready.ok("update", "--epochs", "2")
    cloud.stop()
    exported = ready.json("export", "--shift", str(tmp_path / "mine.shift"))
    assert (exported["task"], exported["version"]) == ("news_headline", "v1")
    shift = shift_files.read((tmp_path / "mine.shift").read_bytes(), "mine.shift", _artefact(cloud))
    assert set(shift.layers) == {1, 2}


def _artefact(cloud: Any) -> Any:
    from tests.support.fake_cloud import SPEC

    from perfit_device.cloud.codec import Artefact
    from perfit_shared.tasks import TASKS

    return Artefact("news_headline", cloud.version, SPEC, TASKS["news_headline"].resolved(False), 0.01, 3, 4)
