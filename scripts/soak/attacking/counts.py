"""A1: messages that are small on the wire and large when they are unpacked.

    PYTHONPATH=scripts .venv/bin/python -m soak.attacking.counts --json counts.json
    PYTHONPATH=scripts .venv/bin/python -m soak.attacking.counts --code ../before --json counts.json

A field that repeats takes two bytes for an empty message, so that a message of 2 MB holds a million of
them, and gzip makes 2 KB of that.
"""

from __future__ import annotations

import sys

from perfit_shared.wire import personalization_pb2 as pb
from soak.attacking.common import Attack, Attacker, main

__all__ = ["ATTACKS", "repeated", "wrapped"]

_BASE = pb.Shift(mode=pb.SHIFT_MODE_BASE)
_MILLION = 1_000_000
_FULL = 8_380_000  # empty messages of two bytes that fill 16 MiB


def repeated(field: int, count: int) -> bytes:
    """So many empty messages (or texts) in a field."""
    return (_varint(field << 3 | 2) + b"\0") * count


def wrapped(field: int, body: bytes) -> bytes:
    """Bytes, a text or a message in a field."""
    return _varint(field << 3 | 2) + _varint(len(body)) + body


def _varint(number: int) -> bytes:
    made = bytearray()
    while number > 127:
        made.append(number & 127 | 128)
        number >>= 7
    return bytes([*made, number])


def empty_candidates(attacker: Attacker) -> None:
    message = repeated(1, _MILLION) + pb.ScoreRequest(shift=_BASE).SerializeToString()
    attacker.call("Score", message, compress=True)


def full_candidates(attacker: Attacker) -> None:
    attacker.call("Score", repeated(1, _FULL), compress=True)


def empty_examples(attacker: Attacker) -> None:
    attacker.call("ComputeGradient", repeated(1, _MILLION), compress=True)


def chat_turns(attacker: Attacker) -> None:
    message = wrapped(1, wrapped(2, repeated(1, _FULL - 50)))
    attacker.call("Generate", message + pb.GenerateRequest(shift=_BASE).SerializeToString(), compress=True)


def stop_texts(attacker: Attacker) -> None:
    head = pb.GenerateRequest(prompt=pb.Prompt(text="the cat"), shift=_BASE, sampling={"max_new_tokens": 4})
    attacker.call("Generate", head.SerializeToString() + wrapped(3, repeated(6, _FULL - 200)), compress=True)


def step_rows(attacker: Attacker) -> None:
    """An update of one example, and a step that names it sixteen million times."""
    described = pb.DescribeResponse.FromString(
        attacker.channel.unary_unary("/perfit.v1.Personalization/Describe")(b"", timeout=60)
    )
    artefact = described.artefacts[0]
    opening = pb.AdaptOpen(artefact=artefact.name, version=artefact.version)
    example = pb.Example(prompt=pb.Prompt(text="the cat sat"), target=" here")
    messages = [
        pb.AdaptRequest(open=opening).SerializeToString(),
        pb.AdaptRequest(examples={"examples": [example]}).SerializeToString(),
        wrapped(3, wrapped(2, bytes(16_700_000))),
    ]
    attacker.stream("Adapt", messages, compress=True)


ATTACKS = [
    Attack("A1 a million empty candidates", empty_candidates),
    Attack("A1 8.4 million empty candidates", full_candidates, threads=1),
    Attack("A1 a million empty examples", empty_examples),
    Attack("A1 8.4 million empty chat turns", chat_turns, threads=4),
    Attack("A1 8.4 million stop texts", stop_texts, threads=2),
    Attack("A1 16.7 million rows of a step", step_rows),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, ATTACKS))
