"""An operator's examples: JSONL or LaMP/OPPU files → token pairs by user, with a validation slice.

    items.jsonl        {"user_id": "7", "text": "…", "title": "…"}     one item a line, user_id optional
    user_others.json   [{"user_id", "profile": [{id, date, fields…}], "query": [{id, input, gold}]}]

Of an OPPU user the profile is read when its items have the task's fields, else the queries: in
`user_others.json` one repeats the other. Whatever is left out is counted.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perfit_cloud.engine.gradients import Pair
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData
from perfit_shared.tasks import Task

__all__ = ["Corpus", "Items", "find_data", "read_items", "tokenise"]

TOKEN_CAP = 2048  # longest example, tokens (OPPU's limit), or the model's context if that is less
_VALIDATION_SHARE, _VALIDATION_MIN, _VALIDATION_MAX = 0.05, 100, 300  # of all examples; examples
_VALIDATION_CAP = 0.2  # of all examples, when there are few


@dataclass(frozen=True)
class Items:
    """What a file holds, by user, each user's items oldest first."""

    source: str  # file name and its folder's, no path
    kind: str  # "jsonl", "profile" or "query"
    users: Mapping[str, list[dict[str, str]]]
    dropped_empty: int  # items with an empty field


@dataclass(frozen=True)
class Corpus:
    """Token pairs by user, split into training and validation users."""

    source: str
    kind: str
    train: Mapping[str, list[Pair]]
    validation: list[Pair]
    validation_users: int
    dropped_empty: int
    dropped_long: int
    token_cap: int

    def examples(self) -> list[Pair]:
        """Every training pair, in a fixed order."""
        return [pair for pairs in self.train.values() for pair in pairs]

    def digest(self) -> str:
        """sha-256 over all token ids and the split, hex: changes when data or tokenizer do."""
        h = hashlib.sha256()
        for name, pairs in [*self.train.items(), ("validation", self.validation)]:
            h.update(f"{name!r}:{len(pairs)}".encode())
            h.update(json.dumps(pairs).encode())
        return h.hexdigest()

    def summary(self) -> dict[str, Any]:
        """Statistics for the card."""
        pairs = [*self.examples(), *self.validation]
        return {
            "source": self.source,
            "rows": self.kind,
            "users": len(self.train) + self.validation_users,
            "examples": len(pairs),
            "dropped": {"empty_field": self.dropped_empty, "too_long": self.dropped_long},
            "token_cap": self.token_cap,
            "validation_users": self.validation_users,
            "validation_examples": len(self.validation),
            "mean_prompt_tokens": round(float(np.mean([len(p) for p, _ in pairs])), 1),
            "mean_target_tokens": round(float(np.mean([len(t) for _, t in pairs])), 1),
        }


# -- reading -----------------------------------------------------------------------------------------


def find_data(path: Path) -> Path:
    """The file that `path` names: itself, or the folder's user_others.json or only .jsonl.

    Raises InvalidData when there is none.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise InvalidData(f"no file or folder {path}")
    if (path / "user_others.json").is_file():
        return path / "user_others.json"
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        raise InvalidData(f"{path} should hold user_others.json or one .jsonl file; name the file itself")
    return found[0]


def read_items(path: Path, task: Task) -> Items:
    """Read a .jsonl or OPPU file. Raises InvalidData naming file, item and field when malformed."""
    path = find_data(path)
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidData(f"{path.name} cannot be read as UTF-8 text") from error
    if text.lstrip()[:200].lower().startswith(("<!doctype html", "<html")):
        raise InvalidData(f"{path.name} is an HTML page, not data: the download went wrong, fetch it again")
    lines = path.suffix == ".jsonl"
    rows, kind = (_jsonl(path.name, text), "jsonl") if lines else _oppu(path.name, text, task)
    users: dict[str, list[dict[str, str]]] = {}
    dropped = 0
    for user, where, raw in rows:
        item = _item(raw, task, where)
        if item is None:
            dropped += 1
        else:
            users.setdefault(user, []).append(item)
    if not users:
        raise InvalidData(f"{path.name} holds no item with all fields of task {task.name}")
    return Items(f"{path.resolve().parent.name}/{path.name}", kind, users, dropped)


Row = tuple[str, str, Mapping[str, Any]]  # user, where it stands (for messages), item


def _jsonl(name: str, text: str) -> Iterable[Row]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            item = json.loads(line)
        except ValueError as error:
            raise InvalidData(f"{where}: not JSON") from error
        if not isinstance(item, dict):
            raise InvalidData(f"{where}: should be an object with the task's fields")
        # Without a name, a line is somebody of their own.
        yield str(item.get("user_id", f"line {number}")), where, item


def _oppu(name: str, text: str, task: Task) -> tuple[list[Row], str]:
    try:
        users = json.loads(text)
    except ValueError as error:
        raise InvalidData(f"{name}: not JSON") from error
    if not isinstance(users, list):
        raise InvalidData(f"{name}: should be a list of users with user_id, profile and query")
    kind = ""
    rows: list[Row] = []
    for number, user in enumerate(users, 1):
        where = f"{name}, user {number}"
        if not isinstance(user, dict) or "user_id" not in user:
            raise InvalidData(f'{where}: field "user_id" is missing')
        where = f"{name}, user {user['user_id']}"
        profile, query = _list(user, "profile", where), _list(user, "query", where)
        kind = kind or _kind(profile, task)
        for item in profile if kind == "profile" else query:
            at = f"{where}, {kind} item {item.get('id', '?')}"
            rows.append((str(user["user_id"]), at, item if kind == "profile" else _query(item, task, at)))
    return _by_date(rows) if kind == "profile" else rows, kind or "profile"


def _list(user: Mapping[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    value = user.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InvalidData(f'{where}: field "{key}" should be a list of items')
    return value


def _kind(profile: list[dict[str, Any]], task: Task) -> str:
    """Whether the file's profiles have the task's fields, judged by its first item; "" if it has none."""
    if not profile:
        return ""
    return "profile" if set(_fields(task)) <= profile[0].keys() else "query"


def _query(item: Mapping[str, Any], task: Task, where: str) -> dict[str, str]:
    for field in ("input", "gold"):
        if not isinstance(item.get(field), str):
            raise InvalidData(f'{where}: field "{field}" is missing or not text')
    try:
        return task.item_from_query(item["input"], item["gold"])
    except InvalidData as error:
        raise InvalidData(f"{where}: {error}") from error


def _by_date(rows: list[Row]) -> list[Row]:
    """Oldest first when every item has an ISO date, else as they stand."""
    if not all(isinstance(item.get("date"), str) for _, _, item in rows):
        return rows
    return sorted(rows, key=lambda row: str(row[2]["date"]))


def _fields(task: Task) -> list[str]:
    parsed = string.Formatter().parse(task.template + task.answer)
    return [name for _, name, _, _ in parsed if name is not None]


def _item(raw: Mapping[str, Any], task: Task, where: str) -> dict[str, str] | None:
    """The task's fields as text; None when one is empty. Raises InvalidData when one is no text."""
    item = {}
    for field in _fields(task):
        if field not in raw:
            raise InvalidData(f'{where}: field "{field}" is missing')
        value = raw[field]
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)  # a rating
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if not isinstance(value, str):
            raise InvalidData(f'{where}: field "{field}" should be text')
        item[field] = value
    return item


# -- tokens ------------------------------------------------------------------------------------------


def tokenise(items: Items, *, base: BaseModel, task: Task, seed: int) -> Corpus:
    """Token pairs, over-long ones dropped and counted, split by user.

    Raises InvalidData when fewer than two examples are left.
    """
    cap = min(base.context, TOKEN_CAP)
    users: dict[str, list[Pair]] = {}
    dropped = 0
    for user, entries in items.users.items():
        for item in entries:
            example = task.example(item)
            prompt = (
                base.encode_chat([("user", example.prompt)]) if task.chat else base.encode(example.prompt)
            )
            target = base.encode_target(example.target)
            if len(prompt) + len(target) > cap:
                dropped += 1
            else:
                users.setdefault(user, []).append((prompt, target))
    if sum(map(len, users.values())) < 2:
        raise InvalidData(f"{items.source}: fewer than two examples fit {cap} tokens, nothing to train on")
    held_out = _validation_users(users, seed)
    if held_out:
        train = {user: pairs for user, pairs in users.items() if user not in held_out}
        validation = [pair for user in sorted(held_out) for pair in users[user]]
    else:  # one user alone: their latest tenth
        (user, pairs), *_ = users.items()
        cut = len(pairs) - max(1, len(pairs) // 10)
        train, validation = {user: pairs[:cut]}, pairs[cut:]
    return Corpus(
        source=items.source, kind=items.kind, train=train, validation=validation,
        validation_users=len(held_out), dropped_empty=items.dropped_empty, dropped_long=dropped,
        token_cap=cap,
    )  # fmt: skip


def _validation_users(users: Mapping[str, list[Pair]], seed: int) -> set[str]:
    """About 5 % of the examples, 100 to 300 (at most a fifth of all), by whole users."""
    if len(users) < 2:
        return set()
    total = sum(map(len, users.values()))
    wanted = min(max(_VALIDATION_SHARE * total, _VALIDATION_MIN), _VALIDATION_MAX, _VALIDATION_CAP * total)
    names = sorted(users)
    order = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    chosen: set[str] = set()
    count = 0
    for name in order:
        size = len(users[name])
        if count < wanted and count + size <= max(1.5 * wanted, 1):
            chosen.add(name)
            count += size
    return chosen or {min(order, key=lambda name: len(users[name]))}
