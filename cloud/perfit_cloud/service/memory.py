"""The memory plan: an operator's ceiling, divided among the parts of the process.

Parts that serving needs have a least size. What the ceiling leaves is shared in proportion to what each part
wants beyond that. Without a ceiling each gets what it wants, and what only saves time wants a share of the
machine. The estimates are for the worst pass or message, from the shapes of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.gradients.batch import PASS_TOKENS, BatchBudget, most_pass_tokens
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.limits import MESSAGE_COPIES, UPDATE_TOKEN_BYTES
from perfit_shared.errors import ConfigError

__all__ = ["MemoryPlan", "kept_bytes", "machine_bytes", "plan_memory", "resident_bytes"]

_MIB = 2**20
_MARGIN = 0.1  # of the ceiling: what the C library and Python cannot give back
_CALL_BYTES = _MIB // 2  # of a call's thread and of gRPC's buffers for it
_LOGITS = 3  # numbers of float32 for each of a pass: logits, their copy in float32, its gradient
_KEPT_SHARE, _MOST_KEPT = 1 / 16, 2048 * _MIB  # of the memory that the model is in, unless keep_bytes says
# Of tensors that were freed and not overwritten yet. What a pass of an update frees is about as much.
_FREED_SHARE, _LEAST_FREED, _MOST_FREED = 1 / 64, 64 * _MIB, 256 * _MIB
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_LIMITS = ("memory.max", "memory/memory.limit_in_bytes")  # of a control group, version 2 and 1


class _Part(NamedTuple):
    """Bytes: what there must be, and what there would be without a ceiling."""

    least: int
    most: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part; a part is 0 where it is not in the host's memory."""

    process: int  # program, libraries and model
    calls: int  # messages that gRPC receives, shifts of streams, and threads
    messages: int  # of messages that are worked on, of all callers together
    examples: int  # tokens of the updates that are open
    cache: int  # keys and values of answers
    answers: int  # a pass of answers
    gradients: int  # a pass of gradients
    kept: int  # cached activations of updates
    freed: int  # tensors that were freed and are overwritten a moment later
    cache_tokens: int
    pass_tokens: int  # of one gradient pass

    @property
    def messages_each(self) -> int:
        """Bytes of one device's messages, so that they leave half of the room to others."""
        return self.messages // (2 * MESSAGE_COPIES)

    @property
    def total(self) -> int:
        return sum(value for name, value in asdict(self).items() if not name.endswith("_tokens"))


def resident_bytes() -> int:
    """What this process has in memory now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def machine_bytes(groups: Path = _CONTROL_GROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Memory of the machine, or what the control group of this process (`own`) may take, if that is less."""
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *_limits(groups, own)])


def _limits(groups: Path, own: Path) -> Iterator[int]:
    """Of the control group of this process and of all above it; what cannot be read is none."""
    try:
        last = own.read_text("ascii").splitlines()[-1].split(":", 2)[2].strip("/")
    except (OSError, ValueError, IndexError):
        last = ""
    for folder in (groups / last, *(groups / last).parents):
        if not folder.is_relative_to(groups):
            return
        for name in _LIMITS:
            try:
                yield int((folder / name).read_text("ascii"))
            except (OSError, ValueError):  # no such file, or "max"
                continue


def kept_bytes(config: CloudConfig, devices: Sequence[torch.device], machine: int) -> int:
    """What updates may keep on the model's devices: as it is set, or a share of the smallest one's memory."""
    if config.keep_bytes:
        return config.keep_bytes
    cards = [device for device in devices if device.type == "cuda"]
    if cards:
        machine = min(int(torch.cuda.get_device_properties(card).total_memory) for card in cards)
    return min(_MOST_KEPT, int(_KEPT_SHARE * machine))


def plan_memory(
    config: CloudConfig, catalog: Catalog, *, process: int, continuous: bool, machine: int
) -> MemoryPlan:
    """`process`: bytes that it has before it serves. `machine`: bytes that it may have at most.

    `continuous`: whether long prompts are read in chunks. Raises ConfigError that names the parts when they
    cannot fit the ceiling.
    """
    limits, shapes = catalog.limits, _Shapes(catalog)
    is_host = catalog.base.device.type == "cpu"
    largest = MESSAGE_COPIES * limits.message_bytes
    update = UPDATE_TOKEN_BYTES * limits.adapt_tokens
    updates = min(config.adaptations, config.adaptations_each + 1)  # one device leaves room for another's
    most_tokens = config.cache_tokens
    # An Ask holds its shift after the message that brought it is done.
    each = limits.message_bytes + catalog.tensor_bytes + _CALL_BYTES
    fixed = {"process": process, "calls": config.calls * each}
    parts = {
        "messages": _Part(min(4, config.calls) * largest, config.calls * largest),
        "examples": _Part(updates * update, config.adaptations * update),
        "freed": _Part(_LEAST_FREED, max(_LEAST_FREED, min(_MOST_FREED, int(_FREED_SHARE * machine)))),
    }
    if is_host:
        rows = config.batch_tokens if continuous else config.cache_tokens
        fixed["answers"] = rows * shapes.row + _LOGITS * config.max_requests * shapes.logits
        parts["cache"] = _Part(2 * limits.context * shapes.cached, most_tokens * shapes.cached)
        # No example is longer, and no engine takes on more.
        least = max(min(limits.context, limits.prompt_tokens + limits.new_tokens), 64)
        most = max(least, most_pass_tokens(catalog.base.device), BatchBudget.of(catalog.base.device).rows)
        parts["gradients"] = _Part(*(tokens * shapes.differentiated for tokens in (least, most)))
        parts["kept"] = _Part(0, kept_bytes(config, catalog.base.devices, machine))
    else:
        parts["kept"] = _Part(0, config.spill_bytes)
    given = {name: part.most for name, part in parts.items()}
    if config.memory_bytes:
        given = _shared(parts, int((1 - _MARGIN) * config.memory_bytes), fixed)
    return MemoryPlan(
        **{"cache": 0, "answers": 0, "gradients": 0, **fixed, **given},
        cache_tokens=min(most_tokens, given["cache"] // shapes.cached) if is_host else most_tokens,
        pass_tokens=given["gradients"] // shapes.differentiated if is_host else PASS_TOKENS,
    )


def _shared(parts: dict[str, _Part], room: int, fixed: dict[str, int]) -> dict[str, int]:
    """What each part gets of `room`, beside what is fixed. Raises ConfigError."""
    left = room - sum(fixed.values()) - sum(part.least for part in parts.values())
    if left < 0:
        named = {**fixed, **{name: part.least for name, part in parts.items()}}
        least = ", ".join(f"{name} {-(-size // _MIB)}" for name, size in named.items() if size)
        raise ConfigError(
            f"memory_bytes is too small by {-(left // _MIB)} MiB: the least are {least} MiB; raise it, or "
            "lower calls, message_bytes, adapt_tokens, batch_tokens or max_requests"
        )
    wanted = sum(part.most - part.least for part in parts.values())
    share = min(1.0, left / wanted) if wanted else 0.0
    return {name: part.least + int(share * (part.most - part.least)) for name, part in parts.items()}


class _Shapes:
    """Bytes that one token takes, by the model's configuration."""

    def __init__(self, catalog: Catalog) -> None:
        config = catalog.base.model.config.get_text_config()
        hidden, size = int(config.hidden_size), catalog.base.model.dtype.itemsize
        heads = int(getattr(config, "num_attention_heads", None) or 1)
        width = int(getattr(config, "head_dim", None) or hidden // heads)
        groups = int(getattr(config, "num_key_value_heads", None) or heads)
        inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
        blocks = catalog.base.blocks
        block = (8 * hidden + 4 * heads * width + 4 * inner) * size  # numbers that one block holds of it
        self.logits = 4 * int(catalog.base.model.get_input_embeddings().num_embeddings)
        self.cached = int(2 * blocks * groups * width * size * (1 + 1 / blocks))  # pools grow block by block
        self.row = 2 * block
        self.differentiated = blocks * block + _LOGITS * self.logits
