"""Training the personal shift: plan, train, and once more without what the cloud turns out to refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from perfit_device.operations.operation import Emit, Operation, Progress
from perfit_shared.errors import ExamplesRefused, ShiftMismatch
from perfit_shared.types import Mode

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.history import HistoryItem, Split
    from perfit_device.nearest import NearestExamples
    from perfit_device.profile import Profile
    from perfit_device.shift_versions import PersonalShift
    from perfit_device.training import update as updates
    from perfit_device.training.gate import ValidationGate
    from perfit_device.training.update import Finished, Plan, Result
    from perfit_device.vault.store import Vault
    from perfit_shared.shifts import ShiftTensors
    from perfit_shared.types import Score

__all__ = ["Gate", "Trained", "Update", "Updated"]


@dataclass(frozen=True)
class Gate:
    """What let the new version in or kept it out. Losses are in nats a token."""

    before: float
    after: float
    gain: float
    error: float  # of the gain
    examples: int
    folds: int
    accepted: bool
    is_of_seed: bool  # what `before` is: the seed's, or the user's shift as it was
    beats_start: bool  # by more than chance explains: what training began with
    recorded: float | None  # of the user's shift as it was, by its own gate, where it cannot be compared


@dataclass(frozen=True)
class Trained:
    steps: int
    epochs: int  # that were planned
    best_epoch: int
    examples: int
    loss_first: float  # mean over the first epoch's steps, nats a token
    loss_last: float  # over the last epoch's
    gate: Gate
    seconds: float  # over all runs that this update took
    resumed_from: int  # step
    fresh: bool


@dataclass(frozen=True)
class Updated:
    """What an update came to. `trained` is None where there was nothing new to learn."""

    artefact: str
    skipped: int  # examples that were left out
    trained: Trained | None = None
    was_accepted: bool = False  # the update before, where nothing was trained
    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True)
class Update(Operation[Updated]):
    """Train. It tells its `Progress` after each step.

    It works on the history that it read, and takes the vault only to read and to write. After an interrupt
    the finished steps are in the vault. Raises Busy where an update of the task runs already.
    """

    task: str | None = None  # name of an artefact
    # Of the plan: epochs, learning_rate, batch_size, seed. What is missing is the artefact's, or 0.
    settings: Mapping[str, Any] = field(default_factory=dict)
    fresh: bool = False  # start from the seed
    again: bool = False  # also when nothing is new
    anyway: bool = False  # take the new version even where the gate finds it no better
    without: tuple[str, ...] = ()  # names of examples that it leaves out
    checkpoint_seconds: float = 30.0
    retry_seconds: float = 60.0  # to wait for a cloud that is gone

    def run(self, profile: Profile, emit: Emit) -> Updated:
        from perfit_device.cloud.retry import RetryPolicy
        from perfit_device.operations.automatic import warnings_of
        from perfit_device.training.update import update_row

        for warning in warnings_of(profile):
            profile.notify(warning)
        retry_policy = RetryPolicy(give_up=self.retry_seconds, notify=profile.notify)
        cloud, info = profile.connect(retry_policy)
        artefact = profile.artefact(self.task)
        up, down = cloud.bytes_up, cloud.bytes_down
        with profile.updating(update_row(info.cloud_id, artefact.name, artefact.task.name)):
            done = _update(profile, self, artefact, retry_policy, emit)
        return replace(done, bytes_up=cloud.bytes_up - up, bytes_down=cloud.bytes_down - down)


def _update(
    profile: Profile, request: Update, artefact: Artefact, retry_policy: RetryPolicy, emit: Emit
) -> Updated:
    """Once more without what the cloud turns out to refuse."""
    from perfit_device import history
    from perfit_device.evaluation import TaskClient
    from perfit_device.refusals import Refusals
    from perfit_device.training import update as updates

    cloud, info = profile.connect(retry_policy)
    with profile.vault() as vault:
        refusals = Refusals.read(vault, info, artefact)
        without, there = set(request.without), history.load(vault, artefact.task.name)
    items = [item for item in there if item.name not in without]
    usable = profile.usable(items, artefact.task)
    while True:
        fitting = [item for item in usable if item.name not in refusals.names]
        if len(fitting) < len(usable):
            left_out = len(usable) - len(fitting)
            profile.notify(f"{left_out} examples are too long for this cloud and are left out")
        run = _Run(profile, request, artefact, fitting, refusals.behind, retry_policy, emit)
        try:
            return run.train(skipped=len(items) - len(fitting))
        except ExamplesRefused as error:
            refused = [item for item in fitting if item.name in error.names]
            rest = [item for item in fitting if item.name not in error.names]
            before = run.nearest.before
            client = TaskClient(cloud, artefact.task, info.limits, retry_policy, before)
            refused += client.refused_among(rest)
            behind = {item.name: len(found) for item in refused if (found := before(item))}
            names = {item.name for item in refused} - behind.keys()
            with profile.vault() as vault:
                refusals = refusals.with_names(vault, names, behind=behind)
                updates.forget_checkpoint(vault, refusals.row)  # of a plan with these examples


@dataclass(frozen=True)
class _Run:
    """One try, on examples that are not known to be refused."""

    profile: Profile
    request: Update
    artefact: Artefact
    items: Sequence[HistoryItem]
    refused: Mapping[str, int]  # names of those that the cloud does not take behind so many others
    retry_policy: RetryPolicy
    emit: Emit

    @cached_property
    def split(self) -> Split:
        """Raises InvalidData on too few."""
        from perfit_device import history

        return history.split(self.items)

    @cached_property
    def nearest(self) -> NearestExamples:
        """What each example is read behind: those that train, also before one that judges.

        So nothing that judges stands before anything, but in folds, where all train: there an example may
        stand before those that train a copy which it judges, as text that is read and not as what is learned.
        """
        from perfit_device.nearest import examples_of_task

        _, info = self.profile.connect(self.retry_policy)
        found = self._nearest(examples_of_task(self.profile.settings, self.artefact.task))
        # A long history is read behind fewer, or the cloud would take it call by call alone.
        while found.count and found.tokens(self._read) > info.limits.adapt_tokens > 0:
            found = self._nearest(found.count // 2)
        return found

    def _nearest(self, count: int) -> NearestExamples:
        from perfit_device.nearest import NearestExamples

        _, info = self.profile.connect(self.retry_policy)
        task, tokens = self.artefact.task, info.limits.prompt_tokens
        return NearestExamples(task, self.split.trained, count, tokens=tokens, refused=self.refused)

    @property
    def _read(self) -> list[HistoryItem]:
        """By their rows."""
        return [*self.split.train, *self.split.gate]

    def _as_asked(self, current: PersonalShift | None, plan: Plan) -> tuple[updates.Evaluate | None, bool]:
        """(scores as questions are asked now, where that differs, whether its gate judged it so)."""
        from perfit_device.cloud.codec import ShiftUse
        from perfit_device.evaluation import TaskClient
        from perfit_device.nearest import examples_before

        asked = examples_before(self.profile, self.artefact, Mode.PERSONAL)
        if current is None or asked == plan.behind:
            return None, current is None or current.behind == asked
        cloud, info = self.profile.connect(self.retry_policy)
        near = self._nearest(asked)
        client = TaskClient(cloud, self.artefact.task, info.limits, before=near.before)

        def scores(rows: Sequence[int], tensors: ShiftTensors) -> Callable[[], Sequence[Score]]:
            items = [self._read[row] for row in rows]
            return lambda: client.all_scores(items, ShiftUse(self.artefact, tensors), cut=True)

        return scores, current.behind == asked

    def train(self, *, skipped: int) -> Updated:
        from perfit_device import history
        from perfit_device.training import update as updates

        cloud, info = self.profile.connect(self.retry_policy)
        row = updates.update_row(info.cloud_id, self.artefact.name, self.artefact.task.name)
        split = self.split
        with self.profile.vault() as vault:
            plan = self._plan(vault, row, split)
            last = updates.read_finished(vault, row)
            if last is not None and self._is_redundant(last, plan, info.fingerprint):
                return Updated(self.artefact.name, skipped, was_accepted=last.accepted)
            current = self._current(vault, info.cloud_id, plan)
            as_asked, recorded_holds = self._as_asked(current, plan)
            settings = updates.UpdateSettings(
                current=current,
                as_asked=as_asked,
                recorded_holds=recorded_holds,
                forgotten=history.forgotten(vault, self.artefact.task.name),
                names=[item.name for item in (*split.train, *split.gate)],
                known=max(item.order for item in (*split.train, *split.gate, *split.test)),
                fingerprint=info.fingerprint,
                anyway=self.request.anyway,
                retry_policy=self.retry_policy,
                checkpoint_seconds=self.request.checkpoint_seconds,
                progress=lambda done, total, loss: self.emit(Progress(done, total, loss)),
                holds=self._holds(vault, info.cloud_id),
            )
        self.profile.release_vault()
        result = self._result(cloud, plan, split, settings)
        return Updated(self.artefact.name, skipped, _trained(result, plan))

    def _is_redundant(self, last: Finished, plan: Plan, fingerprint: str) -> bool:
        requested = self.request.again or (self.request.anyway and not last.accepted)
        return not requested and (last.plan, last.fingerprint) == (plan, fingerprint)

    def _holds(self, vault: Vault, cloud_id: str) -> Callable[[Vault], bool]:
        """Whether a vault still has these examples and this cloud, and this version as the current one."""
        from perfit_device import history, personal
        from perfit_device.cloud_record import read_record

        def current(vault: Vault) -> int | None:
            versions = personal.read_versions(vault, cloud_id, self.artefact.name)
            return None if versions is None else versions.current

        before = current(vault)
        return lambda vault: (
            current(vault) == before
            and read_record(vault).cloud_id == cloud_id
            and history.has_all(vault, self.items)
        )

    def _result(self, cloud: Cloud, plan: Plan, split: Split, settings: updates.UpdateSettings) -> Result:
        from perfit_device.starts import start_of
        from perfit_device.training import update as updates
        from perfit_device.training.gradients import GradientSource

        _, info = self.profile.connect(self.retry_policy)
        current = settings.current
        with GradientSource(cloud, self.artefact, info.limits, split, self.nearest.before) as source:
            judges = f"judged on the latest {plan.held_out}"
            if current is not None and not plan.anew:
                start = current.tensors
            else:
                found = start_of(self.profile, self.artefact, self.retry_policy, without=self.request.without)
                start = found.tensors
                if plan.folds:
                    judges = f"judged in {plan.folds} folds, each without a part of them, from {found.words}"
            run = updates.Update(
                self.profile.vault,
                info.cloud_id,
                self.artefact,
                plan,
                start=start,
                source=updates.Source(source.gradient, source.scores),
                settings=settings,
            )
            self.profile.notify(
                f"{self.artefact.name}: {plan.examples} examples, "
                + (f"each behind up to {plan.behind} of them that are nearest to it, " if plan.behind else "")
                + f"{judges}; up to {plan.epochs} epochs, {plan.steps} steps"
                + (f", resuming after step {run.resumed_from}" if run.resumed_from else "")
            )
            try:
                return run.run()
            except KeyboardInterrupt:
                self.profile.notify(
                    f"stopped after step {run.step} of {plan.steps}; the same command resumes there"
                )
                raise

    def _current(self, vault: Vault, cloud_id: str, plan: Plan) -> PersonalShift | None:
        from perfit_device import personal

        try:
            return personal.load(vault, cloud_id, self.artefact)
        except ShiftMismatch:
            if not plan.fresh:
                raise
            return None  # made for another artefact, so the gate cannot measure it

    def _plan(self, vault: Vault, row: str, split: Split) -> Plan:
        """The half-done plan if it still holds and the request agrees, else a new one."""
        from perfit_device.training import update as updates
        from perfit_shared.training import Overrides, schedule_for

        artefact, request = self.artefact, dict(self.request.settings)
        schedule = schedule_for(
            "device", artefact, len(split.train), Overrides(**request), held_out=len(split.gate)
        )
        if "batch_size" in request:  # plans hold no batch larger than the history
            request["batch_size"] = schedule.batch_size
        judges = ("examples", "held_out", "folds")  # a half-done update of an earlier perfit has others
        now: dict[str, Any] = {"history": split.digest(), "version": artefact.version}
        now |= {"behind": self.nearest.count, "read": self.nearest.digest(self._read)}
        now |= {name: getattr(schedule, name) for name in judges}
        checkpoint = updates.read_checkpoint(vault, row)
        if checkpoint is not None:
            old = asdict(checkpoint.schedule)
            again = replace(
                checkpoint.schedule, **request, fresh=self.request.fresh or checkpoint.schedule.fresh
            )
            if {key: old[key] for key in now} == now and again == checkpoint.schedule:
                return checkpoint.schedule
            reason = "you asked for other settings"
            if old["read"] != now["read"]:
                reason = "your examples are read behind others than they were"
            if any(old[name] != now[name] for name in judges):
                reason = "an earlier perfit began it"
            if old["version"] != now["version"]:
                reason = "the cloud's artefact changed"
            if old["history"] != now["history"]:
                reason = "your history changed"
            self.profile.notify(
                f"the update that was interrupted cannot be resumed, since {reason}; starting anew"
            )
        return updates.Plan(
            **asdict(schedule),
            fresh=self.request.fresh,
            history=split.digest(),
            version=artefact.version,
            behind=now["behind"],
            read=now["read"],
        )


def _trained(result: Result, plan: Plan) -> Trained:
    return Trained(
        steps=result.steps,
        epochs=result.epochs,
        best_epoch=result.best_epoch,
        examples=result.examples,
        loss_first=result.loss_first,
        loss_last=result.loss_last,
        gate=_gate(result.gate, plan),
        seconds=result.seconds,
        resumed_from=result.resumed_from,
        fresh=plan.fresh,
    )


def _gate(gate: ValidationGate, plan: Plan) -> Gate:
    return Gate(
        before=gate.before,
        after=gate.after,
        gain=gate.shown.gain,
        error=gate.shown.error,
        examples=len(gate.shown.after),
        folds=gate.folds,
        accepted=gate.accepted,
        beats_start=gate.start.is_better,
        is_of_seed=plan.anew and gate.current is None,
        recorded=gate.recorded,
    )
