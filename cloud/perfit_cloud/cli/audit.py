"""`perfit-cloud audit`: look into a server from outside for what it should have forgotten."""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_cloud.cli.common import MODEL_HELP
from perfit_shared.errors import InvalidInput

if TYPE_CHECKING:
    from perfit_cloud.audit.rows import Row
    from perfit_cloud.audit.server import Sealed

__all__ = ["audit", "audit_as"]

_MOMENTS = ("before", "during", "after", "closed")


def audit(  # noqa: PLR0917 - options of a command
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    artefact: Annotated[Path, typer.Option(help="Artefact folder.")],
    rpc: Annotated[list[str] | None, typer.Option(help="Only this RPC; may be given several times.")] = None,
    ending: Annotated[
        list[str] | None,
        typer.Option(help="Only calls that end so: done, cancelled, deadline, refused or gone."),
    ] = None,
    devices: Annotated[int, typer.Option(min=0, max=64, help="How many at once; 0: no load.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Of the canaries.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of one forward pass.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="auto (the faster), float32 or bfloat16, as the server's.")
    ] = "auto",
    engine: Annotated[str, typer.Option(help="The server's engine: auto, own or vllm.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer calls, and no load.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write what each look found.")
    ] = None,
) -> None:
    """Search a server's memory, files and logs for what devices sent it, while and after it worked on that.

    It starts servers of its own, first with hardening off and then on, and calls every RPC with words
    and tensors that stand nowhere else. The code is 1 when something is left after a call and its
    channel have ended, or when a control fails: before a call nothing may be found, during it tensors
    and words must be, and of every kind of secret something by some look. What it shows is shown for
    this processor, which it names, and for one dtype. Needs Linux and CAP_SYS_PTRACE. GPU memory cannot
    be searched.

        perfit-cloud audit --model models/newslm --artefact runs/news_headline

        perfit-cloud audit --model models/newslm --artefact runs/news_headline --rpc Adapt --quick
    """
    kept = audit_as(
        model=model,
        artefact=artefact,
        rpc=rpc,
        ending=ending,
        devices=devices,
        seed=seed,
        threads=threads,
        dtype=dtype,
        engine=engine,
        quick=quick,
        as_json=as_json,
    )
    if not kept:
        raise typer.Exit(1)


def audit_as(
    *,
    model: str,
    artefact: Path,
    rpc: Sequence[str] | None,
    ending: Sequence[str] | None,
    devices: int,
    seed: int,
    threads: int,
    dtype: str,
    engine: str,
    quick: bool,
    as_json: Path | None,
    sealed: Sealed | None = None,
    database: Callable[[], str] | None = None,
) -> bool:
    """The command, and with `sealed` or `database` what `Plan` says of them. Returns whether it passed."""
    from perfit_cloud.audit.memory import check_allowed
    from perfit_cloud.audit.processor import processor
    from perfit_cloud.audit.rows import forms_found, passed, unseen
    from perfit_cloud.audit.scenarios import ENDINGS, RPCS, Plan
    from perfit_cloud.audit.scenarios import audit as run

    rpcs, endings = _chosen("--rpc", rpc, RPCS), _chosen("--ending", ending, ENDINGS)
    check_allowed()
    # A server that was stopped to be looked at should not stay so: SIGTERM unwinds as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    import torch

    from perfit_cloud.audit.reference import ReferenceEngines
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import load_base

    torch.set_num_threads(threads)  # as the server's: the same bits
    base = load_base(model, dtype=dtype)
    made_on, dtype = processor(), str(base.model.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(prefix="perfit-audit-") as folder:
        plan = Plan(
            model=model,
            artefact=artefact,
            folder=Path(folder),
            rpcs=rpcs,
            endings=endings,
            devices=devices,
            seed=seed,
            is_quick=quick,
            flags=("--threads", str(threads), "--dtype", dtype, "--engine", engine),
            sealed=sealed,
            database=database,
        )
        with ReferenceEngines(base, Artefact.load(artefact)) as reference:
            rows = run(plan, reference, _notify)
    if as_json is not None:
        written = {
            "kept": passed(rows),
            "seed": seed,
            "devices": 0 if quick else devices,
            "processor": asdict(made_on),
            "dtype": dtype,
            "threads": threads,
            "engine": engine,
            "sealed": sealed is not None,
            "replica": database is not None,
            "forms_found": forms_found(rows),
            "never_found": unseen(rows),
            "rows": [_written(row) for row in rows],
        }
        as_json.write_text(json.dumps(written, indent=1) + "\n", "utf-8")
    print(f"{dtype}, {threads} thread{'s' * (threads > 1)} a pass, on {made_on}\n")
    for line in [*_table(rows), *_forms(forms_found(rows))]:
        print(line)
    for family in unseen(rows):
        print(f"no look found any {family}: that it is forgotten was not shown", file=sys.stderr)
    if not passed(rows):
        print("the audit failed", file=sys.stderr)
        return False
    print("nothing was left after any call and channel, and every control found what it should")
    return True


def _chosen(flag: str, given: Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Raises InvalidInput and lists what there is."""
    for name in given or ():
        if name not in known:
            raise InvalidInput(f'{flag} should be {", ".join(known)}, not "{name[:40]}"')
    return tuple(name for name in known if not given or name in given)


def _notify(row: Row) -> None:
    """Progress, on stderr."""
    fault = f" ({', '.join(row.found)}): {row.fault}" if row.fault else ""
    look = f"hardening {row.hardening}, {row.rpc} {row.ending}, {row.moment}: {_count(row)}"
    print(look + fault, file=sys.stderr, flush=True)


def _count(row: Row) -> str:
    return f"{len(row.found)} kind{'s' * (len(row.found) > 1)}" if row.found else "nothing"


def _table(rows: Sequence[Row]) -> list[str]:
    """A line for each call, and below it what was found when the call was over."""
    calls: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        calls.setdefault((row.hardening, row.rpc, row.ending), {})[row.moment] = row
    lines = [_line("hardening", "rpc", "ending", *_MOMENTS)]
    for call, looks in calls.items():
        lines.append(_line(*call, *(_count(looks[m]) if m in looks else "-" for m in _MOMENTS)))
        for moment in ("before", "after", "closed"):
            found = looks[moment].found if moment in looks else {}
            lines += [f"    {moment}: {kind} in {', '.join(where)}" for kind, where in sorted(found.items())]
        for row in looks.values():
            if row.unreadable:
                lines.append(f"    {row.moment}: could not read {'; '.join(row.unreadable[:4])}")
    return lines


def _forms(families: dict[str, dict[str, bool]]) -> list[str]:
    """Of every family of needles the forms that some look found, and those that none did."""
    lines = ["", "found by some look since its call began"]
    for family, forms in families.items():
        seen = [form for form, is_seen in forms.items() if is_seen]
        never = [form for form, is_seen in forms.items() if not is_seen]
        nowhere = f" (in no look: {', '.join(never)})" if never and seen else ""
        lines.append(f"    {family}: {', '.join(seen) or 'never'}{nowhere}")
    return lines


def _written(row: Row) -> dict[str, object]:
    """For the file; the kinds that were sought stand in it once."""
    return {key: value for key, value in asdict(row).items() if key != "sought"} | {"fault": row.fault}


def _line(*cells: str) -> str:
    widths = (9, 15, 10, 8, 8, 8, 8)
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
