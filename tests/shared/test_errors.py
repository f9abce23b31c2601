"""One table from errors to statuses, both ways, and nothing private in what travels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from perfit_shared import errors

ROOT = Path(__file__).resolve().parents[2]


def tree(cls: type[errors.PerfitError] = errors.PerfitError) -> list[type[errors.PerfitError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in tree(child))]


def test_codes_are_unique_and_every_class_is_in_the_drawing() -> None:
    codes = [cls.code for cls in tree()]
    assert len(codes) == len(set(codes))
    for cls in tree():
        assert cls.__name__ in (errors.__doc__ or "")
        assert cls.__name__ in errors.__all__


def test_what_travels_comes_back_as_itself() -> None:
    for cls in errors.STATUS:
        status, code, message, retry = errors.to_status(cls("said so", retry_ms=5))
        assert status in grpc.StatusCode.__members__
        back = errors.from_code(status, code, message, retry)
        assert (type(back), str(back), back.retry_ms) == (cls, "said so", 5)


@pytest.mark.parametrize("error", [ValueError("a secret"), errors.VaultDamaged("a path"), KeyError("x")])
def test_anything_else_is_internal(error: Exception) -> None:
    assert errors.to_status(error) == ("INTERNAL", "internal", "internal error", 0)


def test_statuses_without_our_code() -> None:
    assert isinstance(errors.from_code("UNAVAILABLE", None, ""), errors.Unavailable)
    assert type(errors.from_code("DATA_LOSS", "no such", "")) is errors.PerfitError


def test_generated_stubs_are_not_stale(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_wire.py"), "--out", str(tmp_path)], check=True
    )
    kept = ROOT / "shared" / "perfit_shared" / "wire"
    for made in sorted(tmp_path.iterdir()):
        assert made.read_text() == (kept / made.name).read_text(), f"{made.name}: run `make wire`"
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in kept.iterdir() if p.is_file()}


def test_every_message_and_field_of_the_protos_is_commented() -> None:
    for proto in (ROOT / "protos").rglob("*.proto"):
        lines = [line.strip() for line in proto.read_text().splitlines()]
        for before, line in zip(["", *lines], lines, strict=False):
            if line.startswith("rpc "):
                assert before.startswith("//"), line
