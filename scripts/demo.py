"""The thing to show a friend: two people's devices learn how they write, and a cloud answers their way.

    make demo                              all of it
    make talk WHO=nell                     afterwards: ask as Nell, or as Joris
    python scripts/demo.py others          train the shifts of someone else that come with the demo
    python scripts/demo.py show --write-docs       also docs/results/demo.md, with all test answers

Cloud and devices are separate processes on loopback, over mutual TLS, driven by their commands. Nell
answers messages, Joris words his commits; Desmond and Ingrid do the same otherwise, and lend their
shifts to show that a personal shift is personal. Writes demo/result.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_pages import page, result_lines, shown
from local import CommandFailed, Device, LocalCloud
from perfit_shared.metrics import rouge
from perfit_shared.shifts import read_metadata

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = ROOT / "demo" / "people"
MODES = ("base", "collective", "seed", "personal", "other")
LONGEST = 360  # seconds that all of it should take where the processor multiplies bfloat16 itself


@dataclass(frozen=True)
class Person:
    name: str
    task: str
    other: str  # who does the same otherwise
    who: str
    asks: str  # what the field is that a question fills
    gold: str


CAST = (
    Person(
        "nell",
        "reply",
        "desmond",
        "keeps a plant nursery and answers messages with one thumb",
        "message",
        "reply",
    ),
    Person(
        "joris",
        "commit_message",
        "ingrid",
        "tunes pianos and writes a program for his larder",
        "changes",
        "message",
    ),
)


@dataclass(frozen=True)
class Stage:
    """Where the demo runs, and what its cloud serves."""

    model: str
    artefacts: Path | None  # folder of folders; None: those that come with perfit
    run: Path
    update: tuple[str, ...] = ()  # flags of updates

    def cloud(self) -> LocalCloud:
        folders = [self.artefacts / person.task for person in CAST] if self.artefacts else []
        return LocalCloud(self.model, folders, self.run / "cloud")

    def device(self, name: str) -> Device:
        return Device(self.run / "homes", name)


def say(text: str = "") -> None:
    print(text, flush=True)


def history_of(name: str, task: str) -> Path:
    return PEOPLE / name / f"{task}.jsonl"


def rows_of(name: str, task: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in history_of(name, task).read_text("utf-8").splitlines()]


def enrol(stage: Stage, cloud: LocalCloud, name: str, task: str) -> Device:
    device = stage.device(name)
    device("enroll", "-", text=cloud.invite())
    device("history", "import", str(history_of(name, task)), "--task", task)
    return device


def shift_of_other(stage: Stage, cloud: LocalCloud, person: Person, version: str) -> Path:
    """The file that comes with the demo; trained now where that one is of another artefact."""
    kept = PEOPLE / person.other / f"{person.task}.safetensors"
    if kept.is_file() and read_metadata(kept.read_bytes()).get("version") == version:
        return kept
    say(f"  ({person.other.title()}'s shift in demo/people is of another artefact, and is learned anew)")
    return train_other(stage, cloud, person, stage.run / f"{person.other}.safetensors")


def train_other(stage: Stage, cloud: LocalCloud, person: Person, path: Path) -> Path:
    other = enrol(stage, cloud, person.other, person.task)
    other.json("update", "--task", person.task, *stage.update)
    other("export", "--shift", str(path), "--task", person.task, "--force")
    return path


def best_affix(answers: list[dict[str, str]], golds: Iterable[str]) -> float:
    """ROUGE-1 on the test golds of the seed's answers with the best constant ending or beginning.

    The affix is what the person's texts begin or end with most often (1 to 4 words, the 20 most
    frequent), chosen on the test golds themselves, which only flatters this baseline.
    """
    counts: Counter[tuple[str, bool]] = Counter()
    for text in golds:
        words = text.split()
        for n in range(1, min(4, len(words)) + 1):
            counts[" ".join(words[:n]), True] += 1
            counts[" ".join(words[-n:]), False] += 1
    test = [a["gold"] for a in answers]
    best = rouge([a["seed"] for a in answers], test)[0]
    for (affix, front), _ in counts.most_common(20):
        tried = [f"{affix} {a['seed']}" if front else f"{a['seed']} {affix}" for a in answers]
        best = max(best, rouge(tried, test)[0], rouge([affix] * len(test), test)[0])
    return best


def meet(stage: Stage, cloud: LocalCloud, person: Person) -> dict[str, Any]:
    """One person enrols, asks, updates, asks again, and is measured."""
    name, task = person.name, person.task
    rows = rows_of(name, task)
    test = [row for row in rows if row.get("part") == "test"]
    device = enrol(stage, cloud, name, task)
    mine = name.title()
    say(f"\n{mine.upper()} {person.who}.")
    learned = len(rows) - len(test)
    say(f"  {learned} examples to learn from; the {len(test)} that came after them are kept for the test.\n")

    asked = test[0]
    ask = ("ask", asked[person.asks], "--task", task, "--temperature", "0")
    before = device.json(*ask)["answer"]
    say(shown("asked", asked[person.asks]))
    say(shown("before", before))
    update = device.json("update", "--task", task, *stage.update)
    after = device.json(*ask)["answer"]
    up, down = update["bytes_up"] / 1e6, update["bytes_down"] / 1e6
    travelled = f"{up:.0f} MB up, {down:.0f} MB down, nothing kept by the cloud"
    say(f"{'':11}… {mine}'s device learns for {update['seconds']:.0f} s: {travelled} …")
    say(shown("after", after))
    say(shown(mine, asked[person.gold]))

    version = device.json("status")["tasks"][task]["version"]
    foreign = shift_of_other(stage, cloud, person, version)
    measured = time.monotonic()
    result = device.json("evaluate", "--task", task, "--with-seed", "--shift", str(foreign), "--answers")
    golds = [a["gold"] for a in result["answers"]]
    questions = {row[person.gold]: row[person.asks] for row in test}
    outcome = {
        "name": name,
        "task": task,
        "loss": result["loss"],
        "metric": result["metric"],
        "rouge_l": {mode: rouge([a[mode] for a in result["answers"]], golds)[1] for mode in MODES},
        "best_constant_affix": best_affix(result["answers"], [row[person.gold] for row in rows]),
        "update_seconds": update["seconds"],
        "evaluate_seconds": round(time.monotonic() - measured, 1),
        "bytes_up": update["bytes_up"],
        "bytes_down": update["bytes_down"],
        "examples": result["examples"],
        "article": asked[person.asks],
        "before": before,
        "after": after,
        "gold": asked[person.gold],
        "other": person.other,
        "answers": [{"asked": questions[a["gold"]], **a} for a in result["answers"]],
    }
    for line in result_lines(outcome):
        say(line)
    return outcome


def broken(people: list[dict[str, Any]]) -> list[str]:
    """What the demo promises of losses and did not show."""
    found = []
    for p in people:
        loss, name = p["loss"], p["name"]
        if loss["personal"] > 0.75 * loss["seed"]:
            found.append(f"{name}: personal loss is not 25 % below the seed's")
        if loss["other"] <= loss["personal"]:
            found.append(f"{name}: someone else's shift has no higher loss")
    return found


def weak(people: list[dict[str, Any]]) -> list[str]:
    """What ROUGE did not show. Said, not judged: of 20 answers it moves by 0.02 with the order of a sum."""
    found = []
    for p in people:
        name = p["name"]
        for metric, figures in (("ROUGE-1", p["metric"]), ("ROUGE-L", p["rouge_l"])):
            better = [m for m in ("collective", "seed", "other") if figures[m] >= figures["personal"]]
            if better:
                found.append(f"{name}: {metric} of personal is not above {', '.join(better)}")
        if p["metric"]["personal"] <= p["best_constant_affix"]:
            found.append(f"{name}: a constant affix does as well")
    return found


def show(stage: Stage, *, write_docs: bool) -> int:
    started = time.monotonic()
    shutil.rmtree(stage.run, ignore_errors=True)
    with stage.cloud() as cloud:
        said = cloud.said
        dtype = said.get("precision", "").partition(":")[0]
        model = f"{said['model']} in {dtype}" if dtype else said["model"]
        ready = time.monotonic() - started
        say(f"A cloud serves {model} at {said['address']}; starting it took {ready:.0f} s.")
        say("Two people have a device each, where what they wrote lies sealed, and what it learns.")
        say("Loss: how much their own words surprise the model. ROUGE: how many its answers share.")
        people = [meet(stage, cloud, person) for person in CAST]
    seconds = time.monotonic() - started
    result = {"people": people, "seconds": round(seconds, 1)}
    (stage.run.parent / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), "utf-8")
    if write_docs:
        machine = f"{os.cpu_count()} cores of {platform.machine()}, {dtype or 'dtype auto'}"
        (ROOT / "docs" / "results" / "demo.md").write_text(page(people, seconds, machine), "utf-8")
    say(f"\n{seconds:.0f} s in all. Figures and all answers: demo/result.json")
    if seconds > LONGEST and dtype == "bfloat16":  # said, not judged: other work may run beside
        say(f"(longer than the {LONGEST} s that it should take; other work beside it slows it down)")
    missed = broken(people)
    for line in (*missed, *weak(people)):
        say(f"short of what the demo should show: {line}")
    say("Talk to it yourself:   make talk WHO=nell     or   make talk WHO=joris")
    return 1 if missed else 0


def typed() -> Iterator[str]:
    """Lines, until an empty one or the end."""
    with suppress(EOFError, KeyboardInterrupt):
        while text := input("\n> ").strip():
            yield text


def talk(stage: Stage, name: str, texts: list[str]) -> int:
    """Ask as one of them: the texts, or what is typed until an empty line."""
    person = next(p for p in CAST if p.name == name)
    if not (stage.run / "homes").is_dir():
        say("nobody has learned anything yet; run `make demo` first")
        return 1
    say(f"The cloud starts again. Then type what {name.title()} should answer; an empty line ends it.")
    say(shown("such as", rows_of(name, person.task)[-1][person.asks]))
    with stage.cloud():
        device = stage.device(name)
        for text in texts or typed():
            ask = ("ask", text, "--task", person.task, "--temperature", "0")
            try:
                answers = device.json(*ask, "--compare")["answers"]
            except CommandFailed as error:
                say(error.said.strip())
                continue
            say(shown("model", answers["collective"]))
            say(shown(name.title(), answers["personal"]))
    return 0


def others(stage: Stage) -> int:
    shutil.rmtree(stage.run, ignore_errors=True)
    with stage.cloud() as cloud:
        for person in CAST:
            path = PEOPLE / person.other / f"{person.task}.safetensors"
            train_other(stage, cloud, person, path)
            path.chmod(0o644)
            say(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="what perfit-cloud serve takes")
    parser.add_argument(
        "--artefacts", type=Path, help="folder of reply and commit_message, not those shipped"
    )
    parser.add_argument(
        "--run", type=Path, default=ROOT / "demo" / "run", help="where cloud and devices live"
    )
    parser.add_argument("--epochs", help="of each update, not the artefact's")
    commands = parser.add_subparsers(dest="command")
    shows = commands.add_parser("show", help="the demo; the default")
    shows.add_argument("--write-docs", action="store_true", help="also docs/results/demo.md")
    talks = commands.add_parser("talk", help="ask as one of the people, after the demo")
    talks.add_argument("name", choices=[p.name for p in CAST])
    talks.add_argument("text", nargs="*")
    commands.add_parser("others", help="train the shifts of someone else that come with the demo")
    args = parser.parse_args()
    update = ("--epochs", args.epochs) if args.epochs else ()
    stage = Stage(args.model, args.artefacts, args.run.resolve(), update)
    if args.command == "talk":
        return talk(stage, args.name, args.text)
    if args.command == "others":
        return others(stage)
    return show(stage, write_docs=getattr(args, "write_docs", False))


if __name__ == "__main__":
    sys.exit(main())
