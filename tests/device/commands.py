"""The command line in this process."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from perfit_device.cli.main import run

ERRORS = {1, 3, 4, 6, 7}  # exit codes


class Perfit:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        self._monkeypatch.setattr(sys, "argv", ["perfit", *arguments])
        code = 0
        try:
            run()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = self._capsys.readouterr()
        return code, captured.out, captured.err

    def ok(self, *arguments: str) -> str:
        code, out, err = self(*arguments)
        assert code == 0, err
        return out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def fails(self, *arguments: str, code: int | None = None) -> str:
        """The last line on stderr. Any code of an error of ours, unless one is given."""
        got, out, err = self(*arguments)
        assert got in (ERRORS if code is None else {code}), err
        assert not out
        line = err.strip().splitlines()[-1]
        assert line.startswith("perfit: ")
        assert not line.endswith(".")
        return line
