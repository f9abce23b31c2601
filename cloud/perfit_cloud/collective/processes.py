"""The processes of one run, as `accelerate launch` started them; without it there is one.

Every process holds the whole base and both shifts, takes its share of each batch, and ends every
step with the same shifts. What is added up between them is one vector: the gradients of the shifts
(about 1e5 numbers) and the loss. DistributedDataParallel would give the same sum, but wants the
shifts to be parameters of a wrapped module, where here they are arguments of hooks on a frozen one;
its buckets overlap the exchange of gigabytes with the backward pass, and here there is nothing to hide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from perfit_cloud.model.precision import choose_precision
from perfit_shared.errors import InvalidInput, PerfitError

__all__ = ["Processes", "close_processes"]

T = TypeVar("T")
_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}


class Processes:
    """This process among `count` of them; `main` is the one that prints and writes.

    Every method is a meeting: all processes call it, in the same order.
    """

    def __init__(self) -> None:
        from accelerate import Accelerator

        # accelerate uses gloo only when it is told that it runs on CPUs.
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.count: int = self._accelerator.num_processes
        self.index: int = self._accelerator.process_index
        self.main: bool = self._accelerator.is_main_process

    def device(self, requested: str) -> str:
        """Where this process should put the base, given the operator's request.

        Raises InvalidInput when several processes are to use one device, or another kind than they
        were launched for.
        """
        if self.count == 1:
            return requested
        given: torch.device = self._accelerator.device
        if requested not in ("auto", given.type):
            raise InvalidInput(
                f"{self.count} processes were launched, each for a {given.type} of its own; leave out "
                "--device (for CPUs, launch with ACCELERATE_USE_CPU=true)"
            )
        return "cpu" if given.type == "cpu" else str(given)

    def dtype(self, requested: str, device: str) -> str:
        """The base's dtype: as requested, or for "auto" what accelerate was launched with, the same for all.

        A frozen base needs no float32 copy beside the one it computes with, so mixed precision
        comes down to loading it in that precision: φ computes in float32 and the shifts are float32.
        """
        if requested == "auto":
            requested = _DTYPES.get(self._accelerator.mixed_precision, requested)
        if self.count == 1 or requested != "auto":
            return requested
        return self.broadcast_from_main(lambda: choose_precision(requested, device).dtype)

    @contextmanager
    def local_main_first(self) -> Iterator[None]:
        """One process of every host goes first, so that it downloads and the others find."""
        with self._accelerator.local_main_process_first():
            yield

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share: every count-th, so that neighbours of like length spread evenly."""
        return items[self.index :: self.count]

    def all_reduce(self, numbers: float, tensors: Sequence[Tensor] = ()) -> float:
        """The sum over all processes of a number, and of tensors in place."""
        if self.count == 1:
            return numbers
        device = self._accelerator.device
        flat = torch.cat([torch.tensor([numbers], device=device), *(t.reshape(-1) for t in tensors)])
        total: Tensor = self._accelerator.reduce(flat, "sum")
        parts = torch.split(total[1:], [t.numel() for t in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))
        return float(total[0])

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        return self.all_reduce(float(flag)) > 0

    def broadcast_from_main(self, work: Callable[[], T]) -> T:
        """What `work` gives on the main process; all raise a PerfitError or OSError (a full disk) of it."""
        if self.count == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = work()
            except (PerfitError, OSError) as error:
                box[1] = error
        broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result


def close_processes() -> None:
    """At the end of a program: close what connects the processes, if anything does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
