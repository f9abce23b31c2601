"""A causal LM's forward pass, with the arguments that its family takes, and only the logits that are read.

Where a vocabulary is large, the head takes most of the time and of the memory. So `token_losses` runs the
decoder once, picks the rows that predict a target token, and runs the head over slices of them. For each
slice it calls the model's own forward, with a decoder that returns those rows. So scales, soft-capping and
whatever else a family does after its head stay the family's own.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from perfit_cloud.model.blocks import decoder_of

__all__ = ["arguments_of", "forward", "recomputed", "replaced", "rows_of", "slice_rows", "token_losses"]

# Numbers of float32 in one slice of logits. glibc gives blocks above 32 MB back to the system whenever they
# are freed, and getting the pages again costs as much time as the head itself.
_LOGITS = 2**22
_LEAST_ROWS = 256  # of a slice: with fewer, reading the head's weights would take most of the time


class _ReachedError(Exception):
    """Ends a pass early: it has the output that it was made for."""


def arguments_of(model: Any) -> frozenset[str]:
    """Names of the arguments that the model's forward takes."""
    return frozenset(inspect.signature(model.forward).parameters)


def forward(model: Any, arguments: frozenset[str], ids: Tensor, **more: Any) -> Any:
    """The model's output for ids (B, T), with those of `more` that are among `arguments`, without a cache."""
    more = {"use_cache": False, **more}
    return model(ids, **{name: value for name, value in more.items() if name in arguments})


def slice_rows(vocabulary: int) -> int:
    """Rows whose logits exist at once."""
    return max(_LEAST_ROWS, _LOGITS // vocabulary)


def token_losses(
    model: Any,
    arguments: frozenset[str],
    ids: Tensor,
    *,
    rows: tuple[Tensor, Tensor],
    labels: Tensor,
    in_slices: bool,
    **more: Any,
) -> Tensor:
    """−log p of labels (N,) after the positions `rows` (two (N,)) of ids (B, T): (N,), float32.

    `in_slices`: whether the family's head can run apart from the decoder (`capabilities`). The backward pass
    computes the logits of each slice again.
    """
    if not in_slices:
        logits = forward(model, arguments, ids, **more).logits[rows]
        return F.cross_entropy(logits.float(), labels, reduction="none")
    output = decoder_output(model, arguments, ids, **more)
    hidden = rows_of(_first(output), rows)  # (N, d)
    labels = labels.to(hidden.device)
    size = slice_rows(model.config.get_text_config().vocab_size)

    def of_slice(part: Tensor, of_part: Tensor) -> Tensor:
        logits = sliced_logits(model, arguments, output, part)
        return F.cross_entropy(logits.float(), of_part, reduction="none")

    if len(hidden) <= size:
        return of_slice(hidden, labels)
    return torch.cat(
        [
            checkpoint(of_slice, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(torch.split(hidden, size), torch.split(labels, size), strict=True)
        ]
    )


def rows_of(hidden: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    """Rows (N, d) of hidden (B, T, d) at these positions, two (N,), wherever they are."""
    row, column = (index.to(hidden.device) for index in rows)
    return hidden[row, column]


def decoder_output(model: Any, arguments: frozenset[str], ids: Tensor, **more: Any) -> Any:
    """What the decoder gives to the model around it. The head does not run."""
    found: list[Any] = []

    def stop(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(output)
        raise _ReachedError

    handle = decoder_of(model).register_forward_hook(stop)
    try:
        with contextlib.suppress(_ReachedError):
            forward(model, arguments, ids, **more)
    finally:
        handle.remove()
    return found[0]


def sliced_logits(model: Any, arguments: frozenset[str], output: Any, hidden: Tensor) -> Tensor:
    """Logits (n, V) of rows (n, d) of the decoder's `output`."""
    rows = hidden.unsqueeze(0)
    standing = (rows, *output[1:]) if isinstance(output, tuple) else _with_hidden(output, rows)
    ids = torch.zeros(rows.shape[:2], dtype=torch.long, device=hidden.device)
    with replaced([decoder_of(model)], lambda _own: lambda *_args, **_more: standing):
        logits: Tensor = forward(model, arguments, ids).logits[0]
    return logits


def _first(output: Any) -> Tensor:
    hidden: Tensor = output[0]
    return hidden


def _with_hidden(output: Any, rows: Tensor) -> Any:
    name = next(iter(output))
    return type(output)(**{**output, name: rows})


@contextlib.contextmanager
def replaced(modules: Iterable[Any], make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace the forward of every module by `make(its forward)`. Hooks on the modules still run."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, _ in before:
            module.forward = make(module.forward)
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own


@contextlib.contextmanager
def recomputed(blocks: Iterable[Any]) -> Iterator[None]:
    """Activations inside these blocks are computed again in the backward pass instead of being held.

    Give it blocks that are differentiated, without the last: it is needed first and would be back at
    once. transformers' own switch works in train mode only, which turns dropout on too. Non-reentrant,
    so that frozen inputs still end the backward pass; hooks on a block's output lie outside what is
    repeated.
    """
    with replaced(
        blocks, lambda own: partial(checkpoint, own, use_reentrant=False, preserve_rng_state=False)
    ):
        yield
