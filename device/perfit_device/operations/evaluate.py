"""What shifts are worth, on examples that none of them has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from perfit_device.operations.operation import Emit, Event, Operation
from perfit_shared.errors import InvalidData, PerfitError, Unavailable
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact, ShiftUse
    from perfit_device.evaluation import Judged, TaskClient
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault

__all__ = ["Evaluate", "Measured", "Report", "Stopped"]


@dataclass(frozen=True)
class Report:
    """Figures by the name of the shift, in the order in which they were measured."""

    task: str  # name of the artefact
    metric_name: str
    examples: int  # that the cloud took under every shift
    skipped: int  # of the test part, which it refused now
    left_out: int  # of all parts: those known to be too long, or without fields of the task
    loss: Mapping[str, float]  # nats a token
    metric: Mapping[str, float]
    answers: Sequence[Mapping[str, str]]  # of each example, "gold" in front


@dataclass(frozen=True)
class Measured(Event):
    """How many scores and answers of one shift there are."""

    name: str
    done: int
    total: int


@dataclass(frozen=True)
class Stopped(Event):
    """An error or an interrupt ends it; which shifts are measured, of which, and what they came to."""

    measured: Sequence[str]
    of: Sequence[str]
    report: Report | None = None


@dataclass(frozen=True)
class Evaluate(Operation[Report]):
    """`shift` is somebody's exported one, as its file has it."""

    task: str | None = None
    with_seed: bool = False
    shift: bytes | None = None
    shift_name: str = ""  # of the file

    def run(self, profile: Profile, emit: Emit) -> Report:
        evaluation = _prepare(profile, self)
        profile.release_vault()
        try:
            evaluation.run(emit)
        except (KeyboardInterrupt, PerfitError) as error:
            report = None
            if evaluation.judged:
                with contextlib.suppress(InvalidData):  # that no example is left is not why it stopped
                    report = evaluation.report()
            elif isinstance(error, PerfitError):
                raise
            emit(Stopped(list(evaluation.judged), list(evaluation.uses), report))
            raise
        found = evaluation.report()
        with contextlib.suppress(Unavailable), profile.vault() as vault:  # another process may have it
            evaluation.remember(vault, found)
        return found


@dataclass
class _Evaluation:
    """What is to be measured, and what is measured so far."""

    artefact: Artefact
    test: Sequence[HistoryItem]
    uses: Mapping[str, ShiftUse]  # by name
    left_out: int
    clients: Mapping[str, TaskClient]  # by name: each asks behind as many own examples as questions have
    row: str  # of the task's updates
    version: int | None  # of the personal shift
    judged: dict[str, Judged] = field(default_factory=dict)

    def run(self, emit: Emit) -> None:
        """Measure; equal shifts are measured once.

        After an error or an interrupt `judged` has what was measured until then.
        """
        from perfit_shared.shifts import ShiftTensors

        same: dict[tuple[str, TaskClient], str] = {}  # digest of the tensors, and who asks → the first name
        total = 2 * len(self.test)

        def report(name: str, done: int) -> None:
            emit(Measured(name, done, total))

        for name, use in self.uses.items():
            digest = use.personal.digest() if isinstance(use.personal, ShiftTensors) else name
            client = self.clients[name]
            first = same.setdefault((digest, client), name)
            if first != name:
                self.judged[name] = self.judged[first]
            else:
                self.judged[name] = client.judge(self.test, use, progress=partial(report, name))

    def report(self) -> Report:
        """Of what is measured. Raises InvalidData when no example is left."""
        from perfit_shared.metrics import measure

        task, rows = self.artefact.task, self._rows()
        golds = [self.test[row].fields[task.gold_field] for row in rows]
        texts = {name: judged.texts(rows) for name, judged in self.judged.items()}
        return Report(
            task=self.artefact.name,
            metric_name=task.metric,
            examples=len(rows),
            skipped=len(self.test) - len(rows),
            left_out=self.left_out,
            loss={name: judged.loss(rows) for name, judged in self.judged.items()},
            metric={name: measure(task.metric, given, golds) for name, given in texts.items()},
            answers=[
                {"gold": gold, **{name: given[at] for name, given in texts.items()}}
                for at, gold in enumerate(golds)
            ],
        )

    def remember(self, vault: Vault, report: Report) -> None:
        """Keep the figures for `perfit status`; not those of somebody else's shift."""
        from perfit_device.training import journal

        measured = journal.Measured(
            date=journal.now(),
            version=self.version,
            examples=report.examples,
            metric_name=report.metric_name,
            loss={name: loss for name, loss in report.loss.items() if name != "other"},
            metric={name: value for name, value in report.metric.items() if name != "other"},
        )
        journal.write_measured(vault, self.row, measured)

    def _rows(self) -> list[int]:
        """The examples that the cloud took under every shift."""
        every = range(len(self.test))
        rows = [row for row in every if all(judged.is_whole(row) for judged in self.judged.values())]
        if not rows:
            raise InvalidData("the cloud refuses every example of the test part as too long")
        return rows


def _prepare(profile: Profile, request: Evaluate) -> _Evaluation:
    """The test part, and the shifts to measure on it."""
    from perfit_device import history, personal, shift_files
    from perfit_device.cloud.codec import ShiftUse
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.evaluation import TaskClient
    from perfit_device.nearest import NearestExamples, examples_before, examples_of_task
    from perfit_device.refusals import Refusals
    from perfit_device.starts import start_of
    from perfit_device.training.update import update_row

    cloud, info = profile.connect()
    artefact = profile.artefact(request.task)
    retry_policy = RetryPolicy(notify=profile.notify)
    with profile.vault() as vault:
        items = history.load(vault, artefact.task.name)
        # Split as an update does, or examples of its gate could be among these.
        refused = Refusals.read(vault, info, artefact).names
        usable = [item for item in profile.usable(items, artefact.task) if item.name not in refused]
        parts = history.split(usable)
        mine = personal.load(vault, info.cloud_id, artefact)
        versions = personal.read_versions(vault, info.cloud_id, artefact.name)
    uses = {"base": ShiftUse(), "collective": ShiftUse(artefact)}
    if request.with_seed or mine is None:
        uses["seed"] = ShiftUse(artefact, retry_policy.call(lambda: cloud.fetch_seed(artefact)))
    if mine is not None:
        uses["personal"] = ShiftUse(artefact, mine.tensors)
    else:
        start = start_of(profile, artefact, retry_policy)
        profile.notify(f"no personal shift yet, so personal is {start.words}; `perfit update` trains one")
        uses["personal"] = ShiftUse(artefact, start.tensors) if start.is_community else uses["seed"]
    if request.shift is not None:
        other = shift_files.read(request.shift, request.shift_name, artefact)
        uses["other"] = ShiftUse(artefact, other)
    count = examples_before(profile, artefact, Mode.PERSONAL)
    counts = {name: 0 if use.personal is None else count for name, use in uses.items()}
    if request.shift is not None:
        behind = shift_files.behind_of(request.shift, profile.settings, artefact.task)
        counts["other"] = examples_of_task(profile.settings, artefact.task, behind)
    by_count: dict[int, TaskClient] = {}
    for number in {*counts.values()}:
        near = NearestExamples(
            artefact.task, [*parts.train, *parts.gate], number, tokens=info.limits.prompt_tokens
        )
        by_count[number] = TaskClient(cloud, artefact.task, info.limits, retry_policy, near.before)
        if number:
            names = [name for name, of_name in counts.items() if of_name == number]
            profile.notify(f"asked behind {number} of your examples: {', '.join(names)}")
    clients = {name: by_count[number] for name, number in counts.items()}
    row = update_row(info.cloud_id, artefact.name, artefact.task.name)
    version = versions.current if versions else None
    left_out = len(items) - len(usable)
    return _Evaluation(artefact, parts.test, uses, left_out, clients, row, version)
