"""The News Category Dataset → the folders news_headline and news_categorize."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from perfit_cloud.lamp.prepare_files import TASK_FILE, Candidate, Notify, Prepared, check_out, write_folder
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_date, numbered_lines, parse_json, read_text
from perfit_shared.lamp import Entry
from perfit_shared.prompts import asking_for
from perfit_shared.tasks import Task, task_named

__all__ = ["prepare_news"]

_HELD_OUT, _HELD_OUT_MOST = 0.2, 30  # of an author's articles, the latest; articles
# Labels of LaMP's that HuffPost has under other names. Which ones LaMP joined it does not say.
_LAMP_LABELS = {
    "science": "science & technology",
    "tech": "science & technology",
    "arts": "culture & arts",
    "arts & culture": "culture & arts",
}


@dataclass(frozen=True)
class _Article:
    line: int
    author: str
    date: str
    headline: str
    description: str
    category: str  # in small letters


def prepare_news(
    file: Path, out: Path, *, users: int, least: int, lamp_labels: bool, force: bool, notify: Notify
) -> tuple[Prepared, ...]:
    """Turn the News Category Dataset (JSON lines) into the folders news_headline and news_categorize.

    Users are authors. Their latest fifth of articles, 30 at most, is held out, and with `least` or
    more before that they may be in the cohort. Everyone else is in user_others.json with all of
    theirs, both as profile and as queries. The labels are the categories that occur, or LaMP's 15;
    a task.json says which. Raises as `prepare_lamp` does.
    """
    headline, categorize = task_named("news_headline"), task_named("news_categorize")
    check_out(out / headline.name, force=force)
    check_out(out / categorize.name, force=force, also=(TASK_FILE,))
    articles, left_out = _read_articles(file)
    notify(f"{file}: {len(articles)} articles of {len({article.author for article in articles})} authors")
    write = partial(write_folder, users=users, least=least, notify=notify)
    headlines = write(headline, out / headline.name, _authors(articles, headline), left_out=left_out)
    if lamp_labels:
        renamed = [replace(a, category=_LAMP_LABELS.get(a.category, a.category)) for a in articles]
        kept = [article for article in renamed if article.category in categorize.labels]
        left_out = {**left_out, "other_category": len(articles) - len(kept)}
    else:
        kept, categorize = articles, _with_labels(categorize, articles)
    written = {"task": categorize.name}
    written |= {key: getattr(categorize, key) for key in ("template", "chat_template", "labels")}
    people = _authors(kept, categorize)
    return headlines, write(categorize, out / categorize.name, people, left_out=left_out, task_json=written)


def _read_articles(path: Path) -> tuple[list[_Article], dict[str, int]]:
    """By time, and how many were left out: with an empty field, or in an author's same words again."""
    articles: dict[tuple[str, ...], _Article] = {}
    left_out = {"empty_field": 0, "repeated": 0}
    with error_context(str(path)):
        for number, line in numbered_lines(read_text(path)):
            with error_context(f"line {number}"):
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
        number,
        texts["authors"],
        texts["date"],
        texts["headline"],
        texts["short_description"],
        texts["category"].lower(),
    )


def _with_labels(task: Task, articles: Iterable[_Article]) -> Task:
    """The task with the categories that occur, most frequent first."""
    counts = Counter(article.category for article in articles)
    labels = sorted(counts, key=lambda label: (-counts[label], label))
    asked, as_a_turn = (asking_for(text, tuple(labels)) for text in (task.template, task.chat_template))
    return replace(task, template=asked, chat_template=as_a_turn, labels=tuple(labels))


def _authors(articles: Iterable[_Article], task: Task) -> list[Candidate]:
    by_author: dict[str, list[_Article]] = {}
    for article in articles:
        by_author.setdefault(article.author, []).append(article)
    people = []
    for author, theirs in by_author.items():
        profile = [_entry(article, task) for article in theirs]
        queries = [_as_query(entry, task) for entry in profile]
        count = min(max(1, round(_HELD_OUT * len(theirs))), _HELD_OUT_MOST)
        people.append(
            Candidate(
                name=author,
                numbered=True,
                profile=profile,
                query=queries,
                history=profile[:-count],
                held_out=queries[-count:],
            )
        )
    return people


def _entry(article: _Article, task: Task) -> Entry:
    if task.name == "news_headline":
        item, extra = {"text": article.description, "title": article.headline}, {}
    else:
        item = {"text": f"{article.headline} {article.description}", "category": article.category}
        extra = {"title": article.headline}
    return Entry(str(article.line), article.date, item, extra)


def _as_query(entry: Entry, task: Task) -> Entry:
    """A profile item as a query: the prompt without the answer's cue, as in LaMP's `input`."""
    asking = task.template[: task.template.rindex("{text}") + len("{text}")]
    return replace(entry, extra={"input": asking.format_map(entry.item)})
