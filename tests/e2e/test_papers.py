"""What lies in the repo beside the code: the generated help, artefacts."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[2]


def test_the_help_page_is_not_stale(tmp_path: Path) -> None:
    out = tmp_path / "help.md"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_help.py"), "--out", str(out)], check=True
    )
    assert out.read_text() == (ROOT / "docs" / "help.md").read_text(), "run `make help-page`"


def test_artefacts_that_ship_are_small_and_whole() -> None:
    """And ask as their tasks do, but for other labels."""
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.shipped import FOLDER
    from perfit_shared.tasks import TASKS

    folders = [path for path in FOLDER.iterdir() if path.is_dir()]
    for folder in folders:
        task, built_in = Artefact.load(folder).task, TASKS[folder.name].resolved(True)
        assert Artefact.load(folder).name == folder.name
        words = {"template": built_in.template, "labels": built_in.labels} if task.labels else {}
        assert replace(task, **words) == built_in
        assert (folder / "CARD.md").is_file()
    assert len({Artefact.load(folder).fingerprint for folder in folders}) <= 1
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 5e6


def test_the_wheel_carries_artefacts(
    tmp_path: Path, load: Any, make_artefact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what setuptools would put into it, with the repo's own settings and one artefact."""
    for folder in ("shared", "device", "cloud"):
        package = tmp_path / folder / f"perfit_{folder}"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    artefact = tmp_path / "cloud" / "perfit_cloud" / "artefacts" / "chat"
    make_artefact(load("llama")).save(artefact)
    for name in ("CARD.md", "loss.png"):
        (artefact / name).touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    built = distribution.get_command_obj("build_py")
    built.ensure_finalized()
    carried = {Path(path).relative_to(built.build_lib).as_posix() for path in built.get_outputs()}
    assert {path for path in carried if "artefacts" in path} == {
        f"perfit_cloud/artefacts/chat/{name}"
        for name in ("artefact.json", "collective.safetensors", "seed.safetensors", "CARD.md")
    }
