"""How the demo's figures and answers look: on a terminal, and in docs/results/demo.md."""

from __future__ import annotations

import textwrap
from typing import Any

__all__ = ["page", "result_lines", "shown"]

_WIDTH = 100
_LONGEST = 230  # characters of an answer on the terminal; the base model does not stop by itself
_BAR = 30
_FIRST = 3  # test answers on the terminal


def shown(label: str, text: str, *, indent: int = 2) -> str:
    """A label and a text beside it, wrapped and cut."""
    text = " ".join(text.split()) or "(nothing)"
    text = text if len(text) <= _LONGEST else text[:_LONGEST].rsplit(" ", 1)[0] + " …"
    head = " " * indent + f"{label:9}"
    return textwrap.fill(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))


def _labels(p: dict[str, Any]) -> dict[str, str]:
    return {
        "base": "the model alone",
        "collective": "with what many share",
        "seed": "where everyone starts",
        "other": f"with {p['other'].title()}'s shift",
        "personal": f"with {p['name'].title()}'s own",
    }


def result_lines(p: dict[str, Any]) -> list[str]:
    """Table and bars of one person, and the first test answers."""
    title = f"  The test, measured in {p['evaluate_seconds']:.0f} s"
    lines = ["", f"{title:{_BAR + 28}}loss   ROUGE-1   ROUGE-L"]
    most = max(p["loss"].values())
    for mode, label in _labels(p).items():
        loss = p["loss"][mode]
        bar = "█" * round(_BAR * loss / most)
        figures = f"{loss:6.2f}{p['metric'][mode]:10.3f}{p['rouge_l'][mode]:10.3f}"
        lines.append(f"  {label:24}{bar:{_BAR}}{figures}")
    lines += ["", f"  The first {_FIRST} of the {p['examples']}, as they come:"]
    for answer in p["answers"][:_FIRST]:
        lines += [
            shown("asked", answer["asked"]),
            shown("answered", answer["personal"]),
            shown(p["name"].title(), answer["gold"]),
        ]
    return lines


def page(people: list[dict[str, Any]], seconds: float, machine: str) -> str:
    """docs/results/demo.md: the table, and every test answer."""
    lines = [
        "# The demo, with all of its answers",
        "",
        f"`make demo`, {machine}: {seconds:.0f} s after set-up. `python scripts/demo.py show --write-docs` "
        "writes this page. The people are invented, and what they wrote was written by hand: "
        "[demo/people](../../demo/people/README.md). The loss is in nats a token.",
        "",
        "| | the model alone | collective | seed | someone else's | personal |",
        "|---|---|---|---|---|---|",
    ]
    for p in people:
        for label, figures in (("loss", p["loss"]), ("ROUGE-1", p["metric"]), ("ROUGE-L", p["rouge_l"])):
            cells = " | ".join(f"{figures[mode]:.3f}" for mode in _labels(p))
            lines.append(f"| {p['name']}, {p['task']}: {label} | {cells} |")
    for p in people:
        lines += [
            "",
            f"{p['name'].title()}'s update took {p['update_seconds']:.0f} s, {p['bytes_up'] / 1e6:.1f} MB up "
            f"and {p['bytes_down'] / 1e6:.1f} MB down; measuring {p['evaluate_seconds']:.0f} s. The best "
            f"constant beginning or ending would give ROUGE-1 {p['best_constant_affix']:.3f}.",
        ]
    for p in people:
        lines += ["", f"## {p['name'].title()}: all {p['examples']} test answers", ""]
        for answer in p["answers"]:
            lines += [f"**{_plain(answer['asked'])}**", ""]
            for label, key in (
                (p["name"], "gold"),
                *((mode, mode) for mode in ("personal", "seed", "other")),
            ):
                lines.append(f"- {label}: {_plain(answer[key])}")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _plain(text: str) -> str:
    """One line that Markdown shows as it is."""
    text = " ".join(text.split()) or "(nothing)"
    return "".join(f"\\{c}" if c in "\\`*_<>|[]#" else c for c in text)
