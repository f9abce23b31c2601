"""`perfit-cloud lamp prepare`: what LaMP and HuffPost publish, as the files that a run reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_shared.errors import InvalidInput

if TYPE_CHECKING:
    from perfit_cloud.lamp.prepare_files import Prepared


def prepare(  # noqa: PLR0917 - typer's way; all are options
    out: Annotated[Path, typer.Option(help="Folder for the files; a folder a task with --news-category.")],
    task: Annotated[
        str | None, typer.Option(help="Task of the questions, for example movie_tagging.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="LaMP's time split as downloaded: train_questions.json, train_outputs.json, dev_..."
        ),
    ] = None,
    questions: Annotated[
        list[Path] | None, typer.Option(help="LaMP's questions, earliest first; may be given again.")
    ] = None,
    outputs: Annotated[list[Path] | None, typer.Option(help="Their outputs, in the same order.")] = None,
    news_category: Annotated[
        Path | None,
        typer.Option(help="The News Category Dataset (JSON lines), for news_headline and news_categorize."),
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="People in the test cohort.")] = 100,
    min_history: Annotated[
        int | None,
        typer.Option(min=1, help="Past items of each of them, at least; 1, and 30 with --news-category."),
    ] = None,
    lamp_labels: Annotated[
        bool, typer.Option("--lamp-labels", help="Keep LaMP's 15 news categories, not all that occur.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the files in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make user_others.json, user_top_100_history.json and its labels from published data.

    The people with the longest histories are the test cohort, and their queries are held out; stage 1
    learns from everyone else. LaMP's questions are joined to people by user_id, or where there is
    none by their profiles.

    \b
    perfit-cloud lamp prepare --task movie_tagging --folder downloads/LaMP_2 --out data/movie_tagging
    perfit-cloud lamp prepare --task tweet_paraphrase --questions dev_questions.json --outputs dev_outputs.json --out data/tweet_paraphrase
    perfit-cloud lamp prepare --news-category News_Category_Dataset_v3.json --users 24 --out data/news
    """  # noqa: E501 - \b keeps an example on one line
    from perfit_cloud.lamp.prepare import find_questions, prepare_lamp
    from perfit_cloud.lamp.prepare_news import prepare_news
    from perfit_shared.tasks import task_named

    pairs = list(zip(questions or [], outputs or [], strict=False))
    if len(questions or []) != len(outputs or []):
        raise InvalidInput("every --questions needs its --outputs")
    if sum((bool(pairs), folder is not None, news_category is not None)) != 1:
        raise InvalidInput("say what to read: --folder, --questions with --outputs, or --news-category")
    if news_category is not None:
        if task is not None:
            raise InvalidInput("--news-category makes news_headline and news_categorize; leave --task out")
        made = prepare_news(
            news_category,
            out,
            users=users,
            least=min_history or 30,
            lamp_labels=lamp_labels,
            force=force,
            notify=_notify,
        )
    else:
        if task is None:
            raise InvalidInput("say which task the questions are of: --task")
        if lamp_labels:
            raise InvalidInput("--lamp-labels goes with --news-category; LaMP's questions have them anyway")
        named = task_named(task)
        files = pairs if folder is None else find_questions(folder, _notify)
        made = (
            prepare_lamp(files, named, out, users=users, least=min_history or 1, force=force, notify=_notify),
        )
    for one in made:
        _notify(_line(one))
    if as_json:
        typer.echo(
            json.dumps({"out": str(out), "tasks": [one.to_json() for one in made]}, ensure_ascii=False)
        )


def _notify(line: str) -> None:
    typer.echo(line, err=True)


def _line(made: Prepared) -> str:
    left_out = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in made.left_out.items())
    return (
        f"{made.folder}: {made.task}, {made.users} people with {made.history} past items "
        f"({made.shortest_history} or more each) and {made.queries} held-out queries; {made.others} others "
        f"with {made.others_history} items and {made.others_queries} queries; left out: {left_out}"
    )
