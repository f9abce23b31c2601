"""Where this user starts: at the plain seed, or at the seed of one of the cloud's communities.

The one with the lowest loss on the user's own examples is taken. The cloud computes the losses, as it does
for `evaluate`, and forgets them; which start it is, the device decides, and keeps sealed:

    start    CLOUD/ARTEFACT/TASK    JSON: which one, and what it was chosen by
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from perfit_device import history
from perfit_shared.errors import InvalidData, InvalidPrompt
from perfit_shared.types import Score
from perfit_shared.validation import mean_loss

if TYPE_CHECKING:
    from perfit_device.cloud.codec import Artefact
    from perfit_device.cloud.retry import RetryPolicy
    from perfit_device.history import HistoryItem
    from perfit_device.profile import Profile
    from perfit_device.vault.store import Vault
    from perfit_shared.shifts import ShiftTensors

__all__ = ["Choice", "Start", "read_choice", "start_of"]

_KIND = "start"


@dataclass(frozen=True)
class Choice:
    """Which start was chosen. Losses are in nats a token, on the examples that it was chosen by."""

    number: int  # of the community, from 1; 0: the plain seed
    of: int  # communities
    examples: int
    seed_loss: float
    loss: float
    digest: str  # over all starts, hex


@dataclass(frozen=True)
class Start:
    tensors: ShiftTensors
    choice: Choice | None = None  # None where there are no communities, or too few examples

    @property
    def is_community(self) -> bool:
        return self.choice is not None and self.choice.number > 0

    @property
    def words(self) -> str:
        """What it is."""
        if self.choice is None or not self.choice.number:
            return "the seed"
        return (
            f"the seed of community {self.choice.number} of {self.choice.of}, which suits your latest "
            f"{self.choice.examples} examples best"
        )


def read_choice(vault: Vault, row: str) -> Choice | None:
    """None where none was made, or by another version of perfit. `row` is that of the checkpoint."""
    try:
        return Choice(**json.loads(vault.get(_KIND, row) or b""))
    except (ValueError, TypeError):
        return None


def start_of(
    profile: Profile, artefact: Artefact, retry_policy: RetryPolicy, *, without: Collection[str] = ()
) -> Start:
    """Fetch the start, chosen anew where the cloud has other ones or there are twice as many examples.

    Examples of the test part have no say, so that they measure what comes of it. Neither have those of the
    names `without`, which are to be forgotten: the choice that is kept is not read then.
    """
    from perfit_device.cloud.codec import ShiftUse
    from perfit_device.evaluation import TaskClient
    from perfit_device.nearest import NearestExamples, examples_of_task
    from perfit_device.refusals import Refusals
    from perfit_shared.starts import CHOOSING, LEAST_TO_CHOOSE

    cloud, info = profile.connect(retry_policy)
    if not artefact.communities:
        return Start(retry_policy.call(lambda: cloud.fetch_seed(artefact)))
    starts = retry_policy.call(lambda: cloud.fetch_starts(artefact))
    digest = hashlib.sha256("".join(each.digest() for each in starts).encode()).hexdigest()
    with profile.vault() as vault:
        refusals = Refusals.read(vault, info, artefact)
        left_out = refusals.names | set(without)
        items = [i for i in history.load(vault, artefact.task.name) if i.name not in left_out]
        choice = None if without else read_choice(vault, refusals.row)
    fitting = _not_tested(profile.usable(items, artefact.task))
    judges = fitting[-CHOOSING:]
    if len(judges) < LEAST_TO_CHOOSE:
        return Start(starts[0])
    if choice is None or choice.digest != digest or _many_more(len(judges), choice.examples):
        tokens, count = info.limits.prompt_tokens, examples_of_task(profile.settings, artefact.task)
        near = NearestExamples(artefact.task, fitting, count, tokens=tokens, refused=refusals.behind)
        client = TaskClient(cloud, artefact.task, info.limits, retry_policy, near.before)
        found = [client.scores(judges, ShiftUse(artefact, start), cut=True) for start in starts]
        choice = _choice(found, digest)
        with profile.vault() as vault:
            vault.put(_KIND, refusals.row, json.dumps(asdict(choice)).encode())
    return Start(starts[choice.number], choice)


def _not_tested(items: Sequence[HistoryItem]) -> list[HistoryItem]:
    """Oldest first: all but the test part, which an update reads neither."""
    try:
        parts = history.split(items)
    except InvalidData:  # too few for an update, and none is set apart but by a file
        return sorted((i for i in items if i.part != "test"), key=lambda i: (i.date, i.order))
    return [*parts.train, *parts.gate]


def _many_more(now: int, before: int) -> bool:
    from perfit_shared.starts import CHOOSING

    return now >= 2 * before or before < now == CHOOSING


def _choice(found: Sequence[Sequence[Score | InvalidPrompt]], digest: str) -> Choice:
    """By the scores of the same examples under every start."""
    from perfit_shared.starts import choose_start

    # What the cloud refuses of an example, it refuses under every start.
    scores = [[score for score in each if isinstance(score, Score)] for each in found]
    number = choose_start(scores)
    losses = [mean_loss(each) if each else 0.0 for each in scores]
    return Choice(number, len(scores) - 1, len(found[0]), losses[0], losses[number], digest)
