"""Write a manual page for each program from its help: `python scripts/generate_man.py [--out DIR]`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perfit_cloud.cli.main import app as cloud
from perfit_device.cli.main import app as device
from perfit_shared.command_tree import command_of

ROOT = Path(__file__).resolve().parents[1]


def roff(text: str) -> str:
    """Text in which nothing is a request or an escape."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return re.sub(r"^\.", "\\&.", text, flags=re.M)


def paragraphs(text: str) -> Iterator[str]:
    """Help text: what begins with a backspace keeps its lines."""
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = part.splitlines()
        if lines[0].strip() == "\b":
            kept = "\n".join(line for line in lines[1:] if line.strip())
            yield f".PP\n.RS 4\n.nf\n{roff(kept)}\n.fi\n.RE"
        else:
            yield f".PP\n{roff(' '.join(line.strip() for line in lines))}"


def section(command: Any, context: Any) -> Iterator[str]:
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"\\fB{roff(context.command_path)}\\fR {roff(usage)}"
    yield from paragraphs(command.help or "")
    records = [parameter.get_help_record(context) for parameter in command.get_params(context)]
    for names, text in [record for record in records if record]:
        yield f".TP\n\\fB{roff(names)}\\fR\n{roff(' '.join(text.split()))}"


def sections(command: Any, context: Any) -> Iterator[str]:
    for name, child in getattr(command, "commands", {}).items():
        if child.hidden:
            continue
        below = child.make_context(name, [], parent=context, resilient_parsing=True)
        yield f".SS {roff(below.command_path)}"
        yield from section(child, below)
        yield from sections(child, below)


def page(app: Any, program: str) -> str:
    command = command_of(app)
    context = command.make_context(program, [], resilient_parsing=True)
    first = (command.help or "").splitlines()[0].rstrip(".")
    lines = [
        f'.TH {program.upper()} 1 "" perfit "User commands"',
        f".SH NAME\n{roff(program)} \\- {roff(first)}",
        ".SH SYNOPSIS",
        *section(command, context),
        ".SH COMMANDS",
        *sections(command, context),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "man")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for program, app in (("perfit", device), ("perfit-cloud", cloud)):
        (out / f"{program}.1").write_text(page(app, program), "utf-8")


if __name__ == "__main__":
    main()
