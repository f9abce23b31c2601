"""LaMP's time-split downloads, and the News Category Dataset, → the three files of an OPPU folder.

    user_others.json                    everyone outside the test cohort: stage 1
    user_top_100_history.json           the cohort, those with the longest histories: stage 2
    user_top_100_history_label.json     the gold answers of the cohort's queries, which are held out

LaMP gives one record a question, with the profile that its person had then. Who that is: `user_id`,
where records have one. Else a question belongs to the person with whom it shares at least half of its
profile (items of the same text and date), since a profile holds what came before the question. Ids
of items say nothing: LaMP makes them from the question's, so the same item has another in every
question, and items of two people may have the same.

A person's history is all their profiles together, without what the held-out queries ask about. All
queries of the cohort are held out, as OPPU does, so a history may have items from between them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.lamp import Entry, User, at, is_date, labels_beside, parse_json, read_text, read_users
from perfit_shared.tasks import Task, task_named

__all__ = ["Prepared", "find_questions", "prepare_lamp", "prepare_news"]

Tell = Callable[[str], None]

_OTHERS, _TOP, _LABELS = "user_others.json", "user_top_100_history.json", "user_top_100_history_label.json"
_TASK = "task.json"
_PARTS = {"train": 0, "dev": 1, "test": 2}  # of a download, in order of time
_SAME_PERSON = 0.5  # of a question's profile
_HELD_OUT, _HELD_OUT_MOST = 0.2, 30  # of an author's articles, the latest; articles
# Labels of LaMP's that HuffPost has under other names. Which ones LaMP joined it does not say.
_JOINED = {
    "science": "science & technology", "tech": "science & technology",
    "arts": "culture & arts", "arts & culture": "culture & arts",
}  # fmt: skip


@dataclass(frozen=True)
class Prepared:
    """A folder that was written, in counts."""

    task: str
    folder: str
    users: int  # of the cohort
    history: int  # their profile items
    shortest_history: int
    queries: int  # theirs, held out
    others: int  # users
    others_history: int
    others_queries: int
    left_out: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Person:
    """Somebody, before it is known who is in the cohort."""

    name: str  # `user_id` of LaMP's records; orders people of equally long histories
    numbered: bool  # the name stays here, and a number goes into the files
    profile: Sequence[Entry]
    query: Sequence[Entry]
    history: Sequence[Entry]  # of the profile, what a member of the cohort learns from
    held_out: Sequence[Entry]  # of the queries, what a member of the cohort is tested on


# -- LaMP --------------------------------------------------------------------------------------------


def find_questions(folder: Path, tell: Tell) -> list[tuple[Path, Path]]:
    """The pairs of questions and outputs in a folder as downloaded, and in folders inside it, by time.

    Questions without outputs are passed over, with a line to `tell`. Raises InvalidData when there
    is no pair.
    """
    pairs = []
    for path in [*folder.glob("*questions.json"), *folder.glob("*/*questions.json")]:
        outputs = labels_beside(path)
        if outputs is None:
            tell(f"{path}: there are no outputs beside it, so it is left out")
        else:
            pairs.append((path, outputs))
    if not pairs:
        raise InvalidData(f"{folder} holds no train_questions.json with its train_outputs.json, nor the like")
    return sorted(pairs, key=lambda pair: (_PARTS.get(pair[0].name.split("_")[0], 0), pair[0]))


def prepare_lamp(
    files: Sequence[tuple[Path, Path]], task: Task, out: Path, *,
    users: int, least: int, force: bool, tell: Tell,
) -> Prepared:  # fmt: skip
    """Turn pairs of LaMP's questions and outputs, earliest first, into OPPU's files in `out`.

    The cohort is `users` people with the longest histories, of `least` items or more; ties go by
    `user_id`, or by their first question's id. Raises InvalidData naming file, item and field;
    InvalidInput when `out` holds such files already or there are too few people.
    """
    _check_out(out, force=force)
    questions: dict[str, User] = {}
    empty = 0
    for path, outputs in files:
        found = read_users(path, task, golds=outputs)
        with at(str(path)):
            if not found.questions:
                raise InvalidData('these are not LaMP\'s questions, [{"id", "input", "profile"}]')
            if found.no_profiles:
                raise InvalidData(f"no profile item has the fields of task {task.name}")
            again = next((user.user_id for user in found.users if user.user_id in questions), None)
            if again is not None:
                raise InvalidData(f"question {again[:40]}: an earlier file has this id too")
        questions |= {user.user_id: user for user in found.users}
        empty += found.dropped_empty
        tell(f"{path}: {len(found.users)} questions")
    people = [_merged(group, task) for group in _grouped(list(questions.values()))]
    tell(f"they are of {len(people)} people")
    return _write(task, out, people, users=users, least=least, left_out={"empty_field": empty}, tell=tell)


def _grouped(questions: Sequence[User]) -> list[list[User]]:
    """Questions by person. Raises InvalidData where only some name theirs."""
    named = [question for question in questions if question.person]
    if named and len(named) < len(questions):
        bare = next(question for question in questions if not question.person)
        raise InvalidData(f'question {bare.user_id[:40]}: field "user_id" is missing, and others have it')
    if not named:
        return _grouped_by_profile(questions)
    groups: dict[str, list[User]] = {}
    for question in questions:
        groups.setdefault(question.person, []).append(question)
    return list(groups.values())


def _grouped_by_profile(questions: Sequence[User]) -> list[list[User]]:
    """One pass from the longest profile down: earlier profiles of a person lie within their later ones."""
    groups: list[list[User]] = []
    owners: defaultdict[int, list[int]] = defaultdict(list)  # hash of an item → groups that have it
    for question in sorted(questions, key=lambda q: (-len(q.profile), q.user_id)):
        items = {hash(_identity(entry)) for entry in question.profile}
        shared = Counter(group for item in items for group in owners[item])
        best = min(shared, key=lambda group: (-shared[group], group), default=-1)
        if best < 0 or shared[best] < _SAME_PERSON * len(items):
            best = len(groups)
            groups.append([])
        groups[best].append(question)
        for item in items:
            if best not in owners[item]:
                owners[item].append(best)
    return groups


def _identity(entry: Entry) -> tuple[str, ...]:
    return entry.date, *entry.item.values()


def _merged(group: Sequence[User], task: Task) -> _Person:
    """All profiles of a person as one, and their queries, earliest first: the profile grows with time."""
    profile: dict[tuple[str, ...], Entry] = {}
    for question in sorted(group, key=lambda q: -len(q.profile)):
        for entry in question.profile:
            profile.setdefault(_identity(entry), entry)
    entries = list(profile.values())
    if all(is_date(entry.date) for entry in entries):
        entries.sort(key=lambda entry: entry.date)
    query = [entry for question in sorted(group, key=lambda q: len(q.profile)) for entry in question.query]
    return _Person(
        name=group[0].person or min(question.user_id for question in group),
        numbered=not group[0].person,
        profile=entries,
        query=query,
        history=_without(entries, query, task),
        held_out=query,
    )


def _without(profile: Iterable[Entry], query: Iterable[Entry], task: Task) -> list[Entry]:
    """The profile without the items that the queries ask about.

    Those are of the same text; where items hold the answer alone, as LaMP-7's tweets, of the same answer.
    """

    def plain(text: str) -> str:
        return " ".join(text.split()).casefold()

    queries = list(query)
    texts = {plain(entry.item[task.text_field]) for entry in queries}
    golds = {plain(entry.item[task.gold_field]) for entry in queries}
    return [
        entry
        for entry in profile
        if (
            plain(entry.item[task.text_field]) not in texts
            if task.text_field in entry.item
            else plain(entry.item[task.gold_field]) not in golds
        )
    ]


# -- News Category Dataset ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Article:
    line: int
    author: str
    date: str
    headline: str
    description: str
    category: str  # in small letters


def prepare_news(
    file: Path, out: Path, *, users: int, least: int, lamp_labels: bool, force: bool, tell: Tell
) -> tuple[Prepared, ...]:
    """Turn the News Category Dataset (JSON lines) into the folders news_headline and news_categorize.

    Users are authors. Their latest fifth of articles, 30 at most, is held out, and with `least` or
    more before that they may be in the cohort. Everyone else is in user_others.json with all of
    theirs, both as profile and as queries. The labels are the categories that occur, or LaMP's 15;
    a task.json says which. Raises as `prepare_lamp` does.
    """
    headline, categorize = task_named("news_headline"), task_named("news_categorize")
    _check_out(out / headline.name, force=force)
    _check_out(out / categorize.name, force=force, also=(_TASK,))
    articles, left_out = _read_articles(file)
    tell(f"{file}: {len(articles)} articles of {len({article.author for article in articles})} authors")
    prepared = [
        _write(
            headline, out / headline.name, _authors(articles, headline), users=users, least=least,
            left_out=left_out, tell=tell,
        )
    ]  # fmt: skip
    if lamp_labels:
        joined = [replace(a, category=_JOINED.get(a.category, a.category)) for a in articles]
        kept = [article for article in joined if article.category in categorize.labels]
        left_out = {**left_out, "other_category": len(articles) - len(kept)}
    else:
        kept, categorize = articles, _with_labels(categorize, articles)
    written = {"task": categorize.name, "template": categorize.template, "labels": categorize.labels}
    prepared.append(
        _write(
            categorize, out / categorize.name, _authors(kept, categorize), users=users, least=least,
            left_out=left_out, tell=tell, task_json=written,
        )
    )  # fmt: skip
    return tuple(prepared)


def _read_articles(path: Path) -> tuple[list[_Article], dict[str, int]]:
    """By time, and how many were left out: with an empty field, or in an author's same words again."""
    articles: dict[tuple[str, ...], _Article] = {}
    left_out = {"empty_field": 0, "repeated": 0}
    with at(str(path)):
        # Not splitlines(): it also splits at U+2028, which JSON allows inside strings.
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            with at(f"line {number}"):
                article = _article(parse_json(line), number)
            words = (article.author, article.headline.casefold(), article.description.casefold())
            if not all((*words, article.category)):
                left_out["empty_field"] += 1
            elif words in articles:
                left_out["repeated"] += 1
            else:
                articles[words] = article
    return sorted(articles.values(), key=lambda article: (article.date, article.line)), left_out


def _article(row: Any, number: int) -> _Article:
    if not isinstance(row, dict):
        raise InvalidData(
            "it should be an object with headline, short_description, authors, category and date"
        )
    texts = {}
    for name in ("headline", "short_description", "authors", "category", "date"):
        if name not in row:
            raise InvalidData(f'field "{name}" is missing')
        if not isinstance(row[name], str):
            raise InvalidData(f'field "{name}" should be text')
        # JSON also makes lone surrogates, which no file can hold.
        texts[name] = " ".join(row[name].encode("utf-8", "replace").decode().split())
    if not is_date(texts["date"]):
        raise InvalidData('field "date" should be a date like 2018-05-26')
    return _Article(
        number, texts["authors"], texts["date"], texts["headline"], texts["short_description"],
        texts["category"].lower(),
    )  # fmt: skip


def _with_labels(task: Task, articles: Iterable[_Article]) -> Task:
    """The task with the categories that occur, most frequent first."""
    counts = Counter(article.category for article in articles)
    labels = sorted(counts, key=lambda label: (-counts[label], label))
    listed = ", ".join(labels).replace("{", "{{").replace("}", "}}")
    template = re.sub(r"\[.*?\]", lambda _: f"[{listed}]", task.template, count=1)
    return replace(task, template=template, labels=tuple(labels))


def _authors(articles: Iterable[_Article], task: Task) -> list[_Person]:
    by_author: dict[str, list[_Article]] = {}
    for article in articles:
        by_author.setdefault(article.author, []).append(article)
    people = []
    for author, theirs in by_author.items():
        profile = [_entry(article, task) for article in theirs]
        queries = [_asked(entry, task) for entry in profile]
        count = min(max(1, round(_HELD_OUT * len(theirs))), _HELD_OUT_MOST)
        people.append(
            _Person(
                name=author, numbered=True, profile=profile, query=queries,
                history=profile[:-count], held_out=queries[-count:],
            )
        )  # fmt: skip
    return people


def _entry(article: _Article, task: Task) -> Entry:
    if task.name == "news_headline":
        item, extra = {"text": article.description, "title": article.headline}, {}
    else:
        item = {"text": f"{article.headline} {article.description}", "category": article.category}
        extra = {"title": article.headline}
    return Entry(str(article.line), article.date, item, extra)


def _asked(entry: Entry, task: Task) -> Entry:
    """A profile item as a query: the prompt without the answer's cue, as in LaMP's `input`."""
    asking = task.template[: task.template.rindex("{text}") + len("{text}")]
    return replace(entry, extra={"input": asking.format_map(entry.item)})


# -- files -------------------------------------------------------------------------------------------


def _check_out(out: Path, *, force: bool, also: tuple[str, ...] = ()) -> None:
    if out.exists() and not out.is_dir():
        raise InvalidInput(f"{out} is a file; --out should be a folder")
    there = next((name for name in (_OTHERS, _TOP, _LABELS, *also) if (out / name).exists()), None)
    if there is not None and not force:
        raise InvalidInput(f"{out} holds {there} already; use another --out, or --force to replace it")


def _write(
    task: Task, out: Path, people: Iterable[_Person], *, users: int, least: int,
    left_out: Mapping[str, int], tell: Tell, task_json: dict[str, Any] | None = None,
) -> Prepared:  # fmt: skip
    """Choose the cohort, number everybody, write the files. Raises InvalidInput when a side is empty."""
    ranked = sorted(people, key=lambda person: (-len(person.history), person.name))
    able = [person for person in ranked if person.held_out and len(person.history) >= least]
    cohort = able[: max(users, 0)]
    chosen = {id(person) for person in cohort}
    others = [person for person in ranked if id(person) not in chosen]
    if not cohort or not any(person.query for person in others):
        raise InvalidInput(
            f"{task.name}: of {len(ranked)} people {len(able)} have queries and a history of {least} or "
            f"more; a cohort of {users} leaves nobody to test on or nobody to learn from"
        )
    if len(cohort) < users:
        tell(f"{task.name}: {len(cohort)} people, not {users}, have a history of {least} or more")
    numbers = {id(person): number for number, person in enumerate([*cohort, *others])}

    def record(person: _Person, profile: Iterable[Entry], query: Iterable[Entry]) -> str:
        return _json({
            "user_id": numbers[id(person)] if person.numbered else person.name,
            "profile": [_profile_row(entry) for entry in profile],
            "query": [_query_row(entry, task) for entry in query],
        })  # fmt: skip

    golds = [{"id": q.id, "output": q.item[task.gold_field]} for p in cohort for q in p.held_out]
    files = {
        _OTHERS: _array(record(p, p.profile, p.query) for p in others),
        _TOP: _array(record(p, p.history, p.held_out) for p in cohort),
        _LABELS: [_json({"task": task.lamp, "golds": golds}), "\n"],
    }
    if task_json is not None:
        files[_TASK] = [_json(task_json), "\n"]
    _write_all(out, files)
    return Prepared(
        task=task.name, folder=str(out), users=len(cohort), history=sum(len(p.history) for p in cohort),
        shortest_history=min(len(p.history) for p in cohort), queries=len(golds), others=len(others),
        others_history=sum(len(p.profile) for p in others), others_queries=sum(len(p.query) for p in others),
        left_out=left_out,
    )  # fmt: skip


def _profile_row(entry: Entry) -> dict[str, str]:
    return {"id": entry.id, **({"date": entry.date} if entry.date else {}), **entry.item, **entry.extra}


def _query_row(entry: Entry, task: Task) -> dict[str, str]:
    return {"id": entry.id, "input": entry.extra["input"], "gold": entry.item[task.gold_field]}


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False)


def _array(records: Iterable[str]) -> Iterable[str]:
    """A JSON list, a record a line, without ever being in memory as a whole."""
    separator = "[\n"
    for record in records:
        yield separator + record
        separator = ",\n"
    yield "\n]\n"


def _write_all(out: Path, files: Mapping[str, Iterable[str]]) -> None:
    """None unless all can be written: to temporary files that then take the old ones' places in a row."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        for name, parts in files.items():
            with (out / f"{name}.new").open("w", encoding="utf-8") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
    except BaseException:
        for name in files:
            (out / f"{name}.new").unlink(missing_ok=True)
        raise
    for name in files:
        (out / f"{name}.new").replace(out / name)
