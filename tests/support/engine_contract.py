"""What every engine for answers must do, asked of what it shows to its callers.

A test module makes a subclass for each engine, with `kind` (and `families`, when it cannot run all):

    class TestMine(EngineContract):
        kind = MyEngine

Promises 1 and 2, Right and Apart, are in `engine_right`, the others here; perfit_cloud/engine/interface.py
says what each means. An engine that is built in another way overrides `build`.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from perfit_cloud.engine.interface import EngineHealth
from perfit_shared.errors import Busy, InvalidPrompt, Unavailable
from perfit_shared.types import Finish, Sampling
from tests.support.engine_right import RightAndApart
from tests.support.engine_subject import PLAIN, POISON, SHORT, Asked, Subject, endless, fragile, logprobs_of
from tests.support.generation import NEW, alone, prompts, serve, uses
from tests.support.waiting import wait_for

__all__ = ["EngineContract"]


class EngineContract(RightAndApart):
    # -- Fair ----------------------------------------------------------------------------------

    def test_who_came_last_does_not_wait_for_all_of_another_owner(
        self, build: Callable[..., Subject]
    ) -> None:
        """The cache holds three of these thirteen at most."""
        subject = build(change=endless, cache_tokens=512)
        with subject.held():
            greedy = [subject.engine.submit([5] * 100, PLAIN, Sampling(60), "greedy") for _ in range(12)]
            honest = subject.engine.submit([5] * 100, PLAIN, Sampling(60), "honest")
        assert list(honest)[-1].finish
        assert subject.engine.health().waiting > 0
        for stream in greedy:
            stream.cancel()

    # -- Bounded, Reproducible -------------------------------------------------------------------

    def test_what_does_not_fit_is_refused(self, build: Callable[..., Subject]) -> None:
        subject = build(change=endless, cache_tokens=200)
        for prompt, new in (([5] * 91, 10), ([5] * 300, 10), ([], 10)):
            with pytest.raises(InvalidPrompt, match="tokens"):
                subject.engine.submit(prompt, PLAIN, Sampling(new))
        whole = subject.engine.submit([5] * 90, PLAIN, Sampling(10))  # half of the cache
        last = list(whole)[-1]
        assert (last.finish, last.prompt_tokens, last.answer_tokens) == (Finish.LENGTH, 90, 10)
        assert len(whole.ids) == 10

    def test_no_more_than_the_models_context(self, build: Callable[..., Subject]) -> None:
        """Beside a long answer a long prompt must not run on past the last position that GPT-2 has."""
        subject = build("gpt2", endless)
        with pytest.raises(InvalidPrompt):
            subject.engine.submit([5] * 250, PLAIN, Sampling(7))
        long = [0, *np.random.default_rng(1).integers(3, 250, 239).tolist()]
        asked: list[Asked] = [(long, PLAIN, Sampling(8)), (SHORT, PLAIN, Sampling(200))]
        for (prompt, use, sampling), got in zip(asked, serve(subject.engine, asked), strict=True):
            assert got == alone(subject.base, prompt, use, sampling.max_new_tokens)

    def test_when_all_places_are_taken_callers_are_told_when_to_come_back(
        self, build: Callable[..., Subject]
    ) -> None:
        subject = build(change=endless, max_requests=3)
        with subject.held():
            streams = [subject.engine.submit(SHORT, PLAIN, Sampling(4)) for _ in range(3)]
            with pytest.raises(Busy) as busy:
                subject.engine.submit(SHORT, PLAIN, Sampling(4))
        assert busy.value.retry_ms > 0
        assert [len(list(stream)) > 0 for stream in streams] == [True] * 3
        assert serve(subject.engine, [(SHORT, PLAIN, Sampling(4))])  # an answer that is over has no place

    def test_who_finds_no_room_waits_and_gets_the_same_answer(self, build: Callable[..., Subject]) -> None:
        subject = build(cache_tokens=320)
        asked = [(p, subject.person(5), Sampling(24)) for p in prompts(10)]
        with subject.held():
            streams = [subject.engine.submit(*each) for each in asked]
        waiting = []
        for (prompt, use, _), stream in zip(asked, streams, strict=True):
            next(stream)
            waiting.append(subject.engine.health().waiting)
            list(stream)
            assert stream.ids == alone(subject.base, prompt, use, 24)
        assert waiting[0] > 0
        assert subject.engine.health() == EngineHealth(0, 0, 0.0, is_alive=True)

    def test_text_comes_as_the_whole_answer_reads(
        self, each_of_few: str, build: Callable[..., Subject]
    ) -> None:
        """Characters of several tokens and spaces in front of words included."""
        subject = build(each_of_few)
        for seed, use in enumerate(uses(subject.artefacts, 6)):
            stream = subject.engine.submit(prompts(8)[6], use, Sampling(40, temperature=3.0, seed=seed))
            text = "".join(chunk.text for chunk in stream)
            ended = stream.ids[-1] in subject.base.end_ids
            assert text == subject.base.decode(stream.ids[:-1] if ended else stream.ids)

    def test_an_answer_ends_before_its_stop_text(self, build: Callable[..., Subject]) -> None:
        subject, prompt = build(), prompts(8)[7]
        use = subject.person(102)
        whole = subject.base.decode(alone(subject.base, prompt, use, 24))
        stop = whole[len(whole) // 2 : len(whole) // 2 + 6]  # over several tokens
        stream = subject.engine.submit(prompt, use, Sampling(24, stop=("never this", stop)))
        chunks = list(stream)
        assert "".join(chunk.text for chunk in chunks) == whole[: whole.index(stop)]
        assert (chunks[-1].finish, chunks[-1].answer_tokens) == (Finish.END, len(stream.ids))
        assert len(stream.ids) < 24

    def test_log_probabilities_are_of_the_tokens_that_are_shown(
        self, each_of_few: str, build: Callable[..., Subject]
    ) -> None:
        """Each with the chunk that its text begins in, none of a stop text, and one of an end of sequence."""
        subject, prompt = build(each_of_few), prompts(8)[7]
        for seed, use in enumerate(uses(subject.artefacts, 6)):
            hot = Sampling(40, temperature=3.0, seed=seed, logprobs=2)
            stream = subject.engine.submit(prompt, use, hot)
            told, text, ids = logprobs_of(stream), subject.base.decode(stream.ids), stream.ids
            assert [(t.token, t.data) for t in told] == [subject.base.token(id_) for id_ in ids]
            assert b"".join(token.data for token in told).decode(errors="replace").lstrip() == text.lstrip()
            stop = text[len(text) // 2 :][:6]
            starts = [len(subject.base.decode(ids[:n]).rstrip("\ufffd")) for n in range(len(ids))]
            shown, cut = 0, ""
            for chunk in subject.engine.submit(prompt, use, replace(hot, stop=(stop,))):
                cut += chunk.text
                assert list(chunk.logprobs) == told[shown : shown + len(chunk.logprobs)]
                shown += len(chunk.logprobs)
                assert shown == sum(start < len(cut) for start in starts)
            assert cut == text[: text.index(stop)]

    def test_the_same_seed_draws_the_same_tokens_whoever_is_there(
        self, build: Callable[..., Subject]
    ) -> None:
        subject, prompt = build(), prompts(8)[6]
        use = subject.person(101)
        hot = Sampling(NEW, temperature=1.5, top_k=50, top_p=0.95, seed=7)
        crowd = [(prompt, use, Sampling(NEW, temperature=1.5, seed=i)) for i in range(6)]
        lowered = [
            (prompt, use, replace(plain, frequency_penalty=1.0, presence_penalty=0.5))
            for plain in (hot, Sampling(NEW))
        ]
        first = serve(subject.engine, [(prompt, use, hot), (prompt, use, Sampling(NEW)), *crowd, *lowered])
        again = serve(subject.engine, [(prompt, use, Sampling(NEW)), (prompt, use, hot)])
        assert first[0] == again[1]
        assert first[-2:] == [serve(subject.engine, [each])[0] for each in lowered]
        assert first[1] == again[0] == alone(subject.base, prompt, use)  # greedy neighbours stay greedy
        assert len({tuple(ids) for ids in first[2:]}) > 1
        greedy = Sampling(NEW, temperature=5.0, top_k=1, seed=3)
        assert serve(subject.engine, [(prompt, use, greedy)])[0] == again[0]

    # -- Cancellable -----------------------------------------------------------------------------

    def test_cancelling_frees_a_place_at_once(self, build: Callable[..., Subject]) -> None:
        subject = build(change=endless, max_requests=2)
        running = [subject.engine.submit(SHORT, PLAIN, Sampling(200)) for _ in range(2)]
        next(running[0])
        with pytest.raises(Busy):
            subject.engine.submit(SHORT, PLAIN, Sampling(4))
        running[0].cancel()
        running[0].cancel()  # harmless
        with subject.held():  # one that never began
            waiting = subject.engine.submit(SHORT, PLAIN, Sampling(4))
            waiting.cancel()
            again = subject.engine.submit(SHORT, PLAIN, Sampling(4))
        assert list(running[0]) == list(waiting) == []
        assert len(list(again)) > 0
        running[1].cancel()
        assert subject.engine.health().in_flight == 0
        wait_for(lambda: subject.engine.cache_tokens_held == 0)

    def test_cancelling_wakes_a_reader_in_another_thread(self, build: Callable[..., Subject]) -> None:
        subject = build()
        read: list[list[Any]] = []
        with subject.held():
            stream = subject.engine.submit(SHORT, PLAIN, Sampling(4))
            reader = threading.Thread(target=lambda: read.append(list(stream)))
            reader.start()
            stream.cancel()
            reader.join(30)
        assert read == [[]]

    def test_a_thousand_who_come_and_go_leave_nothing_behind(self, build: Callable[..., Subject]) -> None:
        """Behind others that read nothing of their answers."""
        subject = build(cache_tokens=512, batch_tokens=64, max_requests=8)
        slow = [subject.engine.submit(SHORT, PLAIN, Sampling(60, temperature=2.0)) for _ in range(4)]
        for _ in range(1000):
            subject.engine.submit([0] * 100, PLAIN, Sampling(100)).cancel()
            assert subject.engine.health().in_flight <= 8
        assert serve(subject.engine, [(SHORT, PLAIN, Sampling(4))])[0] == alone(subject.base, SHORT, PLAIN, 4)
        assert all(list(stream)[-1].finish for stream in slow)  # made meanwhile, and kept for them
        assert subject.engine.health().in_flight == 0
        wait_for(lambda: subject.engine.cache_tokens_held == 0)

    # -- Healthy ---------------------------------------------------------------------------------

    def test_health_tells_of_work_and_of_standing_still(self, build: Callable[..., Subject]) -> None:
        subject = build()
        assert subject.engine.health() == EngineHealth(0, 0, 0.0, is_alive=True)
        with subject.held():
            streams = [subject.engine.submit(SHORT, PLAIN, Sampling(4)) for _ in range(2)]
            assert subject.engine.health().in_flight == 2
            wait_for(lambda: subject.engine.health().stalled_seconds >= 0.1)
            assert subject.engine.health().is_alive
        for stream in streams:
            list(stream)
        assert subject.engine.health() == EngineHealth(0, 0, 0.0, is_alive=True)
        subject.engine.stop()
        assert not subject.engine.health().is_alive

    def test_a_step_that_fails_ends_only_the_answers_that_it_was_for(
        self, build: Callable[..., Subject]
    ) -> None:
        subject = build(change=fragile, cache_tokens=256)
        poisoned = (POISON, *[9] * 80)
        with subject.held():
            failing = [subject.engine.submit([*poisoned], PLAIN, Sampling(20)) for _ in range(2)]
            waiting = subject.engine.submit([9] * 81, PLAIN, Sampling(20))  # the cache holds two of these
        for stream in failing:
            with pytest.raises(Unavailable) as caught:
                list(stream)
            assert "secret" not in str(caught.value)
        assert list(waiting)[-1].finish
        assert subject.engine.health() == EngineHealth(0, 0, 0.0, is_alive=True)
        assert serve(subject.engine, [(SHORT, PLAIN, Sampling(4))])

    def test_stop_ends_every_stream_and_nothing_is_taken_after_it(
        self, build: Callable[..., Subject]
    ) -> None:
        subject = build(change=endless, cache_tokens=512)
        running = subject.engine.submit(SHORT, PLAIN, Sampling(200))
        next(running)
        with subject.held():
            waiting = [subject.engine.submit(SHORT, PLAIN, Sampling(200)) for _ in range(5)]
            stopping = threading.Thread(target=subject.engine.stop)
            stopping.start()
            wait_for(lambda: not subject.engine.health().is_alive)
        stopping.join(30)
        for stream in (running, *waiting):
            with pytest.raises(Unavailable):
                list(stream)
        with pytest.raises(Unavailable):
            subject.engine.submit(SHORT, PLAIN, Sampling(2))

    # -- Forgetful -------------------------------------------------------------------------------

    @pytest.mark.filterwarnings("ignore::FutureWarning")  # of objects that the look comes across
    @pytest.mark.parametrize("end", ["read", "cancelled", "cancelled before it began", "failed"])
    def test_what_came_with_a_request_goes_with_it(self, end: str, build: Callable[..., Subject]) -> None:
        """Not at some later collection of cycles: on an idle cloud that may be hours away."""
        subject = build(change=lambda base: fragile(endless(base)))
        prompt = _Tokens([0, POISON if end == "failed" else 5, 6, 7 + 1])
        gc.collect()
        gc.disable()
        try:
            use = subject.person(1)
            assert use.personal is not None
            arrays = [array for _, array in use.personal.named()]
            marks = [float(array.flat[0]) for array in arrays]
            held = [weakref.ref(each) for each in (prompt, use, use.personal, *arrays)]
            with subject.held():
                stream = subject.engine.submit(prompt, use, Sampling(200 if end == "cancelled" else 3))
                if end == "cancelled before it began":
                    stream.cancel()
                assert end == "cancelled before it began" or _tensors_with(marks)  # the look finds them
            del prompt, use, arrays
            if end == "failed":
                with pytest.raises(Unavailable):
                    list(stream)
            elif end == "cancelled":
                next(stream)
                stream.cancel()
            else:
                list(stream)
            wait_for(lambda: not any(ref() is not None for ref in held))
            wait_for(lambda: not _tensors_with(marks))
        finally:
            gc.enable()


class _Tokens(list[int]):
    """Token ids that can be referred to weakly."""


def _tensors_with(marks: Sequence[float]) -> int:
    """How many tensors of this process hold one of these numbers."""
    return sum(
        isinstance(each, torch.Tensor)
        and each.dtype == torch.float32
        and any(bool((each == mark).any()) for mark in marks)
        for each in gc.get_objects()
    )
