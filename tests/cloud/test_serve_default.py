"""`perfit-cloud serve` of somebody who brings nothing: which model, which artefacts, and what is next."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.authority import enrolled, open_authority
from tests.support.models import needs_smollm2
from tests.support.processes import Forked, fork

from local import Device, LocalCloud
from perfit_cloud.cli.announcement import say_what_is_next
from perfit_cloud.collective.blank import BlankRequest, make_blank
from perfit_cloud.config import CloudConfig, load_config
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.shipped import FOLDER
from perfit_cloud.service.identity.authority import Authority
from perfit_shared.errors import ConfigError

FREE = ["--address", "127.0.0.1:0", "--enrol-address", "127.0.0.1:0", "--threads", "1"]


@contextmanager
def served(tmp_path: Path, *words: str, before: str = "") -> Iterator[Forked]:
    errors = tmp_path / "errors"
    process = fork("serve", *FREE, "--state", str(tmp_path / "state"), *words, before=before, errors=errors)
    try:
        yield process
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.fixture
def shipped(tmp_path: Path, load: Callable[[str], BaseModel], make_artefact: Any) -> str:
    """Code that puts two artefacts into the package: one for the tiny Llama, one for another model."""
    folder, base = tmp_path / "artefacts", load("llama")
    make_artefact(base, "chat").save(folder / "chat")
    replace(make_artefact(base, "reply"), fingerprint="0" * 64).save(folder / "reply")
    (folder / "README.md").touch()
    return (
        "from pathlib import Path; from perfit_cloud.model import shipped\n"
        f"shipped.FOLDER = Path({str(folder)!r})"
    )


@pytest.mark.slow
def test_what_ships_for_the_model_is_served(
    shipped: str, model_folder: Callable[[str], Path], load: Any, make_artefact: Any, tmp_path: Path
) -> None:
    model = ["--model", str(model_folder("llama"))]
    with served(tmp_path, *model, "--json", before=shipped) as process:
        assert json.loads(process.stdout.readline())["artefacts"] == ["chat"]
    make_artefact(load("llama"), "news_headline").save(tmp_path / "mine")
    mine = ["--artefact", str(tmp_path / "mine")]
    with served(tmp_path, *model, *mine, "--json", before=shipped) as process:
        assert json.loads(process.stdout.readline())["artefacts"] == ["news_headline"]


def test_the_model_is_optional(tmp_path: Path) -> None:
    file = tmp_path / "cloud.toml"
    file.write_text("new_tokens = 5\n")
    assert load_config(file=file, environment={}).model == CloudConfig().model == "smollm2"
    with pytest.raises(ConfigError, match='leave it out for "smollm2"'):
        load_config(environment={"PERFIT_CLOUD_MODEL": ""})


def test_what_is_next_is_said_until_somebody_enrols(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority = open_authority(tmp_path / "my state")
    said = saying(capsys, authority, ["reply", "chat"], state=tmp_path / "my state")
    assert f"perfit-cloud invite --state '{tmp_path}/my state' prints an invite" in said
    assert "perfit enroll INVITE, then perfit ask TEXT --task chat" in said
    assert "--task news_headline" in saying(capsys, authority, ["news_headline"])
    assert "perfit-cloud invite prints" in saying(capsys, authority, ["chat"])
    assert "perfit-cloud collective blank" in saying(capsys, authority, [])
    enrolled(authority)
    assert saying(capsys, authority, ["chat"]) == ""
    authority.close()


def saying(
    capsys: pytest.CaptureFixture[str], authority: Authority, artefacts: list[str], **config: Any
) -> str:
    say_what_is_next(authority, CloudConfig(**config), artefacts)
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.slow
@needs_smollm2
def test_in_an_empty_folder_a_newcomer_gets_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes with perfit, or else a blank chat, on smollm2."""
    blank = tmp_path / "chat"
    made = [] if (FOLDER / "chat").is_dir() else [blank]
    if made:
        make_blank(BlankRequest("chat", "smollm2", blank))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with LocalCloud(None, made, tmp_path / "state") as cloud:
        assert "chat" in cloud.said["artefacts"]
        device = Device(tmp_path / "home", "me")
        device("enroll", "-", text=cloud.invite())
        assert device.json("ask", "What is the capital of France?", "--task", "chat")["answer"].strip()
