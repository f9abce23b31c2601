"""A pretended card beside the CPU: its tensors compute there, and refuse what CUDA refuses, mixing devices.

A model split over the CPU and the card stands for one over two cards. A process that imports this has the
device card:0 for good, so import it in a process of its own. (torch lets a device in Python have one index.)
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend


class _Module(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("card", _Module())
aten = torch.ops.aten
_CARD = "card"
_MOVE = (aten._to_copy.default, aten.copy_.default)
moved: Counter[tuple[str, str]] = Counter()  # copies from one kind of device to the other


class Card(Tensor):
    """A tensor that says it is on a card. `inner`: the same on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:  # accelerate makes a parameter of the kind that was there
            return torch.nn.Parameter(inner, requires_grad)
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            dtype=inner.dtype,
            device=torch.device(_CARD, 0),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Card({self.inner!r})"

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        if func in _MOVE:
            return _move(func, args, kwargs)
        if any(not isinstance(each, Card) and each.dim() for each in tensors):
            raise RuntimeError(f"{func}: tensors on the CPU and on a card")
        owners = {id(each.inner): each for each in tensors if isinstance(each, Card)}
        stays = torch.device(kwargs.get("device") or _CARD).type == _CARD
        if kwargs.get("device"):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        inner = func(*_inside(args), **_inside(kwargs))
        return tree_map(lambda out: _outside(out, owners), inner) if stays else inner


def _inside(tree: Any) -> Any:
    return tree_map(lambda each: each.inner if isinstance(each, Card) else each, tree)


def _outside(out: Any, owners: dict[int, Card]) -> Any:
    if not isinstance(out, Tensor):
        return out
    return owners[id(out)] if id(out) in owners else Card(out)


def _move(func: Any, args: Any, kwargs: Any) -> Any:
    if func is aten.copy_.default:
        to, of = args[:2]
        _count(of.device, to.device)
        _inside(to).copy_(_inside(of))
        return to
    (of,) = args
    device = torch.device(kwargs.get("device") or of.device)
    _count(of.device, device)
    copied = func(of.inner, **{**kwargs, "device": torch.device("cpu")})
    return Card(copied) if device.type == _CARD else copied


def _count(of: torch.device, to: torch.device) -> None:
    moved[of.type, to.type] += of != to


def _empty(size: Any, stride: Any = None, *, dtype: Any = None, **_: Any) -> Card:
    return Card(
        torch.empty(size, dtype=dtype) if stride is None else torch.empty_strided(size, stride, dtype=dtype)
    )


def _arange(*limits: Any, dtype: Any = None, **_: Any) -> Card:
    return Card(torch.arange(*limits, dtype=dtype))


def _copy_from(of: Tensor, to: Tensor, _non_blocking: bool = False) -> Tensor:
    """What `torch.tensor` calls, which goes round `__torch_dispatch__`."""
    _count(of.device, to.device)
    _inside(to).copy_(_inside(of))
    return to


_library = torch.library.Library("aten", "IMPL", "PrivateUse1")
for _name in ("empty.memory_format", "empty_strided"):
    _library.impl(_name, _empty)
for _name in ("arange", "arange.start", "arange.start_step"):
    _library.impl(_name, _arange)
_library.impl("_copy_from", _copy_from)
