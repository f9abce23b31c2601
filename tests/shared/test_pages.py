"""The pages: every link inside them leads somewhere, in the repository and on the site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_NOT_OURS = {"runs", "node_modules", "artefacts"}  # artefacts' cards speak of where they were made
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *(
        page
        for folder in ("docs", "demo", "examples", "cloud")
        for page in sorted((ROOT / folder).rglob("*.md"))
        if not _NOT_OURS & set(page.relative_to(ROOT).parts)
    ),
]
_LINK = re.compile(r"\]\((?!\w+:)([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```", flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and the site make them."""
    text = _FENCED.sub("", page.read_text("utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*)$", text, flags=re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = sum(name == one or re.fullmatch(rf"{re.escape(name)}-\d+", one) is not None for one in found)
        found.add(f"{name}-{number}" if number else name)
    return found


def broken(page: Path) -> list[str]:
    """Links that lead nowhere."""
    found = []
    for link in _LINK.findall(re.sub(r"`[^`\n]*`", "``", _FENCED.sub("", page.read_text("utf-8")))):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not broken(page)


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [
        ("b.md", False),
        ("b.md#the-end", False),
        ("b.md#the-end-1", False),
        ("#here", False),
        ("https://example.org/x", False),
        ("c.md", True),
        ("b.md#beginning", True),
        ("b.md#the-end-2", True),
        ("b.md#no-heading", True),
        ("#there", True),
    ],
)
def test_a_broken_link_is_found(link: str, is_broken: bool, tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# The end\n\n## The `end`\n\n```\n# No heading\n```\n")
    (tmp_path / "a.md").write_text(f"# Here\n\n[x]({link}), `[x](gone.md)`\n\n```\n[x](gone.md)\n```\n")
    assert bool(broken(tmp_path / "a.md")) == is_broken


def check_site(site: Path) -> tuple[int, str]:
    command = [sys.executable, str(ROOT / "scripts" / "check_site.py"), str(site)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ('<a href="b.html#end">', ""),
        ('<a href="b.html?x=1">', ""),
        ('<a href="https://example.org/gone">', ""),
        ('<a href="c.html">', "index.html links to c.html, which is not there"),
        ('<a href="b.html#start">', "index.html links to b.html#start, whose anchor is not there"),
        ('<a href="#end">', "index.html links to #end, whose anchor is not there"),
        ('<img src="gone.png">', "index.html links to gone.png, which is not there"),
        ('<script src="https://example.org/x.js"></script>', "index.html loads https://example.org/x.js"),
    ],
)
def test_the_site_is_checked(written: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(f"<html>{written}</html>")
    (tmp_path / "b.html").write_text('<html><h1 id="end">End</h1></html>')
    code, err = check_site(tmp_path)
    assert (code, err.strip()) == (1 if says else 0, says)


def test_a_site_without_a_start_page_is_none(tmp_path: Path) -> None:
    assert check_site(tmp_path)[0] == 1
