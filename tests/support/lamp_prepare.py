"""`perfit-cloud lamp prepare` in this process, and what it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner, Result

from perfit_cloud.cli.lamp.prepare import prepare
from perfit_shared.errors import PerfitError
from perfit_shared.lamp import Users, read_users
from perfit_shared.tasks import TASKS

HEADLINE = TASKS["news_headline"]
ASK = "Generate a headline for the following article: "
FILES = ("user_others.json", "user_top_100_history.json", "user_top_100_history_label.json")
app = typer.Typer()
app.command()(prepare)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def fails(kind: type[PerfitError], *arguments: Any) -> str:
    result = call(*arguments)
    assert type(result.exception) is kind, result.output
    return str(result.exception)


def result(*arguments: Any) -> dict[str, Any]:
    done = call(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return dict(json.loads(done.stdout))


def read(folder: Path, name: str, task: Any = HEADLINE) -> Users:
    return read_users(folder / name, task)
