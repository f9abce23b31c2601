"""What a personal shift learned: from what the vault keeps, and when asked for with fresh scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from perfit_device.insight.report import Answered, Insight, Layer, Learned
from perfit_device.operations.operation import Emit, Operation, Progress
from perfit_device.training import journal
from perfit_shared.errors import InvalidPrompt, NotFound
from perfit_shared.types import Mode, Score

if TYPE_CHECKING:
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_device.shift_versions import Versions
    from perfit_device.vault.store import Vault
    from perfit_shared.tasks import Task

__all__ = ["ShowInsight"]

_KIND = "influence"  # row of a checkpoint's name, so that `forget` finds it
_MOST_SCORED = 400  # examples, the newest
_ANSWERED = 6


@dataclass(frozen=True)
class ShowInsight(Operation[Insight]):
    """Raises NotFound when there is no personal shift."""

    task: str | None = None  # name of an artefact
    online: bool = False  # score the examples that trained, and answer some of the test part

    def run(self, profile: Profile, emit: Emit) -> Insight:
        from perfit_device import history, personal
        from perfit_device.training.update import update_row

        cloud_id, name = profile.trained(self.task)
        answers = _ask(profile, name, emit) if self.online else ()
        with profile.vault() as vault:
            versions = personal.read_versions(vault, cloud_id, name)
            if versions is None:
                raise NotFound(f"there is no personal shift for {name} yet; `perfit update` trains one")
            row = update_row(cloud_id, name, versions.task)
            scored = json.loads(vault.get(_KIND, row) or b"{}")
            task = profile.task(name)
            return Insight(
                artefact=name,
                version=versions.current,
                date=journal.now(),
                updates=tuple(journal.read(vault, row)),
                layers=_layers(vault, personal.shift_row(cloud_id, name), versions),
                measured=journal.read_measured(vault, row),
                examples=_learned(scored.get("rows", ()), history.load(vault, versions.task), task),
                examples_date=scored.get("date", ""),
                examples_version=scored.get("version"),
                answers=answers,
                gain_on_test=scored.get("gain_on_test"),
            )


def _layers(vault: Vault, row: str, versions: Versions) -> tuple[Layer, ...]:
    from perfit_device import personal
    from perfit_device.training.distance import distances, read_seed

    seed = read_seed(vault, row, versions.now.artefact_version)
    if seed is None:
        return ()
    cloud_id, _, name = row.partition("/")
    mine = personal.read_tensors(vault, cloud_id, name, versions.current)
    return tuple(Layer(each.layer, each.moved, each.seed) for each in distances(mine, seed))


def _learned(rows: Sequence[Any], items: Sequence[HistoryItem], task: Task) -> tuple[Learned, ...]:
    """Those that are still in the history, by how far their loss fell."""
    by_name = {item.name: item for item in items}
    found = [
        Learned(name, _prompt(by_name[name], task), by_name[name].fields.get(task.gold_field, ""), *losses)
        for name, *losses in rows
        if name in by_name
    ]
    return tuple(sorted(found, key=lambda each: each.drop, reverse=True))


def _prompt(item: HistoryItem, task: Task) -> str:
    """What stands in the question, without the task's template."""
    return item.fields.get(task.text_field) or " · ".join(
        text for name, text in item.fields.items() if name != task.gold_field
    )


def _ask(profile: Profile, name: str, emit: Emit) -> tuple[Answered, ...]:
    """Score the examples that trained under seed and shift, and answer test examples; the scores are kept."""
    from perfit_device import history, personal
    from perfit_device.cloud.codec import ShiftUse
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.evaluation import TaskClient
    from perfit_device.nearest import NearestExamples, examples_before
    from perfit_device.refusals import Refusals
    from perfit_device.training.distance import write_seed
    from perfit_device.training.update import update_row

    cloud, info = profile.connect()
    artefact = profile.artefact(name)
    policy = RetryPolicy(notify=profile.notify)
    seed = policy.call(lambda: cloud.fetch_seed(artefact))
    with profile.vault() as vault:
        refusals = Refusals.read(vault, info, artefact)
        items = [i for i in history.load(vault, artefact.task.name) if i.name not in refusals.names]
        parts = history.split(profile.usable(items, artefact.task))
        mine = personal.load(vault, info.cloud_id, artefact)
        versions = personal.read_versions(vault, info.cloud_id, name)
    if mine is None or versions is None:
        raise NotFound(f"there is no personal shift for {name} yet; `perfit update` trains one")
    alone = TaskClient(cloud, artefact.task, info.limits, policy)
    known, count = [*parts.train, *parts.gate], examples_before(profile, artefact, Mode.PERSONAL)
    tokens = info.limits.prompt_tokens
    near = NearestExamples(artefact.task, known, count, tokens=tokens, refused=refusals.behind)
    behind = replace(alone, before=near.before)
    trained = parts.trained[-_MOST_SCORED:]
    asked, test = [*trained, *parts.test], list(parts.test[-_ANSWERED:])
    total, done = 2 * (len(asked) + len(test)), 0

    def progress(count: int) -> None:
        emit(Progress(done + count, total))

    uses = {"seed": ShiftUse(artefact, seed), "personal": ShiftUse(artefact, mine.tensors)}
    scores: dict[str, Sequence[Score | InvalidPrompt]] = {}
    for which, use in uses.items():
        scores[which] = behind.scores(asked, use, cut=True, progress=progress)
        done += len(asked)
    texts: dict[str, Sequence[str | InvalidPrompt]] = {}
    for which, client, use in (("base", alone, ShiftUse()), ("personal", behind, uses["personal"])):
        texts[which] = client.answers(test, use, progress=progress)
        done += len(test)
    rows = _losses(asked, scores)
    gains = [rows[item.name] for item in parts.test if item.name in rows]
    record = {
        "date": journal.now(),
        "version": versions.current,
        "rows": [[item.name, *rows[item.name]] for item in trained if item.name in rows],
        "gain_on_test": sum(a - b for a, b in gains) / len(gains) if gains else None,
    }
    with profile.vault() as vault, vault.transaction():
        row = update_row(info.cloud_id, name, artefact.task.name)
        vault.put(_KIND, row, json.dumps(record).encode())
        write_seed(vault, personal.shift_row(info.cloud_id, name), artefact, seed)
    return tuple(
        Answered(_prompt(item, artefact.task), item.fields[artefact.task.gold_field], base, personal_)
        for item, base, personal_ in zip(test, texts["base"], texts["personal"], strict=True)
        if isinstance(base, str) and isinstance(personal_, str)
    )


def _losses(
    items: Sequence[HistoryItem], scores: Mapping[str, Sequence[Score | InvalidPrompt]]
) -> dict[str, tuple[float, float]]:
    """Nats a token before and after, of those that the cloud took."""
    found = {}
    for item, before, after in zip(items, scores["seed"], scores["personal"], strict=True):
        if isinstance(before, Score) and isinstance(after, Score):
            found[item.name] = (-before.log_likelihood / before.tokens, -after.log_likelihood / after.tokens)
    return found
