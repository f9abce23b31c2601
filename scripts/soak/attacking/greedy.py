"""A5: one device that asks for all it may, within its limits.

PYTHONPATH=scripts .venv/bin/python -m soak.attacking.greedy --json greedy.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import Artefact
from perfit_shared.shifts import ShiftTensors
from perfit_shared.wire import personalization_pb2 as pb
from soak.attacking.common import Attack, Attacker, main

__all__ = ["ATTACKS"]

_BASE = pb.Shift(mode=pb.SHIFT_MODE_BASE)
_TEXT = "The council will decide on the new bridge over the river on Thursday, its speaker said. " * 8
_LONG = pb.Prompt(text=_TEXT)  # two thirds of the 511 tokens that the model takes
_HOURS = 3600.0


def shift_of(attacker: Attacker, artefact: pb.Artefact) -> pb.Shift:
    """The seed, as a device's own."""
    seed = pb.FetchSeedResponse.FromString(
        attacker.channel.unary_unary("/perfit.v1.Personalization/FetchSeed")(
            pb.FetchSeedRequest(artefact=artefact.name).SerializeToString(), timeout=60
        )
    )
    return pb.Shift(
        mode=pb.SHIFT_MODE_PERSONAL, artefact=artefact.name, version=artefact.version, personal=seed.seed
    )


def artefact_of(attacker: Attacker) -> pb.Artefact:
    describe = attacker.channel.unary_unary("/perfit.v1.Personalization/Describe")
    return pb.DescribeResponse.FromString(describe(b"", timeout=60)).artefacts[0]


def gradients(attacker: Attacker) -> None:
    shift = shift_of(attacker, artefact_of(attacker))
    request = pb.ComputeGradientRequest(examples=[pb.Example(prompt=_LONG, target=" news")] * 64, shift=shift)
    attacker.call("ComputeGradient", request.SerializeToString(), seconds=_HOURS)


def scores(attacker: Attacker) -> None:
    candidate = pb.Candidate(prompt=_LONG, answer=" news")
    request = pb.ScoreRequest(candidates=[candidate] * 64, shift=_BASE)
    attacker.call("Score", request.SerializeToString(), seconds=_HOURS)


def answers(attacker: Attacker) -> None:
    """Twelve at once, each with as long a prompt and as many tokens as fit."""
    request = pb.GenerateRequest(
        prompt=_LONG, shift=_BASE, sampling={"max_new_tokens": 150, "temperature": 2.0}
    )
    attacker.call("Generate", request.SerializeToString(), seconds=_HOURS)


def prompts(attacker: Attacker) -> None:
    """Twelve at once that are read and not answered."""
    request = pb.GenerateRequest(prompt=_LONG, shift=_BASE, sampling={"max_new_tokens": 1})
    attacker.call("Generate", request.SerializeToString(), seconds=_HOURS)


def updates(attacker: Attacker) -> None:
    """Steps of all examples of the largest update there may be."""
    artefact = artefact_of(attacker)
    shift = shift_of(attacker, artefact)
    examples = [pb.Example(prompt=_LONG, target=" news")] * 500

    def messages() -> Iterator[bytes]:
        yield pb.AdaptRequest(
            open={"artefact": artefact.name, "version": artefact.version}
        ).SerializeToString()
        for _ in range(4):
            yield pb.AdaptRequest(examples={"examples": examples}).SerializeToString()
        step = pb.AdaptStep(rows=range(2_000), personal=shift.personal)
        while not attacker.is_over.is_set():
            yield pb.AdaptRequest(step=step).SerializeToString()

    attacker.stream("Adapt", messages(), seconds=_HOURS)


_SEEDS: dict[Cloud, tuple[Artefact, ShiftTensors]] = {}


def gradient_of_few(honest: Cloud) -> None:
    """What an honest device asks for beside it: a gradient of four short examples."""
    if honest not in _SEEDS:
        artefact = honest.describe().artefacts[0]
        _SEEDS[honest] = artefact, honest.fetch_seed(artefact)
    honest.compute_gradient([("The council will decide on the bridge", " news")] * 4, *_SEEDS[honest])


ATTACKS = [
    Attack("A5 four gradients at once, beside a gradient", gradients, threads=4, honest=gradient_of_few),
    Attack("A5 two updates, beside a gradient", updates, threads=2, honest=gradient_of_few),
    Attack("A5 four gradients at once", gradients, threads=4),
    Attack("A5 four scores at once", scores, threads=4),
    Attack("A5 twelve long answers", answers, threads=12),
    Attack("A5 twelve long prompts", prompts, threads=12),
    Attack("A5 two updates, steps of all examples", updates, threads=2),
]

if __name__ == "__main__":
    sys.exit(main(__doc__, ATTACKS))
