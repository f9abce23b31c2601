"""vLLM computes with as many threads as PyTorch was told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from perfit_shared.types import Sampling
from tests.support.engine_subject import Subject
from tests.support.vllm_engines import VllmEngines


@pytest.fixture
def another_number() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("another_number")
class TestThreads(VllmEngines):
    def test_a_thread_that_has_computed_nothing_yet(self, build: Callable[..., Subject]) -> None:
        """The engine's thread is such a one when it takes its first request."""
        subject = build()
        assert list(subject.engine.submit([0, 5, 6, 7], subject.person(1), Sampling(4)))
