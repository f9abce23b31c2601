"""The audit of a whole server: real processes, mutual TLS, a tiny random model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.memory import looking
from tests.support.models import needs_smollm2
from typer.testing import CliRunner

from local import BIN, CommandFailed, run
from local_postgres import MISSING, server_programs
from perfit_cloud.cli.main import app
from perfit_cloud.collective.blank import BlankRequest, make_blank
from perfit_shared.errors import InvalidInput

DEPLOYED = Path(__file__).parents[2] / "scripts" / "audit_deployed.py"


@pytest.fixture(scope="module")
def command(
    model_folder: Callable[[str], Path],
    load: Any,
    make_artefact: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:
    artefact = tmp_path_factory.mktemp("artefact")
    make_artefact(load("llama"), layers=(0, 1, 2)).save(artefact)
    model = model_folder("llama")
    return [str(BIN / "perfit-cloud"), "audit", "--model", str(model), "--artefact", str(artefact)]


@looking
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_hardened_server_forgets(command: list[str], tmp_path: Path, dtype: str) -> None:
    """Every RPC, answered and cut off, beside a server with hardening off that must not look clean."""
    file = tmp_path / "audit.json"
    try:
        said = run([*command, "--quick", "--dtype", dtype, "--json", str(file)])
    except CommandFailed as failed:
        rows = json.loads(file.read_text())["rows"] if file.exists() else []
        pytest.fail(f"{failed.said[-800:]} {[row for row in rows if row['fault']]}")
    written = json.loads(file.read_text())
    assert written["kept"]
    assert written["dtype"] == dtype
    assert f"on {written['processor']['name']}" in said
    assert written["never_found"] == []
    families = {"tensor", "gradient", "invite secret", "device key", "signing request"}
    for owner in ("prompt", "example", "answer"):
        families |= {f"{owner} text", f"{owner} ids"}
    assert set(written["forms_found"]) == families
    assert not any(written["forms_found"]["device key"].values())
    assert "nothing was left" in said
    seen = {(row["rpc"], row["ending"]) for row in written["rows"] if row["hardening"] == "on"}
    for rpc in ("Generate", "Ask", "Score", "ComputeGradient", "Adapt"):
        assert {(rpc, "done"), (rpc, "gone")} <= seen
    assert {("Enroll", "done"), ("Renew", "done"), ("Leave", "done")} <= seen
    during = [row for row in written["rows"] if row["moment"] == "during"]
    assert all(any(kind.startswith("tensor") for kind in row["found"]) for row in during)
    left = [
        row["found"] for row in written["rows"] if row["hardening"] == "off" and row["moment"] == "closed"
    ]
    assert any(left)
    assert not any(row["unreadable"] for row in written["rows"])


@looking
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_without_a_compiler_forgets_too(command: list[str]) -> None:
    """Memory is then overwritten by glibc, in other ways and at other times."""
    said = run([*command, "--quick", "--rpc", "Ask", "--rpc", "Adapt"], env={"CC": "/nowhere/cc"})
    assert "nothing was left" in said


@looking
@pytest.mark.slow
@pytest.mark.timeout(1800)
@needs_smollm2
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_is_forgotten_too(tmp_path: Path, dtype: str) -> None:
    """The model that is served by default: its kernels, vocabulary and tokenizer."""
    make_blank(BlankRequest("chat", "smollm2", tmp_path / "chat"))
    command = [str(BIN / "perfit-cloud"), "audit", "--model", "smollm2", "--artefact", str(tmp_path / "chat")]
    # ComputeGradient, too: of Adapt's examples only token ids are there while a model this slow works.
    kinds = [word for rpc in ("Ask", "ComputeGradient", "Adapt") for word in ("--rpc", rpc)]
    said = run([*command, "--quick", "--dtype", dtype, *kinds])
    assert "nothing was left" in said


@looking
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(server_programs() is None, reason=MISSING)
@pytest.mark.parametrize("flags", [[], ["--sealed"]], ids=["plain", "sealed"])
def test_a_replica_of_a_fleet_forgets_too(command: list[str], tmp_path: Path, flags: list[str]) -> None:
    """It answers and updates; another process enrols, and what both know lies in a PostgreSQL."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    file = tmp_path / "audit.json"
    kinds = ["--rpc", "Adapt", "--rpc", "Renew", "--ending", "done", "--ending", "gone", "--devices", "0"]
    said = run(
        [sys.executable, str(DEPLOYED), "--replica", *flags, *command[2:], *kinds, "--json", str(file)]
    )
    assert "nothing was left" in said
    written = json.loads(file.read_text())
    assert written["kept"]
    closed = {
        (row["hardening"], row["rpc"], row["ending"]): bool(row["found"])
        for row in written["rows"]
        if row["moment"] == "closed"
    }
    hardened = {("on", "Adapt", "done"), ("on", "Adapt", "gone"), ("on", "Renew", "not here")}
    assert {call for call in closed if call[0] == "on"} == hardened
    assert not any(closed[call] for call in hardened)
    assert any(is_left for call, is_left in closed.items() if call[0] == "off")
    assert written["forms_found"]["signing request"]["as sent"]  # a replica reads one, and refuses


def test_an_rpc_that_there_is_not_is_refused(command: list[str]) -> None:
    refused = CliRunner().invoke(app, [*command[1:], "--rpc", "Forget"])
    assert isinstance(refused.exception, InvalidInput), refused.output
    said = str(refused.exception)
    assert said.startswith("--rpc should be Generate, Ask, Score,")
    assert said.endswith('not "Forget"')
