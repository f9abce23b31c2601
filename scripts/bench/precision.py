"""bfloat16 against float32 on this processor: prompts, and decoding one token.

    python scripts/bench/precision.py --model smollm2 --threads 1

Both take turns in one process. Seconds are of CPU time, of all threads, so that other work beside
lengthens them less; a ratio is float32's over bfloat16's.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import common
import torch
from workload import load_model, parser

from perfit_cloud.model.base import BaseModel

_PROMPTS, _TOKENS = 16, 128


def _sides(base: BaseModel, rows: int, tokens: int) -> Callable[[], float]:
    """Seconds of a pass over `rows` prompts, or with tokens = 1 of one more token behind them."""
    vocabulary = base.model.config.get_text_config().vocab_size
    ids = torch.arange(rows * _TOKENS).view(rows, _TOKENS) % vocabulary

    @torch.no_grad()
    def run() -> float:
        past = None if tokens > 1 else base.model(ids, use_cache=True, logits_to_keep=1).past_key_values
        begun = time.process_time()
        base.model(ids[:, :tokens], past_key_values=past, use_cache=True, logits_to_keep=1)
        return time.process_time() - begun

    return run


def main() -> None:
    args = parser(__doc__).parse_args()
    bases = {}
    for dtype in ("float32", "bfloat16"):
        args.dtype = dtype
        bases[dtype] = load_model(args)
    rows = []
    for what, count, tokens in (
        (f"{_PROMPTS} prompts of {_TOKENS}", _PROMPTS, _TOKENS),
        ("one token, 16 rows", 16, 1),
        ("one token, 1 row", 1, 1),
    ):
        sides = {dtype: _sides(base, count, tokens) for dtype, base in bases.items()}
        found = common.interleaved(sides, pairs=args.pairs)
        medians = [sorted(seconds)[len(seconds) // 2] for seconds in found.values()]
        rows.append([what, args.threads, *medians, str(common.ratio(found["float32"], found["bfloat16"]))])
    headers = ["pass", "threads", "float32, s", "bfloat16, s", "times as fast [95 %]"]
    print(common.table(headers, rows))
    common.finish({"rows": rows}, args.json)


if __name__ == "__main__":
    main()
