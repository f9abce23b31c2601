"""δ-vectors of many users: `perfit-cloud analyze`'s passes against one `output_hidden_states` pass a query.

    python scripts/bench/analyze.py --model ../shared/models/newslm --users 1000

Users are synthetic: a history of ten short texts and one query each. The plain way runs the whole model on
one sequence at a time, twice a query, and keeps every hidden state; it runs on a part of the users in each
round, ours on all of them. Seconds are of CPU time, of all threads, so that other work beside lengthens them
less. Ours counts reading, retrieval, tokens and writing; the plain way is given its tokens. No control
prefixes on either side.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import torch
from workload import load_model, parser

from perfit_cloud.analysis.deltas import DeltaSettings, open_deltas, write_deltas
from perfit_cloud.analysis.prompts import Prompt, Prompts
from perfit_cloud.analysis.queries import QueryOptions, asking_users
from perfit_cloud.collective.progress import Progress
from perfit_cloud.engine.gradients.batch import BatchBudget
from perfit_cloud.model.base import BaseModel
from perfit_shared.tasks import TASKS, Task

_HISTORY, _PLAIN_USERS = 10, 100  # entries of each user; users that the plain way gets a round
_OPTIONS = QueryOptions(retrieved=2)
_WORDS = ("council", "river", "school", "storm", "market", "doctor", "garden", "train", "museum", "coast")


def _write_users(path: Path, users: int) -> None:
    rng = np.random.default_rng(0)

    def text(words: int) -> str:
        return " ".join(rng.choice(_WORDS, words))

    records = []
    for user in range(users):
        entries = [{"id": f"{user}-{n}", "text": text(12), "title": text(4)} for n in range(_HISTORY + 1)]
        query = {"id": f"{user}-q", "input": f"article: {entries[-1]['text']}", "gold": entries[-1]["title"]}
        records.append({"user_id": user, "profile": entries[:-1], "query": [query]})
    path.write_text(json.dumps(records))


def _ours(base: BaseModel, task: Task, file: Path, out: Path) -> float:
    tokens = BatchBudget.of(base.device).rows
    settings = DeltaSettings(
        base.fingerprint, str(base.model.dtype), task.to_json(), "", "", 2, 32, None, False, tokens, 0
    )
    begun = time.process_time()
    users = asking_users(file, task, _OPTIONS)
    write_deltas(out, users, Prompts(base, task), base, settings, progress=Progress(0, shown=False))
    seconds = time.process_time() - begun
    open_deltas(out, settings, base)
    return seconds


@torch.no_grad()
def _plain(base: BaseModel, prompts: Sequence[Prompt]) -> float:
    begun = time.process_time()
    for prompt in prompts:
        for ids in (prompt.alone, prompt.with_history):
            output = base.model(torch.tensor([ids], device=base.device), output_hidden_states=True)
            torch.stack([state[0, -1].float() for state in output.hidden_states[1:]]).cpu()
    return time.process_time() - begun


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--users", type=int, default=1000)
    args = made.parse_args()
    users, some = (8, 8) if args.small else (args.users, min(_PLAIN_USERS, args.users))
    base, task = load_model(args), TASKS["news_headline"].resolved(False)
    with tempfile.TemporaryDirectory() as place:
        file, turns = Path(place) / "user_others.json", iter(range(args.pairs + 2))
        _write_users(file, users)
        prompts = Prompts(base, task)
        asked = [prompts.encode(user.questions[0]) for user in asking_users(file, task, _OPTIONS, users=some)]
        found = [prompt for prompt in asked if prompt is not None]
        tokens = [len(ids) for prompt in found for ids in (prompt.alone, prompt.with_history)]
        with common.Peak() as peak:
            _ours(base, task, file, Path(place) / str(next(turns)))
        sides = {
            "plain": lambda: _plain(base, found) * users / some,
            "ours": lambda: _ours(base, task, file, Path(place) / str(next(turns))),
        }
        seconds = common.interleaved(sides, pairs=args.pairs)
    times = common.ratio(seconds["plain"], seconds["ours"])
    rows = [
        [name, float(np.median(of_side)), users / float(np.median(of_side))]
        for name, of_side in seconds.items()
    ]
    print(common.table(["way", f"s for {users} users", "users a s"], rows))
    print(f"\nours is {times} times as fast; {np.mean(tokens):.0f} tokens a sequence")
    print(f"peak memory of the process while ours runs {peak.megabytes:.0f} MB")
    result = {
        "model": base.name,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "users": users,
        "plain_users": some,
        "seconds": seconds,
        "ratio": times.to_json(),
        "mean_tokens": float(np.mean(tokens)),
        "peak_rss_mb": peak.megabytes,
    }
    common.finish(result, args.json)


if __name__ == "__main__":
    main()
