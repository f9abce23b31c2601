"""An operator's examples: JSONL or LaMP/OPPU files → token pairs by user, with a validation slice.

    items.jsonl        {"user_id": "7", "text": "…", "title": "…"}     one item a line, user_id optional
    user_others.json   and the other files of `perfit_shared.lamp`, which says what is trained on

Whatever is left out is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from perfit_cloud.collective.streaming import stream_users
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.lamp import at, id_of, item_of, parse_json, read_text, read_users
from perfit_shared.tasks import Task

__all__ = ["TOKEN_CAP", "Corpus", "Items", "find_data", "fit", "read_items", "tokenise"]

TOKEN_CAP = 2048  # longest example, tokens (OPPU's limit), or the model's context if that is less
_SHORTEST_PROMPT = 2  # tokens
_WHOLE_BYTES = 2**25  # of a file that is parsed as a whole; larger ones person by person
_VALIDATION_SHARE, _VALIDATION_MIN, _VALIDATION_MAX = 0.05, 100, 300  # of all examples; examples
_VALIDATION_CAP = 0.2  # of all examples, when there are few
# Users whose update on a device is simulated, their latest examples, and how many make an update.
_TRIAL_USERS, _TRIAL_MOST, _TRIAL_LEAST = 8, 64, 12


@dataclass(frozen=True)
class Items:
    """What a file holds, by user, each user's items oldest first."""

    source: str  # file name and its folder's, no path
    kind: str  # "jsonl", "profile" or "query"
    users: Mapping[str, list[dict[str, str]]]
    dropped_empty: int  # items of the file with an empty field
    # The latest of the profiles where queries are trained on; of a streamed file, of the longest ones.
    profiles: Mapping[str, list[dict[str, str]]] = field(default_factory=dict)
    only_profiles: int = 0  # users left out, since they have no queries and others do
    unnamed: int = 0  # users who are one line or one question, whoever wrote it

    def history(self, user: str) -> list[dict[str, str]]:
        """What a device of this user would hold: the profile, unless what is trained on is longer."""
        return max(self.users[user], self.profiles.get(user, []), key=len)

    def first_users(self, count: int, seed: int) -> Items:
        """The first `count` users of an order that `seed` shuffles: 10 of a seed are among its 100.

        Raises InvalidInput when the file does not hold as many.
        """
        if not 1 <= count <= len(self.users):
            raise InvalidInput(
                f"{self.source} holds {len(self.users)} users, {count} of them cannot be taken"
            )
        names = sorted(self.users)
        chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
        return replace(
            self,
            users={name: items for name, items in self.users.items() if name in chosen},
            profiles={name: items for name, items in self.profiles.items() if name in chosen},
        )


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
        """What the card may tell of data that nobody else may learn of: how many people there are."""
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
        some = stream_users(path, task, latest=_TRIAL_MOST)
        return Items(
            f"{path.resolve().parent.name}/{path.name}",
            some.kind,
            some.users,
            some.dropped_empty,
            some.profiles,
            some.only_profiles,
            some.unnamed,
        )
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
    with at(str(path)):
        # Not splitlines(): it also splits at U+2028, which JSON allows inside strings.
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            with at(f"line {number}"):
                values = parse_json(line)
                if not isinstance(values, dict):
                    raise InvalidData("it should be an object with the task's fields")
                named = "user_id" in values
                # Without a name, a line is somebody of their own.
                user = id_of(values, "user_id") if named else f"line {number}"
                item = item_of(values, task)
            if item is None:
                dropped += 1
            else:
                users.setdefault(user, []).append(item)
                unnamed += not named
    source = f"{path.resolve().parent.name}/{path.name}"
    return Items(source, "jsonl", users, dropped, unnamed=unnamed)


# -- tokens ------------------------------------------------------------------------------------------


_Encode = Callable[[Sequence[Mapping[str, str]]], tuple[list[Pair], int]]  # (pairs, prompts cut)


def tokenise(items: Items, *, base: BaseModel, task: Task, seed: int, others: Items | None = None) -> Corpus:
    """Token pairs, split by user; `fit` cuts long prompts, and what it cannot fit is left out.

    `others`: examples to validate on and to try updates on, so that all `items` are trained
    on. Raises InvalidData when fewer than two examples are left.
    """
    cap = min(base.context, TOKEN_CAP)
    encode = partial(_pairs, base=base, task=task, cap=cap)
    users, dropped, shortened = _by_user(items, encode)
    if sum(map(len, users.values())) < 2:
        raise InvalidData(f"{items.source}: fewer than two examples fit {cap} tokens, nothing to train on")
    if others is not None:
        return _validated_on(others, items, users, encode, dropped=dropped, shortened=shortened, cap=cap)
    held_out = _validation_users(users, seed)
    if held_out:
        train = {user: pairs for user, pairs in users.items() if user not in held_out}
        validation = [pair for user in sorted(held_out) for pair in users[user]]
    else:  # one user alone: their latest tenth
        (user, pairs), *_ = users.items()
        cut = len(pairs) - max(1, len(pairs) // 10)
        train, validation = {user: pairs[:cut]}, pairs[cut:]
    histories = _histories(items, set(users), held_out, encode)
    return Corpus(
        source=items.source,
        kind=items.kind,
        train=train,
        validation=validation,
        validation_users=len(held_out),
        histories=histories,
        held_out_histories=len(held_out & set(histories)),
        dropped_empty=items.dropped_empty,
        dropped_long=dropped,
        shortened=shortened,
        token_cap=cap,
        only_profiles=items.only_profiles,
    )


def _validated_on(
    others: Items,
    items: Items,
    users: dict[str, list[Pair]],
    encode: _Encode,
    *,
    dropped: int,
    shortened: int,
    cap: int,
) -> Corpus:
    theirs, _, _ = _by_user(others, encode)
    if not theirs:
        raise InvalidData(f"{others.source}: no example fits {cap} tokens, nothing to validate on")
    everything = [pair for pairs in theirs.values() for pair in pairs]
    histories = _histories(others, set(theirs), set(theirs), encode)
    return Corpus(
        source=items.source,
        kind=items.kind,
        train=users,
        validation=everything[:: -(-len(everything) // _VALIDATION_MAX)],  # of everybody alike
        validation_users=len(theirs),
        histories=histories,
        held_out_histories=len(histories),
        dropped_empty=items.dropped_empty,
        dropped_long=dropped,
        shortened=shortened,
        token_cap=cap,
        only_profiles=items.only_profiles,
    )


def _by_user(items: Items, encode: _Encode) -> tuple[dict[str, list[Pair]], int, int]:
    """(pairs of users who have any, how many are left out, how many prompts were cut)."""
    users: dict[str, list[Pair]] = {}
    dropped = shortened = 0
    for user, entries in items.users.items():
        pairs, cut = encode(entries)
        dropped += len(entries) - len(pairs)
        shortened += cut
        if pairs:
            users[user] = pairs
    return users, dropped, shortened


def _histories(items: Items, users: set[str], held_out: set[str], encode: _Encode) -> dict[str, list[Pair]]:
    """Of those whose updates are tried."""
    chosen = _trial_users(items, users, held_out)
    return {user: encode(items.history(user)[-_TRIAL_MOST:])[0] for user in chosen}


def _pairs(
    items: Sequence[Mapping[str, str]], *, base: BaseModel, task: Task, cap: int
) -> tuple[list[Pair], int]:
    """Those that fit `cap` tokens, in order, and how many prompts were cut to that."""
    pairs, shortened = [], 0
    for item in items:
        example = task.example(item)
        prompt = base.encode_chat([("user", example.prompt)]) if task.chat else base.encode(example.prompt)
        pair = fit(prompt, base.encode_target(example.target), cap=cap)
        if pair is not None:
            pairs.append(pair)
            shortened += len(pair[0]) < len(prompt)
    return pairs, shortened


def fit(prompt: list[int], target: list[int], *, cap: int) -> Pair | None:
    """A pair of at most `cap` tokens; None where the target leaves the prompt fewer than two.

    What is cut is the middle of the prompt: the instruction stands at its start, and the answer's cue
    at its end. A target is never cut, since a model would learn to stop there.
    """
    room = cap - len(target)
    if len(prompt) > room >= _SHORTEST_PROMPT:
        prompt = prompt[: room // 2] + prompt[len(prompt) - (room - room // 2) :]
    return (prompt, target) if len(prompt) <= room else None


def _trial_users(items: Items, users: set[str], held_out: set[str]) -> list[str]:
    """Users with enough of a history: those not trained on first, the longest histories first."""
    long = [user for user in users if len(items.history(user)) >= _TRIAL_LEAST]
    return sorted(long, key=lambda u: (u not in held_out, -len(items.history(u)), u))[:_TRIAL_USERS]


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
