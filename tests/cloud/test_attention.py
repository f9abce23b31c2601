"""Attention with gradients, product by product, is the fused one; what holds too many scores stays fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from perfit_cloud.model import attention
from perfit_cloud.model.attention import attend, hiding


def inputs() -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8))
    made = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return made, hiding(torch.ones(2, 1, 5, 9, dtype=torch.bool).triu(5), torch.float32)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_products_are_the_fused_attention(scale: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, bias = inputs()
    wanted = F.scaled_dot_product_attention(*parts, attn_mask=bias, scale=scale)
    slopes = torch.autograd.grad(wanted.square().sum(), parts)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("not fused"))
    found = attend(*parts, bias, scale=scale, softcap=None)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), parts), slopes)


def test_answers_and_many_scores_stay_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, bias = inputs()
    asked: list[bool] = []
    fused = F.scaled_dot_product_attention

    def watched(*args: torch.Tensor, **kwargs: object) -> torch.Tensor:
        asked.append(torch.is_grad_enabled())
        return fused(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    with torch.inference_mode():
        attend(*parts, bias, scale=None, softcap=None)
    monkeypatch.setattr(attention, "_MOST_SCORES", 2 * 3 * 5 * 9 - 1)
    attend(*parts, bias, scale=None, softcap=None)
    assert asked == [False, True]
