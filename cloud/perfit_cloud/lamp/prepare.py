"""LaMP's time-split downloads → the three files of an OPPU folder (`prepare_files`).

LaMP gives one record a question, with the profile that its person had then. Who that is: `user_id`,
where records have one. Else a question belongs to the person with whom it shares at least half of its
profile (items of the same text and date), since a profile holds what came before the question. Ids
of items say nothing: LaMP makes them from the question's, so the same item has another in every
question, and items of two people may have the same.

A person's history is all their profiles together, without what the held-out queries ask about. All
queries of the cohort are held out, as OPPU does, so a history may have items from between them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from perfit_cloud.lamp.prepare_files import Candidate, Notify, Prepared, check_out, write_folder
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, is_date
from perfit_shared.lamp import Entry, User, labels_beside, read_users
from perfit_shared.tasks import Task

__all__ = ["find_questions", "prepare_lamp"]

_PARTS = {"train": 0, "dev": 1, "test": 2}  # of a download, in order of time
_SAME_PERSON = 0.5  # of a question's profile


def find_questions(folder: Path, notify: Notify) -> list[tuple[Path, Path]]:
    """The pairs of questions and outputs in a folder as downloaded, and in folders inside it, by time.

    Questions without outputs are passed over, with a line to `notify`. Raises InvalidData when there
    is no pair.
    """
    pairs = []
    for path in [*folder.glob("*questions.json"), *folder.glob("*/*questions.json")]:
        outputs = labels_beside(path)
        if outputs is None:
            notify(f"{path}: there are no outputs beside it, so it is left out")
        else:
            pairs.append((path, outputs))
    if not pairs:
        raise InvalidData(f"{folder} holds no train_questions.json with its train_outputs.json, nor the like")
    return sorted(pairs, key=lambda pair: (_PARTS.get(pair[0].name.split("_")[0], 0), pair[0]))


def prepare_lamp(
    files: Sequence[tuple[Path, Path]],
    task: Task,
    out: Path,
    *,
    users: int,
    least: int,
    force: bool,
    notify: Notify,
) -> Prepared:
    """Turn pairs of LaMP's questions and outputs, earliest first, into OPPU's files in `out`.

    The cohort is `users` people with the longest histories, of `least` items or more; ties go by
    `user_id`, or by their first question's id. Raises InvalidData naming file, item and field;
    InvalidInput when `out` holds such files already or there are too few people.
    """
    check_out(out, force=force)
    questions: dict[str, User] = {}
    empty, label_task = 0, ""
    for path, outputs in files:
        found = read_users(path, task, golds=outputs)
        with error_context(str(path)):
            if not found.questions:
                raise InvalidData('these are not LaMP\'s questions, [{"id", "input", "profile"}]')
            if found.no_profiles:
                raise InvalidData(f"no profile item has the fields of task {task.name}")
            again = next((user.user_id for user in found.users if user.user_id in questions), None)
            if again is not None:
                raise InvalidData(f"question {again[:40]}: an earlier file has this id too")
        with error_context(str(outputs)):
            if label_task and found.labels.task not in ("", label_task):
                raise InvalidData(
                    f"its task is {found.labels.task[:40]}, an earlier file's {label_task[:40]}"
                )
        label_task = label_task or found.labels.task
        questions |= {user.user_id: user for user in found.users}
        empty += found.dropped_empty
        notify(f"{path}: {len(found.users)} questions")
    people = [_merged(group, task) for group in _grouped(list(questions.values()))]
    notify(f"they are of {len(people)} people")
    return write_folder(
        task,
        out,
        people,
        users=users,
        least=least,
        left_out={"empty_field": empty},
        notify=notify,
        label_task=label_task,
    )


def _grouped(questions: Sequence[User]) -> list[list[User]]:
    """Questions by person. Raises InvalidData where only some name theirs."""
    named = [question for question in questions if question.person is not None]
    if named and len(named) < len(questions):
        bare = next(question for question in questions if question.person is None)
        raise InvalidData(f'question {bare.user_id[:40]}: field "user_id" is missing, and others have it')
    if not named:
        return _grouped_by_profile(questions)
    groups: dict[str, list[User]] = {}
    for question in questions:
        groups.setdefault(str(question.person).strip(), []).append(question)
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


def _merged(group: Sequence[User], task: Task) -> Candidate:
    """All profiles of a person as one, and their queries, earliest first: the profile grows with time."""
    profile: dict[tuple[str, ...], Entry] = {}
    for question in sorted(group, key=lambda q: -len(q.profile)):
        for entry in question.profile:
            profile.setdefault(_identity(entry), entry)
    entries = list(profile.values())
    if all(is_date(entry.date) for entry in entries):
        entries.sort(key=lambda entry: entry.date)
    query = [entry for question in sorted(group, key=lambda q: len(q.profile)) for entry in question.query]
    person = group[0].person
    return Candidate(
        name=min(question.user_id for question in group) if person is None else person,
        numbered=person is None,
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
