"""A2: work that is done before it is charged, and requests that are refused at their end.

PYTHONPATH=scripts .venv/bin/python -m soak.attacking.unpaid --json unpaid.json
"""

from __future__ import annotations

import sys

from perfit_shared.wire import personalization_pb2 as pb
from soak.attacking.common import Attack, Attacker, main

__all__ = ["ATTACKS"]

_BASE = pb.Shift(mode=pb.SHIFT_MODE_BASE)
_TEXT = "The council will decide on the new bridge over the river on Thursday, its speaker said. " * 8
_LONG = pb.Prompt(text=_TEXT)  # two thirds of the 511 tokens that the model takes


def nearly_good_candidates(attacker: Attacker) -> None:
    good = pb.Candidate(prompt=_LONG, answer=" news")
    request = pb.ScoreRequest(candidates=[good] * 63 + [pb.Candidate(prompt=_LONG)], shift=_BASE)
    attacker.call("Score", request.SerializeToString())


def nearly_good_updates(attacker: Attacker) -> None:
    described = pb.DescribeResponse.FromString(
        attacker.channel.unary_unary("/perfit.v1.Personalization/Describe")(b"", timeout=60)
    )
    artefact = described.artefacts[0]
    good = pb.Example(prompt=_LONG, target=" news")
    messages = [
        pb.AdaptRequest(open={"artefact": artefact.name, "version": artefact.version}),
        *[pb.AdaptRequest(examples={"examples": [good] * 500})] * 4,
        pb.AdaptRequest(examples={"examples": [pb.Example()]}),
    ]
    attacker.stream("Adapt", [message.SerializeToString() for message in messages])


def texts_too_long(attacker: Attacker) -> None:
    """Answered without a token of it; each is refused when it has been tokenized."""
    prompt = pb.Prompt(text="a b c d e f g h " * 500)
    attacker.call(
        "Generate",
        pb.GenerateRequest(prompt=prompt, shift=_BASE, sampling={"max_new_tokens": 1}).SerializeToString(),
    )


ATTACKS = [
    Attack("A2 63 long candidates and an empty one", nearly_good_candidates, threads=4),
    Attack("A2 updates whose last example is empty", nearly_good_updates, threads=2),
    Attack("A2 prompts that are too long", texts_too_long, threads=8),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, ATTACKS))
