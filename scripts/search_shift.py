"""Which layers, ranks, positions and rates suit a model: docs/results/search.md.

    python scripts/search_shift.py --data ../shared/data/commits --task commit_message --out runs/search

Only people of `user_others.json`: 24 of them, drawn by a fixed seed, are held out; stage 1 learns one epoch
of 60 others for each choice, and the held-out people make updates of 9 examples and are measured on the ones
behind. Two figures decide: the loss of the seed, and that after the update. What is finished is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from pathlib import Path
from typing import Any

from local import BIN, run

ROOT = Path(__file__).resolve().parents[1]
_HELD, _LEARN, _EXAMPLES = 24, 60, 9
_USUAL = {"layers": "8;12;16", "positions": "l7", "collective-rank": 16, "personal-rank": 16, "lr": 1e-3}
# Each differs from the usual in what its name says.
CHOICES: dict[str, dict[str, Any]] = {
    "8;12;16": {},
    "5;8;11": {"layers": "5;8;11"},
    "3;6;9": {"layers": "3;6;9"},
    "11;14;17": {"layers": "11;14;17"},
    "five layers, rank 32": {"layers": "6;9;12;15;18", "personal-rank": 32},
    "personal rank 64": {"personal-rank": 64},
    "l16": {"positions": "l16"},
    "f7+l7": {"positions": "f7+l7"},
    "as text": {"chat": "no"},
    "rate 3e-3": {"lr": 3e-3},
}


def split(data: Path, out: Path) -> None:
    """Two folders with people of their own: `learn` and `held`."""
    users = json.loads((data / "user_others.json").read_text())
    random.Random(7).shuffle(users)
    held = [user for user in users if len(user["query"]) >= _EXAMPLES + 3][:_HELD]
    names = {user["user_id"] for user in held}
    learn = [user for user in users if user["user_id"] not in names][:_LEARN]
    for name, people in (("learn", learn), ("held", held)):
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "user_others.json").write_text(json.dumps(people))


def measured(choice: dict[str, Any], given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of one choice, measured now unless they are there."""
    result = folder / "result.json"
    if not result.is_file():
        options = [f"--{key}={value}" for key, value in (_USUAL | choice).items()]
        train = [str(BIN / "perfit-cloud"), "collective", "train", "--task", given.task, "--epochs", "1"]
        train += [
            "--model",
            given.model,
            "--data",
            str(given.out / "learn"),
            "--out",
            str(folder / "artefact"),
        ]
        subprocess.run([*train, "--device-lr", str(given.device_lr), "--force", *options], check=True)
        measure = [str(BIN / "python"), str(ROOT / "scripts" / "small_histories.py"), "--model", given.model]
        measure += ["--artefact", str(folder / "artefact"), "--data", str(given.out / "held")]
        said = run([*measure, "--sizes", str(_EXAMPLES), "--users", str(_HELD)])
        result.write_text(said)
    return dict(json.loads(result.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with a user_others.json")
    parser.add_argument("--task", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device-lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=CHOICES, default=list(CHOICES))
    given = parser.parse_args()
    split(given.data, given.out)
    print("| choice | seed | personal | of the last epoch | kept out |", "|---|---|---|---|---|", sep="\n")
    for name in given.only:
        found = measured(CHOICES[name], given, given.out / name.replace(";", "-").replace(" ", "_"))
        cells = [f"{found[key]:.3f}" for key in ("seed", "personal", "of the last epoch")]
        print(f"| {name} | {' | '.join(cells)} | {found['rejected']} of {found['people']} |", flush=True)


if __name__ == "__main__":
    main()
