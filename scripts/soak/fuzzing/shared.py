"""Targets in perfit_shared: tensors, positions, specs, tasks, invites, states of training."""

from __future__ import annotations

import json
import string
from typing import Any

import numpy as np
from hypothesis import strategies as st

from perfit_shared.errors import InvalidData
from perfit_shared.invites import Invite
from perfit_shared.json_input import is_date, parse_json
from perfit_shared.positions import Positions
from perfit_shared.shifts import (
    ShiftSpec,
    ShiftTensors,
    gradient_from_bytes,
    gradient_to_bytes,
    read_metadata,
    wire_dtype,
)
from perfit_shared.starts import near_identity
from perfit_shared.tasks import TASKS, Task
from perfit_shared.training import Schedule, Training
from perfit_shared.types import Score
from soak.fuzzing.checking import Target, Unsound
from soak.fuzzing.mutation import TEXT, edited, edited_json, forms_of, mostly, tensor_bytes

__all__ = ["SPEC", "TENSORS", "targets"]

SPEC = ShiftSpec(layers=(1, 2), positions="f3+l3", collective_rank=6, personal_rank=3, hidden_size=32)
TENSORS = [ShiftTensors.identity(SPEC, 3, 1), near_identity(SPEC, 3, seed=2, size=0.3)]
_GRADIENTS = [gradient_to_bytes(tensors, form) for tensors in TENSORS for form in ("float32", "float16")]
_ITEM = {"text": "the cat sat", "title": "a cat", "date": "2024-05-01"}


def targets() -> list[Target]:
    shifts = [data for tensors in TENSORS for data in forms_of(tensors)]
    exported = TENSORS[0].to_bytes(metadata={"artefact": "news_headline", "version": "1", "updates": "2"})
    tasks = [json.loads(task.to_json()) for task in TASKS.values()]
    return [
        Target("shift tensors", 9, tensor_bytes(shifts), _shift),
        Target("gradients", 7, tensor_bytes(_GRADIENTS), _gradient),
        Target("headers of shift files", 4, tensor_bytes([exported, *shifts]), _header),
        Target("positions", 2, _positions_texts(), _positions),
        Target("shift specs", 4, edited_json([SPEC.to_json()]), _spec),
        Target("tasks", 5, edited_json(tasks), _task),
        Target("invites", 5, _invites(), _invite),
        Target("states of training", 3, edited(_trainings()), _training),
        Target("dates", 1, TEXT | st.datetimes().map(str) | st.dates().map(str), _date),
    ]


def _shift(data: bytes) -> None:
    tensors = ShiftTensors.from_bytes(data, SPEC, SPEC.personal_rank)
    tensors.check(SPEC, SPEC.personal_rank)
    again = ShiftTensors.from_bytes(tensors.to_bytes(), SPEC, SPEC.personal_rank)
    if again.digest() != tensors.digest() or wire_dtype(data) not in ("float32", "float16", "int8"):
        raise Unsound("what was decoded does not encode to itself")


def _gradient(data: bytes) -> None:
    gradient = gradient_from_bytes(data, SPEC, SPEC.personal_rank)
    if not all(np.isfinite(array).all() and array.dtype == np.float32 for _, array in gradient.named()):
        raise Unsound("a gradient that is no number")
    if [name for name, _ in gradient.named()] != [name for name, _ in TENSORS[0].named()]:
        raise Unsound("a gradient of other layers")


def _header(data: bytes) -> str:
    form, metadata = wire_dtype(data), read_metadata(data)
    if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
        raise Unsound("metadata that is no text")
    return f"a file in {form}"


def _positions_texts() -> st.SearchStrategy[str]:
    number = st.integers(-1, 2000).map(str)
    built = st.builds(
        lambda a, n, b, m: f"{a}{n}{b}{m}",
        st.sampled_from("fl+ "),
        number,
        st.sampled_from(["+l", "l", "+f", "+", "", "\n", "+l7+l"]),
        number,
    )
    return built | TEXT | st.text("fl+0123456789７ \n", max_size=9)


def _positions(text: str) -> None:
    positions = Positions.parse(text)
    if Positions.parse(str(positions)) != positions:
        raise Unsound("positions that do not print as themselves")
    for length in (0, 1, 2, 7, 40):
        indices = positions.indices(length)
        if indices != sorted(set(indices)) or any(not 0 <= i < length for i in indices):
            raise Unsound("positions outside of the prompt")


def _spec(text: str) -> None:
    values = parse_json(text)
    if not isinstance(values, dict):
        raise InvalidData("not an object")
    spec = ShiftSpec.from_json(values)
    numbers = (*spec.layers, spec.collective_rank, spec.personal_rank, spec.hidden_size)
    if any(type(number) is not int for number in numbers) or spec.personal_parameters() < 1:
        raise Unsound("a spec whose numbers are no whole numbers")
    if ShiftSpec.from_json(json.loads(json.dumps(spec.to_json()))) != spec:
        raise Unsound("a spec that does not print as itself")


def _task(text: str) -> None:
    task = Task.from_json(text)
    if Task.from_json(task.to_json()) != task:
        raise Unsound("a task that does not print as itself")
    item = dict.fromkeys(task.field_names, "a few words")
    example = task.example(item)
    if "a few words" not in example.prompt or "a few words" not in example.target:
        raise Unsound("a prompt without its text")
    task.parse(example.target)
    task.fields_of({})
    if task.item_from_query(f"{task.marker} rest", "gold")[task.gold_field] != "gold":
        raise Unsound("an item without its answer")


def _invites() -> st.SearchStrategy[str]:
    sound = Invite("cloud.example:7444", b"\x30\x82" + bytes(range(250)), 1_900_000_000, bytes(range(32)))
    # With a right checksum too, or nothing behind it would ever be reached.
    summed = edited([_body(sound.encode())]).map(_sealed)
    text = edited([sound.encode().encode()]).map(lambda data: data.decode("latin-1"))
    wrapped = st.text(string.whitespace, max_size=3).map(lambda gap: gap.join(sound.encode()))
    return mostly(summed, text, wrapped, TEXT)


def _body(text: str) -> bytes:
    import base64

    encoded = text.removeprefix("perfit1-")
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))[:-8]


def _sealed(body: bytes) -> str:
    import base64
    import hashlib

    data = body + hashlib.sha256(body).digest()[:8]
    return "perfit1-" + base64.urlsafe_b64encode(data).decode().rstrip("=")


def _invite(text: str) -> None:
    invite = Invite.decode(text)
    if invite.encode() != "".join(text.split()):
        raise Unsound("an invite with two spellings")


def _trainings() -> list[bytes]:
    training = Training.start(Schedule(2, 1e-2, 2, 0, 6), TENSORS[0])
    stepped = training.stepped(1.0, TENSORS[1]).judge([Score(-0.5, 1)])
    return [training.to_bytes(), stepped.to_bytes()]


def _training(data: bytes) -> None:
    training = Training.from_bytes(data, Schedule)
    if Training.from_bytes(training.to_bytes(), Schedule).tensors.digest() != training.tensors.digest():
        raise Unsound("a state that does not encode to itself")


def _date(text: str) -> Any:
    return "date" if is_date(text) else "no date"
