"""What only a card shows: its limit and the share of it, a gradient step, and what is left in its memory.

    python scripts/bench/card.py --model random-7b --dtype bfloat16 --device cuda --serving serving.json

The limit is what a large product of the model's dtype reaches here. A step is the gradient of 8 examples of
256 tokens; its share counts 4 operations a weight and token (forward, and backward to activations alone), an
answer's 2 (`--serving` is the result of vllm_serving.py). After answers of people with known tensors the keys
and values are looked at, and then all memory of the card that nobody has: it is taken in pieces, as it is,
and searched for 8 bytes of the tensors and of the prompts at a time. The control frees a tensor full of such
bytes first, and must find it. On a CPU (--small) freed memory is not searched: it tries the script.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from workload import artefact_for, examples, load_model, parser, prompts, uses

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.interface import GenerationSettings
from perfit_cloud.model.base import BaseModel
from perfit_shared.types import Sampling

_SIDE, _STEPS, _PIECE = 8192, 20, 256 << 20  # of a product; steps; bytes
_LEFT_FREE = 1 << 30  # bytes that nobody takes, for what searching itself needs
_NEW = 32


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--serving", type=Path, help="result of vllm_serving.py on the same model")
    args = made.parse_args()
    if args.small:  # as in vllm_serving.py
        args.small, args.model, side, steps, tokens = False, "random-8m", 256, 2, 32
    else:
        side, steps, tokens = _SIDE, _STEPS, 256
    base = load_model(args)
    weights = sum(weight.numel() for weight in base.model.parameters())
    limit = _limit(base, side)
    seconds = _step(base, tokens, steps)
    result: dict[str, Any] = {
        "model": base.name,
        "limit_tflops": limit / 1e12,
        "step_p50_ms": 1000 * seconds,
        "step_share": 4 * weights * 8 * tokens / seconds / limit,
        "left": _left(base),
    }
    if args.serving and args.serving.exists():
        result["serving_share"] = _shares(json.loads(args.serving.read_text("utf-8")), weights, limit)
    print(json.dumps(result, indent=1))
    common.finish(result, args.json)


def _shares(found: dict[str, Any], weights: int, limit: float) -> dict[str, dict[str, float]]:
    """Of the limit, by load and side: for each new token as many of a prompt are read as the sizes say."""
    sizes = found["sizes"]
    tokens = 1 + (sizes["shortest"] + sizes["longest"]) / 2 / sizes["new_tokens"]
    return {
        f"{row['in_flight']} of {row['distinct_users']} users": {
            side: 2 * weights * tokens * speed / limit for side, speed in row["tokens_per_second"].items()
        }
        for row in found["rows"]
    }


def _limit(base: BaseModel, side: int) -> float:
    """Operations a second of the best of some products of the model's dtype."""
    left, right = (torch.randn(side, side, device=base.device, dtype=base.model.dtype) for _ in range(2))
    best = min(_timed(base, lambda: left @ right) for _ in range(5))
    return 2 * side**3 / best


def _step(base: BaseModel, tokens: int, steps: int) -> float:
    """Median seconds of the gradient of 8 examples of so many tokens."""
    artefact = artefact_for(base)
    engine = UpdateEngine(base, keep_bytes=2 << 30)
    with engine.open(examples(base, 8, tokens - 10), artefact) as opened:
        request = GradientRequest(opened, range(8), artefact.seed)
        times = [_timed(base, lambda: engine.gradients([request])) for _ in range(1 + steps)]
    engine.close()
    return float(np.median(times[1:]))


def _timed(base: BaseModel, call: Callable[[], object]) -> float:
    _wait(base)
    begun = time.perf_counter()
    call()
    _wait(base)
    return time.perf_counter() - begun


def _wait(base: BaseModel) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)


# -- what is left in the card's memory ------------------------------------------------------------


def _left(base: BaseModel) -> dict[str, Any]:
    """By place: how many 8-byte words of tensors and prompts are there, after the answers' end."""
    artefact = artefact_for(base)
    asked = prompts(base, 8, 64, 64, seed=3)
    whose = uses(artefact, 8, 8)
    settings = GenerationSettings(cache_tokens=8 * (64 + _NEW), max_requests=8)
    engine: Any = build_engine(base, {artefact.name: artefact}, settings, name="vllm")
    for answer in [engine.submit(p, use, Sampling(_NEW)) for p, use in zip(asked, whose, strict=True)]:
        list(answer)
    while engine._core.is_busy:  # the step that tells workers who has ended
        time.sleep(0.05)
    caches = engine._core.runner.kv_caches
    needles = _needles(base, asked, whose)
    found: dict[str, Any] = {"needles": len(needles)}
    found["keys and values, not zero"] = sum(int(torch.count_nonzero(torch.as_tensor(c))) for c in caches)
    engine.stop()
    if base.device.type == "cuda":
        found["freed memory"] = _in_freed(needles)
        planted = needles.repeat(1 << 20)
        del planted
        found["control, freed memory"] = _in_freed(needles)
    else:
        found["control, held memory"] = _count(needles.repeat(4), needles)
    return found


def _needles(base: BaseModel, asked: list[list[int]], whose: list[Any]) -> torch.Tensor:
    """Words of 8 bytes: of tensors in float32 and in the model's dtype, of prompts as int64 and two int32."""
    words = []
    for use in whose:
        for _, array in use.personal.named():
            for dtype in {torch.float32, base.model.dtype}:
                data = torch.from_numpy(array).to(dtype).flatten().contiguous().view(torch.uint8)
                words.append(data[: len(data) // 8 * 8].view(torch.int64))
    for prompt in asked:
        ids = torch.tensor(prompt)
        words.append(ids.to(torch.int32)[: len(ids) // 2 * 2].view(torch.int64))
    found = torch.cat(words).unique()
    return found[found.abs() > 1 << 33].to(base.device)  # small ones are anybody's


def _in_freed(needles: torch.Tensor) -> int:
    torch.cuda.empty_cache()
    return sum(_count(piece, needles) for piece in _taken(needles.device))


def _taken(device: torch.device) -> Iterator[torch.Tensor]:
    """The card's free memory, as it is, in pieces that stay taken until all are searched."""
    held = []
    while torch.cuda.mem_get_info(device)[0] > _LEFT_FREE + _PIECE:
        held.append(torch.empty(_PIECE // 8, dtype=torch.int64, device=device))
        yield held[-1]


def _count(words: torch.Tensor, needles: torch.Tensor) -> int:
    return sum(int(torch.isin(part, needles).sum()) for part in words.split(1 << 22))


if __name__ == "__main__":
    main()
