"""Training the personal shift: plan, train, and once more without what the cloud turns out to refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from perfit_device import history, personal
from perfit_device.cloud.codec import Artefact
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.evaluation import TaskClient
from perfit_device.profile import Profile
from perfit_device.refusals import Refusals
from perfit_device.training import update as updates
from perfit_device.training.gradients import GradientSource
from perfit_device.training.update import Finished, Plan, Result
from perfit_shared.errors import ExamplesRefused, ShiftMismatch
from perfit_shared.training import Overrides, schedule_for

if TYPE_CHECKING:
    from perfit_device.history import Split
    from perfit_device.personal import PersonalShift
    from perfit_device.vault.store import Vault

__all__ = ["UpdateRequest", "Updated", "update"]


@dataclass(frozen=True)
class UpdateRequest:
    """What the user wants."""

    task: str | None = None  # name of an artefact
    # Of the plan: epochs, learning_rate, batch_size, seed. What is missing is the artefact's, or 0.
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False  # start from the seed
    again: bool = False  # also when nothing is new
    anyway: bool = False  # take the new version even where the gate finds it no better
    checkpoint_seconds: float = 30.0
    retry_seconds: float = 60.0  # to wait for a cloud that is gone


@dataclass(frozen=True)
class Updated:
    """What an update came to. `result` is None where there was nothing new to learn."""

    artefact: Artefact
    plan: Plan
    skipped: Sequence[str]  # names of examples that were left out
    result: Result | None = None
    was_accepted: bool = False  # the update before, where there is no result


def update(
    profile: Profile, request: UpdateRequest, progress: Callable[[int, int, float], None] = lambda *_: None
) -> Updated:
    """Train. `progress` gets step, steps and loss.

    It holds the vault until it ends. After an interrupt the finished steps are in the vault.
    """
    retry_policy = RetryPolicy(give_up=request.retry_seconds, notify=profile.notify)
    cloud, info = profile.connect(retry_policy)
    artefact = profile.artefact(request.task)
    with profile.vault() as vault:
        refusals = Refusals.read(vault, info, artefact)
        items = history.load(vault, artefact.task.name)
        usable = profile.usable(items, artefact.task)
        while True:
            fitting = [item for item in usable if item.name not in refusals.names]
            if len(fitting) < len(usable):
                left_out = len(usable) - len(fitting)
                profile.notify(f"{left_out} examples are too long for this cloud and are left out")
            run = _Run(profile, vault, request, artefact, history.split(fitting), retry_policy, progress)
            try:
                return run.train([item.name for item in items if item not in fitting])
            except ExamplesRefused as error:
                rest = [item for item in fitting if item.name not in error.names]
                client = TaskClient(cloud, artefact.task, info.limits, retry_policy)
                more = client.refused_among(rest)
                refusals = refusals.with_names(vault, [*error.names, *(item.name for item in more)])
                updates.forget_checkpoint(vault, refusals.row)  # of a plan with these examples


@dataclass(frozen=True)
class _Run:
    """One try, on examples that are not known to be refused."""

    profile: Profile
    vault: Vault
    request: UpdateRequest
    artefact: Artefact
    split: Split
    retry_policy: RetryPolicy
    progress: Callable[[int, int, float], None]

    def train(self, skipped: Sequence[str]) -> Updated:
        _, info = self.profile.connect()
        row = updates.update_row(info.cloud_id, self.artefact.name, self.artefact.task.name)
        plan = self._plan(row)
        last = updates.read_finished(self.vault, row)
        if last is not None and self._is_redundant(last, plan, info.fingerprint):
            return Updated(self.artefact, plan, skipped, was_accepted=last.accepted)
        return Updated(self.artefact, plan, skipped, self._result(plan))

    def _is_redundant(self, last: Finished, plan: Plan, fingerprint: str) -> bool:
        requested = self.request.again or (self.request.anyway and not last.accepted)
        return not requested and (last.plan, last.fingerprint) == (plan, fingerprint)

    def _result(self, plan: Plan) -> Result:
        cloud, info = self.profile.connect()
        current = self._current(plan)
        with GradientSource(cloud, self.artefact, info.limits, self.split) as source:
            if current is not None and not plan.anew:
                start = current.tensors
            else:
                start = self.retry_policy.call(lambda: cloud.fetch_seed(self.artefact))
            run = updates.Update(
                self.vault,
                info.cloud_id,
                self.artefact,
                plan,
                start=start,
                source=updates.Source(source.gradient, source.scores),
                settings=updates.UpdateSettings(
                    current=current,
                    forgotten=history.forgotten(self.vault, self.artefact.task.name),
                    fingerprint=info.fingerprint,
                    anyway=self.request.anyway,
                    retry_policy=self.retry_policy,
                    checkpoint_seconds=self.request.checkpoint_seconds,
                    progress=self.progress,
                ),
            )
            judges = f"judged on the latest {plan.held_out}"
            if plan.folds:
                judges = f"judged in {plan.folds} folds, each without a part of them, from the seed"
            self.profile.notify(
                f"{self.artefact.name}: {plan.examples} examples, {judges}; "
                f"up to {plan.epochs} epochs, {plan.steps} steps"
                + (f", resuming after step {run.resumed_from}" if run.resumed_from else "")
            )
            try:
                return run.run()
            except KeyboardInterrupt:
                self.profile.notify(
                    f"stopped after step {run.step} of {plan.steps}; `perfit update` resumes there"
                )
                raise

    def _current(self, plan: Plan) -> PersonalShift | None:
        _, info = self.profile.connect()
        try:
            return personal.load(self.vault, info.cloud_id, self.artefact)
        except ShiftMismatch:
            if not plan.fresh:
                raise
            return None  # made for another artefact, so the gate cannot measure it

    def _plan(self, row: str) -> Plan:
        """The half-done plan if it still holds and the request agrees, else a new one."""
        artefact, split, request = self.artefact, self.split, dict(self.request.settings)
        schedule = schedule_for(
            "device", artefact, len(split.train), Overrides(**request), held_out=len(split.gate)
        )
        if "batch_size" in request:  # plans hold no batch larger than the history
            request["batch_size"] = schedule.batch_size
        judges = ("examples", "held_out", "folds")  # a half-done update of an earlier perfit has others
        now = {"history": split.digest(), "version": artefact.version}
        now |= {name: getattr(schedule, name) for name in judges}
        checkpoint = updates.read_checkpoint(self.vault, row)
        if checkpoint is not None:
            old = asdict(checkpoint.schedule)
            again = replace(
                checkpoint.schedule, **request, fresh=self.request.fresh or checkpoint.schedule.fresh
            )
            if {key: old[key] for key in now} == now and again == checkpoint.schedule:
                return checkpoint.schedule
            reason = "you asked for other settings"
            if any(old[name] != now[name] for name in judges):
                reason = "an earlier perfit began it"
            if old["version"] != now["version"]:
                reason = "the cloud's artefact changed"
            if old["history"] != now["history"]:
                reason = "your history changed"
            self.profile.notify(
                f"the update that was interrupted cannot be resumed, since {reason}; starting anew"
            )
        return Plan(
            **asdict(schedule), fresh=self.request.fresh, history=split.digest(), version=artefact.version
        )
