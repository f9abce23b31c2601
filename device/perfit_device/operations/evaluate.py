"""What shifts are worth, on examples that none of them has seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfit_device import history, personal, shift_files
from perfit_device.cloud.codec import Artefact, ShiftUse
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.evaluation import Judged, TaskClient
from perfit_device.profile import Profile
from perfit_device.refusals import Refusals
from perfit_shared.errors import InvalidData
from perfit_shared.metrics import measure

if TYPE_CHECKING:
    from perfit_device.history import HistoryItem

__all__ = ["Evaluation", "Report", "prepare"]


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


@dataclass
class Evaluation:
    """What is to be measured, and what is measured so far. It needs no vault."""

    artefact: Artefact
    test: Sequence[HistoryItem]
    uses: Mapping[str, ShiftUse]  # by name
    left_out: int
    _client: TaskClient
    judged: dict[str, Judged] = field(default_factory=dict)

    def run(self, progress: Callable[[str, int, int], None] = lambda *_: None) -> None:
        """Measure; equal shifts are measured once. `progress` gets name, done and total.

        After an error or an interrupt `judged` has what was measured until then.
        """
        same: dict[str, str] = {}  # digest of the tensors → the first name they have
        total = 2 * len(self.test)
        for name, use in self.uses.items():
            digest = use.personal.digest() if use.personal is not None else name
            first = same.setdefault(digest, name)
            if first != name:
                self.judged[name] = self.judged[first]
                continue

            def report(done: int, name: str = name) -> None:
                progress(name, done, total)

            self.judged[name] = self._client.judge(self.test, use, progress=report)

    def report(self) -> Report:
        """Of what is measured. Raises InvalidData when no example is left."""
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

    def _rows(self) -> list[int]:
        """The examples that the cloud took under every shift."""
        every = range(len(self.test))
        rows = [row for row in every if all(judged.is_whole(row) for judged in self.judged.values())]
        if not rows:
            raise InvalidData("the cloud refuses every example of the test part as too long")
        return rows


def prepare(
    profile: Profile, task: str | None = None, *, with_seed: bool = False, shift: Path | None = None
) -> Evaluation:
    """The test part, and the shifts to measure on it; `shift` is somebody's exported one."""
    cloud, info = profile.connect()
    artefact = profile.artefact(task)
    retry_policy = RetryPolicy(notify=profile.notify)
    with profile.vault() as vault:
        items = history.load(vault, artefact.task.name)
        # Split as an update does, or examples of its gate could be among these.
        refused = Refusals.read(vault, info, artefact).names
        usable = [item for item in profile.usable(items, artefact.task) if item.name not in refused]
        test = history.split(usable).test
        mine = personal.load(vault, info.cloud_id, artefact)
    if mine is None:
        profile.notify("no personal shift yet, so personal is the seed; `perfit update` trains one")
    uses = {"base": ShiftUse(), "collective": ShiftUse(artefact)}
    if with_seed or mine is None:
        uses["seed"] = ShiftUse(artefact, retry_policy.call(lambda: cloud.fetch_seed(artefact)))
    uses["personal"] = ShiftUse(artefact, mine.tensors) if mine else uses["seed"]
    if shift is not None:
        uses["other"] = ShiftUse(artefact, shift_files.read_file(shift, artefact))
    client = TaskClient(cloud, artefact.task, info.limits, retry_policy)
    return Evaluation(artefact, test, uses, len(items) - len(usable), client)
