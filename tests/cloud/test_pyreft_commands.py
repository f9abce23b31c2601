"""`perfit-cloud artefact import` and `export`: artefacts and users' shifts as pyreft checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.models import random_shift
from tests.support.pyreft import FIRST, Shifts, change_state, same_states, states
from typer.testing import CliRunner

from perfit_cloud.cli.artefact import app
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.pyreft import describe_model, read_checkpoint, to_artefact, write_checkpoint
from perfit_shared.errors import InvalidData, InvalidInput, PerfitError
from perfit_shared.shifts import ShiftSpec, ShiftTensors, read_metadata
from perfit_shared.tasks import task_named


def run_app(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture
def artefact(
    load: Callable[[str], BaseModel], make_artefact: Callable[..., Artefact], tmp_path: Path
) -> Artefact:
    made = make_artefact(load("llama"))
    made.save(tmp_path / "artefact")
    return made


def test_import_then_export_and_back(
    tmp_path: Path, artefact: Artefact, model_folder: Callable[[str], Path]
) -> None:
    run_app("export", "--format", "pyreft", "--artefact", tmp_path / "artefact", "--out", tmp_path / "a")
    told = run_app(
        "import",
        "--format",
        "pyreft",
        "--checkpoint",
        tmp_path / "a",
        "--model",
        model_folder("llama"),
        "--task",
        "news_headline",
        "--positions",
        "f3+l3",
        "--out",
        tmp_path / "made",
        "--json",
    )
    made = Artefact.load(tmp_path / "made")
    assert (made.spec, made.fingerprint) == (artefact.spec, artefact.fingerprint)
    assert made.collective.digest() == artefact.collective.digest()
    assert made.seed.digest() == artefact.seed.digest()
    assert json.loads(told)["version"] == made.version
    run_app("export", "--artefact", tmp_path / "made", "--out", tmp_path / "b")
    assert same_states(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_one_shift_alone(tmp_path: Path, artefact: Artefact, model_folder: Callable[[str], Path]) -> None:
    for which, its in (("collective", artefact.collective), ("personal", artefact.seed)):
        out = tmp_path / which
        run_app("export", "--artefact", tmp_path / "artefact", "--out", out, "--shift", which)
        assert [s.digest() for s in read_checkpoint(out).shifts] == [its.digest()]
        run_app(
            "import",
            "--checkpoint",
            out,
            "--model",
            model_folder("llama"),
            "--task",
            "news_headline",
            "--positions",
            "l2",
            "--shift",
            which,
            "--out",
            tmp_path / f"{which}.artefact",
        )
        made = Artefact.load(tmp_path / f"{which}.artefact")
        kept, lacking = (
            (made.collective, made.seed) if which == "collective" else (made.seed, made.collective)
        )
        assert kept.digest() == its.digest()
        # What the checkpoint lacks changes nothing.
        assert all(np.array_equal(s.source, s.rotation) and not s.bias.any() for s in lacking.layers.values())


def test_a_users_shift_to_pyreft_and_back(tmp_path: Path, artefact: Artefact) -> None:
    mine = random_shift(artefact.spec, 3, seed=9)
    (tmp_path / "mine").write_bytes(mine.to_bytes())
    given = ("--artefact", tmp_path / "artefact")
    run_app("export", *given, "--personal", tmp_path / "mine", "--out", tmp_path / "p")
    assert (tmp_path / "p").stat().st_mode & 0o077 == 0
    run_app("import", *given, "--checkpoint", tmp_path / "p", "--out", tmp_path / "back")
    back = (tmp_path / "back").read_bytes()
    assert ShiftTensors.from_bytes(back, artefact.spec, 3).digest() == mine.digest()
    assert read_metadata(back)["version"] == artefact.version
    assert (tmp_path / "back").stat().st_mode & 0o077 == 0
    # That file names its artefact, so another one's export refuses it.
    other = Artefact.load(tmp_path / "artefact")
    object.__setattr__(other, "seed", mine)
    other.save(tmp_path / "other")
    with pytest.raises(PerfitError, match="another artefact"):
        run_app(
            "export",
            "--artefact",
            tmp_path / "other",
            "--personal",
            tmp_path / "back",
            "--out",
            tmp_path / "q",
        )


def test_a_users_shift_over_another_collective_shift_is_refused(
    tmp_path: Path, artefact: Artefact, checkpoint: Path
) -> None:
    with pytest.raises(PerfitError, match="another collective shift"):
        run_app(
            "import", "--artefact", tmp_path / "artefact", "--checkpoint", checkpoint, "--out", tmp_path / "x"
        )


def test_mending_is_told(tmp_path: Path, checkpoint: Path, model_folder: Callable[[str], Path]) -> None:
    change_state(checkpoint, FIRST, lambda s: s.update(rotate_layer=s["rotate_layer"].bfloat16()))
    told = run_app(
        "import",
        "--checkpoint",
        checkpoint,
        "--model",
        model_folder("llama"),
        "--task",
        "news_headline",
        "--positions",
        "l2",
        "--out",
        tmp_path / "made",
    )
    assert "replaced by the nearest orthonormal ones" in told
    assert Artefact.load(tmp_path / "made").card["imported"]["mended"] > 1e-4


def test_a_model_that_cannot_carry_it_is_refused(
    tmp_path: Path, pyreft_shifts: Shifts, model_folder: Callable[[str], Path]
) -> None:
    model, task = describe_model(str(model_folder("llama"))), task_named("news_headline")
    write_checkpoint(tmp_path, [ShiftTensors({9: pyreft_shifts[0].layers[1]})])
    with pytest.raises(InvalidData, match=r"config.json has layer 9, .* has blocks 0 to 3"):
        to_artefact(read_checkpoint(tmp_path), model=model, task=task, positions="l2")
    narrow = ShiftSpec((1,), "l3", 2, 2, hidden_size=16)
    write_checkpoint(tmp_path, [random_shift(narrow, 2, seed=0)])
    with pytest.raises(InvalidData, match="hidden size 16"):
        to_artefact(read_checkpoint(tmp_path), model=model, task=task, positions="l2")


def test_positions_are_not_guessed(
    tmp_path: Path, checkpoint: Path, model_folder: Callable[[str], Path]
) -> None:
    with pytest.raises(InvalidInput, match="--positions"):
        run_app(
            "import",
            "--checkpoint",
            checkpoint,
            "--model",
            model_folder("llama"),
            "--task",
            "news_headline",
            "--out",
            tmp_path / "made",
        )
    assert not (tmp_path / "made").exists()


def test_nothing_is_overwritten(tmp_path: Path, artefact: Artefact, checkpoint: Path) -> None:
    before = states(checkpoint)
    with pytest.raises(InvalidInput, match="no empty folder"):
        run_app("export", "--artefact", tmp_path / "artefact", "--out", checkpoint)
    assert states(checkpoint).keys() == before.keys()
