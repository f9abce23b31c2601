"""What lies in the repo beside the code: the demo's people, the generated help, the starter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PEOPLE = ROOT / "demo" / "people"
STARTER = ROOT / "cloud" / "perfit_cloud" / "starter"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (PEOPLE / name).read_text().splitlines()]


@pytest.mark.parametrize("name", ["headlines.jsonl", "headlines_other.jsonl"])
def test_no_word_or_affix_is_in_over_30_percent_of_the_headlines(name: str) -> None:
    titles = [row["title"].lower().split() for row in rows(name)]
    counts: Counter[str] = Counter()
    for words in titles:
        found = set(words)
        for n in (2, 3, 4):
            found |= {" ".join(words[:n]) + " …", "… " + " ".join(words[-n:])}
        counts.update(found)
    word, most = counts.most_common(1)[0]
    assert most <= 0.3 * len(titles), word


@pytest.mark.parametrize("name", ["folders.jsonl", "folders_other.jsonl"])
def test_six_folders_of_like_size(name: str) -> None:
    counts = Counter(row["category"] for row in rows(name))
    assert len(counts) == 6
    assert max(counts.values()) <= 0.25 * sum(counts.values())


def test_the_others_differ_on_the_same_texts() -> None:
    for mine, other in (("headlines", "headlines_other"), ("folders", "folders_other")):
        a, b = rows(f"{mine}.jsonl"), rows(f"{other}.jsonl")
        assert [r["text"] for r in a] == [r["text"] for r in b]
        assert all(x != y for x, y in zip(a, b, strict=True))
        assert len({r["text"] for r in a}) == len(a) >= 100


def test_the_help_page_is_not_stale(tmp_path: Path) -> None:
    out = tmp_path / "help.md"
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "generate_help.py"), "--out", str(out)], check=True
    )
    assert out.read_text() == (ROOT / "docs" / "help.md").read_text(), "run `make help-page`"


def test_the_starter_is_small_and_whole() -> None:
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import open_model

    files = [path for path in STARTER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 20e6
    own = open_model(str(STARTER / "perfit-starter")).fingerprint()
    for task in ("news_headline", "news_categorize"):
        assert Artefact.load(STARTER / task).fingerprint == own


@pytest.mark.brief
def test_no_row_of_the_data_is_in_the_people(brief: Path) -> None:
    folder = brief / "data" / "lamp_news" / "news_headline"
    known = {
        row["text"]
        for name in ("user_others.json", "user_top_100_history.json")
        for user in json.loads((folder / name).read_text())
        for row in user["profile"]
    }
    assert not known & {row["text"] for row in rows("headlines.jsonl") + rows("folders.jsonl")}
