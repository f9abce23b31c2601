"""The update loop against a quadratic in this process: resume, gate, and a cloud that goes away."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.updates import (
    ARTEFACT,
    SEED,
    SPEC,
    Answer,
    evaluate,
    gradient,
    make_split,
    plan_for,
    prepared,
    scored,
)

from perfit_device import personal
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.shift_versions import PersonalShift
from perfit_device.training import update as updates
from perfit_device.training.update import Plan, Result
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import (
    Busy,
    InvalidData,
    ShiftMismatch,
    Unavailable,
    UpdateFailed,
    VaultDamaged,
    VaultError,
    VaultUnswept,
)
from perfit_shared.mixes import between
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import Training
from perfit_shared.types import Score

ROW = updates.update_row("cloud", "news_headline", "news_headline")


@pytest.fixture
def vault(tmp_path: Path) -> Iterator[Vault]:
    with Vault.create(tmp_path / "v.db", "x", kdf=KdfParams(32, 1, 4)) as opened:
        yield opened


def failing_after(calls: int, error: BaseException) -> Callable[..., Any]:
    left = iter(range(calls))

    def ask(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Answer]:
        def answer() -> Answer:
            if next(left, None) is None:
                raise error
            return gradient(rows, tensors)()

        return answer

    return ask


def final(vault: Vault) -> str:
    shift = personal.load(vault, "cloud", ARTEFACT)
    assert shift is not None
    return shift.tensors.digest()


def test_training_lowers_the_loss_and_the_gate_accepts(vault: Vault) -> None:
    result: Result = prepared(vault).run()
    assert result.gate.accepted and result.gate.after < 0.7 * result.gate.before
    assert result.loss_last < result.loss_first
    assert (result.examples, result.steps, result.epochs) == (21, 24, 4)
    assert updates.read_checkpoint(vault, ROW) is None
    shift = personal.load(vault, "cloud", ARTEFACT)
    assert shift is not None and shift.updates == 1
    shift.tensors.check(SPEC, SPEC.personal_rank)


@pytest.mark.parametrize(
    ("calls", "stop"),
    [(1, KeyboardInterrupt()), (7, Unavailable("gone")), (7, MemoryError()), (23, MemoryError())],
)
def test_an_interrupted_update_resumes_exactly(
    vault: Vault, tmp_path: Path, stop: BaseException, calls: int
) -> None:
    with Vault.create(tmp_path / "straight.db", "x", kdf=KdfParams(32, 1, 4)) as straight:
        prepared(straight).run()
        expected = final(straight)
    first = prepared(vault, gradient=failing_after(calls, stop), checkpoint_seconds=1e9)
    with pytest.raises(UpdateFailed if isinstance(stop, Unavailable) else type(stop)):
        first.run()
    again = prepared(vault)
    assert again.resumed_from == calls
    result = again.run()
    assert result.steps == 24 and result.resumed_from == calls
    assert final(vault) == expected


def test_an_interrupt_at_the_gate_costs_no_step(vault: Vault) -> None:
    judgements = iter([evaluate])  # of the start

    def gone(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], list[Score]]:
        for judged in judgements:
            return judged(rows, tensors)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(vault, evaluate=gone, checkpoint_seconds=1e9).run()
    again = prepared(vault)
    assert again.resumed_from == 6  # the end of the first epoch, where the gate part is first measured
    assert again.run().gate.accepted


def test_the_candidate_lies_on_the_way_to_the_best_epoch(vault: Vault) -> None:
    seen: list[ShiftTensors] = []

    def second_is_best(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], list[Score]]:
        if tensors.digest() == SEED.digest():
            return lambda: scored(rows, lambda row: 1.0)
        seen.append(tensors)
        return lambda: scored(rows, lambda row: [0.9, 0.5, 0.7, 0.8][len(seen) - 1])

    result = prepared(vault, evaluate=second_is_best).run()
    assert (result.gate.before, result.gate.after, len(seen)) == (1.0, 0.5, 4)
    kept = personal.load(vault, "cloud", ARTEFACT)
    assert kept is not None
    assert kept.tensors.digest() == between(SEED, seen[1], 0.75).digest() != seen[1].digest()


def test_checkpoint_bytes_round_trip(vault: Vault) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepared(vault, gradient=failing_after(5, KeyboardInterrupt())).run()
    data = vault.get("checkpoint", ROW)
    assert data is not None
    once = updates.read_checkpoint(vault, ROW)
    assert once is not None
    twice = Training.from_bytes(once.to_bytes(), Plan)
    assert (twice.schedule, twice.losses, twice.seconds) == (once.schedule, once.losses, once.seconds)
    assert once.step == 5 and twice.tensors.digest() == once.tensors.digest()
    for broken in (b"", data[:100], data[:-100], b"x" * 200):
        with pytest.raises(InvalidData):
            Training.from_bytes(broken, Plan)
        vault.put("checkpoint", ROW, broken)
        with pytest.raises(VaultDamaged):
            updates.read_checkpoint(vault, ROW)


def test_another_plan_starts_anew(vault: Vault) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepared(vault, gradient=failing_after(5, KeyboardInterrupt())).run()
    split = make_split()
    for changes in ({"epochs": 5}, {"history": "other"}, {"version": "v2"}, {"fresh": True}, {"seed": 1}):
        assert prepared(vault, plan=plan_for(split, **changes)).resumed_from == 0


def test_the_gate_keeps_a_worse_candidate_out(vault: Vault) -> None:
    personal.store(vault, "cloud", ARTEFACT, PersonalShift(SEED, 3))
    mine = personal.load(vault, "cloud", ARTEFACT)
    worse = prepared(
        vault,
        current=mine,
        evaluate=lambda rows, tensors: (
            lambda: scored(rows, lambda row: 1.0 if tensors.digest() == SEED.digest() else 1.1)
        ),
    )
    result = worse.run()
    assert not result.gate.accepted
    kept = personal.load(vault, "cloud", ARTEFACT)
    assert kept is not None and kept.updates == 3 and kept.tensors.digest() == SEED.digest()
    assert updates.read_checkpoint(vault, ROW) is None
    same = prepared(vault, current=mine, evaluate=lambda rows, tensors: lambda: scored(rows, lambda row: 1.0))
    assert not same.run().gate.accepted, "as good is not better"


def test_the_next_request_is_out_before_the_bookkeeping(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress and checkpoint of a step fall between the next request and its answer."""
    log: list[str] = []
    put = vault.put

    def asking(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Answer]:
        log.append("ask")

        def answer() -> Answer:
            log.append("answer")
            return gradient(rows, tensors)()

        return answer

    def judged(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], list[Score]]:
        log.append("ask judge")

        def answer() -> list[Score]:
            log.append("judged")
            return evaluate(rows, tensors)()

        return answer

    def kept(kind: str, name: str, data: bytes, **how: bool) -> None:
        log.append(kind)
        put(kind, name, data, **how)

    monkeypatch.setattr(vault, "reserve", lambda size: None)
    monkeypatch.setattr(vault, "put", kept)
    prepared(
        vault,
        plan=plan_for(make_split(), epochs=1, batch_size=11),
        gradient=asking,
        evaluate=judged,
        progress=lambda *_: log.append("progress"),
    ).run()
    assert log == [
        "ask judge",
        "judged",
        "ask",
        "checkpoint",
        "answer",
        "ask",
        "progress",
        "checkpoint",
        "answer",
        "ask judge",
        "progress",
        "checkpoint",
        "judged",
        "checkpoint",
        "shift",
        "version",
        "trained",
        "seed",
        "updates",
        "finished",
    ]


def test_a_cloud_that_comes_back_is_waited_for(vault: Vault) -> None:
    waits: list[float] = []
    trouble = iter([Unavailable("a"), Busy("b", retry_ms=700), Unavailable("c")])

    def shaky(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Answer]:
        def answer() -> Answer:
            error = next(trouble, None)
            if error is not None:
                raise error
            return gradient(rows, tensors)()

        return answer

    retry_policy = RetryPolicy(give_up=60.0, sleep=waits.append)
    assert prepared(vault, gradient=shaky, retry_policy=retry_policy).run().gate.accepted
    assert len(waits) == 3 and waits[1] >= 0.7 and all(0 < wait <= 8 for wait in waits)


def test_a_cloud_that_stays_away_ends_it_with_a_hint(vault: Vault) -> None:
    with pytest.raises(UpdateFailed, match="after step 6 of 24, and the same command resumes"):
        prepared(vault, gradient=failing_after(6, Unavailable("gone"))).run()


@pytest.mark.parametrize("answer", [(math.nan, 1, SEED), (math.inf, 1, SEED)])
def test_what_is_no_number_costs_no_step(vault: Vault, tmp_path: Path, answer: Answer) -> None:
    """It dropped the half-done update, so a cloud could throw hours away by one answer."""
    with Vault.create(tmp_path / "straight.db", "x", kdf=KdfParams(32, 1, 4)) as straight:
        prepared(straight).run()
        expected = final(straight)
    left = iter(range(7))

    def breaks(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Answer]:
        return gradient(rows, tensors) if next(left, None) is not None else lambda: answer

    with pytest.raises(UpdateFailed, match=r"step 8; try --lr .* resumes after step 7"):
        prepared(vault, gradient=breaks, checkpoint_seconds=1e9).run()
    assert personal.load(vault, "cloud", ARTEFACT) is None
    again = prepared(vault)
    assert again.resumed_from == 7
    again.run()
    assert final(vault) == expected


def test_a_kill_costs_no_more_than_the_time_between_checkpoints(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step was begun as long as the time was not over, so a kill could cost a step more."""
    now = 0.0
    saved: list[float] = []
    put = vault.put

    def slow(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Answer]:
        def answer() -> Answer:
            nonlocal now
            now += 7.0
            return gradient(rows, tensors)()

        return answer

    def kept(kind: str, name: str, data: bytes, **how: bool) -> None:
        saved.extend([now] if kind == "checkpoint" else [])
        put(kind, name, data, **how)

    monkeypatch.setattr(updates.time, "monotonic", lambda: now)
    monkeypatch.setattr(vault, "put", kept)
    prepared(vault, gradient=slow, checkpoint_seconds=30.0).run()
    assert saved == [28.0, 56.0, 84.0, 112.0, 140.0, 168.0]


def test_a_judgement_is_work_that_is_kept(vault: Vault) -> None:
    """It counted as no step, so what followed it within 30 s was lost with it."""
    judged = []

    def counted(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], list[Score]]:
        def answer() -> list[Score]:
            judged.append(tensors.digest())
            return evaluate(rows, tensors)()

        return answer

    def gone(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Answer]:
        def answer() -> Answer:
            if len(judged) > 1:
                raise SystemExit  # and the state in memory is no more
            return gradient(rows, tensors)()

        return answer

    update = prepared(vault, gradient=gone, evaluate=counted)
    with pytest.raises(SystemExit):
        update._train()
    kept = updates.read_checkpoint(vault, ROW)
    assert kept is not None
    assert (kept.step, kept.judged) == (6, 6)


def test_a_disk_too_full_to_sweep_ends_no_update(vault: Vault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint was written, and the update ended all the same."""
    put = vault.put

    def unswept(kind: str, name: str, data: bytes, **how: bool) -> None:
        put(kind, name, data, **how)
        if kind == "checkpoint":
            raise VaultUnswept("the change is made")

    monkeypatch.setattr(vault, "put", unswept)
    assert prepared(vault).run().gate.accepted


def test_a_disk_too_full_for_a_checkpoint_keeps_the_one_before(
    vault: Vault, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, left = vault.put, iter(range(6))  # the start is judged, which is kept too

    def full(kind: str, name: str, data: bytes, **how: bool) -> None:
        if kind == "checkpoint" and next(left, None) is None:
            raise VaultError("the disk is full, so nothing was changed")
        put(kind, name, data, **how)

    monkeypatch.setattr(vault, "put", full)
    with pytest.raises(VaultError, match="disk is full"):
        prepared(vault).run()
    monkeypatch.undo()
    again = prepared(vault)
    assert again.resumed_from == 5
    assert again.run().gate.accepted


def test_a_shift_of_another_artefact_version_is_a_mismatch(vault: Vault) -> None:
    personal.store(vault, "cloud", ARTEFACT, PersonalShift(SEED, 1))
    with pytest.raises(ShiftMismatch, match="perfit migrate"):
        personal.load(vault, "cloud", replace(ARTEFACT, version="v2"))
