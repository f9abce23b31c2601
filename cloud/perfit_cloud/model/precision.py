"""The dtype that a base model's weights take where the operator leaves it open.

bfloat16 halves memory and traffic everywhere, but a processor without instructions for it multiplies it
more slowly than float32. So a CPU is asked for its features, and one product of a decoder's size is timed.
Shifts, losses, their gradients and what is summed up are float32 in any case.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import NamedTuple

import torch

from perfit_shared.errors import ConfigError

__all__ = ["DTYPES", "Precision", "choose_precision", "decide"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROWS, _WIDTH, _INNER = 128, 768, 2048  # a prompt's tokens through a small decoder's MLP
_ROUNDS = 10
_FASTER = 1.1  # less than that is noise


class Precision(NamedTuple):
    dtype: str
    reason: str

    def __str__(self) -> str:
        return f"{self.dtype}: {self.reason}"


def choose_precision(requested: str, device: str) -> Precision:
    """Raises ConfigError on a dtype that is none."""
    if requested != "auto":
        if requested not in DTYPES:
            raise ConfigError(f'dtype "{requested}" should be auto, {", ".join(DTYPES)}')
        return Precision(requested, "as asked for")
    if torch.device(device).type != "cpu":
        return Precision("bfloat16", "on a GPU")
    features = _features()
    return decide(features, *(_timed() if _native(features) else (1.0, 1.0)))


def decide(features: Collection[str], float32_seconds: float, bfloat16_seconds: float) -> Precision:
    """Of a CPU with these features, which took so long for the same product in each dtype."""
    if not _native(features):
        return Precision("float32", "the processor does not multiply bfloat16 natively")
    faster = float32_seconds / bfloat16_seconds
    if faster < _FASTER:
        return Precision("float32", f"bfloat16 is only {faster:.1f} times as fast on this processor")
    return Precision(
        "bfloat16", f"the processor multiplies it natively, {faster:.1f} times as fast as float32"
    )


def _features() -> list[str]:
    return [name for name, has in torch.cpu.get_capabilities().items() if has is True]


def _native(features: Collection[str]) -> bool:
    """Intel's AMX, AVX-512 with BF16, and ARM's BF16 all say so in their name."""
    return any(name.endswith("bf16") for name in features)


def _timed() -> tuple[float, float]:
    """Fewest seconds of a product in float32 and in bfloat16, in turns.

    What else runs on the machine only adds to them.
    """
    left, right = torch.ones(_ROWS, _WIDTH), torch.ones(_INNER, _WIDTH)
    factors = [(left, right), (left.bfloat16(), right.bfloat16())]
    seconds: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        at = [time.perf_counter()]
        for pair in factors:
            torch.nn.functional.linear(*pair)
            at.append(time.perf_counter())
        seconds.append((at[1] - at[0], at[2] - at[1]))
    plain, half = zip(*seconds, strict=True)
    return min(plain), min(half)
