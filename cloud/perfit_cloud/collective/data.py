"""An operator's examples: JSONL or LaMP/OPPU files → token pairs by user, with a validation slice.

    items.jsonl        {"user_id": "7", "text": "…", "title": "…"}     one item a line, user_id optional
    user_others.json   and the other files of `perfit_shared.lamp`, which says what is trained on

Whatever is left out is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from perfit_cloud.collective.encoding import Encoded, Encoder
from perfit_cloud.collective.items import Items, source_of
from perfit_cloud.collective.streaming import stream_users
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData
from perfit_shared.json_input import error_context, id_of, numbered_lines, parse_json, read_text
from perfit_shared.lamp import item_of, read_users
from perfit_shared.tasks import Task

__all__ = ["Corpus", "find_data", "read_items", "tokenise"]

_WHOLE_BYTES = 2**25  # of a file that is parsed as a whole; larger ones person by person
_VALIDATION_SHARE, _VALIDATION_MIN, _VALIDATION_MAX = 0.05, 100, 300  # of all examples; examples
_VALIDATION_CAP = 0.2  # of all examples, when there are few
# Users whose update on a device is simulated, their latest examples, and how many make an update.
TRIAL_USERS, _TRIAL_MOST, _TRIAL_LEAST = 8, 64, 12


@dataclass(frozen=True)
class Corpus:
    """Token pairs by user, split into training and validation users."""

    source: str
    kind: str
    train: Mapping[str, list[Pair]]
    validation: list[Pair]
    validation_users: int
    histories: Mapping[str, list[Pair]]  # of users to try device updates on, oldest first
    held_out_histories: int  # of those users, how many are not trained on; they come first
    dropped_empty: int
    dropped_long: int  # answers that fill the context
    shortened: int  # prompts cut to fit it
    token_cap: int
    only_profiles: int  # users left out, since they have no queries and others do
    validated: Mapping[str, list[Pair]]  # the examples of the validation users, whole

    def examples(self) -> list[Pair]:
        """Every training pair, in a fixed order."""
        return [pair for pairs in self.train.values() for pair in pairs]

    def digest(self) -> str:
        """sha-256 over all token ids and the split, hex: changes when data or tokenizer do."""
        h = hashlib.sha256()
        parts = [*self.train.items(), ("validation", self.validation), *self.histories.items()]
        for name, pairs in parts:
            h.update(f"{name!r}:{len(pairs)}".encode())
            h.update(json.dumps(pairs).encode())
        return h.hexdigest()

    def private_summary(self) -> dict[str, Any]:
        """What the card may publish about private data: how many people there are."""
        return {
            "source": self.source,
            "rows": self.kind,
            "users": len(self.train),
            "token_cap": self.token_cap,
            "validation_users": self.validation_users,
            "validation_examples": len(self.validation),
        }

    def summary(self) -> dict[str, Any]:
        """Statistics for the card."""
        pairs = [*self.examples(), *self.validation]
        return {
            "source": self.source,
            "rows": self.kind,
            "users": len(self.train) + self.validation_users,
            "examples": len(pairs),
            "dropped": {
                "empty_field": self.dropped_empty,
                "too_long": self.dropped_long,
                "users_without_queries": self.only_profiles,
            },
            "token_cap": self.token_cap,
            "shortened": self.shortened,
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
    """Read a .jsonl, OPPU or LaMP file. Raises InvalidData naming file, item and field when malformed."""
    path = find_data(path)
    items = _read_lines(path, task) if path.suffix == ".jsonl" else _read_users(path, task)
    if not items.users:
        raise InvalidData(f"{path} holds no item with all fields of task {task.name}")
    return items


def _read_users(path: Path, task: Task) -> Items:
    if path.stat().st_size > _WHOLE_BYTES:
        return stream_users(path, task, latest=_TRIAL_MOST)
    found = read_users(path, task)
    kind, entries = found.to_train_on()
    users = {user: [dict(entry.item) for entry in theirs] for user, theirs in entries.items()}
    if kind == "profile":
        return Items(found.source, kind, users, found.dropped_empty)
    with_profiles = [user for user in found.users if user.profile]
    profiles = {
        user.user_id: [dict(entry.item) for entry in user.profile[-_TRIAL_MOST:]]
        for user in with_profiles
        if user.query
    }
    return Items(
        found.source,
        kind,
        users,
        found.dropped_empty,
        profiles,
        only_profiles=0 if found.questions else len(with_profiles) - len(profiles),
        unnamed=len(users) if found.questions else 0,
    )


def _read_lines(path: Path, task: Task) -> Items:
    users: dict[str, list[dict[str, str]]] = {}
    dropped = unnamed = 0
    with error_context(str(path)):
        for number, line in numbered_lines(read_text(path)):
            with error_context(f"line {number}"):
                values = parse_json(line)
                if not isinstance(values, dict):
                    raise InvalidData("it should be an object with the task's fields")
                named = "user_id" in values
                # A line without a name counts as a person of its own.
                user = id_of(values, "user_id") if named else f"line {number}"
                item = item_of(values, task)
            if item is None:
                dropped += 1
            else:
                users.setdefault(user, []).append(item)
                unnamed += not named
    return Items(source_of(path), "jsonl", users, dropped, unnamed=unnamed)


# -- tokens ------------------------------------------------------------------------------------------


def tokenise(items: Items, *, base: BaseModel, task: Task, seed: int, others: Items | None = None) -> Corpus:
    """Token pairs, split by user; long prompts are cut, and what does not fit is left out (`Encoder`).

    `others`: examples to validate on and to try updates on, so that all `items` are trained
    on. Raises InvalidData when fewer than two examples are left.
    """
    encoder = Encoder(base, task)
    encoded = {user: encoder.examples(entries) for user, entries in items.users.items()}
    users = _with_examples(encoded)
    if sum(map(len, users.values())) < 2:
        raise InvalidData(
            f"{items.source}: fewer than two examples fit {encoder.cap} tokens, nothing to train on"
        )
    if others is None:
        split = _split(users, seed)
        histories = _histories(items, set(users), set(split.users), encoder)
    else:
        split = _validated_on(others, users, encoder)
        histories = _histories(others, set(split.users), set(split.users), encoder)
    return Corpus(
        source=items.source,
        kind=items.kind,
        train=split.train,
        validation=split.validation,
        validation_users=len(split.users),
        histories=histories,
        held_out_histories=len(split.users.keys() & set(histories)),
        dropped_empty=items.dropped_empty,
        dropped_long=sum(len(items.users[user]) - len(found) for user, found in encoded.items()),
        shortened=sum(example.is_cut for found in encoded.values() for example in found),
        token_cap=encoder.cap,
        only_profiles=items.only_profiles,
        validated=split.users,
    )


class _Split(NamedTuple):
    train: Mapping[str, list[Pair]]
    validation: list[Pair]
    users: Mapping[str, list[Pair]]  # of the validation examples, unless they are trained on too


def _with_examples(encoded: Mapping[str, list[Encoded]]) -> dict[str, list[Pair]]:
    return {user: [example.pair for example in found] for user, found in encoded.items() if found}


def _split(users: Mapping[str, list[Pair]], seed: int) -> _Split:
    held_out = _validation_users(users, seed)
    if not held_out:  # one user alone: their latest tenth
        (user, pairs), *_ = users.items()
        cut = len(pairs) - max(1, len(pairs) // 10)
        return _Split({user: pairs[:cut]}, pairs[cut:], {})
    train = {user: pairs for user, pairs in users.items() if user not in held_out}
    theirs = {user: users[user] for user in sorted(held_out)}
    return _Split(train, [pair for pairs in theirs.values() for pair in pairs], theirs)


def _validated_on(others: Items, users: Mapping[str, list[Pair]], encoder: Encoder) -> _Split:
    theirs = _with_examples({user: encoder.examples(entries) for user, entries in others.users.items()})
    if not theirs:
        raise InvalidData(f"{others.source}: no example fits {encoder.cap} tokens, nothing to validate on")
    everything = [pair for pairs in theirs.values() for pair in pairs]
    some = everything[:: -(-len(everything) // _VALIDATION_MAX)]  # of everybody alike
    return _Split(users, some, theirs)


def _histories(items: Items, users: set[str], held_out: set[str], encoder: Encoder) -> dict[str, list[Pair]]:
    """Of those whose updates are tried."""
    chosen = _trial_users(items, users, held_out)
    latest = {user: items.history(user)[-_TRIAL_MOST:] for user in chosen}
    return {user: [e.pair for e in encoder.examples(entries)] for user, entries in latest.items()}


def _trial_users(items: Items, users: set[str], held_out: set[str]) -> list[str]:
    """Users with enough of a history: those not trained on first, the longest histories first."""
    long = [user for user in users if len(items.history(user)) >= _TRIAL_LEAST]
    return sorted(long, key=lambda u: (u not in held_out, -len(items.history(u)), u))[:TRIAL_USERS]


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
