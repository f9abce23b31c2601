"""Packed running of part of a decoder gives what the library's own forward pass gives."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.tail import Packing, Tail, ragged, supports

# Windows shorter than the sequences, and blocks with and without one where the family mixes them.
KEPT = {
    "llama": {},
    "mistral": {"sliding_window": 12, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "head_dim": 16},
    "gemma2": {
        "sliding_window": 11, "head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "sliding_window": 7, "head_dim": 8, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"sliding_window": 13},
}  # fmt: skip
LENGTHS = np.array([9, 31, 2, 17, 1])


@functools.cache
def build(family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> BaseModel:
    """A tiny random model of four blocks, without a tokenizer."""
    common = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    if family == "gpt2":
        config = AutoConfig.for_model("gpt2", n_embd=32, n_layer=4, n_head=4, n_positions=256, **common)
    else:
        config = AutoConfig.for_model(
            family, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
            **KEPT.get(family, {}), **extra, **common,
        )  # fmt: skip
    torch.manual_seed(len(family))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    return BaseModel(family, "fingerprint", model, None)


def sequences() -> list[torch.Tensor]:
    rng = np.random.default_rng(2)
    return [torch.from_numpy(rng.integers(3, 300, n)) for n in LENGTHS]


@pytest.fixture(params=KEPT)
def both(request: pytest.FixtureRequest) -> tuple[Any, Tail]:
    """The library's model and ours over the same tensors."""
    base = build(request.param)
    return base.model, Tail(base.twin())


@torch.no_grad()
def test_packed_blocks_and_head_equal_the_whole_model(both: Any) -> None:
    model, tail = both
    device = torch.device("cpu")
    packing = Packing(np.zeros_like(LENGTHS), LENGTHS, device)
    hidden = tail.embed(torch.cat(sequences()))
    for first, last in ((0, 1), (1, 4)):  # in two goes
        hidden = tail.run(hidden, range(first, last), packing)
    labels = torch.arange(len(hidden)) % 300
    losses, gradient = tail.losses(hidden, labels)
    logits = torch.cat([model(ids[None]).logits[0] for ids in sequences()])
    torch.testing.assert_close(
        losses, F.cross_entropy(logits, labels, reduction="none"), rtol=1e-4, atol=1e-5
    )
    assert len(gradient) == 0


@torch.no_grad()
def test_rows_behind_a_known_past_equal_the_whole(both: Any) -> None:
    """Keys and values of the first tokens are captured, and the rest runs behind them, narrowed."""
    _, tail = both
    device, lengths = torch.device("cpu"), LENGTHS[:4]
    starts = np.array([4, 25, 1, 8])
    embedded = tail.embed(torch.cat(sequences()[:4]))
    whole = tail.run(embedded, range(4), Packing(np.zeros_like(starts), lengths, device))
    past: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    first = lengths.cumsum() - lengths
    tail.run(
        embedded[ragged(first, starts)], range(4),
        Packing(np.zeros_like(starts), starts, device, capture=lambda layer, *kv: past.update({layer: kv})),
    )  # fmt: skip
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
    got = tail.run(embedded[places], range(4), behind, rows=rows)
    torch.testing.assert_close(got, whole[places][rows], rtol=1e-4, atol=1e-4)


def test_gradient_of_the_losses_equals_autograd(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tail = both
    monkeypatch.setattr("perfit_cloud.model.tail._LOGITS", 1)  # pieces of 256 rows
    torch.manual_seed(0)
    hidden, labels = torch.randn(600, 32), torch.randint(0, 300, (600,))
    weights = torch.rand(600)
    losses, gradient = tail.losses(hidden, labels, weights)
    leaf = hidden.clone().requires_grad_()
    logits = model.get_output_embeddings()(model.get_decoder().norm(leaf))
    cap = getattr(model.config, "final_logit_softcapping", None)
    logits = logits if cap is None else torch.tanh(logits / cap) * cap
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted @ weights, leaf)[0], rtol=1e-4, atol=1e-6)


def test_which_models_are_supported() -> None:
    assert all(supports(build(family).model) for family in KEPT)
    assert not supports(build("gpt2").model)
    longrope = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 64, "factor": 4.0,
    }  # fmt: skip
    model = build("llama").twin()
    model.config.rope_parameters = longrope  # frequencies would depend on one's neighbours
    assert not supports(model)
    model = build("gemma3_text").twin()
    model.config.rope_parameters["full_attention"] = longrope
    assert not supports(model)
    model = build("gemma3_text").twin()
    model.config.use_bidirectional_attention = True
    assert not supports(model)


def test_ranges_one_behind_another() -> None:
    assert ragged(np.array([5, 0, 7]), np.array([2, 0, 3])).tolist() == [5, 6, 7, 8, 9]
    assert ragged(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).tolist() == []
