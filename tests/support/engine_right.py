"""Promises 1 and 2 of engines for answers: Right and Apart. Part of `engine_contract`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from perfit_cloud.engine.interface import ShiftUse
from perfit_shared.errors import InvalidPrompt, InvalidTensors, NotFound
from perfit_shared.shifts import LayerShift, ShiftTensors
from perfit_shared.types import Mode, Sampling
from tests.support.engine_subject import (
    PLAIN,
    SMALL,
    Asked,
    EngineSuite,
    Subject,
    endless,
    halved,
    logprobs_of,
    opinionated,
)
from tests.support.generation import NEW, alone, assert_parts_at_ties, forced, prompts, serve, uses
from tests.support.models import random_shift

__all__ = ["RightAndApart"]

_ALONE: dict[str, list[list[int]]] = {}  # by family: what is wanted of every engine, computed once


class RightAndApart(EngineSuite):
    # -- Right ---------------------------------------------------------------------------------

    def test_tokens_are_those_of_each_request_alone(
        self, each_of_families: str, build: Callable[..., Subject]
    ) -> None:
        """Against the model's own `generate` of one request, with φ₂∘φ₁ written out by hand."""
        subject = build(each_of_families)
        whose = uses(subject.artefacts, 16)
        asked = [(p, use, Sampling(NEW)) for p, use in zip(prompts(16), whose, strict=True)]
        served = serve(subject.engine, asked)
        if each_of_families not in _ALONE:
            _ALONE[each_of_families] = [alone(subject.base, prompt, use) for prompt, use, _ in asked]
        for (prompt, use, _), got, want in zip(asked, served, _ALONE[each_of_families], strict=True):
            assert got == want, (use.mode, len(prompt))
        plain = serve(subject.engine, [(prompt, PLAIN, Sampling(NEW)) for prompt, _, _ in asked])
        assert sum(a != b for a, b in zip(served, plain, strict=True)) >= 3  # the shifts are on

    def test_in_half_precision_tokens_part_only_at_ties(
        self, each_of_few: str, build: Callable[..., Subject]
    ) -> None:
        """Closer than the largest change that a batch alone makes to the untouched model's logits."""
        subject = build(each_of_few, halved)
        whose = uses(subject.artefacts, 16)
        asked = [(p, use, Sampling(NEW)) for p, use in zip(prompts(16), whose, strict=True)]
        assert assert_parts_at_ties(subject.base, asked, serve(subject.engine, asked)) >= 8

    def test_base_mode_is_the_untouched_model(
        self, each_of_families: str, build: Callable[..., Subject]
    ) -> None:
        """Tokens of a tiny random model may agree by luck, so their probabilities have to, too."""
        subject = build(each_of_families)
        shifted = [(p, u, Sampling(4)) for p, u in zip(prompts(6), uses(subject.artefacts, 6), strict=True)]
        plain = [(p, PLAIN, Sampling(4, logprobs=1)) for p in prompts(8)]
        for prompt, stream in zip(prompts(8), subject.together(plain + shifted), strict=False):
            found = [token.logprob for token in logprobs_of(stream)]
            ids = stream.ids
            with torch.no_grad():
                logits = subject.base.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            want = logits.double().log_softmax(-1)[range(len(ids)), ids]
            assert found == pytest.approx(want.tolist(), abs=4e-4)

    def test_log_probabilities_are_those_of_a_hooked_pass(
        self, each_of_few: str, build: Callable[..., Subject]
    ) -> None:
        """Of the logits that the model gives to each request alone, whatever is drawn and who is beside."""
        subject = build(each_of_few)
        hot = {"temperature": 2.0, "top_k": 30, "top_p": 0.9}
        settings = [Sampling(NEW, logprobs=n, seed=n, **(hot if n % 2 else {})) for n in (0, 1, 20, 3, 0, 5)]
        asked = list(zip(prompts(6), uses(subject.artefacts, 6), settings, strict=True))
        for (prompt, use, sampling), stream in zip(asked, subject.together(asked), strict=True):
            found = logprobs_of(stream)
            assert len(found) == (len(stream.ids) if sampling.logprobs else 0)
            want = forced(subject.base, prompt, stream.ids, use).log_softmax(-1)
            for token, id_, of_all in zip(found, stream.ids, want, strict=bool(found)):
                assert (token.token, token.data) == subject.base.token(id_)
                assert token.logprob == pytest.approx(float(of_all[id_]), abs=4e-4)
                values, ids = of_all.topk(sampling.logprobs)
                assert [top.logprob for top in token.top] == pytest.approx(values.tolist(), abs=4e-4)
                apart = bool((values[:-1] - values[1:] > 1e-3).all())
                assert not apart or [(t.token, t.data) for t in token.top] == [
                    subject.base.token(number) for number in ids.tolist()
                ]

    def test_penalties_are_openais_formula(self, each_of_few: str, build: Callable[..., Subject]) -> None:
        """On the model's own logits, of the answer alone; log-probabilities stay the model's own."""
        subject = build(each_of_few, endless)
        penalties = [(0.0, 0.0), (0.7, 0.0), (0.0, 1.5), (0.3, 0.4), (-0.5, 0.0), (2.0, -2.0)]
        asked = [
            (prompt, use, Sampling(24, logprobs=1, frequency_penalty=frequency, presence_penalty=presence))
            for prompt, use, (frequency, presence) in zip(
                prompts(6), uses(subject.artefacts, 6), penalties, strict=True
            )
        ]
        changed = 0
        for (prompt, use, sampling), stream in zip(asked, subject.together(asked), strict=True):
            found = logprobs_of(stream)
            logits = forced(subject.base, prompt, stream.ids, use).double()
            counts = torch.zeros_like(logits[0])
            for token, id_, of_all in zip(found, stream.ids, logits, strict=True):
                assert token.logprob == pytest.approx(float(of_all.log_softmax(-1)[id_]), abs=4e-4)
                lowered = of_all - counts * sampling.frequency_penalty
                lowered -= (counts > 0) * sampling.presence_penalty
                assert lowered[id_] == pytest.approx(float(lowered.max()), abs=1e-3)
                changed += bool(of_all[id_] < of_all.max() - 1e-2)
                counts[id_] += 1
        assert changed  # or the penalties changed no token

    def test_who_asks_for_log_probabilities_changes_no_token(self, build: Callable[..., Subject]) -> None:
        subject = build()
        asked = [
            (p, use, Sampling(NEW)) for p, use in zip(prompts(8), uses(subject.artefacts, 8), strict=True)
        ]
        some = [(p, use, Sampling(NEW, logprobs=n % 3)) for n, (p, use, _) in enumerate(asked)]
        plain, beside = subject.together(asked), subject.together(some)
        assert [len(logprobs_of(stream)) for stream in plain] == [0] * 8
        for without, stream in zip(plain, beside, strict=True):
            assert list(stream)[-1].finish and stream.ids == without.ids

    def test_many_shifts_of_one_prompt_are_not_shared(
        self, each_of_few: str, build: Callable[..., Subject]
    ) -> None:
        """Keys and values hold one user's shift; a prefix cache would hand them to the next."""
        subject = build(each_of_few)
        prompt = [0, *np.random.default_rng(8).integers(3, 250, 69).tolist()]
        asked = [(prompt, use, Sampling(NEW)) for use in uses(subject.artefacts, 6)]
        for (_, use, _), got in zip(asked, serve(subject.engine, asked), strict=True):
            assert got == alone(subject.base, prompt, use)

    def test_a_shift_that_changes_nothing_changes_no_bit(
        self, load: Any, build: Callable[..., Subject]
    ) -> None:
        subject = build()
        spec = subject.artefact.spec
        nothing = replace(subject.artefact, collective=ShiftTensors.identity(spec, spec.collective_rank))
        engine = type(self).kind(subject.base, {nothing.name: nothing}, SMALL)
        identity = ShiftUse(Mode.PERSONAL, nothing, ShiftTensors.identity(spec, spec.personal_rank))
        found = []
        try:
            for use in (PLAIN, identity):
                stream = engine.submit(prompts(8)[7], use, Sampling(NEW, logprobs=5))
                found.append((logprobs_of(stream), stream.ids))
        finally:
            engine.stop()
        assert found[0] == found[1]

    def test_on_differs_from_off_and_both_come_again(self, build: Callable[..., Subject]) -> None:
        subject, prompt = build(), prompts(8)[7]
        off, on, off_again, on_again = (
            subject.log_probabilities([(prompt, use, Sampling(NEW))])
            for use in (PLAIN, subject.person(1), PLAIN, subject.person(1))
        )
        assert off == off_again and on == on_again
        assert off != on

    def test_what_the_models_folder_suggests_is_not_used(self, build: Callable[..., Subject]) -> None:
        asked = [(p, PLAIN, Sampling(NEW)) for p in prompts(4)]
        plain, told = (serve(build(change=change).engine, asked) for change in (None, opinionated))
        assert told == plain

    # -- Apart ---------------------------------------------------------------------------------

    def test_a_neighbours_values_change_no_bit_of_mine(
        self, each_of_families: str, build: Callable[..., Subject]
    ) -> None:
        """Same shapes, other tensors, text and draws beside me; tensors as large as the wire lets through."""
        subject = build(each_of_families, endless)
        text = np.random.default_rng(3).integers(3, 250, (3, 40)).tolist()
        mine = [
            ([0, *ids], use, Sampling(NEW, frequency_penalty=penalty))
            for ids, use, penalty in zip(text, uses(subject.artefacts, 3), (0.0, 0.5, 0.0), strict=True)
        ]

        def neighbours(seed: int, size: float) -> list[Asked]:
            asked: list[Asked] = []
            for i, artefact in enumerate([*subject.artefacts.values()] * 3):
                spec = artefact.spec
                words = np.random.default_rng([seed, i]).integers(3, 250, 12 + 9 * i).tolist()
                tensors = random_shift(spec, spec.personal_rank, seed + i, size)
                tensors.check(spec, spec.personal_rank)
                use = ShiftUse(Mode.PERSONAL, artefact, tensors)
                drawn = Sampling(NEW, temperature=1.0, seed=seed, frequency_penalty=seed / 2)
                asked.append(([0, *words], use, drawn))
            return asked

        first = subject.log_probabilities([*mine, *neighbours(1, 0.5)])
        second = subject.log_probabilities([*mine, *neighbours(2, self.largest)])
        assert first[:3] == second[:3]
        assert np.isfinite(np.concatenate(first[:3])).all()
        assert all(a != b for a, b in zip(first[3:], second[3:], strict=True))  # or this shows nothing

    @pytest.mark.parametrize("apart", [True, False])
    def test_alone_no_bit_tells_whether_others_are_there(
        self, each_of_few: str, apart: bool, build: Callable[..., Subject]
    ) -> None:
        """And without `alone` the last bits do, or the test would show nothing."""
        subject = build(each_of_few, alone=apart, batch_tokens=16)
        mine = (list(range(2, 32)), subject.person(99), Sampling(12))
        others = [(list(range(1, 6 + 9 * n)), subject.person(n), Sampling(5 + n)) for n in range(7)]
        by_myself, beside = (subject.log_probabilities([mine, *more])[0] for more in ([], others))
        assert (by_myself == beside) == apart
        assert by_myself == pytest.approx(beside, abs=1e-4)

    def test_hostile_neighbours_are_refused_or_harmless(self, build: Callable[..., Subject]) -> None:
        subject = build()
        spec = subject.artefact.spec
        good = random_shift(spec, spec.personal_rank, 5)

        def changed(change: Callable[[LayerShift], LayerShift]) -> ShiftUse:
            layers = {layer: change(shift) for layer, shift in good.layers.items()}
            return ShiftUse(Mode.PERSONAL, subject.artefact, ShiftTensors(layers))

        refused = {
            "not a number": changed(lambda s: s._replace(bias=np.full_like(s.bias, np.nan))),
            "infinite": changed(lambda s: s._replace(source=np.full_like(s.source, np.inf))),
            "another rank": changed(lambda s: LayerShift(*(t[:2] for t in s))),
            "another size": changed(lambda s: s._replace(rotation=s.rotation[:, :-1])),
            "another layer": ShiftUse(
                Mode.PERSONAL, subject.artefact, ShiftTensors({0: good.layers[spec.layers[0]]})
            ),
            "nothing": ShiftUse(Mode.PERSONAL, subject.artefact),
        }
        huge = changed(lambda s: s._replace(source=s.source * 1e4, bias=np.full_like(s.bias, 1e4)))
        prompt, use = prompts(8)[7], subject.person(1)
        with subject.held():
            mine = subject.engine.submit(prompt, use, Sampling(NEW, logprobs=1))
            for hostile in refused.values():
                with pytest.raises(InvalidTensors):
                    subject.engine.submit(prompt, hostile, Sampling(NEW))
            with pytest.raises(NotFound):
                other = replace(subject.artefact, name="another")
                subject.engine.submit(prompt, ShiftUse(Mode.COLLECTIVE, other), Sampling(NEW))
            for token in (10**6, -1):
                with pytest.raises(InvalidPrompt, match="does not know"):
                    subject.engine.submit([0, token], PLAIN, Sampling(NEW))
            beside = subject.engine.submit(prompt, huge, Sampling(NEW))
        assert np.isfinite([token.logprob for token in logprobs_of(mine)]).all()
        assert mine.ids == alone(subject.base, prompt, use)
        assert list(beside)[-1].finish
