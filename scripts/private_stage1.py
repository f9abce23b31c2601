"""What differential privacy by person costs stage 1: validation loss by ε and by how many people there are.

    python scripts/private_stage1.py --model ../shared/models/newslm \\
        --data ../shared/data/lamp_news/news_categorize --people 220 2697 27000

Trains as `collective train --epsilon` does, on the people of user_others.json, and validates on those of
user_top_100_history.json. More people than the data hold are simulated by their noise alone: as if
everybody stood there several times, which changes no mean gradient. The step count and the people a
step expects are the same for all, so the rows differ in the noise and, below the data's own number, in
whose examples were read. ε inf adds no noise and still clips.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from perfit_cloud.collective.data import Corpus, read_items, tokenise
from perfit_cloud.collective.forward import forward_for
from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.privacy import Privacy, PrivateSteps, noise_for
from perfit_cloud.collective.processes import Processes
from perfit_cloud.collective.steps import Losses, rate_at, trainable
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.sinks import past_sinks
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--task", default="news_categorize")
    parser.add_argument("--people", type=int, nargs="+", default=[220])
    parser.add_argument("--data-people", type=int, help="whose examples are read; all")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--rank", type=int, default=1, help="of both shifts")
    parser.add_argument("--positions", default="f7+l7")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--clip-norm", type=float, default=1.0)
    parser.add_argument("--people-per-step", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of who is drawn and of the noise")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = load_base(args.model, dtype=args.dtype)
    _Measurement(base, args).run()


class _Measurement:
    def __init__(self, base: BaseModel, args: argparse.Namespace) -> None:
        self._args, self._base = args, base
        task = load_task(args.data, args.task).resolved(base.has_chat_template)
        items = read_items(args.data / "user_others.json", task)
        if args.data_people is not None:
            items = items.first_users(args.data_people, seed=0)
        others = read_items(args.data / "user_top_100_history.json", task)
        self._corpus: Corpus = tokenise(items, base=base, task=task, seed=0, others=others)
        prompts = [prompt for prompt, _ in self._corpus.validation]
        positions = past_sinks(args.positions, base, prompts, args.layer)
        self._spec = ShiftSpec((args.layer,), positions, args.rank, args.rank, base.hidden_size)
        self._losses = Losses(forward_for(base, self._spec), processes=Processes())

    def run(self) -> None:
        pairs = [*self._corpus.examples(), *self._corpus.validation]
        self._losses.cache(pairs, [0] * len(pairs), lambda _: None)
        base = self._losses.mean(self._corpus.validation, collective=None, personal=None)
        print(
            f"{len(self._corpus.train)} people, positions {self._spec.positions}, base {base:.4f}", flush=True
        )
        for people in self._args.people:
            for epsilon in self._args.epsilon:
                self._row(people, epsilon)

    def _row(self, people: int, epsilon: float) -> None:
        privacy = self._privacy(people, epsilon)
        names = list(self._corpus.train)[:people]
        train = {name: self._corpus.train[name] for name in names}
        drawn = replace(privacy, people=len(train), sampling_rate=privacy.expected / len(train))
        steps = PrivateSteps(self._losses, train, drawn, rng=np.random.default_rng(self._args.seed))
        device, spec = self._base.device, self._spec
        collective = trainable(ShiftTensors.identity(spec, self._args.rank, 0), device, rotations=False)
        personal = trainable(ShiftTensors.identity(spec, self._args.rank, 1), device, rotations=False)
        optimizer = StiefelAdam([collective, personal])
        for step in range(privacy.steps):
            rate = rate_at(step, privacy.steps, self._args.lr)
            steps.step(collective=collective, personal=personal, optimizer=optimizer, rate=rate)
        validation = self._corpus.validation
        alone = self._losses.mean(validation, collective=collective, personal=None)
        loss = self._losses.mean(validation, collective=collective, personal=personal)
        numbers = sum(
            t.numel() for shift in (collective, personal) for phi in shift.values() for t in phi[1:]
        )
        noise = privacy.noise_multiplier * math.sqrt(numbers) / privacy.expected
        print(
            f"people {people} epsilon {epsilon:g} delta {privacy.delta:.1g} q {privacy.sampling_rate:.4g} "
            f"sigma {privacy.noise_multiplier:.3g} ({noise:.2f} clip norms over {numbers} numbers): "
            f"collective {alone:.4f} seed {loss:.4f}",
            flush=True,
        )

    def _privacy(self, people: int, epsilon: float) -> Privacy:
        args, delta = self._args, 0.1 / people
        rate = min(1.0, args.people_per_step / people)
        noise = 0.0
        if math.isfinite(epsilon):
            noise = noise_for(epsilon, delta, rate=rate, steps=args.steps)
        return Privacy(epsilon, delta, args.clip_norm, people, rate, args.steps, noise)


if __name__ == "__main__":
    main()
