"""What lies in the repo beside the code: the generated help, the starter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STARTER = ROOT / "cloud" / "perfit_cloud" / "starter"


def test_the_help_page_is_not_stale(tmp_path: Path) -> None:
    out = tmp_path / "help.md"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_help.py"), "--out", str(out)], check=True
    )
    assert out.read_text() == (ROOT / "docs" / "help.md").read_text(), "run `make help-page`"


def test_the_starter_is_small_and_whole() -> None:
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import fingerprint

    files = [path for path in STARTER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    for task in ("news_headline", "news_categorize"):
        assert Artefact.load(STARTER / task).fingerprint == fingerprint(STARTER / "perfit-starter")
