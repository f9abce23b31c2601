"""Weights of linear layers in the layout in which a CPU multiplies bfloat16.

PyTorch brings a weight into oneDNN's layout for every product. With few rows, as while answers are decoded,
that takes as long as the product itself. Packed once, a weight is there twice: gradients need it as it was.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["pack_linear_layers", "packed_bytes"]

_TOLERANCE = 2**-6  # of a trial's largest number: some rounding errors of bfloat16


def packed_bytes(model: nn.Module) -> int:
    """What `pack_linear_layers` would add; 0 where it does nothing."""
    return sum(layer.weight.nbytes for layer in _layers(model))


def pack_linear_layers(model: nn.Module) -> None:
    """Let the linear layers of `model`, a tree from `share_weights`, multiply by packed weights.

    On a CPU, for bfloat16 alone, and for layers that keep to `torch.nn.Linear`. Whoever wants gradients gets
    the layer's own product. Does nothing where PyTorch cannot pack, or its packed product is another. What
    changes a weight later changes no packed one, and such a tree is neither copied nor saved.
    """
    for layer in _layers(model):
        setattr(layer, "forward", _Packed(layer))  # noqa: B010 - to mypy a method is not assigned to


def _layers(model: nn.Module) -> list[nn.Linear]:
    """Those that are packed."""
    found = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear and "forward" not in vars(layer) and _is_fit(layer.weight)
    ]
    return found if found and _works(found[0]) else []


def _is_fit(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and weight.layout == torch.strided


class _Packed:
    """In place of a layer's `forward`."""

    def __init__(self, layer: nn.Linear) -> None:
        self._weight, self._bias = layer.weight, layer.bias
        self._packed = _pack(layer.weight)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and rows.requires_grad:
            return functional.linear(rows, self._weight, self._bias)
        return _product(rows, self._packed, self._bias)


def _works(layer: nn.Linear) -> bool:
    """Whether the packed product of some rows is PyTorch's own, within rounding."""
    rows = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad(), suppress(Exception):
        expected = functional.linear(rows, layer.weight, layer.bias).float()
        found = _product(rows, _pack(layer.weight), layer.bias).float()
        return bool((found - expected).abs().max() <= _TOLERANCE * expected.abs().max())
    return False


def _pack(weight: torch.Tensor) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)


def _product(rows: torch.Tensor, packed: Any, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
    return product
