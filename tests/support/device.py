"""The command line in this process."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from perfit_device.cli.main import run


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

    def fails(self, *arguments: str, code: int = 1) -> str:
        """The last line on stderr. `code` is the exit code, by the table of `perfit_shared.errors`."""
        got, out, err = self(*arguments)
        assert got == code, err
        assert not out
        line = err.strip().splitlines()[-1]
        assert line.startswith("perfit: ")
        assert not line.endswith(".")
        return line
