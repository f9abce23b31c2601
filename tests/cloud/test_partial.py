"""Packed running of part of a decoder gives what the library's own forward pass gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.support.models import FAMILIES, KEPT, build

from perfit_cloud.model.partial import Packing, PartialDecoder, ragged, supports

LENGTHS = np.array([9, 31, 2, 17, 1])


def sequences() -> list[torch.Tensor]:
    rng = np.random.default_rng(2)
    return [torch.from_numpy(rng.integers(3, 300, n)) for n in LENGTHS]


@pytest.fixture(params=KEPT)
def both(request: pytest.FixtureRequest) -> tuple[Any, PartialDecoder]:
    """The library's model and ours over the same tensors."""
    base = build(request.param)
    return base.model, PartialDecoder(base.share_weights())


@torch.no_grad()
def test_packed_blocks_and_head_equal_the_whole_model(both: Any) -> None:
    model, decoder = both
    device = torch.device("cpu")
    packing = Packing(np.zeros_like(LENGTHS), LENGTHS, device)
    hidden = decoder.embed(torch.cat(sequences()))
    for first, last in ((0, 1), (1, 4)):  # in two goes
        hidden = decoder.run(hidden, range(first, last), packing)
    labels = torch.arange(len(hidden)) % 300
    losses, gradient = decoder.losses(hidden, labels)
    logits = torch.cat([model(ids[None]).logits[0] for ids in sequences()])
    torch.testing.assert_close(
        losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-4, atol=1e-5
    )
    assert len(gradient) == 0


@torch.no_grad()
def test_rows_behind_a_known_past_equal_the_whole(both: Any) -> None:
    """Keys and values of the first tokens are captured, and the rest runs behind them, narrowed."""
    _, decoder = both
    device, lengths = torch.device("cpu"), LENGTHS[:4]
    starts = np.array([4, 25, 1, 8])
    embedded = decoder.embed(torch.cat(sequences()[:4]))
    whole = decoder.run(embedded, range(4), Packing(np.zeros_like(starts), lengths, device))
    past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    first = lengths.cumsum() - lengths
    decoder.run(
        embedded[ragged(first, starts)],
        range(4),
        Packing(np.zeros_like(starts), starts, device, capture=lambda layer, *kv: past.update({layer: kv})),
    )
    slots = starts.max() + (lengths - starts).max()

    def padded(layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        out = []
        for packed in past[layer]:
            spread = torch.randn(4, slots, packed.shape[1])  # what lies behind a past is not to be seen
            for b, of_one in enumerate(packed.split(starts.tolist())):
                spread[b, : len(of_one)] = of_one
            out.append(spread.flatten(0, 1))
        return out[0], out[1]

    rows = torch.tensor([0, 3, 5, 9])
    behind = Packing(starts, lengths - starts, device, past=padded)
    places = ragged(first + starts, lengths - starts)
    got = decoder.run(embedded[places], range(4), behind, rows=rows)
    torch.testing.assert_close(got, whole[places][rows], rtol=1e-4, atol=1e-4)


def test_gradient_of_the_losses_equals_autograd(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, decoder = both
    monkeypatch.setattr("perfit_cloud.model.forward._LOGITS", 1)  # pieces of 256 rows
    monkeypatch.setattr("perfit_cloud.model.partial._CACHED", 300 * 7)  # and of these, 7 at a time
    torch.manual_seed(0)
    hidden, labels = torch.randn(600, 32), torch.randint(0, 300, (600,))
    weights = torch.rand(600)
    losses, gradient = decoder.losses(hidden, labels, weights)
    leaf = hidden.clone().requires_grad_()
    logits = model.get_output_embeddings()(model.get_decoder().norm(leaf))
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted @ weights, leaf)[0], rtol=1e-4, atol=1e-6)


def test_which_models_are_supported() -> None:
    for family in FAMILIES:
        assert supports(build(family).model) == (family in KEPT)
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64,
        "factor": 4.0,
    }
    model = build("llama").share_weights()
    model.config.rope_parameters = longrope  # frequencies would depend on one's neighbours
    assert not supports(model)
    model = build("gemma3_text").share_weights()
    model.config.rope_parameters["full_attention"] = longrope
    assert not supports(model)
    model = build("gemma3_text").share_weights()
    model.config.use_bidirectional_attention = True
    assert not supports(model)


def test_ranges_one_behind_another() -> None:
    assert ragged(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert ragged(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).tolist() == []
