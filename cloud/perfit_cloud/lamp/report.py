"""report.md and its PNGs: the paper's tables and figures from finished runs."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from perfit_cloud.lamp.figures import draw_heat, draw_points
from perfit_cloud.lamp.groups import RunGroup, group_runs
from perfit_cloud.lamp.layout import Section, setting, variant
from perfit_cloud.lamp.measured import FIGURES_FILE
from perfit_cloud.lamp.method_tables import text_section
from perfit_cloud.lamp.results import Run, write_bytes
from perfit_cloud.lamp.statistics import RESAMPLES
from perfit_cloud.lamp.tables import SECTIONS
from perfit_cloud.text_tables import markdown_table
from perfit_shared.errors import InvalidInput

__all__ = ["write_report"]

_log = logging.getLogger(__name__)
_HOW_TO_READ = (
    "Loss is in nats a target token, the mean over users of each user's own mean; metrics count all queries "
    "alike, as LaMP's scripts do. With one seed [low, high] is the 95 % interval of a bootstrap that draws "
    f"users with all their queries ({RESAMPLES:,} resamples, BCa); with several seeds ± is one standard "
    "deviation over them. Error bars are the same. The paper's figures are of Llama-2-7B on LaMP's own test "
    "users, with OPPU's prompts and answers of 200 tokens: on another model, other data or other prompts "
    "they say what the method can do, not what these runs should give. Rows of different prompts or decoding "
    "(*Runs*, below) are no comparison of methods; no difference or test is taken between such."
)


def write_report(folders: Sequence[Path], out: Path, *, texts: bool = True) -> Path:
    """Draw what the runs allow into `out`; the path of report.md.

    Without `texts` nothing that people or the model wrote goes into it: no answer, no gold, no user's id.

    Raises InvalidData on a folder without a finished run, InvalidInput without any folder.
    """
    distinct = list(dict.fromkeys(folder.resolve() for folder in folders))
    if not distinct:
        raise InvalidInput("no runs; name the folders of finished ones")
    # `runs/*` names whatever else lies there as well.
    folders = [
        f
        for f in distinct
        if any((f / name).is_file() for name in ("run.json", "settings.json", FIGURES_FILE))
    ]
    for other in distinct:
        if folders and other not in folders:
            _log.warning("%s is no run and is left out", other.name)
    folders = folders or distinct
    groups = group_runs(Run.load(folder, texts=False) for folder in folders)
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# LaMP", "", _HOW_TO_READ, ""]
    missing = []
    for section in (make(groups) for make in (*SECTIONS, *([text_section] if texts else []))):
        if any(block.rows for block in section.blocks):
            lines += _written(section, out)
        else:
            missing.append(section.title[0].lower() + section.title[1:])
    if missing:
        lines += [f"No runs for: {', '.join(missing)}.", ""]
    lines += _runs(groups)
    path = out / "report.md"
    write_bytes(path, "\n".join(lines).encode())
    return path


def _written(section: Section, out: Path) -> list[str]:
    """The section's lines, its PNGs drawn."""
    lines = [f"## {section.title}", "", section.about, ""]
    blocks = [block for block in section.blocks if block.rows]
    drawn = sum(bool(block.points or block.heat) for block in blocks)
    number = 0
    for block in blocks:
        if block.caption:
            lines += [f"**{block.caption}**", ""]
        lines += [*markdown_table(block.head, block.rows), ""]
        if not (block.points or block.heat):
            continue
        number += 1
        name = f"{section.key}-{number}.png" if drawn > 1 else f"{section.key}.png"
        if block.points:
            draw_points(out / name, block.points)
        else:
            draw_heat(out / name, block.heat)
        lines += [f"![{section.title}]({name})", ""]
    return [*lines, section.paper, ""]


def _runs(groups: Sequence[RunGroup]) -> list[str]:
    rows = [
        # The folder and its parent: enough to find it, and no path of a machine.
        f"- `{'/'.join(run.folder.parts[-2:])}`: {group.task.name}, {variant(group)}, {setting(group)}, "
        f"{group.get('users', '')} users, seed {seed}; {group.decoding}{_cut(group)}"
        for group in groups
        for run, seed in zip(group.runs, group.seeds, strict=True)
    ]
    return ["## Runs", "", *rows, ""]


def _cut(group: RunGroup) -> str:
    """The longest example, where the run says it."""
    cap = group.get("token_cap")
    return "" if cap is None else f"; at most {cap} tokens, {group.get('shortened')} prompts cut to that"
