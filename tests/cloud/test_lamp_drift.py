"""`lamp run --drift`: what personal states do to prompts that concern nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.lamp_files import TASK, write_files

from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp.drift import PROMPTS
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Mode


@pytest.fixture
def request_for(tmp_path: Path) -> Callable[..., LampRequest]:
    data = write_files(tmp_path / "data")

    def make(artefact: Artefact | None, **changes: Any) -> LampRequest:
        if artefact is not None:
            artefact.save(tmp_path / "artefact")
        values: dict[str, Any] = {"users": 2, "epochs": 1, "learning_rate": 2e-2, "users_together": 2}
        given = None if artefact is None else tmp_path / "artefact"
        where = {"data": data, "out": tmp_path / "out", "artefact": given}
        return LampRequest(task=TASK, model="tiny", **{**where, **values, **changes})

    return make


@pytest.mark.slow
def test_an_identity_shift_does_not_drift_and_others_do(
    request_for: Callable[..., LampRequest], base: BaseModel, artefact: Artefact
) -> None:
    spec = artefact.spec
    nothing = replace(artefact, collective=ShiftTensors.identity(spec, spec.collective_rank, 0))
    request = request_for(nothing, method="perfit_stage1", drift=True)
    still = run_lamp(request, base=base).summary()["drift"]
    assert all(abs(of["nats"]) < 1e-6 and of["unchanged"] == 1 for of in still.values())
    assert set(still) == {"collective", "seed"}

    plain = run_lamp(request_for(artefact, out=request.out / "plain"), base=base)
    before = plain.summary()
    assert "drift" not in before
    run = run_lamp(request_for(artefact, out=plain.folder, drift=True), base=base)
    after = run.summary()
    drift = after.pop("drift")
    assert {**after, "seconds": None} == {**before, "seconds": None}, "only drift came to the finished run"
    assert set(drift) == {"collective", "seed", "personal"}
    assert all(of["nats"] > 0.01 and of["unchanged"] < 1 for of in drift.values()), "it was the likeliest"
    low, high = drift["personal"]["intervals"]["nats"]
    assert low <= drift["personal"]["nats"] <= high and drift["collective"]["intervals"]["nats"] is None

    times = {path: path.stat().st_mtime_ns for path in run.folder.rglob("drift.json")}
    assert len(times) == 3
    run_lamp(request_for(artefact, out=plain.folder, drift=True), base=base)
    assert times == {path: path.stat().st_mtime_ns for path in times}, "measured once"
    cut = next(run.folder.glob("users/*/drift.json"))
    cut.unlink()
    again = run_lamp(request_for(artefact, out=plain.folder, drift=True), base=base)
    assert cut.is_file() and again.summary()["drift"] == drift, "a run that was killed amid people"
    _check_by_hand(Run.load(run.folder), base, artefact, drift)


def _check_by_hand(run: Run, base: BaseModel, artefact: Artefact, drift: dict[str, Any]) -> None:
    """The collective shift's nats, from answers that `generate` gives to the prompts as text."""
    import torch

    pairs = []
    for prompt in PROMPTS:
        ids = base.encode(f"Question: {prompt}\nAnswer:")
        with torch.no_grad():
            whole = base.model.generate(torch.tensor([ids]), max_new_tokens=32, do_sample=False)[0]
        text = base.decode([t for t in whole[len(ids) :].tolist() if t not in base.end_ids]).split("\n")[0]
        if text.strip():
            pairs.append((ids, base.encode_target(f" {text.strip()}")))
    engine = GradientEngine(base)
    off = engine.score(pairs, ShiftUse(Mode.BASE))
    on = engine.score(pairs, ShiftUse(Mode.COLLECTIVE, artefact))
    engine.close()
    lost = sum(a.log_likelihood - b.log_likelihood for a, b in zip(off, on, strict=True))
    assert drift["collective"]["nats"] == pytest.approx(lost / sum(score.tokens for score in off), rel=1e-4)
    assert drift["collective"]["prompts"] == len(pairs)
    assert json.loads((run.folder / "drift.json").read_text())["tokens"] == [score.tokens for score in off]


@pytest.mark.parametrize(
    "method",
    ["none", "rag", *(pytest.param(m, marks=pytest.mark.slow) for m in ("perfit+rag", "lora-c+perfit"))],
)
def test_every_kind_of_method_is_measured(
    method: str, request_for: Callable[..., LampRequest], base: BaseModel, artefact: Artefact
) -> None:
    """With own texts in the prompt, with weights of their own, and with nothing at all."""
    given: dict[str, Any] = {"method": method, "users": 1, "examples": 4, "collective_epochs": 1}
    given |= {"collective_learning_rate": 1e-3, "learning_rate": 1e-3}
    if method == "lora-c+perfit":
        given |= {"layers": (1,), "positions": "l2", "personal_rank": 1}
    if method == "perfit+rag":
        given |= {"collective_epochs": None, "collective_learning_rate": None}
    shift = artefact if method == "perfit+rag" else None
    run = run_lamp(request_for(shift, drift=True, **given), base=base)
    drift = run.summary().get("drift", {})
    assert ("personal" in drift) == (method != "none")
    assert all(of["nats"] != 0 and 0 <= of["unchanged"] <= 1 for of in drift.values())
