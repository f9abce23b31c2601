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
    opinionated,
)
from tests.support.generation import NEW, alone, assert_parts_at_ties, prompts, serve, uses
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
        assert sum(a != b for a, b in zip(served, plain, strict=True)) >= 5  # the shifts are on

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
        streams = subject.together([(p, PLAIN, Sampling(4)) for p in prompts(8)] + shifted)
        for prompt, stream in zip(prompts(8), streams, strict=False):
            list(stream)
            ids = stream.ids
            with torch.no_grad():
                logits = subject.base.model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            want = logits.double().log_softmax(-1)[range(len(ids)), ids]
            assert stream.log_probabilities == pytest.approx(want.tolist(), abs=4e-4)

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
                stream = engine.submit(prompts(8)[7], use, Sampling(NEW))
                list(stream)
                found.append((stream.ids, stream.log_probabilities))
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
            ([0, *ids], use, Sampling(NEW)) for ids, use in zip(text, uses(subject.artefacts, 3), strict=True)
        ]

        def neighbours(seed: int, size: float) -> list[Asked]:
            asked: list[Asked] = []
            for i, artefact in enumerate([*subject.artefacts.values()] * 3):
                spec = artefact.spec
                words = np.random.default_rng([seed, i]).integers(3, 250, 12 + 9 * i).tolist()
                tensors = random_shift(spec, spec.personal_rank, seed + i, size)
                tensors.check(spec, spec.personal_rank)
                use = ShiftUse(Mode.PERSONAL, artefact, tensors)
                asked.append(([0, *words], use, Sampling(NEW, temperature=1.0, seed=seed)))
            return asked

        first = subject.log_probabilities([*mine, *neighbours(1, 0.5)])
        second = subject.log_probabilities([*mine, *neighbours(2, 8.0)])
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
            mine = subject.engine.submit(prompt, use, Sampling(NEW))
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
        assert list(mine)[-1].finish and list(beside)[-1].finish
        assert mine.ids == alone(subject.base, prompt, use)
        assert np.isfinite(mine.log_probabilities).all()
