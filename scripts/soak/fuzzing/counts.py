"""Counts and sizes: a field of any request, there up to a million times or as large as a message may be.

The walk over a message's bytes must let through nothing that is over a bound once it is parsed, and refuse
what is over one within as many steps as the bounds allow.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import strategies as st

from perfit_cloud.service.bounds import Bound, MessageBounds, request_types
from perfit_cloud.service.catalog import Catalog
from soak.attacking.counts import wrapped
from soak.fuzzing.checking import Target, Unsound

__all__ = ["Counted", "counted", "targets"]

_LARGEST = 1 << 21  # bytes of an input
_STEPS = 400_000  # calls and jumps of Python that one walk may take
_STRANGE = 99  # a field that no message has


class Counted(NamedTuple):
    """`element` so many times in a field, inside the fields that lead to it."""

    path: str  # of the method
    outer: tuple[int, ...]
    field: int
    element: bytes
    times: int
    is_compressed: bool

    def to_bytes(self) -> bytes:
        one = wrapped(self.field, self.element)
        data = one * min(self.times, _LARGEST // len(one))
        for number in reversed(self.outer):
            data = wrapped(number, data)
        return data


def counted() -> st.SearchStrategy[Counted]:
    """Any field of any request."""
    places = [
        (path, outer, field)
        for path, kind in request_types().items()
        for outer, of in _reached(kind)
        for field in (*of.fields_by_number, _STRANGE)
    ]
    times = st.one_of(st.integers(0, 70), st.sampled_from([64, 65, 2047, 4096, 4097, 10**5, 10**6]))
    sizes = st.one_of(st.integers(0, 70), st.sampled_from([255, 4096, 70_000, 10**6]))
    elements = st.one_of(
        sizes.map(bytes), sizes.map(lambda size: b"a" * size), sizes.map(lambda size: b"\xff" * size)
    )
    return st.builds(
        lambda place, element, n, is_compressed: Counted(*place, element, n, is_compressed),
        st.sampled_from(places),
        elements,
        times,
        st.booleans(),
    )


def _reached(kind: Descriptor) -> list[tuple[tuple[int, ...], Descriptor]]:
    """A request and every message that can stand in it, with the fields that lead there."""
    found: list[tuple[tuple[int, ...], Descriptor]] = [((), kind)]
    for field in kind.fields:
        if field.message_type is not None:
            found += [((field.number, *outer), of) for outer, of in _reached(field.message_type)]
    return found


def targets(catalog: Catalog) -> list[Target]:
    devices, strangers = (
        MessageBounds.of_devices(catalog.limits, catalog.tensor_bytes),
        MessageBounds.of_enrolment(),
    )

    def check(case: Counted) -> str:
        bounds = strangers if ".Enrollment/" in case.path else devices
        kind, data = request_types()[case.path], case.to_bytes()
        with _few_steps():
            bounds.check(case.path, data, lambda _: None)
        try:
            message = GetMessageClass(kind).FromString(data)
        except Exception:
            return "no message"
        _within(message, bounds.fields)
        return "within its bounds"

    return [Target("cloud: counts and sizes", 9, counted(), check, seconds=2.0)]


def _within(message: Message, bounds: Mapping[str, Bound]) -> None:
    """Raises Unsound on a field that is over its bound."""
    for field, value in message.ListFields():
        bound = bounds.get(f"{message.DESCRIPTOR.name}.{field.name}", Bound())
        values: Any = value if field.is_repeated else [value]
        if len(values) > bound.times:
            raise Unsound(f"{field.full_name} is there {len(values)} times")
        for one in values:
            if isinstance(one, Message):
                _within(one, bounds)
            elif isinstance(one, str | bytes):
                size = len(one.encode() if isinstance(one, str) else one)
                if size > bound.size:
                    raise Unsound(f"{field.full_name} has {size} bytes")


@contextmanager
def _few_steps() -> Iterator[None]:
    """Raises Unsound where the block makes more calls than a walk may."""
    steps = 0

    def count(*_: object) -> None:
        nonlocal steps
        steps += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
    if steps > _STEPS:
        raise Unsound(f"the walk made {steps} calls")
