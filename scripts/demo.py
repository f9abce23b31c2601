"""The main job: two people enrol, ask, update, ask again. `make demo` runs it.

Cloud and devices are separate processes on loopback, over mutual TLS. Nora words headlines, Ravi
files pieces under folders of his own; Otto and Mina do the same otherwise, and lend their shifts to
show that a personal shift is personal. Prints a table and writes demo/result.json.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from local import Device, LocalCloud
from perfit_shared.metrics import rouge

ROOT = Path(__file__).resolve().parents[1]
STARTER = ROOT / "cloud" / "perfit_cloud" / "starter"
PEOPLE = ROOT / "demo" / "people"
RUN = ROOT / "demo" / "run"
# (name, task, own history, the other person's name, their history)
CAST = [
    ("nora", "news_headline", "headlines.jsonl", "otto", "headlines_other.jsonl"),
    ("ravi", "news_categorize", "folders.jsonl", "mina", "folders_other.jsonl"),
]
MODES = ("base", "collective", "personal", "other")


def say(text: str = "") -> None:
    print(text, flush=True)


def enrol(cloud: LocalCloud, name: str, task: str, history: Path) -> Device:
    device = Device(RUN / "homes", name)
    device("enroll", "-", text=cloud.invite())
    device("history", "import", str(history), "--task", task)
    return device


def best_affix(answers: list[dict[str, str]], history: list[str]) -> float:
    """ROUGE-1 on the test golds of the collective answers with the best constant ending or beginning.

    The affix is what the person's titles begin or end with most often (1 to 4 words, the 20 most
    frequent), chosen on the test golds themselves, which only flatters this baseline.
    """
    counts: Counter[tuple[str, bool]] = Counter()
    for title in history:
        words = title.split()
        for n in range(1, min(4, len(words)) + 1):
            counts[" ".join(words[:n]), True] += 1
            counts[" ".join(words[-n:]), False] += 1
    golds = [a["gold"] for a in answers]
    best = rouge([a["collective"] for a in answers], golds)[0]
    for (affix, front), _ in counts.most_common(20):
        tried = [f"{affix} {a['collective']}" if front else f"{a['collective']} {affix}" for a in answers]
        best = max(best, rouge(tried, golds)[0], rouge([affix] * len(golds), golds)[0])
    return best


def person(cloud: LocalCloud, entry: tuple[str, str, str, str, str]) -> dict[str, Any]:
    name, task, history, other_name, other_history = entry
    device = enrol(cloud, name, task, PEOPLE / history)
    rows = [json.loads(line) for line in (PEOPLE / history).read_text().splitlines()]
    article = rows[-1]["text"]
    say(f"{name} enrolled; {len(rows)} examples sealed in {name}'s vault")
    ask = ("ask", article, "--task", task, "--temperature", "0")
    before = device.json(*ask)["answer"]
    update = device.json("update", "--task", task)
    gate = update["gate"]
    say(
        f"{name} updated in {update['seconds']:.0f} s, loss {update['loss_first']:.2f} to "
        f"{update['loss_last']:.2f}; gate {gate['before']:.3f} to {gate['after']:.3f}"
    )

    other = enrol(cloud, other_name, task, PEOPLE / other_history)
    other.json("update", "--task", task)
    foreign = RUN / f"{other_name}.safetensors"
    other("export", "--shift", str(foreign), "--task", task)
    result = device.json("evaluate", "--task", task, "--shift", str(foreign), "--answers")
    after = device.json(*ask)["answer"]
    entry_out = {
        "name": name,
        "task": task,
        "loss": result["loss"],
        "metric": result["metric"],
        "update_seconds": update["seconds"],
        "bytes_up": update["bytes_up"],
        "bytes_down": update["bytes_down"],
        "examples": result["examples"],
        "article": article,
        "before": before,
        "after": after,
        "gold": rows[-1].get("title") or rows[-1]["category"],
    }
    if task == "news_headline":
        entry_out["best_constant_affix"] = best_affix(result["answers"], [r["title"] for r in rows])
    return entry_out


def table(people: list[dict[str, Any]]) -> None:
    say(f"\n{'':28}" + "".join(f"{mode:>12}" for mode in MODES))
    for p in people:
        metric = p["metric"]
        say(f"{p['name'] + ', test loss':28}" + "".join(f"{p['loss'][m]:12.3f}" for m in MODES))
        say(f"{p['name'] + ', ' + metric['name']:28}" + "".join(f"{metric[m]:12.3f}" for m in MODES))
        if "best_constant_affix" in p:
            say(f"{'  best constant affix':28}{p['best_constant_affix']:24.3f}")
    for p in people:
        say(f"\n{p['name']} asks: {p['article']}")
        for label, key in (("before", "before"), ("after", "after"), ("wrote", "gold")):
            say(f"  {label:8}{p[key].strip()}")
        up, down = p["bytes_up"] / 1e6, p["bytes_down"] / 1e6
        say(f"  update took {p['update_seconds']:.0f} s, {up:.1f} MB up, {down:.1f} MB down")


def shortfalls(people: list[dict[str, Any]]) -> list[str]:
    """What the demo promises and did not show."""
    found = []
    for p in people:
        loss, metric, name = p["loss"], p["metric"], p["name"]
        gain = metric["personal"] - metric["collective"]
        if loss["personal"] > 0.9 * loss["collective"]:
            found.append(f"{name}: personal loss is not 10 % below collective")
        if loss["other"] <= loss["personal"]:
            found.append(f"{name}: someone else's shift is no worse")
        if gain < (0.15 if metric["name"] == "accuracy" else 0.03):
            found.append(f"{name}: {metric['name']} gains only {gain:.3f}")
        if metric["personal"] <= p.get("best_constant_affix", -1):
            found.append(f"{name}: a constant affix does as well")
    return found


def main() -> int:
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    artefacts = [STARTER / task for _, task, *_ in CAST]
    with LocalCloud(STARTER / "perfit-starter", artefacts, RUN / "cloud") as cloud:
        said = cloud.said
        say(f"cloud serves {said['model']} with {', '.join(said['artefacts'])} at {said['address']}")
        people = [person(cloud, entry) for entry in CAST]
    seconds = time.monotonic() - started
    table(people)
    (ROOT / "demo" / "result.json").write_text(
        json.dumps({"people": people, "seconds": round(seconds, 1)}, indent=1, ensure_ascii=False)
    )
    say(f"\n{seconds:.0f} s in all; figures in demo/result.json")
    missed = shortfalls(people)
    if seconds > 180:
        missed.append(f"{seconds:.0f} s instead of 180")
    for line in missed:
        say(f"short of what the demo should show: {line}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
