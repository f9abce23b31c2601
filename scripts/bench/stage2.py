"""How long personal training takes, ours beside a loop that does what the reference stack does.

    python scripts/bench/stage2.py --data ../shared/data/lamp_news --model ../shared/models/newslm --json stage2.json

Real authors with their own histories, the presets' layers, ranks, and the paper's schedule; collective shift
and seed are the identity. Both sides take the same batches in the same order from the same tensors at
the same rates. Ours is what `perfit-cloud lamp run` calls, one user at a time and all users together;
the reference (reference.py) knows one user at a time. The two take turns, user by user, so that
whatever else the machine does falls on both. Seconds are sums over users, of the fastest of
`--rounds`; losses are means over the target tokens of all held-out queries, nats.
"""  # noqa: E501 - the command keeps its line

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import reference
import torch

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.lamp import stage2
from perfit_cloud.lamp.people import Learner, Person, read_people
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.presets import preset_for
from perfit_shared.shifts import ShiftTensors
from perfit_shared.tasks import load_task
from perfit_shared.types import Mode

_KEEP_BYTES = 4 << 30  # of activations, as `lamp run` keeps by default


@dataclass(frozen=True)
class Setting:
    task: str  # its preset gives layers, ranks, positions, batch and epochs
    prompt_tokens: int | None = None  # prompts are made this long; None: as they are


SETTINGS = (Setting("news_categorize"), Setting("news_headline"), Setting("news_headline", 200))


@dataclass(frozen=True)
class Times:
    """Of one setting: seconds of ours alone and of the reference by user, of ours together; tensors."""

    alone: list[float]
    reference: list[float]
    together: float
    ours: list[ShiftTensors]  # by user
    ours_together: list[ShiftTensors]
    theirs: list[ShiftTensors]


@dataclass(frozen=True)
class Tokens(Learner):
    """A person as tokens."""

    queries: tuple[Pair, ...]

    @classmethod
    def of(cls, person: Person, encoder: Encoder) -> Tokens:
        queries = tuple(encoder.query(query.item).pair for query in person.queries)
        return cls(person.user_id, Learner.of(person, encoder).history, queries)


def lengthened(person: Tokens, tokens: int) -> Tokens:
    """Every prompt led by the person's articles before it (the first by the last), to `tokens` tokens."""

    def lead(earlier: Sequence[Pair], pair: Pair) -> Pair:
        prompt = list(pair[0])
        for before in reversed(earlier):
            if len(prompt) >= tokens:
                break
            prompt = [*before[0], *before[1], *prompt]
        return prompt[-tokens:], pair[1]

    past = list(person.history)
    return replace(
        person,
        history=tuple(lead(past[i + 1 :] + past[:i], pair) for i, pair in enumerate(past)),
        queries=tuple(lead(past, pair) for pair in person.queries),
    )


class Bench:
    """A model with our engines on it."""

    def __init__(
        self, base: BaseModel, data: Path, *, users: slice, epochs: int | None, rate: float, rounds: int
    ) -> None:
        self._base, self._data, self._epochs = base, data, epochs
        self._users, self._rate, self._rounds = users, rate, rounds
        self._adaptation = UpdateEngine(base, keep_bytes=_KEEP_BYTES)
        self._gradients = GradientEngine(base)

    def rows(self, setting: Setting) -> list[dict[str, Any]]:
        """Two rows of the result: one user at a time, and all together."""
        task = load_task(self._data / setting.task, setting.task).resolved(False)
        read = list(read_people(self._data / setting.task, task, self._base).people)[self._users]
        people = [Tokens.of(person, Encoder(self._base, task)) for person in read]
        if setting.prompt_tokens is not None:
            people = [lengthened(person, setting.prompt_tokens) for person in people]
        artefact = self._artefact(setting)
        times = self._times(people, artefact)
        prompts = [len(prompt) for person in people for prompt, _ in person.history]
        theirs = self._loss(people, artefact, times.theirs)
        made = []
        for together, seconds, tensors in (
            (1, sum(times.alone), times.ours),
            (len(people), times.together, times.ours_together),
        ):
            made.append(
                {
                    "preset": artefact.spec.positions,
                    "prompt_tokens": round(sum(prompts) / len(prompts)),
                    "users_together": together,
                    "ours_seconds": seconds,
                    "reference_seconds": sum(times.reference),
                    "ratio": sum(times.reference) / seconds,
                    "ours_loss": self._loss(people, artefact, tensors),
                    "reference_loss": theirs,
                }
            )
        return made

    def _artefact(self, setting: Setting) -> Artefact:
        preset = preset_for(setting.task)
        spec = preset.spec(blocks=self._base.blocks, hidden_size=self._base.hidden_size)
        return Artefact(
            name=setting.task,
            spec=spec,
            task=load_task(self._data / setting.task, setting.task).resolved(False),
            fingerprint=self._base.fingerprint,
            batch_size=preset.batch_size,
            epochs=self._epochs or preset.epochs,
            collective=ShiftTensors.identity(spec, spec.collective_rank, seed=1),
            seed=ShiftTensors.identity(spec, spec.personal_rank, seed=2),
            learning_rate=self._rate,
        )

    def _times(self, people: Sequence[Tokens], artefact: Artefact) -> Times:
        settings = stage2.Stage2Settings(artefact.epochs, self._rate, artefact.batch_size, seed=0)
        alone, theirs, together = [], [], []
        for turn in range(self._rounds):
            together.append(self._ours(people, artefact, settings))
            for i, person in enumerate(people):
                if (turn + i) % 2:
                    theirs.append((i, *self._reference(person, artefact, settings)))
                tensors, seconds = self._ours([person], artefact, settings)
                alone.append((i, tensors[0], seconds))
                if not (turn + i) % 2:
                    theirs.append((i, *self._reference(person, artefact, settings)))
        users = range(len(people))
        return Times(
            alone=[min(s for i, _, s in alone if i == user) for user in users],
            reference=[min(s for i, _, s in theirs if i == user) for user in users],
            together=min(s for _, s in together),
            # Every round gives the same tensors.
            ours=[next(t for i, t, _ in alone if i == user) for user in users],
            ours_together=together[0][0],
            theirs=[next(t for i, t, _ in theirs if i == user) for user in users],
        )

    def _ours(
        self, people: Sequence[Tokens], artefact: Artefact, settings: stage2.Stage2Settings
    ) -> tuple[list[ShiftTensors], float]:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            trainings = stage2.train(
                self._adaptation,
                people,
                artefact,
                settings,
                checkpoint=Path(folder) / "checkpoint",
                resumed=lambda examples: None,
                progress=lambda examples, finished: None,
                stop=lambda: None,
            )
            return [training.tensors for training in trainings], time.perf_counter() - begun

    def _reference(
        self, person: Tokens, artefact: Artefact, settings: stage2.Stage2Settings
    ) -> tuple[ShiftTensors, float]:
        return reference.train(
            self._base,
            person.history,
            spec=artefact.spec,
            collective=artefact.collective,
            start=artefact.seed,
            schedule=settings.schedule_for(person),
        )

    def _loss(self, people: Sequence[Tokens], artefact: Artefact, tensors: Sequence[ShiftTensors]) -> float:
        total = tokens = 0.0
        for person, personal in zip(people, tensors, strict=True):
            use = ShiftUse(Mode.PERSONAL, artefact, personal)
            for score in self._gradients.score(person.queries, use):
                total, tokens = total - score.log_likelihood, tokens + score.tokens
        return total / tokens


def main() -> None:
    root = Path(__file__).resolve().parents[2].parent / "shared"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=root / "data" / "lamp_news")
    parser.add_argument("--model", default=str(root / "models" / "newslm"))
    parser.add_argument("--users", type=int, default=8, help="so many of the test cohort")
    parser.add_argument("--skip", type=int, default=0, help="users before them, who have longer histories")
    parser.add_argument("--epochs", type=int, help="the preset's; fewer for a quick look")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=5e-3, help="peak; small models want it this high")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0: torch's own choice")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="where the rows go")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    base = load_base(args.model, dtype=args.dtype, device=args.device)
    users = slice(args.skip, args.skip + args.users)
    bench = Bench(base, args.data, users=users, epochs=args.epochs, rate=args.lr, rounds=args.rounds)
    rows = []
    print("| positions | prompt tokens | users together | ours, s | reference, s | ratio | loss | its loss |")
    print("|---" * 8 + "|")
    for setting in SETTINGS:
        print(f"{setting} …", file=sys.stderr, flush=True)
        for row in bench.rows(setting):
            rows.append(row)
            print(
                f"| {row['preset']} | {row['prompt_tokens']} | {row['users_together']} "
                f"| {row['ours_seconds']:.1f} | {row['reference_seconds']:.1f} | {row['ratio']:.2f} "
                f"| {row['ours_loss']:.4f} | {row['reference_loss']:.4f} |",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
