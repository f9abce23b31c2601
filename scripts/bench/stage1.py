"""How long stage 1 takes, by this code and by another checkout's, on the same data in one run.

    python scripts/bench/stage1.py --code ../before --model ../shared/models/newslm --data ../shared/data/lamp_news

Every turn is a run of `perfit-cloud collective train` with the preset's layers, ranks, positions and batch at
a given rate, so no trials. Seconds are the run's own: filling the cache, steps, validation and the final
losses, without loading model and data. Sides take turns, and the machine's state falls on both. The ratio is
the other code's seconds over ours. Prompts of 200 tokens are led by other articles of the data.
`--processes 2` starts both sides by accelerate's launcher. Without --code only this checkout runs.
"""  # noqa: E501 - the command keeps its line

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
from workload import load_model, parser

from perfit_cloud.model.base import BaseModel

_ROOT = Path(__file__).resolve().parents[2]
_LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_machines 1 --main_process_port 0 --no_python"
_ENTRY = "from perfit_cloud.cli.main import run; run()"


@dataclass(frozen=True)
class Setting:
    task: str  # its preset gives layers, ranks, positions and batch
    prompt_tokens: int | None  # None: as they are
    epochs: int


SETTINGS = [
    Setting(task, tokens, epochs)
    for task, tokens in (("news_categorize", None), ("news_headline", None), ("news_headline", 200))
    for epochs in (3, 1)
]


class Bench:
    def __init__(self, base: BaseModel, args: argparse.Namespace, folder: Path) -> None:
        self._base, self._args, self._folder = base, args, folder
        self._model = folder / "model"
        base.model.save_pretrained(self._model)
        base.tokenizer.save_pretrained(self._model)
        self._code = {"ours": _ROOT} | ({"theirs": args.code} if args.code else {})

    def row(self, setting: Setting) -> dict[str, Any]:
        """One row of the result."""
        data = self._data(setting)
        cards: dict[str, Any] = {}
        sides: dict[str, Callable[[], float]] = {
            side: partial(self._run, side, setting, data, cards) for side in self._code
        }
        seconds = common.interleaved(sides, pairs=self._args.pairs, warm_up=0)
        ratio = common.ratio(seconds["theirs"], seconds["ours"]) if "theirs" in seconds else None
        shape = cards["ours"]["hyper_parameters"]
        return {
            "task": setting.task,
            "positions": shape["positions"],
            "layers": shape["layers"],
            "prompt_tokens": setting.prompt_tokens,
            "epochs": setting.epochs,
            "examples": cards["ours"]["data"]["examples"],
            "seconds": {side: float(np.median(of)) for side, of in seconds.items()},
            "ratio": ratio and ratio.to_json(),
            "losses": {side: card["losses"]["validation"]["seed"] for side, card in cards.items()},
        }

    def _run(self, side: str, setting: Setting, data: Path, cards: dict[str, Any]) -> float:
        code, args = self._code[side], self._args
        out = self._folder / side
        options = {
            "task": setting.task,
            "data": data,
            "model": self._model,
            "out": out,
            "epochs": setting.epochs,
            "lr": 1e-3,
            "device-lr": 1e-3,
            "threads": args.threads,
        }
        command = [sys.executable, "-c", _ENTRY, "collective", "train", "--force"]
        for name, value in options.items():
            command += [f"--{name}", str(value)]
        if args.processes > 1:
            launch = [*_LAUNCH.split(), "--mixed_precision", "no", "--dynamo_backend", "no"]
            command = [sys.executable, *launch, "--num_processes", str(args.processes), *command]
        path = os.pathsep.join(str(code / side) for side in ("shared", "device", "cloud"))
        environment = {**os.environ, "PYTHONPATH": path, "ACCELERATE_USE_CPU": "true"}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        cards[side] = json.loads((out / "artefact.json").read_text("utf-8"))["card"]
        return float(cards[side]["seconds"])

    def _data(self, setting: Setting) -> Path:
        """A folder with the first so many authors' items, prompts lengthened where the setting wants it."""
        source = self._args.data / setting.task
        folder = self._folder / f"{setting.task}-{setting.prompt_tokens}"
        folder.mkdir(exist_ok=True)
        users = json.loads((source / "user_others.json").read_text("utf-8"))
        items = [(user["user_id"], item) for user in users for item in user["profile"]][: self._args.examples]
        texts = [item["text"] for _, item in items]
        with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
            for number, (user, item) in enumerate(items):
                text = self._lengthened(texts[number:] + texts[:number], setting.prompt_tokens)
                print(json.dumps({**item, "user_id": str(user), "text": text}), file=file)
        (folder / "task.json").write_bytes((source / "task.json").read_bytes())
        return folder / "items.jsonl"

    def _lengthened(self, texts: list[str], tokens: int | None) -> str:
        """The first text, led by words of the others up to so many tokens."""
        if tokens is None:
            return texts[0]
        count = 1
        while len(self._base.encode(" ".join(texts[:count]))) < tokens and count < len(texts):
            count += 1
        words = " ".join(reversed(texts[:count])).split()
        while len(self._base.encode(" ".join(words))) > tokens:
            del words[:1]
        return " ".join(words)


def cells(row: dict[str, Any]) -> list[object]:
    """A row of the table."""
    seconds, losses = row["seconds"], row["losses"]
    return [
        row["positions"],
        row["prompt_tokens"] or "as they are",
        row["epochs"],
        seconds["ours"],
        seconds.get("theirs", "–"),
        common.Ratio(*row["ratio"]) if row["ratio"] else "–",
        f"{losses['ours']:.5f}",
        f"{losses['theirs']:.5f}" if "theirs" in losses else "–",
    ]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", type=Path, required=True, help="a folder of tasks, such as lamp_news")
    made.add_argument("--code", type=Path, help="another checkout to stand beside this one")
    made.add_argument("--examples", type=int, default=320)
    made.add_argument("--processes", type=int, default=1)
    args = made.parse_args()
    settings = SETTINGS[:1] if args.small else SETTINGS
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load_model(args), args, Path(folder))
        for setting in settings:
            rows.append(bench.row(setting))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    headers = ("positions", "prompt tokens", "epochs", "ours, s", "theirs, s", "theirs over ours [95 %]")
    print(common.table([*headers, "loss", "its loss"], [cells(row) for row in rows]))
    common.finish({"rows": rows}, args.json)


if __name__ == "__main__":
    main()
