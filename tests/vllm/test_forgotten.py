"""What vLLM would keep of a request that is over, and what it does not do on the way."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perfit_shared.errors import Unavailable
from perfit_shared.types import Sampling
from tests.support.engine_subject import POISON, Subject, endless, fragile
from tests.support.generation import alone, serve, uses
from tests.support.sockets import LOOPBACK, listening, reached
from tests.support.vllm_engines import VllmEngines
from tests.support.waiting import wait_for

_PROMPT = [0, *range(100, 130)]


class TestForgotten(VllmEngines):
    @pytest.mark.parametrize("end", ["read", "cancelled"])
    def test_pages_tensors_and_token_ids_are_overwritten(
        self, end: str, build: Callable[..., Subject]
    ) -> None:
        subject = build(change=endless)
        core, channel = subject.engine._core, subject.engine._channel  # type: ignore[attr-defined]
        runner = core.runner
        stream = subject.engine.submit(_PROMPT, subject.person(1), Sampling(60))
        next(stream)
        held = list(runner.perfit._shifts.values())
        assert held and any(np.any(np.asarray(cache)) for cache in runner.kv_caches)
        assert np.isin(_PROMPT[1:], runner.input_batch.token_ids_cpu).all()
        slots = channel._floats[-channel.layout.slots * channel.layout.slot_floats :]
        assert slots.any()
        if end == "cancelled":
            stream.cancel()
        else:
            list(stream)
        wait_for(lambda: not core.is_busy and subject.engine.cache_tokens_held == 0)
        with subject.held():  # the step that tells the worker is over
            assert not any(np.any(np.asarray(cache)) for cache in runner.kv_caches)
            assert not runner.input_batch.token_ids_cpu.any()
            assert not runner.input_ids.cpu.any()
            assert not slots.any()
            assert not runner.perfit._shifts and not runner.perfit.is_active
            assert not any(t.any() for shift in held for phi in (shift.personal or {}).values() for t in phi)

    def test_a_neighbours_pages_stay_when_mine_are_overwritten(self, build: Callable[..., Subject]) -> None:
        """And where vLLM takes pages away for want of room, a prompt is read and shifted once more."""
        subject = build(change=endless, cache_tokens=192, max_requests=12)
        engine: Any = subject.engine
        engine.settings = replace(engine.settings, cache_tokens=4096)  # more than vLLM has pages for
        taken: list[str] = []
        update = engine._core.runner._update_states

        def noting(step: Any) -> Any:
            taken.extend(step.preempted_req_ids or ())
            return update(step)

        engine._core.runner._update_states = noting
        asked = [
            ([0, *np.random.default_rng(n).integers(3, 250, 20 + n).tolist()], use, Sampling(60))
            for n, use in enumerate(uses(subject.artefacts, 12))
        ]
        for (prompt, use, _), got in zip(asked, serve(engine, asked), strict=True):
            assert got == alone(subject.base, prompt, use, 60)
        assert taken

    def test_nothing_of_a_request_is_logged_when_a_step_fails(
        self,
        build: Callable[..., Subject],
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        subject = build(change=fragile)
        with caplog.at_level(logging.DEBUG):
            stream = subject.engine.submit([0, 211, 212, POISON, 213], subject.person(1), Sampling(4))
            with pytest.raises(Unavailable):
                list(stream)
        written = caplog.text + "".join(capfd.readouterr())
        assert "a pass failed" in written
        assert not any(mark in written for mark in ("secret", "211, 212", "extra_args", "SamplingParams("))

    def test_prefix_caching_is_off(self, build: Callable[..., Subject]) -> None:
        core = build().engine._core._core  # type: ignore[attr-defined]
        assert not core.vllm_config.cache_config.enable_prefix_caching
        assert core.request_block_hasher is None

    def test_nobody_is_told_of_what_it_does(self, build: Callable[..., Subject]) -> None:
        """Neither its makers, by usage statistics, nor who reads metrics, nor its own log of statistics."""
        from prometheus_client import REGISTRY
        from vllm.usage.usage_lib import is_usage_stats_enabled

        subject = build()
        list(subject.engine.submit(_PROMPT, subject.person(1), Sampling(8)))
        core = subject.engine._core._core  # type: ignore[attr-defined]
        assert not core.log_stats
        assert not is_usage_stats_enabled()
        assert not [m.name for m in REGISTRY.collect() if m.name.startswith("vllm")]
        assert reached(os.getpid()) <= LOOPBACK
        assert listening(os.getpid()) <= LOOPBACK
