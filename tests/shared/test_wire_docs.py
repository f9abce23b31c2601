"""docs/wire: what clients in other languages are built by says what the code does."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import generate_vectors
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import TASKS, Task

WIRE = generate_vectors.OUT
ROOT = WIRE.parents[1]
SCHEMA = json.loads((WIRE / "task.schema.json").read_text("utf-8"))


def is_like(found: Any, wanted: Any) -> bool:
    """Equal but for the last digits of floats, which another processor may round otherwise."""
    if isinstance(wanted, float):
        return isinstance(found, float) and math.isclose(found, wanted, rel_tol=1e-5, abs_tol=1e-6)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(is_like, found, wanted))
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(is_like(found[k], wanted[k]) for k in wanted)
    return bool(found == wanted)


def test_the_pages_are_not_stale(tmp_path: Path) -> None:
    generate_vectors.generate(tmp_path)
    for name in ("errors.md", "task.schema.json"):
        assert (tmp_path / name).read_text() == (WIRE / name).read_text("utf-8"), "run `make wire`"


@pytest.mark.parametrize("name", generate_vectors.VECTORS)
def test_the_code_gives_the_vectors(name: str) -> None:
    committed = json.loads((WIRE / "vectors" / f"{name}.json").read_text("utf-8"))
    made = json.loads(json.dumps(generate_vectors.VECTORS[name]()))
    assert is_like(made, committed), "what clients were built by has changed"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_fits_the_schema(task: Task) -> None:
    for has_template in (False, True):
        jsonschema.validate(json.loads(task.resolved(has_template).to_json()), SCHEMA)
    spoken = replace(task, chat="auto", system="You are brief.").resolved(True)
    jsonschema.validate(json.loads(spoken.to_json()), SCHEMA)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "News"},
        {"template": "no field"},
        {"answer": ""},
        {"metric": "bleu"},
        {"labels": [""]},
        {"stop": ["x"] * 9},
        {"answer_tokens": 0},
        {"answer_tokens": 1.5},
        {"frequency_penalty": 2.5},
        {"presence_penalty": "1"},
        {"chat": "yes"},
        {"system": " "},
        {"colour": "red"},
        {"name": None},
    ],
    ids=str,
)
def test_what_a_task_may_not_be_does_not_fit_the_schema(change: dict[str, Any]) -> None:
    values = {**json.loads(TASKS["chat"].to_json()), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values, SCHEMA)
    with pytest.raises(InvalidData):
        Task.from_json(json.dumps(values))


def test_the_schema_takes_optional_keys_as_optional() -> None:
    short = {key: json.loads(TASKS["chat"].to_json())[key] for key in SCHEMA["required"]}
    jsonschema.validate(short, SCHEMA)
    assert Task.from_json(json.dumps(short)).stop == ("\n",)


def test_the_image_is_the_contract_of_today(tmp_path: Path) -> None:
    """`make wire` renews it, after `buf breaking` has found that no client breaks."""
    made, buf = tmp_path / "image.binpb", Path(sys.executable).parent / "buf"
    subprocess.run([buf, "build", "--exclude-source-info", "--output", made], cwd=ROOT, check=True)
    assert made.read_bytes() == (ROOT / "protos" / "perfit.v1.binpb").read_bytes(), "run `make wire`"


def test_a_change_that_breaks_clients_is_found(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copy(ROOT / "buf.yaml", tmp_path)
    proto = tmp_path / "protos" / "perfit" / "v1" / "personalization.proto"
    proto.write_text(proto.read_text("utf-8").replace("uint32 context = 8;", "uint32 context = 99;"), "utf-8")
    buf = Path(sys.executable).parent / "buf"
    command = [buf, "breaking", "--against", "protos/perfit.v1.binpb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert '"8"' in done.stdout
