"""`perfit evaluate`: what your shift is worth, on examples that it has never seen."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say, usable_items
from perfit_device.cli.progress import Progress
from perfit_shared.errors import InvalidData, PerfitError
from perfit_shared.terminal import one_line

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact, CloudInfo, ShiftUse
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.evaluation import Judged
    from perfit_device.history import HistoryItem
    from perfit_device.vault.store import Vault


def evaluate(
    context: typer.Context,
    *,
    task: TaskOption = None,
    shift: Annotated[
        Path | None, typer.Option("--shift", metavar="FILE", help="Also someone else's exported shift.")
    ] = None,
    with_seed: Annotated[
        bool, typer.Option("--with-seed", help="Also the seed, where every shift starts.")
    ] = False,
    answers: Annotated[
        bool, typer.Option("--answers", help="Also print the answers, beside the golds.")
    ] = False,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Loss (nats a token) and the task's metric on the test part of your history.

    Ctrl-C and errors end it with what is measured by then. Examples that are too long for the cloud,
    or lack fields of the task, are left out and counted.

    \b
    perfit evaluate --task news_headline
    perfit evaluate --task news_headline --shift friend.shift --json
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import history
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.refusals import Refusals

    with session.open_vault() as vault, session.open_cloud(vault) as (cloud, info):
        artefact = session.artefact(info, vault, task)
        items = history.load(vault, artefact.task.name)
        # As an update splits them, or its gate's examples could be among these.
        refused = Refusals.read(vault, info, artefact).names
        usable = [item for item in usable_items(items, artefact.task) if item.name not in refused]
        test = history.split(usable).test
        retry_policy = RetryPolicy(tell=say)
        uses = _uses(
            vault, cloud, info, artefact, retry_policy=retry_policy, with_seed=with_seed, shift=shift
        )
        vault.close()
        found = _Found(artefact, test, left_out=len(items) - len(usable))
        try:
            _judge(found, cloud, info, uses, retry_policy)
        except (KeyboardInterrupt, PerfitError) as error:
            if found.judged:
                say(f"stopped; {', '.join(found.judged)} of {', '.join(uses)} are measured")
                with contextlib.suppress(InvalidData):  # that no example is left is not why it stopped
                    _show(session, found, answers=answers, partial=True)
            elif isinstance(error, KeyboardInterrupt):
                say("stopped, before anything was measured")
            raise
    _show(session, found, answers=answers, partial=False)


def _uses(
    vault: Vault,
    cloud: Cloud,
    info: CloudInfo,
    artefact: Artefact,
    *,
    retry_policy: RetryPolicy,
    with_seed: bool,
    shift: Path | None,
) -> dict[str, ShiftUse]:
    from perfit_device import personal
    from perfit_device.cloud.codec import ShiftUse

    mine = personal.load(vault, info.cloud_id, artefact)
    if mine is None:
        say("no personal shift yet, so personal is the seed; `perfit update` trains one")
    uses = {"base": ShiftUse(), "collective": ShiftUse(artefact)}
    if with_seed or mine is None:
        uses["seed"] = ShiftUse(artefact, retry_policy.call(lambda: cloud.fetch_seed(artefact)))
    uses["personal"] = ShiftUse(artefact, mine.tensors) if mine else uses["seed"]
    if shift is not None:
        uses["other"] = ShiftUse(artefact, personal.read_file(shift, artefact))
    return uses


@dataclass
class _Found:
    """What is measured so far, by the name of the shift."""

    artefact: Artefact
    test: Sequence[HistoryItem]
    left_out: int = 0  # examples that lack fields of the task or are known to be too long, of all parts
    judged: dict[str, Judged] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """The examples that the cloud took under every shift. Raises InvalidData when there are none."""
        every = range(len(self.test))
        rows = [row for row in every if all(judged.is_whole(row) for judged in self.judged.values())]
        if not rows:
            raise InvalidData("the cloud refuses every example of the test part as too long")
        return rows


def _judge(
    found: _Found, cloud: Cloud, info: CloudInfo, uses: dict[str, ShiftUse], retry_policy: RetryPolicy
) -> None:
    """Fill `found`; shifts that are the same are measured once."""
    from perfit_device import evaluation

    progress = Progress()
    same: dict[str, str] = {}  # digest of the tensors → the first name they have
    try:
        for name, use in uses.items():
            digest = use.personal.digest() if use.personal is not None else name
            first = same.setdefault(digest, name)
            if first == name:
                found.judged[name] = evaluation.judge(
                    cloud,
                    found.artefact.task,
                    found.test,
                    use,
                    info.limits,
                    retry_policy=retry_policy,
                    progress=lambda done, name=name: progress.count(  # type: ignore[misc]
                        name, done, 2 * len(found.test)
                    ),
                )
            else:
                found.judged[name] = found.judged[first]
    finally:
        progress.end()


def _show(session: Session, found: _Found, *, answers: bool, partial: bool) -> None:
    from perfit_shared.metrics import measure

    of, kept = found.artefact.task, found.rows
    skipped = len(found.test) - len(kept)
    if skipped:
        say(f"{skipped} examples are too long for this cloud and were left out")
    golds = [found.test[row].fields[of.gold_field] for row in kept]
    texts = {name: judged.texts(kept) for name, judged in found.judged.items()}
    loss = {name: judged.loss(kept) for name, judged in found.judged.items()}
    metric = {name: measure(of.metric, given, golds) for name, given in texts.items()}
    rows = [
        {"gold": gold, **{name: given[at] for name, given in texts.items()}} for at, gold in enumerate(golds)
    ]
    if session.json:
        value: dict[str, Any] = {
            "task": found.artefact.name,
            "examples": len(kept),
            "skipped": skipped + found.left_out,
            "loss": loss,
            "metric": {"name": of.metric, **metric},
        }
        session.emit(value | ({"answers": rows} if answers else {}) | ({"partial": True} if partial else {}))
        return
    print(f"{found.artefact.name}, {len(kept)} examples\n{'':<12}{'loss':>8}{of.metric:>12}")
    for name, nats in loss.items():
        print(f"{name:<12}{nats:>8.4f}{metric[name]:>12.4f}")
    for row in rows if answers else []:
        print("\n" + "\n".join(f"{name:<12}{one_line(text)}" for name, text in row.items()))
