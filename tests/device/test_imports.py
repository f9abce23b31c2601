"""Imports on the command line: counts, dry runs, taking one back, and exports that come back equal."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import pytest
from tests.support.device import Perfit


def write(path: Path, *numbers: int) -> str:
    rows = [{"text": f"Text {n}.", "title": f"Title {n}", "date": f"2024-03-{n + 1:02}"} for n in numbers]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def texts(perfit: Perfit) -> set[str]:
    return {
        item["fields"]["text"] for item in perfit.json("history", "list") if "Text" in item["fields"]["text"]
    }


def test_an_import_is_taken_back_and_what_others_brought_stays(ready: Perfit, tmp_path: Path) -> None:
    ready.ok("history", "add", "Text 1.", "Title 1", "--task", "news_headline")
    ready.ok("history", "import", write(tmp_path / "a.jsonl", 1, 2, 3))
    done = ready.json("history", "import", write(tmp_path / "b.jsonl", 3, 4))
    assert (done["added"], done["known"], done["import"]) == (1, 1, 3)
    found = ready.json("history", "imports")
    assert [(i["number"], i["file"], i["added"], i["known"], i["alone"]) for i in found] == [
        (1, "mine.jsonl", 20, 0, 20), (2, "a.jsonl", 2, 1, 1), (3, "b.jsonl", 1, 1, 1)
    ]  # fmt: skip
    line = ready.fails("history", "undo", "2")
    assert (
        "this forgets the 1 examples that import 2, of a.jsonl, brought, for good. Say so with --yes" in line
    )
    assert ready.json("history", "undo", "2", "--yes") == {"import": 2, "forgotten": 1, "kept": 1}
    assert texts(ready) == {"Text 1.", "Text 3.", "Text 4."}
    assert ready.json("history", "undo", "--yes") == {"import": 3, "forgotten": 2, "kept": 0}
    assert texts(ready) == {"Text 1."}, "what was added by hand is no import's"
    assert "there is no import 2" in ready.fails("history", "undo", "2", "--yes")
    ready.ok("history", "forget", "--all", "--yes")
    assert ready.json("history", "imports") == [], "nothing of it is left, its file's name neither"


def test_a_dry_run_changes_nothing(ready: Perfit, tmp_path: Path) -> None:
    done = ready.json("history", "import", write(tmp_path / "a.jsonl", 1, 2), "--dry-run")
    assert (done["added"], done["known"], done["import"]) == (2, 0, None)
    assert not texts(ready) and len(ready.json("history", "imports")) == 1


def test_an_export_comes_back_equal(ready: Perfit, tmp_path: Path) -> None:
    ready.ok("history", "add", "An undated \u2028 thing", "T", "--task", "news_headline")
    before = ready.ok("history", "list", "--json")
    out = ready.ok("history", "export")
    file = tmp_path / "out.jsonl"
    ready.ok("history", "export", str(file))
    assert file.read_text() == out and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "exists; choose another name, or --force" in ready.fails("history", "export", str(file))
    ready.ok("history", "export", str(file), "--force")
    ready.ok("history", "forget", "--all", "--yes")
    assert ready.json("history", "import", str(file))["added"] == 21
    assert ready.ok("history", "list", "--json") == before
    assert ready.ok("history", "export", "--task", "chat") == ""


def test_formats_find_their_task(enrolled: Perfit, cloud: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path.write_text(json.dumps({"messages": turns}))
    assert enrolled("ask", "x", "--mode", "base")[0] == 0
    line = enrolled.fails("history", "import", str(path))
    assert "the cloud has no task chat or reply; it has news_headline, and --task makes" in line
    done = enrolled.json("history", "import", str(path), "--task", "news_headline")
    assert (done["added"], done["format"]) == (1, "messages")
    assert "say what to import: a PATH, or --git REPO" in enrolled.fails("history", "import")


def test_the_guide_s_examples_are_true(
    perfit: Perfit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file in docs/importing.md that stands behind a line `FILE:` imports as the page says."""
    from perfit_device.history.importers import read_history
    from perfit_shared.tasks import TASKS

    page = Path(__file__).parents[2] / "docs/importing.md"
    found = re.findall(
        r"^`(\S+)`, `--task (\w+)`:\n\n```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(found) >= 6
    for name, task, text in found:
        path = tmp_path / name
        path.write_text(text)
        assert read_history(path, TASKS[task]), name
