"""How often the gate of an update takes what is chance, and how often it misses a gain: a simulation.

    python scripts/gate_by_chance.py

Each held-out example of about 12 tokens becomes likelier by `gain` nats a token and by a part of its own,
in twelve epochs that learn less and less. Its own part grows all the time in one direction (`straight`), or
each epoch adds one of its own (`wandering`), or half of each (`both`). Shares of updates that pass: with
the rule of `perfit_shared.validation`, and were the best epoch compared on the examples that chose it.
"""

from __future__ import annotations

import argparse

import numpy as np

from perfit_shared.types import Score
from perfit_shared.validation import Comparison, chosen_by_others, mean_loss

EPOCHS = 12
PATIENCE = 4  # epochs after the best
SIZES = (4, 9, 17, 30, 60)
KINDS = {"straight": 1.0, "both": 0.5, "wandering": 0.0}


def judgements(
    rng: np.random.Generator, size: int, gain: float, spread: float, straight: float
) -> list[list[Score]]:
    """Of one update, the start's first; they end early as a training does."""
    tokens = 3 + rng.poisson(9, size)
    learned = 1 - (1 - np.arange(EPOCHS + 1) / EPOCHS) ** 2
    alone = rng.standard_t(4, (EPOCHS, size)) * np.sqrt(np.diff(learned) / 2)[:, None]
    wandering = np.vstack([np.zeros(size), alone.cumsum(axis=0)])
    growing = learned[:, None] * rng.standard_t(4, size) / np.sqrt(2)
    own = np.sqrt(straight) * growing + np.sqrt(1 - straight) * wandering
    nats = tokens * (gain * learned[:, None] + spread * own)
    found: list[list[Score]] = []
    best = 0
    for epoch, values in enumerate(nats):
        found.append([Score(float(value), int(count)) for value, count in zip(values, tokens, strict=True)])
        best = epoch if mean_loss(found[epoch]) < mean_loss(found[best]) else best
        if epoch - best >= PATIENCE:
            break
    return found


def passes(found: list[list[Score]]) -> tuple[bool, bool]:
    """With the rule, and on the examples that chose the epoch."""
    best = min(found, key=mean_loss)
    if best is found[0]:
        return False, False
    return Comparison(found[0], chosen_by_others(found)).is_better, Comparison(found[0], best).is_better


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--updates", type=int, default=1000, help="of each kind")
    parser.add_argument("--spread", type=float, default=0.35, help="of the examples, nats a token")
    parser.add_argument("--gains", default="0,0.1,-0.05", help="nats a token")
    given = parser.parse_args()
    rng = np.random.default_rng(0)
    print("| gain | own part | " + " | ".join(f"{size} examples" for size in SIZES) + " |")
    print("|---|---|" + "---|" * len(SIZES))
    for gain in map(float, given.gains.split(",")):
        for kind, straight in KINDS.items():
            cells = []
            for size in SIZES:
                updates = (
                    passes(judgements(rng, size, gain, given.spread, straight)) for _ in range(given.updates)
                )
                rule, flattered = np.mean(list(updates), axis=0)
                cells.append(f"{rule:.0%} ({flattered:.0%})")
            print(f"| {gain:g} | {kind} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
