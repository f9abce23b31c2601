"""How vLLM's workers get the weights that this process has loaded, so that every format is read once.

A worker in this process takes them as they are. To worker processes they go through a file without a name, in
memory, which each inherits and lets go of once it has its part; for that while the host has one more copy.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import get_spawning_popen
from typing import Any

import torch
from torch import Tensor

from perfit_cloud.model.base import BaseModel

__all__ = ["LOAD_FORMAT", "InheritedDescriptor", "offered", "register_loader"]

LOAD_FORMAT = "perfit"
_ALIGNMENT = 64  # bytes, of each tensor's place in the file
_Index = list[tuple[str, str, list[int], int]]  # of tensors: name, dtype, shape and place in the file
_SERVED: dict[str, Any] = {}  # by name: models whose weights a core is to have


class InheritedDescriptor(int):
    """A file's descriptor that a process which is being spawned with it inherits, under the same number."""

    def __reduce__(self) -> Any:
        if (spawning := get_spawning_popen()) is not None:
            spawning.duplicate_for_child(int(self))
        return InheritedDescriptor, (int(self),)


@contextmanager
def offered(base: BaseModel, workers: int) -> Iterator[dict[str, Any]]:
    """While this lasts a loader finds the weights by what this gives."""
    if workers == 1:
        name = str(id(base.model))
        _SERVED[name] = base.model
        try:
            yield {"model": name}
        finally:
            del _SERVED[name]
        return
    file = os.memfd_create("perfit-weights")
    try:
        yield {"descriptor": InheritedDescriptor(file), "tensors": _write(file, dict(_weights(base.model)))}
    finally:
        os.close(file)


def register_loader() -> None:
    """Have vLLM know LOAD_FORMAT. Harmless when repeated."""
    from vllm.model_executor import model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class Loader(BaseModelLoader):  # type: ignore[misc]
        """Takes the weights that `offered` offers."""

        def download_model(self, model_config: Any) -> None:
            """It is here."""

        def load_weights(self, model: Any, model_config: Any) -> None:
            told = self.load_config.model_loader_extra_config
            if "model" in told:
                model.load_weights(_weights(_SERVED[told["model"]]))
            else:
                model.load_weights(_read(told["descriptor"], told["tensors"]))
                os.close(told["descriptor"])

    if LOAD_FORMAT not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        model_loader.register_model_loader(LOAD_FORMAT)(Loader)


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return (each for each in model.state_dict().items() if not (tied and each[0] == "lm_head.weight"))


def _write(file: int, weights: dict[str, Tensor]) -> _Index:
    """Copies them there."""
    index: _Index = []
    size = 0
    for name, tensor in weights.items():
        index.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    os.ftruncate(file, max(1, size))
    room = mmap.mmap(file, max(1, size))
    for place, tensor in zip(_places(room, index), weights.values(), strict=True):
        place[1].copy_(tensor)
    return index


def _read(file: int, index: _Index) -> Iterator[tuple[str, Tensor]]:
    """Views into the file, whose pages are let go of with the last of them."""
    # ACCESS_COPY: torch wants a buffer that can be written to, and nobody else is to see it if it does.
    return _places(mmap.mmap(file, 0, access=mmap.ACCESS_COPY), index)


def _places(room: mmap.mmap, index: _Index) -> Iterator[tuple[str, Tensor]]:
    for name, dtype, shape, start in index:
        count = torch.Size(shape).numel()
        if not count:
            yield name, torch.empty(shape, dtype=getattr(torch, dtype))
            continue
        flat = torch.frombuffer(room, dtype=getattr(torch, dtype), count=count, offset=start)
        yield name, flat.view(shape)
