"""What the memory of a front that ends TLS holds: of sealed calls nothing, of others what they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tests.support.cloud import Running
from tests.support.front import FrontProcess, FrontSettings, new_device
from tests.support.memory import looking
from tests.support.models import random_shift

from perfit_cloud.audit.memory import look_at, settle, stopped
from perfit_cloud.audit.needles import Needle, canary_words, gradient_sent, raw, tensor_forms, text
from perfit_cloud.audit.search import Index
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import LOSS_DTYPE, ShiftUse, shift_to_wire
from perfit_device.cloud.sealing import Sealing
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb


def kinds_left(front: FrontProcess, needles: list[Needle]) -> set[str]:
    """The first words of the needles that the front's memory and open files hold."""
    index = Index(needles)
    settle(front.pid)
    with stopped(front.pid):
        look = look_at(front.pid, index)
    assert look.searched > 10**7
    return {index.needles[found.needle].kind.split()[0] for found in look.found}


def call(cloud: Cloud, seed: int) -> list[Needle]:
    """Two calls with words and numbers that stand nowhere else; what to look for."""
    artefact = cloud.describe().artefacts[0]
    words = canary_words(np.random.default_rng(seed), 8)
    prompt, target = " ".join(words[:6]), f" {' '.join(words[6:])}"
    tensors = random_shift(artefact.spec, artefact.spec.personal_rank, seed)
    use = ShiftUse(artefact, tensors)
    sampling = Sampling(max_new_tokens=8)
    list(cloud.generate(prompt, use, sampling))  # its pieces are too short to look for
    request = pb.ComputeGradientRequest(shift=shift_to_wire(use, LOSS_DTYPE))
    request.examples.add(prompt=pb.Prompt(text=prompt), target=target)
    gradient = cloud._call("ComputeGradient", request).gradient
    return [
        *text("prompt text", [prompt]),
        *text("target text", [target]),
        *tensor_forms(tensors.to_bytes(dtype="int8"), artefact.spec),
        *tensor_forms(tensors.to_bytes(dtype=LOSS_DTYPE), artefact.spec),
        gradient_sent(gradient),
    ]


@looking
def test_the_memory_of_a_front_holds_sealed_calls_as_noise(run: Callable[..., Running]) -> None:
    """The same calls: unsealed through a front that is enrolled itself, as the control, then sealed."""
    running = run(front_address="127.0.0.1:0", hardening="off")
    authority = running.authority
    every = {"prompt", "target", "tensor", "gradient"}
    as_today = FrontSettings.of(authority, running.address, **new_device(authority))
    with FrontProcess(as_today) as front, Cloud(running.enrolled(front.address)) as cloud:
        assert kinds_left(front, call(cloud, 1)) == every
    through = FrontSettings.of(authority, running.front_address)
    with FrontProcess(through) as front, Cloud(running.enrolled(front.address), sealing=Sealing()) as cloud:
        needles = call(cloud, 2)
        assert kinds_left(front, needles) == set()
        # The search finds in this process, too: what the front could not read anyway.
        sealer = cloud._connections.for_call().sealer
        in_the_clear = [raw("key id", sealer.key().key_id.encode())] if sealer else []
        assert kinds_left(front, in_the_clear) == {"key"}
