"""How `make docs` makes the site from these pages."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
LINK = re.compile(r"\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)\)")

project = "perfit"
author = "the perfit authors"
html_title = "perfit"
html_theme = "furo"
html_theme_options = {"source_edit_link": "", "navigation_with_keys": True}
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["site/static"]
html_css_files = ["site.css"]

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["results/*/runs/**", "results/bench/**", "results/security/**"]
# A heading's anchor is the one that it has where these pages are read in the repository.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
nitpicky = True
# Code blocks hold shell, tables and pictures in text: no language is right for all.
highlight_language = "none"
suppress_warnings = ["misc.highlighting_failure"]


def setup(app):
    app.connect("source-read", name_what_is_no_page)


def name_what_is_no_page(app, page, source):
    """A link to a folder, or to a page outside docs/, works in the repository alone: name it instead."""
    folder = (DOCS / page).parent

    def named(match):
        target = (folder / match[2]).resolve()
        is_outside = not target.is_relative_to(DOCS) and target.suffix == ".md"
        if not target.is_dir() and not (is_outside and target.is_file()):
            return match[0]
        words = match[1].strip("`")
        path = target.relative_to(DOCS.parent).as_posix()
        return f"`{path}`" if words in path else f"{match[1]} (`{path}`)"

    source[0] = LINK.sub(named, source[0])
