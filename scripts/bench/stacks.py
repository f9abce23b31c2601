"""What it costs that threads overwrite their stacks at the end of every turn: calls with it and without.

    python scripts/bench/stacks.py --model ../shared/models/newslm --json docs/results/bench/stacks.json

One process, hardened as a server is, calls its own engines in turns with the overwriting and without: an
answer of 16 tokens, log-likelihoods of 4 candidates, the gradient of 8 examples, of 60-token prompts. Counted
is the processor's time, not the clock's, so that other work beside it counts little; with several threads
their waiting for each other is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

from perfit_cloud.hardening.process import restart_hardened

_TOKENS, _PROMPT, _EXAMPLES, _CANDIDATES = 16, 60, 8, 4


def main() -> None:
    restart_hardened()

    import common
    import numpy as np
    from workload import artefact_for, load_model, parser, uses

    from perfit_cloud.engine.device_lock import DeviceLock
    from perfit_cloud.engine.generation.factory import build_engine
    from perfit_cloud.engine.gradients.stateless import GradientEngine
    from perfit_cloud.engine.interface import GenerationSettings
    from perfit_cloud.hardening.stacks import DeadStacks
    from perfit_shared.types import Sampling

    made = parser(__doc__)
    made.set_defaults(pairs=40, threads=1)
    args = made.parse_args()
    base, device_lock, stacks = load_model(args), DeviceLock(), DeadStacks(args.threads)
    artefact = artefact_for(base)
    (use,) = uses(artefact, 1, 1)
    generation = build_engine(base, {artefact.name: artefact}, GenerationSettings(), device_lock)
    gradients = GradientEngine(base, device_lock)
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(5, 500, _PROMPT).tolist(), [7, 8, 9]) for _ in range(_EXAMPLES)]
    calls: dict[str, Callable[[], object]] = {
        "answer": lambda: list(generation.submit(pairs[0][0], use, Sampling(_TOKENS))),
        "score": lambda: gradients.score(pairs[:_CANDIDATES], use),
        "gradient": lambda: gradients.gradient(pairs, use),
    }
    spent: list[float] = []  # seconds of one overwriting

    def overwrite() -> None:
        begun = time.thread_time()
        stacks.overwrite_all()
        spent.append(time.thread_time() - begun)

    def timed(call: Callable[[], object], before_release: Callable[[], object]) -> float:
        device_lock.before_release = before_release
        begun = time.process_time()
        call()
        return time.process_time() - begun

    rows = []
    for name, call in calls.items():
        spent.clear()
        sides = {"with": partial(timed, call, overwrite), "without": partial(timed, call, lambda: None)}
        seconds = common.interleaved(sides, pairs=2 if args.small else args.pairs)
        milliseconds = {f"{side}_ms": 1e3 * median(of_side) for side, of_side in seconds.items()}
        rows.append(
            {
                "call": name,
                **milliseconds,
                "turns": len(spent) / (len(seconds["with"]) + 1),
                "ratio": common.ratio(seconds["with"], seconds["without"]).to_json(),
                "overwriting_us": 1e6 * median(spent),
            }
        )
    generation.stop()
    lines = [
        [r["call"], r["with_ms"], r["without_ms"], common.Ratio(*r["ratio"]), r["turns"], r["overwriting_us"]]
        for r in rows
    ]
    print(common.table(["call", "with, ms", "without, ms", "ratio [95 %]", "turns", "a turn's, µs"], lines))
    common.finish({"model": base.name, "dtype": str(base.model.dtype), "rows": rows}, args.json)


if __name__ == "__main__":
    main()
