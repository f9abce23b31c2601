"""What `lamp run` does to a base model when no rate is given: losses by mode, a row for each positions.

    python scripts/default_rates.py --model SMOLLM2 --data ../shared/data/commits --out runs/rates

It works on a small copy of the data, so that a 135M model is done within minutes: long fields cut,
the first users, their latest examples. The task's fields are those of its task.json; everything else
is news_headline's preset.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from perfit_cloud.lamp.measure import Decoding
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.run import run_lamp

_TASK = "news_headline"
_COLLECTIVE, _TEST = "user_others.json", "user_top_100_history.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--positions", nargs="+", default=["l7", "f7+l7"])
    parser.add_argument("--collective-users", type=int, default=40)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--history", type=int, default=48, help="latest examples of a user")
    parser.add_argument("--queries", type=int, default=10, help="of a user")
    parser.add_argument("--characters", type=int, default=200, help="of a prompt's field")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    data = args.out / "data"
    _small_copy(args, data)
    for positions in args.positions:
        out = args.out / positions
        run_lamp(
            LampRequest(
                task=_TASK,
                model=args.model,
                data=data,
                out=out,
                positions=positions,
                dtype=args.dtype,
                collective_users=args.collective_users,
                threads=args.threads,
                decoding=Decoding(temperature=0),
            )
        )
        print(_row(positions, out), flush=True)


def _small_copy(args: argparse.Namespace, out: Path) -> None:
    # Losses are what is read here; answers of a few tokens cost little.
    task = json.loads((args.data / "task.json").read_text("utf-8")) | {"task": _TASK, "answer_tokens": 2}
    field = task["template"].partition("{")[2].partition("}")[0]
    others = json.loads((args.data / _COLLECTIVE).read_text("utf-8"))
    people = json.loads((args.data / _TEST).read_text("utf-8"))[: args.users]
    for person in people:
        person["profile"] = person["profile"][-args.history :]
        person["query"] = person["query"][: args.queries]
    for person in [*others, *people]:
        for item in person["profile"]:
            item[field] = item[field][: args.characters]
        for item in person["query"]:
            item["input"] = item["input"][: args.characters + len(task["marker"])]
    kept = {query["id"] for person in people for query in person["query"]}
    label = json.loads((args.data / _TEST.replace(".json", "_label.json")).read_text("utf-8"))
    label["golds"] = [gold for gold in label["golds"] if gold["id"] in kept]
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "task.json": task,
        _COLLECTIVE: others,
        _TEST: people,
        _TEST.replace(".json", "_label.json"): label,
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")


def _row(positions: str, out: Path) -> str:
    loss = json.loads((out / "summary.json").read_text("utf-8"))["loss"]
    hyper = json.loads((out / "artefact" / "artefact.json").read_text("utf-8"))["card"]["hyper_parameters"]
    losses = [f"{mode} {value:.3f}" for mode, value in loss.items()]
    rates = f"rates {hyper['learning_rate']:g} and {hyper['device_learning_rate']:g}"
    return f"{positions} ({hyper['positions']}), {rates}: {', '.join(losses)}"


if __name__ == "__main__":
    main()
