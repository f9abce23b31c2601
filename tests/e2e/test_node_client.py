"""The client of examples/node, written from protos and docs/wire alone, against a real cloud."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import ForkedCloud

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("npm") is None, reason="the client in Node needs node and npm, which are not installed"
    ),
]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a script of the example, with its packages installed, in a copy of what it needs."""
    home = tmp_path_factory.mktemp("node")
    for part in ("examples/node", "protos", "docs/wire"):
        shutil.copytree(ROOT / part, home / part, ignore=shutil.ignore_patterns("node_modules"))
    example = home / "examples" / "node"
    install = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--ignore-scripts"]
    subprocess.run(install, cwd=example, check=True, capture_output=True, text=True, timeout=180)

    def run(*command: str, text: str = "") -> str:
        done = subprocess.run(
            ["node", *command],
            cwd=example,
            input=text,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="module")
def cloud(
    load: Any,
    make_artefact: Any,
    model_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ForkedCloud]:
    artefact = tmp_path_factory.mktemp("artefact")
    make_artefact(load("llama"), layers=(0, 1, 2)).save(artefact)
    state = tmp_path_factory.mktemp("state") / "cloud"
    with ForkedCloud(model_folder("llama"), [artefact], state) as cloud:
        yield cloud


def test_it_gives_the_vectors(node: Callable[..., str]) -> None:
    assert node("check.mjs") == "ok\n"


def test_it_enrols_asks_takes_a_step_and_renews(node: Callable[..., str], cloud: ForkedCloud) -> None:
    said = json.loads(node("client.mjs", "the cat sat", text=cloud.invite()))
    assert said["after"] < said["before"]
    assert said["renewed"] is True
    assert said["refused"] == "invalid_prompt"
    assert set(said["answers"]) == {"base", "collective", "seed", "personal"}
    # The seed is not the identity: it answers otherwise than the collective shift alone.
    assert len(set(said["answers"].values())) >= 3


LAPSE = """
import { readFileSync } from "node:fs";
import { setTimeout } from "node:timers/promises";
import { Cloud, codeOf, enroll, newKey, readInvite, renewLapsed } from "./perfit.mjs";

const credentials = await enroll(readInvite(readFileSync(0, "utf8")), await newKey());
const cloud = new Cloud(credentials);
await cloud.describe();
const told = { open: undefined };
while (!told.open) {
  await setTimeout(200);
  told.open = await cloud.describe().then(() => undefined, codeOf);
}
cloud.close();
const late = new Cloud(credentials);
told.fresh = await late.describe().catch((error) => [error.code, codeOf(error) ?? null]);
late.close();
const again = new Cloud(await renewLapsed(credentials));
told.renewed = (await again.describe()).cloud_id !== "";
again.close();
console.log(JSON.stringify(told));
"""


def test_what_a_lapsed_certificate_looks_like(
    node: Callable[..., str], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """On an open channel a code word; on a new one a broken connection, which says nothing of why."""
    flags = ["--set", "certificate_seconds=3"]
    with ForkedCloud(model_folder("llama"), [], tmp_path / "cloud", flags=flags) as cloud:
        told = json.loads(node("--input-type=module", "--eval", LAPSE, text=cloud.invite()))
    assert told == {"open": "certificate_expired", "fresh": [14, None], "renewed": True}
