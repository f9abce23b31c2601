"""Check the built docs site: every link inside it leads somewhere, and no page loads from outside."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src", "source": "src"}
NOT_LOADED = {"canonical", "next", "prev", "search", "index", "author", "genindex"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADED and LOADED[tag] in values and values.get("rel") not in NOT_LOADED:
            self.loads.append(values[LOADED[tag]])


def problems(site: Path) -> list[str]:
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where} loads {url}" for url in page.loads if urlparse(url).netloc]
        for url in [*page.links, *page.loads]:
            parsed = urlparse(url)
            if parsed.scheme or parsed.netloc:
                continue
            file, anchor = urldefrag(parsed._replace(query="").geturl())
            target = (path.parent / unquote(file)).resolve() if file else path
            if not target.exists():
                found.append(f"{where} links to {url}, which is not there")
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                found.append(f"{where} links to {url}, whose anchor is not there")
    return found


def main() -> None:
    site = Path(sys.argv[1]).resolve()
    found = problems(site)
    if found or not (site / "index.html").is_file():
        sys.exit("\n".join(found) or "there is no page")


if __name__ == "__main__":
    main()
