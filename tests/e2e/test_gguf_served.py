"""GGUF files of three families end to end: both stages of a LaMP run, its figures, and its shifts served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.gguf_files import gguf_model, write_gguf
from tests.support.lamp_files import TASK, write_files
from tests.support.processes import ForkedCloud
from typer.testing import CliRunner

from perfit_cloud.cli.main import app
from perfit_cloud.lamp.results import Run, UserFolder
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import open_model
from perfit_device.cloud import client, enrolment
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.identity import Identity
from perfit_device.evaluation import prompt_of
from perfit_device.history import HistoryItem
from perfit_shared.invites import Invite
from perfit_shared.shifts import ShiftTensors

MODES = {"base", "collective", "seed", "personal", "other"}
SMALL = {
    "layers": "1;2",
    "positions": "f2+l3",
    "collective-rank": 4,
    "personal-rank": 2,
    "batch-size": 4,
    "collective-epochs": 1,
    "collective-lr": 5e-3,
    "epochs": 4,
    "lr": 2e-2,
    "users": 2,
    "temperature": 0,
    "threads": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_a_run_and_a_cloud_on_one_file_give_one_answer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `lamp run` predicts for a user, a cloud on that file answers under that user's tensors."""
    file = write_gguf(tmp_path / f"{family}.gguf", gguf_model(family, "Q8_0", initializer_range=0.3), "Q8_0")
    data, out = write_files(tmp_path / "data"), tmp_path / "out"
    options = {"model": file, "data": data, "out": out, "task": TASK, **SMALL}
    words = ["lamp", "run", "--json", *(f"--{name}={value}" for name, value in options.items())]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output

    run, artefact, summary = Run.load(out), Artefact.load(out / "artefact"), json.loads(done.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert set(summary["loss"]) == set(summary["metrics"]["rouge_1"]) == MODES
    assert len(set(summary["loss"].values())) == len(MODES), "every shift changes something"
    assert run.settings["fingerprint"] == artefact.fingerprint == open_model(str(file)).fingerprint()
    predicted = json.loads((out / "predictions.json").read_text())["golds"]
    user, articles = run.users[0], json.loads((data / "user_top_100_history.json").read_text())[0]["query"]
    query, text = user.queries[0], articles[0]["input"].partition(": ")[2]
    assert (articles[0]["id"], query.answers["personal"]) == (query.id, predicted[0]["output"])
    assert query.answers["personal"] != query.answers["base"], "or any cloud would pass"

    monkeypatch.setattr(client, "ANSWER_DTYPE", "float32")  # what int8 rounds would be another shift
    with ForkedCloud(file, [out / "artefact"], tmp_path / "cloud") as server:
        enrolled = enrolment.enroll(Invite.decode(server.invite()), Identity.create())
        with client.Cloud(enrolled) as cloud:
            (served,) = cloud.describe().artefacts
            assert (served.name, served.version) == (artefact.name, artefact.version)
            item = HistoryItem.make(served.task, {"text": text, "title": query.gold})
            tensors = (UserFolder(out, user.user_id).path / "personal.safetensors").read_bytes()
            for mode, use in (
                ("base", ShiftUse()),
                ("collective", ShiftUse(served)),
                ("personal", ShiftUse(served, ShiftTensors.from_bytes(tensors, served.spec, 2))),
            ):
                prompt, sampling = prompt_of(served.task, item), served.task.sampling()
                chunks = cloud.generate(prompt, use, sampling)
                assert served.task.parse("".join(c.text for c in chunks)) == query.answers[mode]
