"""Stage 1 on tiny random models: it learns, resumes to the same bits, and says what is wrong."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.collective import StopAfter, small_request, write_toy
from tests.support.processes import fork
from tests.support.waiting import wait_for
from typer.testing import CliRunner

from perfit_cloud.collective import trials
from perfit_cloud.collective.checkpoint import FILE
from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_cloud.collective.steps import batches, rate_at, spread
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.errors import Cancelled, InvalidData, InvalidInput


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "news")


@pytest.fixture
def request_for(
    toy: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[..., CollectiveRequest]:
    def make(**changes: Any) -> CollectiveRequest:
        given = {"data": toy, "model": str(model_folder("llama")), "out": tmp_path / "out"}
        return small_request(**{**given, **changes})

    return make


# -- learning ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_lowers_the_loss_and_writes_everything(
    request_for: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, model_folder: Any
) -> None:
    request = request_for(epochs=3, learning_rate=None, device_learning_rate=None)
    artefact = train_collective(request)
    card = artefact.card
    losses = card["losses"]["validation"]
    assert losses["seed"] < 0.8 * losses["base"]
    assert losses["collective"] != losses["base"]
    # What is taken validated best; the point is measured again at the end.
    assert losses["seed"] == pytest.approx(
        min(loss for _, loss in card["losses"]["validation_curve"]), rel=1e-4
    )
    start = card["losses"]["validation_curve"][0][1]
    assert start == pytest.approx(losses["base"], rel=1e-4)
    gains = {trial["learning_rate"]: start - trial["validation_loss"] for trial in card["trials"]}
    assert len(gains) >= 5
    assert card["hyper_parameters"]["learning_rate"] == min(
        rate for rate, gain in gains.items() if gain >= 0.9 * max(gains.values())
    )
    assert len(card["device_trials"]) >= 4
    rates = {trial["learning_rate"] for trial in card["device_trials"]}
    if trials.ranks_rates(card["device_trials"]):
        assert artefact.learning_rate in rates
    else:
        assert artefact.learning_rate <= card["hyper_parameters"]["learning_rate"]
    assert card["data"]["users"] == 12 and card["data"]["examples"] == 192
    assert {p.name for p in request.out.iterdir()} == {
        "artefact.json",
        "collective.safetensors",
        "seed.safetensors",
        "CARD.md",
        "loss.png",
    }
    loaded = Artefact.load(request.out)
    assert loaded.version == artefact.version
    loaded.collective.check(loaded.spec, 4)
    loaded.seed.check(loaded.spec, 4)
    for name in ("artefact.json", "CARD.md"):  # no path of the machine it was made on
        text = (request.out / name).read_text("utf-8")
        assert str(tmp_path) not in text and str(model_folder("llama")) not in text
    json.loads((request.out / "artefact.json").read_text(), parse_constant=pytest.fail)
    assert "layers 1;2 of 4 (as given)" in capsys.readouterr().err


def test_the_mapping_of_the_preset_s_layers_is_printed(
    request_for: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Cancelled):
        train_collective(request_for(layers=None, positions=None), stop=lambda: True)
    assert "layers 1;2;3 of 4 (from 14;15;16 of 32), positions l7, ranks 4/4" in capsys.readouterr().err


# -- interrupting ------------------------------------------------------------------------------------


def same(a: Artefact, b: Artefact) -> bool:
    return a.version == b.version and a.learning_rate == b.learning_rate


@pytest.mark.parametrize("stops", [(3,), (10, 5)], ids=["first epoch", "twice"])
def test_an_interrupted_run_ends_with_the_same_bits(request_for: Any, tmp_path: Path, stops: Any) -> None:
    whole = train_collective(request_for(out=tmp_path / "whole"))
    request = request_for(out=tmp_path / "parts")
    for steps in stops:
        with pytest.raises(Cancelled, match="the same command"):
            train_collective(request, stop=StopAfter(steps))
        assert not (request.out / "artefact.json").exists()
    assert same(train_collective(request), whole)
    assert not (request.out / FILE).exists()


@pytest.mark.slow
def test_an_interrupt_among_the_trials_changes_nothing(
    request_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "LADDER", (1e-4, 1e-3))
    free = {"learning_rate": None, "device_learning_rate": None, "epochs": 1}
    whole = train_collective(request_for(out=tmp_path / "whole", **free))
    request = request_for(out=tmp_path / "parts", **free)
    interrupts = 0
    while True:  # an unfinished trial begins anew, so stop after more steps than one has
        try:
            done = train_collective(request, stop=StopAfter(120))
            break
        except Cancelled:
            interrupts += 1
    assert interrupts >= 2
    assert same(done, whole)
    assert done.card["trials"] == whole.card["trials"]
    assert done.card["device_trials"] == whole.card["device_trials"]


def test_changed_arguments_or_data_are_refused(request_for: Any, toy: Path, tmp_path: Path) -> None:
    request = request_for()
    with pytest.raises(Cancelled):
        train_collective(request, stop=StopAfter(2))
    with pytest.raises(InvalidInput, match=r"other batch size.*another --out"):
        train_collective(replace(request, batch_size=8))
    other = write_toy(tmp_path / "other", users=11)
    with pytest.raises(InvalidInput, match="other data"):
        train_collective(replace(request, data=other))
    (request.out / FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(InvalidData, match="damaged"):
        train_collective(request)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(request_for: Any, tmp_path: Path) -> None:
    request = request_for(epochs=500)
    words = ["collective", "train", "--task", request.task, "--data", str(request.data)]
    words += ["--model", request.model, "--layers", "1;2", "--lr", "1e-2", "--device-lr", "1e-2"]
    words += ["--epochs", "500", "--threads", "1", "--out", str(request.out)]
    process = fork(*words, errors=tmp_path / "errors")
    wait_for((request.out / FILE).exists, seconds=120, what="the end of the first epoch")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stdout.read() == ""
    assert "the same command goes on from there" in process.errors().splitlines()[-1]
    assert "Traceback" not in process.errors()


# -- refusing ----------------------------------------------------------------------------------------


def test_a_finished_artefact_is_kept_unless_forced(request_for: Any, tmp_path: Path) -> None:
    request = request_for(epochs=1)
    first = train_collective(request)
    with pytest.raises(InvalidInput, match="--force"):
        train_collective(request)
    assert Artefact.load(request.out).version == first.version
    assert train_collective(replace(request, seed=1, force=True)).version != first.version
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InvalidInput, match="is a file"):
        train_collective(replace(request, out=file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (3, 9)}, "blocks 0 to 3"),
        ({"epochs": 0}, "at least 1"),
        ({"learning_rate": -1.0}, "between 0 and 1"),
        ({"personal_rank": 99}, "at most the hidden size"),
        ({"positions": "g7"}, "should read like"),
    ],
)
def test_flags_that_cannot_be(request_for: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        train_collective(request_for(**changes))


def test_cli_prints_one_line_or_json(request_for: Any, tmp_path: Path) -> None:
    from perfit_cloud.cli.collective import app

    request = request_for()
    common = [
        "train",
        "--task",
        request.task,
        "--data",
        str(request.data),
        "--model",
        request.model,
        "--layers",
        "1;2",
        "--positions",
        "l2",
        "--lr",
        "1e-2",
        "--device-lr",
        "2e-2",
        "--epochs",
        "1",
        "--device-epochs",
        "3",
    ]
    result = CliRunner().invoke(app, [*common, "--out", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) == 1 and "-> collective" in result.stdout
    result = CliRunner().invoke(app, [*common, "--json", "--out", str(tmp_path / "b")])
    data = json.loads(result.stdout)
    assert data["device_learning_rate"] == 0.02 and set(data["validation_loss"]) == {
        "base",
        "collective",
        "seed",
    }
    artefact = Artefact.load(tmp_path / "b")
    assert (artefact.epochs, artefact.spec.positions, artefact.learning_rate) == (3, "l2", 0.02)
    assert "given" in artefact.card["trials_note"]


# -- parts -------------------------------------------------------------------------------------------


def test_batches_hold_every_example_once_and_pad_little() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 1000).tolist()
    plan = batches(lengths, batch_size=16, seed=0, epoch=0)
    assert sorted(i for batch in plan for i in batch) == list(range(1000))
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in plan)
    assert padded < 1.1 * sum(lengths)
    assert plan == batches(lengths, batch_size=16, seed=0, epoch=0)
    assert plan != batches(lengths, batch_size=16, seed=0, epoch=1)


def test_every_batch_is_spread_evenly_over_processes_that_keep_their_examples() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 1000).tolist()
    plans = [batches(lengths, batch_size=16, seed=0, epoch=epoch) for epoch in range(3)]
    homes = np.array(spread(plans, 2))
    shares = [np.bincount(homes[batch], minlength=2) / len(batch) for plan in plans for batch in plan]
    assert np.mean([share.max() for share in shares]) < 0.53  # 0.5 at the best; by chance 0.59
    assert spread(plans, 1) == [0] * 1000


def test_rate_warms_up_and_decays() -> None:
    rates = [rate_at(i, 100, 1.0) for i in range(100)]
    assert rates[0] == 0 and max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and 0 < rates[-1] < 0.02
    assert rate_at(0, 1, 1.0) == 1.0
