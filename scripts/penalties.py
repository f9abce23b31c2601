"""What frequency and presence penalties do to greedy answers: overlap with the person's own words, and loops.

    make demo
    python scripts/penalties.py --commits ../shared/data/commits
    perfit-cloud lamp run --method perfit_behind+rag --out RUN --data FOLDER …
    python scripts/penalties.py --of RUN=FOLDER

Serves smollm2 with what comes with perfit, and answers over the wire: the test questions of the demo's people
by their own shifts; the newest part of Desmond's and Ingrid's examples by the shifts that come with the demo,
which did not learn from it; Nell's questions as those of a talk, by the seed of `chat`; and of `--commits`
every sixth person's first queries, by the seed of the shipped artefact. With `--of` it asks the people of a
run instead, each by the shift that the run kept for them, behind own examples where that was trained so.
Answers at several settings share the batch, so that one thread needs few passes. Keeps figures alone,
question by question, in runs/penalties.jsonl, goes on where it stopped, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev

from demo import CAST, PEOPLE, ROOT, Person, rows_of
from local import PASSPHRASE, Device, LocalCloud
from perfit_cloud.lamp.methods.perfit_rag import PerFitRag, parts_of_state
from perfit_device import history, personal, shift_files
from perfit_device.cloud.codec import Artefact, Prompt, ShiftUse
from perfit_device.cloud.questions import ask_all
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.evaluation import prompt_of
from perfit_device.history import HistoryItem
from perfit_device.nearest import NearestExamples
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_shared.lamp import read_users
from perfit_shared.metrics import rouge_pairs
from perfit_shared.shifts import ShiftTensors
from perfit_shared.tasks import Task

# (frequency, presence)
SETTINGS = ((0.0, 0.0), (0.4, 0.0), (1.0, 0.0), (0.2, 0.0), (0.7, 0.0), (0.0, 0.4))
EVERY, QUERIES = 6, 12  # of the people of --commits, and of each person's queries
TOGETHER = 128  # answers at a time
# What the cloud is told to take so many of.
ROOM = ("questions", "answers_each", "streams", "max_requests")


@dataclass(frozen=True)
class Asked:
    """Questions that one shift answers."""

    use: ShiftUse
    items: Sequence[HistoryItem]
    own: NearestExamples | None = None  # stand before each, where there are any

    def prompt(self, item: HistoryItem, task: Task) -> Prompt:
        return prompt_of(task, item, before=self.own.before(item) if self.own else ())


@dataclass(frozen=True)
class Group:
    """Questions of one kind, and the shifts that answer them."""

    name: str
    profile: Profile  # who asks
    artefact: Artefact
    asked: Sequence[Asked]


@dataclass(frozen=True)
class Measured:
    """Of one group at one setting, a figure for each question."""

    group: str
    frequency: float
    presence: float
    rouge_1: list[float]
    rouge_l: list[float]
    loops: list[bool]
    words: list[int]  # of the answers
    gold_words: list[int]

    @property
    def key(self) -> tuple[str, float, float]:
        return self.group, self.frequency, self.presence


def has_loop(text: str) -> bool:
    """Whether three words in a row stand twice or more often."""
    words = text.lower().split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) < len(triples)


def own_group(profile: Profile) -> Group:
    """A demo person's test questions, by the shift that their device learned."""
    person = person_of(profile)
    artefact = profile.artefact(person.task)
    _, info = profile.connect()
    with profile.vault() as vault:
        own = personal.load(vault, info.cloud_id, artefact)
    if own is None:
        raise SystemExit(f"{person.name} has learned nothing yet; run `make demo` first")
    asked = Asked(ShiftUse(artefact, own.tensors), tested(person.name, artefact))
    return Group(person.name, profile, artefact, [asked])


def committers(profile: Profile, folder: Path) -> Group:
    """Every sixth person of a cohort, by the seed."""
    artefact = profile.artefact("commit_message")
    found = read_users(folder / "user_top_100_history.json", artefact.task).users[::EVERY]
    items = [HistoryItem(artefact.name, e.item) for user in found for e in user.query[:QUERIES]]
    return Group(f"{len(found)} committers", profile, artefact, [Asked(seed_of(profile, artefact), items)])


def people_of(profile: Profile, run: Path, folder: Path) -> Group:
    """The people of a `lamp run` and their queries, by the shifts that it kept.

    Their examples are searched as a device searches them.
    """
    settings = json.loads((run / "settings.json").read_text("utf-8"))
    artefact = profile.artefact(settings["task"])
    task, count = artefact.task, settings["k"] if settings["method"] == "perfit_behind+rag" else 0
    _, info = profile.connect()
    everybody = {u.user_id: u for u in read_users(folder / "user_top_100_history.json", task).users}
    asked = []
    for kept in sorted((run / "users").glob("*/personal.*")):
        user = everybody[kept.parent.name]
        latest = settings["examples"] or len(user.profile)
        history = [
            HistoryItem(task.name, e.item, date=e.date, order=order)
            for order, e in enumerate(user.profile[-latest:])
        ]
        own = NearestExamples(task, history, count, tokens=info.limits.prompt_tokens) if count else None
        queries = [HistoryItem(task.name, e.item) for e in user.query[: settings["queries"]]]
        data = kept.read_bytes()
        data = parts_of_state(data)[0] if kept.name == PerFitRag.state_file else data
        tensors = ShiftTensors.from_bytes(data, artefact.spec, artefact.spec.personal_rank)
        asked.append(Asked(ShiftUse(artefact, tensors), queries, own))
    if not asked:
        raise SystemExit(f"{run} keeps no shifts; it wants a finished run of perfit or perfit_behind+rag")
    return Group(f"{run}, {len(asked)} people", profile, artefact, asked)


def other_group(profile: Profile) -> Group:
    """Who does the same otherwise, by the shift that comes with the demo."""
    person = person_of(profile)
    artefact = profile.artefact(person.task)
    file = PEOPLE / person.other / f"{person.task}.safetensors"
    use = ShiftUse(artefact, shift_files.read(file.read_bytes(), file.name, artefact))
    return Group(person.other, profile, artefact, [Asked(use, tested(person.other, artefact))])


def chats(profile: Profile) -> Group:
    """Nell's test questions as those of a talk, by the seed."""
    artefact = profile.artefact("chat")
    items = [
        HistoryItem("chat", {"prompt": item.fields["message"], "reply": item.fields["reply"]})
        for item in tested("nell", profile.artefact("reply"))
    ]
    return Group("chat", profile, artefact, [Asked(seed_of(profile, artefact), items)])


def seed_of(profile: Profile, artefact: Artefact) -> ShiftUse:
    cloud, _ = profile.connect()
    return ShiftUse(artefact, cloud.fetch_seed(artefact))


def person_of(profile: Profile) -> Person:
    return next(p for p in CAST if p.name == profile.settings.profile)


def tested(name: str, artefact: Artefact) -> Sequence[HistoryItem]:
    """The part of a demo person's history that no update learned from."""
    fields = artefact.task.field_names
    return history.split(
        [
            HistoryItem(
                artefact.task.name,
                {key: row[key] for key in fields},
                date=row.get("date", ""),
                order=order,
                part=row.get("part", ""),
            )
            for order, row in enumerate(rows_of(name, artefact.task.name))
        ]
    ).test


def measure(group: Group, settings: Sequence[tuple[float, float]]) -> Iterator[Measured]:
    """As `perfit evaluate` answers, greedily; questions at all settings share the batch."""
    task = group.artefact.task
    answers: dict[tuple[float, float], list[str]] = {setting: [] for setting in settings}
    golds: list[str] = []
    for asked in group.asked:
        texts = iter(answers_of(group.profile, task, asked, settings))
        for setting in settings:
            answers[setting] += [task.parse(next(texts)) for _ in asked.items]
        golds += [item.fields[task.gold_field] for item in asked.items]
    for (frequency, presence), given in answers.items():
        scores = rouge_pairs(given, golds)
        yield Measured(
            group=group.name,
            frequency=frequency,
            presence=presence,
            rouge_1=[one for one, _ in scores],
            rouge_l=[longest for _, longest in scores],
            loops=[has_loop(answer) for answer in given],
            words=[len(answer.split()) for answer in given],
            gold_words=[len(gold.split()) for gold in golds],
        )


def answers_of(
    profile: Profile, task: Task, asked: Asked, settings: Sequence[tuple[float, float]]
) -> list[str]:
    """Of all questions at the first setting, then at the next."""
    cloud, info = profile.connect()
    prompts = [asked.prompt(item, task) for item in asked.items]
    samplings = [
        task.sampling(most=info.limits.new_tokens, frequency_penalty=frequency, presence_penalty=presence)
        for frequency, presence in settings
    ]
    questions = [(prompt, sampling) for sampling in samplings for prompt in prompts]
    retry_policy = RetryPolicy()  # a busy machine takes longer than a stream may
    in_flight = min(TOGETHER, info.limits.questions)
    return ask_all(cloud, asked.use, questions, in_flight=in_flight, retry_policy=retry_policy)


def lines(measured: Sequence[Measured]) -> Iterator[str]:
    """A table in Markdown. change: from no penalty, the mean over questions and its standard error."""
    heads = ("group", "questions", "frequency", "presence", "ROUGE-1", "change", "ROUGE-L", "change", "loops")
    yield f"| {' | '.join(heads)} | length |"
    yield "| --- " * (len(heads) + 1) + "|"
    plain = {of.group: of for of in measured if (of.frequency, of.presence) == SETTINGS[0]}
    for group in dict.fromkeys(of.group for of in measured):
        for of in sorted((m for m in measured if m.group == group), key=lambda m: (m.presence, m.frequency)):
            base = plain.get(group, of)
            cells = [group, str(len(of.words)), f"{of.frequency:g}", f"{of.presence:g}"]
            for values, before in ((of.rouge_1, base.rouge_1), (of.rouge_l, base.rouge_l)):
                cells += [f"{fmean(values):.3f}", change(values, before) if of is not base else ""]
            length = sum(of.words) / sum(of.gold_words)
            cells += [f"{fmean(of.loops):.0%}", f"{length:.2f}"]
            yield f"| {' | '.join(cells)} |"


def change(values: Sequence[float], before: Sequence[float]) -> str:
    gained = [a - b for a, b in zip(values, before, strict=True)]
    return f"{fmean(gained):+.3f} ± {stdev(gained) / len(gained) ** 0.5:.3f}"


def read(kept: Path) -> list[Measured]:
    if not kept.is_file():
        return []
    return [Measured(**json.loads(line)) for line in kept.read_text("utf-8").splitlines()]


def run(given: argparse.Namespace, kept: Path) -> None:
    stage = given.run.resolve() if not given.of else ROOT / "runs" / "penalties"
    flags = ["--threads", "1", *(word for key in ROOM for word in ("--set", f"{key}={TOGETHER}"))]
    with ExitStack() as opened:
        cloud = opened.enter_context(LocalCloud("smollm2", [], stage / "cloud", flags=flags))
        print(cloud.said["model"], cloud.said["precision"], file=sys.stderr, flush=True)

        def profile(name: str) -> Profile:
            settings = DeviceSettings(name, stage / "homes")
            return opened.enter_context(Profile.open(settings, passphrase=lambda: PASSPHRASE))

        if given.of:
            if not (stage / "homes").exists():
                Device(stage / "homes", "asker")("enroll", "-", text=cloud.invite())
            asker = profile("asker")
            groups = [people_of(asker, *pair) for pair in given.of]
        else:
            cast = [profile(person.name) for person in CAST]
            groups = [own_group(each) for each in cast]
            groups += [other_group(each) for each in cast] + [chats(cast[0])]
            groups += [committers(cast[0], given.commits)] if given.commits else []
        for group in groups:
            known = {of.key for of in read(kept)}
            wanted = SETTINGS[: given.settings]
            missing = [setting for setting in wanted if (group.name, *setting) not in known]
            step = max(1, TOGETHER // max(len(asked.items) for asked in group.asked))
            for settings in (missing[at : at + step] for at in range(0, len(missing), step)):
                for of in measure(group, settings):
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(of)) + "\n")
                    print(list(lines([of]))[-1], file=sys.stderr, flush=True)


def run_and_folder(text: str) -> tuple[Path, Path]:
    name, there, folder = text.partition("=")
    if not (name and there and folder):
        raise argparse.ArgumentTypeError("give RUN=FOLDER")
    return Path(name), Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--run", type=Path, default=ROOT / "demo" / "run", help="what `make demo` left")
    parser.add_argument("--commits", type=Path, help="folder with user_top_100_history.json")
    parser.add_argument(
        "--of", action="append", type=run_and_folder, metavar="RUN=FOLDER", help="a lamp run and its --data"
    )
    parser.add_argument("--settings", type=int, metavar="N", help="the first N of the settings alone")
    given = parser.parse_args()
    kept = ROOT / "runs" / "penalties.jsonl"
    kept.parent.mkdir(exist_ok=True)
    run(given, kept)
    print("\n".join(lines(read(kept))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
