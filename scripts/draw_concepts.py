"""Draw the pictures of docs/concepts.md: `python scripts/draw_concepts.py [--out DIR]`."""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 480  # of narrow screens little more
INK, DEVICE, CLOUD, PAPER, GONE = "#1f2933", "#dcefe3", "#dde8f7", "#ffffff", "#f6e3df"


def text(x: float, y: float, words: str, *, size: int = 16, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{INK}"{weight}>'
        f"{escape(words)}</text>"
    )


def caption(y: float, words: str) -> str:
    return text(WIDTH / 2, y, words, size=15, anchor="middle")


def box(at: tuple[float, float, float, float], title: str, lines: list[str], fill: str) -> str:
    """A titled box with lines of text, at (x, y, width, height)."""
    x, y, width, height = at
    drawn = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="{fill}" stroke="{INK}"/>',
        text(x + 12, y + 25, title, bold=True),
    ]
    drawn += [text(x + 12, y + 48 + 22 * n, line) for n, line in enumerate(lines)]
    return "".join(drawn)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.6" '
        'marker-end="url(#head)"/>'
    )


def exchange(y: float, down: str, up: str) -> list[str]:
    """What goes from a box that ends at y to one that begins 64 further down, and what comes back."""
    return [
        arrow(32, y + 2, 32, y + 60),
        text(44, y + 37, down, size=15),
        arrow(448, y + 60, 448, y + 2),
        text(436, y + 37, up, size=15, anchor="end"),
    ]


def picture(height: int, title: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif">'
        f"<title>{escape(title)}</title>"
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>'
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="{PAPER}"/>' + "".join(parts) + "</svg>\n"
    )


def places() -> str:
    vault = ["history: your examples", "personal shift φ₂, its versions", "identity: key and certificate"]
    cloud = ["the base model, frozen", "collective shift φ₁ and seed,", "one artefact for each task"]
    return picture(
        408,
        "What lies on the device and what in the cloud",
        [
            box((16, 16, 448, 158), "your device", [], DEVICE),
            box((36, 54, 408, 104), "vault, sealed", vault, PAPER),
            arrow(200, 176, 200, 230),
            arrow(280, 230, 280, 176),
            caption(209, "TLS"),
            box((16, 234, 448, 158), "the cloud", [], CLOUD),
            box((36, 272, 408, 104), "public, the same for all", cloud, PAPER),
        ],
    )


def question() -> str:
    parts = [
        box((16, 16, 448, 84), "your device", ["question, φ₂ as int8", "the answer in your way"], DEVICE),
        *exchange(100, "prompt + φ₂", "text, as it comes"),
        box((16, 164, 448, 152), "the cloud", [], CLOUD),
    ]
    for number in range(5):
        x = 32 + 86 * number
        shifted = number in (1, 3)
        parts.append(
            f'<rect x="{x}" y="206" width="70" height="60" rx="6" fill="{DEVICE if shifted else PAPER}" '
            f'stroke="{INK}"/>'
        )
        parts.append(text(x + 35, 241, "φ₂∘φ₁" if shifted else "block", size=15, anchor="middle"))
        if number:
            parts.append(arrow(x - 15, 236, x - 1, 236))
    parts.append(caption(299, "some layers shift chosen prompt tokens"))
    return picture(332, "How a question flows", parts)


def step() -> str:
    device = [
        "1  draws a batch from the history",
        "4  takes the step: AdamW, with R kept a rotation",
        "5  seals it every 30 s",
    ]
    cloud = [
        "2  forward: loss of the answers",
        "3  backward: gradients of R, W, b;",
        "    the model itself never moves",
    ]
    return picture(
        360,
        "One step of an update",
        [
            box((16, 16, 448, 106), "your device", device, DEVICE),
            *exchange(122, "rows of the batch + φ₂", "loss, gradients of φ₂"),
            box((16, 186, 448, 106), "the cloud", cloud, CLOUD),
            caption(320, "At the end a gate compares the losses on examples"),
            caption(342, "that were not trained on: better, or the old one stays."),
        ],
    )


def forgotten() -> str:
    during = ["question, examples, answer", "personal shift, gradients", "tokens, cached activations"]
    after = [
        "counts: calls, tokens, seconds",
        "the device's random identity, with dates",
        "nothing that you wrote",
    ]
    return picture(
        326,
        "What the cloud holds during a call and after it",
        [
            box((16, 16, 448, 106), "in the cloud's memory, during a call", during, GONE),
            arrow(180, 124, 180, 176),
            text(196, 156, "overwritten", size=15),
            box((16, 180, 448, 106), "in the cloud, after the call", after, CLOUD),
            caption(312, "An audit looks for it in memory, disk, logs and metrics."),
        ],
    )


PICTURES = {"places": places, "question": question, "step": step, "forgotten": forgotten}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "site" / "pictures")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (out / f"{name}.svg").write_text(draw(), "utf-8")


if __name__ == "__main__":
    main()
