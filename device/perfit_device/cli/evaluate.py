"""`perfit evaluate`: what your shift is worth, on examples that it has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, one_line, say


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

    \b
    perfit evaluate --task news_headline
    perfit evaluate --task news_headline --shift friend.shift --json
    """
    session = Session.of(context, profile=profile, json=json)
    from perfit_device import evaluation, history, personal
    from perfit_device.codec import ShiftUse
    from perfit_device.patience import Patience
    from perfit_shared.metrics import measure

    with session.open_vault() as vault, session.open_cloud(vault) as (cloud, info):
        artefact = session.artefact(info, vault, task)
        of = artefact.task
        test = history.split(history.load(vault, of.name)).test
        mine = personal.load(vault, info.cloud_id, artefact)
        if mine is None:
            say("no personal shift yet, so personal is the seed; `perfit update` trains one")
        patience = Patience(tell=say)
        uses = {"base": ShiftUse(), "collective": ShiftUse(artefact)}
        if with_seed or mine is None:
            uses["seed"] = ShiftUse(artefact, patience.call(lambda: cloud.fetch_seed(artefact)))
        uses["personal"] = ShiftUse(artefact, mine.tensors) if mine else uses["seed"]
        if shift is not None:
            uses["other"] = ShiftUse(artefact, personal.read_file(shift, artefact))
        vault.close()
        golds = [item.fields[of.gold_field] for item in test]
        loss: dict[str, float] = {}
        metric: dict[str, Any] = {"name": of.metric}
        rows = [{"gold": gold} for gold in golds]
        for name, use in uses.items():
            loss[name] = evaluation.mean_loss(cloud, of, test, use, info.limits, patience=patience)
            given = evaluation.answers(cloud, of, test, use, info.limits, patience=patience)
            metric[name] = measure(of.metric, given, golds)
            for row, answer in zip(rows, given, strict=True):
                row[name] = answer
    if session.json:
        value = {"task": artefact.name, "examples": len(test), "loss": loss, "metric": metric}
        session.emit(value | ({"answers": rows} if answers else {}))
        return
    print(f"{artefact.name}, {len(test)} examples\n{'':<12}{'loss':>8}{of.metric:>12}")
    for name in uses:
        print(f"{name:<12}{loss[name]:>8.4f}{metric[name]:>12.4f}")
    for row in rows if answers else []:
        print("\n" + "\n".join(f"{name:<12}{one_line(text)}" for name, text in row.items()))
