"""One device of the load: what it asks, what it must get, and what may go wrong on the way.

Before the load every device asks everything once, alone. Under load the same question must get

- the same text, letter for letter: decoding is greedy and in float32. What batch a request shares changes
  its logits by about 1e-5, and the two highest of this model lie further apart than that; a tie would show
  here as a wrong answer.
- log-likelihoods and losses within 1e-4 of their size, gradients within GRADIENT of the largest of their
  tensor: sums in another order, and then one step of float16, in which they travel.
- an update the same tensors within UPDATE of how far training moved them: Adam divides by the gradient's
  own size, so that a last bit of an entry near zero can turn a step of it around.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from perfit_device import history, personal
from perfit_device.cloud.channels import mutual_channel
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import (
    ANSWER_DTYPE,
    CloudInfo,
    ShiftUse,
    prompt_to_wire,
    sampling_to_wire,
    shift_to_wire,
)
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.cloud.questions import ask_all
from perfit_device.cloud.retry import TRANSIENT, RetryPolicy
from perfit_device.history import HistoryItem
from perfit_device.training import update as updates
from perfit_device.training.gradients import GradientSource
from perfit_device.vault.crypto import KdfParams
from perfit_device.vault.store import Vault
from perfit_shared.errors import Cancelled, PerfitError, UpdateFailed
from perfit_shared.invites import Invite
from perfit_shared.shifts import ShiftTensors
from perfit_shared.starts import near_identity
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb
from perfit_shared.wire import personalization_pb2_grpc as services

__all__ = ["GRADIENT", "KINDS", "LOSS", "UPDATE", "Device", "Tally", "Wrong"]

LOSS = 1e-4  # relative
GRADIENT = 2.0**-9  # of the largest entry of the tensor: two steps of float16 there
UPDATE = 0.05  # of the largest move of the tensor's entries
# What is asked, and how often in a hundred.
KINDS = {
    "generate_base": 18,
    "generate_collective": 14,
    "generate_personal": 26,
    "ask": 8,
    "score": 10,
    "gradient": 12,
    "describe": 6,
    "cancelled": 4,
    "deadline": 2,
}
_WORDS = ["the", "cat", "dog", "mat", "door", "sat", "ran", "to", "on", "and", "a", "red", "old", "big"]
_PASSPHRASE = "a passphrase for this run only"  # noqa: S105 - protects nothing
_CHEAP = KdfParams(memory_kib=32, iterations=1, lanes=1)
_EXAMPLES = 20  # of a history: 12 to train on
_VARIANTS = 3  # of every kind of question
_NEW_TOKENS = 6
_PATIENCE = 300.0  # seconds, with every call: a restart takes seconds, on a busy machine many
_SHORT_PATIENCE = 3.0  # of an update, so that some give up and resume
_PERSONAL_ERRORS = (*TRANSIENT, Cancelled)


class Wrong(Exception):
    """An answer that is not the one it was before, or an error that no fault explains."""


@dataclass
class Tally:
    """What became of a device's calls."""

    answered: Counter[str] = field(default_factory=Counter)  # and right
    faults: Counter[str] = field(default_factory=Counter)  # that were met on the way, by error
    updates: int = 0
    resumed: int = 0  # updates that gave up and went on from their checkpoint
    furthest: dict[str, float] = field(
        default_factory=dict
    )  # from the references, as shares of what is allowed

    def to_json(self) -> dict[str, Any]:
        return {
            "answered": dict(self.answered.most_common()),
            "faults": dict(self.faults.most_common()),
            "updates": self.updates,
            "resumed": self.resumed,
            "furthest": self.furthest,
        }

    def add(self, other: Tally) -> None:
        self.answered += other.answered
        self.faults += other.faults
        self.updates += other.updates
        self.resumed += other.resumed
        for name, share in other.furthest.items():
            self.furthest[name] = max(share, self.furthest.get(name, 0.0))


class Device:
    """Enrolled, with a vault, a history and a shift of its own. Used by one thread."""

    def __init__(
        self, number: int, invite: Invite, folder: Path, *, seed: int, kinds: Mapping[str, int] = KINDS
    ) -> None:
        self.number = number
        self.tally = Tally()
        self._kinds = kinds
        self.progress = 0  # calls answered and tries at an update
        self._random = random.Random(f"{seed}/{number}")
        self._enrolment: Enrolment = enroll(invite, Identity.create())
        self._vault = Vault.create(folder / f"{number}.db", _PASSPHRASE, kdf=_CHEAP)
        self._cloud = Cloud(self._enrolment)
        self._channel = mutual_channel(self._enrolment, self._enrolment.address)
        self._stub: Any = services.PersonalizationStub(self._channel)
        info: CloudInfo = self._cloud.describe()
        self._info = info
        self._artefact = next(a for a in info.artefacts if a.name == "news_headline")
        self._shift = near_identity(
            self._artefact.spec, self._artefact.spec.personal_rank, seed=1000 * seed + number, size=0.3
        )
        history.add(self._vault, self._history())
        self._questions = self._make_questions()
        self._references: dict[tuple[str, int], Any] = {}

    def close(self) -> None:
        self._cloud.close()
        self._channel.close()
        self._vault.close()

    # -- what it asks ------------------------------------------------------------------------------------

    def learn_references(self) -> None:
        """Ask everything once, alone."""
        for kind in ("generate_base", "generate_collective", "generate_personal", "ask", "score", "gradient"):
            for variant in range(_VARIANTS):
                self._references[kind, variant] = self._ask(kind, variant)
        self._references["update", 0] = self._updated(RetryPolicy(give_up=_PATIENCE))

    def call(self) -> tuple[str, float]:
        """One call, of a kind and a variant that the seed chooses; its kind and seconds. Raises Wrong."""
        begun = time.monotonic()
        kind = self._random.choices(list(self._kinds), list(self._kinds.values()))[0]
        variant = self._random.randrange(_VARIANTS)
        if kind in ("cancelled", "deadline"):
            self._left(kind, variant)
        else:
            found = self._patiently(lambda: self._ask(kind, variant))
            if kind != "describe":
                self._compare(kind, found, self._references[kind, variant])
        self.tally.answered[kind] += 1
        self.progress += 1
        return kind, time.monotonic() - begun

    def update(self) -> None:
        """A whole update, which must end where the undisturbed one ended. Raises Wrong."""
        found = None
        while found is None:
            try:
                found = self._updated(RetryPolicy(give_up=_SHORT_PATIENCE))
            except UpdateFailed:
                self.tally.resumed += 1
            except _PERSONAL_ERRORS as error:  # before its first step
                self._met(error)
            self.progress += 1
        self._compare("update", found, self._references["update", 0])
        self.tally.updates += 1

    def _ask(self, kind: str, variant: int) -> Any:
        prompts, pairs = self._questions[variant]
        sampling = Sampling(_NEW_TOKENS)
        cloud, artefact = self._cloud, self._artefact
        mine = ShiftUse(artefact, self._shift)
        if kind.startswith("generate"):
            use = {"base": ShiftUse(), "collective": ShiftUse(artefact), "personal": mine}[kind[9:]]
            return "".join(piece.text for piece in cloud.generate(prompts[0], use, sampling))
        if kind == "ask":
            return ask_all(cloud, mine, [(prompt, sampling) for prompt in prompts], in_flight=2)
        if kind == "score":
            return [score.log_likelihood for score in cloud.score(pairs, mine)]
        if kind == "gradient":
            return cloud.compute_gradient(pairs, artefact, self._shift)
        return cloud.describe().fingerprint == self._info.fingerprint

    def _left(self, kind: str, variant: int) -> None:
        """A call that is not waited for: left at its first piece, or by a deadline too short for it."""
        prompt = self._questions[variant][0][0]
        use = ShiftUse(self._artefact, self._shift)
        request = pb.GenerateRequest(
            prompt=prompt_to_wire(prompt),
            shift=shift_to_wire(use, ANSWER_DTYPE),
            sampling=sampling_to_wire(Sampling(_NEW_TOKENS)),
        )
        seconds = _PATIENCE if kind == "cancelled" else self._random.uniform(0.001, 0.03)
        call = self._stub.Generate(request, timeout=seconds)
        try:
            for _ in call:
                if kind == "cancelled":
                    break
        except grpc.RpcError as error:
            passing = {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"}
            if error.code().name not in passing:
                said = f"{error.code().name}: {error.details()}"
                raise Wrong(f"a call that was left ended with {said}") from error
            self.tally.faults[error.code().name] += 1
        finally:
            call.cancel()

    def _patiently(self, ask: Callable[[], Any]) -> Any:
        """The answer, however often it takes; every error on the way must be one that a fault explains."""

        def once() -> Any:
            try:
                return ask()
            except _PERSONAL_ERRORS as error:
                self._met(error)
                raise
            except PerfitError as error:
                raise Wrong(f"{type(error).__name__}: {error}") from error

        while True:
            try:
                return RetryPolicy(give_up=_PATIENCE).call(once)
            except Cancelled:  # a connection that was cut; the device did not do it
                continue
            except TRANSIENT as error:
                raise Wrong(f"no answer within {_PATIENCE:g} s: {error}") from error

    def _met(self, error: PerfitError) -> None:
        self.tally.faults[type(error).__name__] += 1

    def _updated(self, retry_policy: RetryPolicy) -> tuple[float, ShiftTensors]:
        """(loss of the gate's part, the tensors) after training anew from the seed."""
        info, artefact, vault = self._info, self._artefact, self._vault
        split = history.split(history.load(vault, artefact.task.name))
        epochs, batch = 2, 4
        plan = updates.Plan(
            epochs=epochs,
            learning_rate=artefact.learning_rate,
            batch_size=batch,
            seed=self.number,
            examples=len(split.train),
            held_out=len(split.gate),
            fresh=True,
            history=split.digest(),
            version=artefact.version,
        )
        start = self._patiently(lambda: self._cloud.fetch_seed(artefact))
        with GradientSource(self._cloud, artefact, info.limits, split) as source:
            run = updates.Update(
                lambda: nullcontext(vault),
                info.cloud_id,
                artefact,
                plan,
                start=start,
                source=updates.Source(source.gradient, source.scores),
                settings=updates.UpdateSettings(retry_policy=retry_policy, checkpoint_seconds=0.5),
            )
            result = run.run()
        kept = personal.load(vault, info.cloud_id, artefact)
        if not result.gate.accepted or kept is None:
            raise Wrong("an update that should lower the loss did not")
        return result.gate.after, kept.tensors

    def _history(self) -> Iterator[HistoryItem]:
        rng = random.Random(f"history {self.number}")
        for _ in range(_EXAMPLES):
            item = {"text": " ".join(rng.choices(_WORDS, k=6)), "title": f"the {rng.choice(_WORDS)} sat"}
            yield HistoryItem.make(self._artefact.task, item)

    def _make_questions(self) -> list[tuple[list[str], list[tuple[str, str]]]]:
        """(prompts, pairs of prompt and answer) of each variant."""
        rng = random.Random(f"questions {self.number}")

        def text() -> str:
            return " ".join(rng.choices(_WORDS, k=rng.randint(3, 20)))

        return [
            ([text() for _ in range(3)], [(text(), f" {text()}"[:20]) for _ in range(3)])
            for _ in range(_VARIANTS)
        ]

    # -- what it must get ----------------------------------------------------------------------------------

    def _compare(self, kind: str, found: Any, wanted: Any) -> None:
        if kind in ("generate_base", "generate_collective", "generate_personal", "ask"):
            if found != wanted:
                raise Wrong(f"{kind} of device {self.number} answered {found!r}, and alone {wanted!r}")
        elif kind == "score":
            self._within("log-likelihoods", found, wanted, LOSS * np.abs(wanted))
        elif kind == "gradient":
            self._within("losses", found[:1], wanted[:1], LOSS * abs(wanted[0]))
            for (_, mine), (_, theirs) in zip(found[2].named(), wanted[2].named(), strict=True):
                self._within("gradients", mine, theirs, GRADIENT * np.abs(theirs).max())
        else:
            self._within("losses of updates", found[:1], wanted[:1], UPDATE * abs(wanted[0]))
            moves = _moves(wanted[1], self._cloud_seed())
            for (_, mine), (_, theirs), move in zip(found[1].named(), wanted[1].named(), moves, strict=True):
                self._within("tensors of updates", mine, theirs, UPDATE * move)

    def _cloud_seed(self) -> ShiftTensors:
        if ("seed", 0) not in self._references:
            self._references["seed", 0] = self._patiently(lambda: self._cloud.fetch_seed(self._artefact))
        return self._references["seed", 0]

    def _within(self, what: str, found: Any, wanted: Any, allowed: Any) -> None:
        share = float(
            np.max(np.abs(np.asarray(found, np.float64) - np.asarray(wanted, np.float64)) / allowed)
        )
        self.tally.furthest[what] = max(share, self.tally.furthest.get(what, 0.0))
        if not share <= 1:
            raise Wrong(f"{what} of device {self.number} are {share:.3g} times what they may be off")


def _moves(tensors: ShiftTensors, seed: ShiftTensors) -> Sequence[float]:
    """By how much training moved the entry of each tensor that it moved furthest."""
    pairs = zip(tensors.named(), seed.named(), strict=True)
    return [float(np.abs(mine - start).max()) for (_, mine), (_, start) in pairs]
