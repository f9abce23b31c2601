"""Engines over vLLM's build for CPUs, on tiny models whose heads are as wide as its attention wants them."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from perfit_cloud.engine.generation.vllm.engine import VllmEngine
from perfit_cloud.model.base import BaseModel
from tests.support.engine_contract import EngineContract
from tests.support.engine_subject import POISON, EngineSuite, FragileEmbedding, Subject

__all__ = ["VllmContract", "VllmEngines", "dividing", "stopped_at_first_token"]

_QUEUES = 700 << 20  # bytes of /dev/shm that vLLM's queues to two workers may take
dividing = pytest.mark.skipif(
    shutil.disk_usage("/dev/shm").free < _QUEUES,  # noqa: S108
    reason="two workers need 700 MiB of /dev/shm",
)


class VllmEngines(EngineSuite):
    """Tests of engines over vLLM."""

    kind = VllmEngine
    largest = 4.0  # on models four times as wide
    few = ("llama", "gemma3_text")

    def prepare(self, engine: Any, base: BaseModel) -> None:
        if isinstance(base.model.get_input_embeddings(), FragileEmbedding):
            break_on_poison(engine)


class VllmContract(VllmEngines, EngineContract):
    """The contract of engines, asked of vLLM."""

    # Without `alone` vLLM's kernels for CPUs gave the same bits too, so the other half shows nothing here.
    @pytest.mark.parametrize("apart", [True])
    def test_alone_no_bit_tells_whether_others_are_there(
        self, each_of_few: str, apart: bool, build: Callable[..., Subject]
    ) -> None:
        super().test_alone_no_bit_tells_whether_others_are_there(each_of_few, apart, build)


def break_on_poison(engine: VllmEngine) -> None:
    """Passes of vLLM's model with POISON in them fail, as our own fragile model's do."""

    def check(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
        if bool((args[0] == POISON).any()):
            raise RuntimeError("secret")

    runner = engine._core.runner
    runner.get_model().register_forward_pre_hook(
        lambda _module, _args, kwargs: check(_module, (kwargs["input_ids"],)), with_kwargs=True
    )


@contextmanager
def stopped_at_first_token(engine: Any) -> Iterator[Callable[[], bool]]:
    """The engine's thread waits once it has made the next token, until this ends.

    What this gives waits for that, and is false where it does not come. A test that waited for the token
    alone could find the whole answer made.
    """
    reached, go, produced = threading.Event(), threading.Event(), engine._produced

    def stopping(*args: Any) -> bool:
        is_last: bool = produced(*args)
        reached.set()
        go.wait(120)
        return is_last

    engine._produced = stopping
    try:
        yield lambda: reached.wait(120)
    finally:
        engine._produced = produced
        go.set()
