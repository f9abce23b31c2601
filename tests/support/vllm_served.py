"""A hardened process that answers by vLLM with two workers, as a server does, and does what its stdin says.

    python -c PROGRAM folder-of-a-model

It says who its workers are and what holds in them. Then for each line, which has a prompt and the seed of a
person's tensors, it says when the first token is there, waits for another line, and says all tokens.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

__all__ = ["PROGRAM", "person"]

PROGRAM = """
import logging, sys
from perfit_cloud.hardening.process import harden, restart_hardened
restart_hardened()
logging.basicConfig(level=logging.WARNING)
harden()
from tests.support.vllm_served import answer
answer(sys.argv[1])
"""
_PR_GET_DUMPABLE = 3


def person(artefact: Any, seed: int) -> Any:
    from perfit_cloud.engine.interface import ShiftUse
    from perfit_shared.types import Mode
    from tests.support.models import random_shift

    spec = artefact.spec
    return ShiftUse(Mode.PERSONAL, artefact, random_shift(spec, spec.personal_rank, seed))


def answer(folder: str) -> None:
    from perfit_cloud.engine.generation.vllm.engine import VllmEngine
    from perfit_cloud.model.base import load_base
    from perfit_shared.types import Sampling
    from tests.support.engine_subject import SMALL, endless
    from tests.support.models import random_artefact
    from tests.support.vllm_engines import stopped_at_first_token

    base = endless(load_base(folder))
    artefact = random_artefact(base)
    engine = VllmEngine(base, {artefact.name: artefact}, replace(SMALL, tensor_parallel=2))
    _say(engine._core._core.model_executor.collective_rpc(_what_holds))
    for line in sys.stdin:
        asked = json.loads(line)
        with stopped_at_first_token(engine) as is_stopped:
            stream = engine.submit(asked["prompt"], person(artefact, asked["seed"]), Sampling(40))
            if is_stopped():
                _say("running")
                sys.stdin.readline()
        list(stream)
        _say(stream.ids)


def _what_holds(_worker: Any) -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "is dumpable": ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0),
        "core": resource.getrlimit(resource.RLIMIT_CORE),
        "has our free": "/memfd:perfit-allocator" in Path("/proc/self/maps").read_text("utf-8"),
        "preloads ours": "/proc/self/fd" in os.environ.get("LD_PRELOAD", ""),
    }


def _say(what: Any) -> None:
    print(json.dumps(what), flush=True)
