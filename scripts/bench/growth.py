"""How serving's cost grows with users in flight, prompt length and rank, and where its time goes."""

from __future__ import annotations

import argparse
import cProfile
import pstats
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from asking import ask_all, ask_in_step
from workload import Asked, artefact_for, prompts, uses

from perfit_cloud.engine.generation.factory import build_engine
from perfit_cloud.engine.interface import GenerationSettings
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.types import Sampling

__all__ = ["packing", "profile", "scaling"]

_NEW_TOKENS = 64
_IN_FLIGHT = (1, 4, 16, 64, 256)
_PROMPTS = (32, 128, 512, 1024)  # tokens; as far as the model's context goes
_RANKS = (4, 16, 64)


def scaling(base: BaseModel, args: argparse.Namespace) -> dict[str, Any]:
    """Three tables, every user another. Else 32 in flight (8 for lengths), prompts 32–256, rank 4."""
    pairs, new = (1, 4) if args.small else (3, _NEW_TOKENS)

    def measure(count: int, shortest: int, longest: int, rank: int) -> dict[str, Any]:
        artefact = artefact_for(base, personal_rank=rank)
        texts = prompts(base, count, shortest, longest)
        room = 2 * sum(len(text) + new for text in texts)
        settings = GenerationSettings(cache_tokens=max(32_768, room), max_requests=count, pack_weights=True)
        ours, plain = (build_engine(base, of, settings) for of in ({artefact.name: artefact}, {}))
        asked, unshifted = (_asked(texts, of, new) for of in (artefact, None))
        with common.Peak() as peak:  # of ours alone: the other engine holds nothing yet
            ask_all(ours, asked)
        ask_all(plain, unshifted)
        rounds = [ask_in_step({"base": (plain, unshifted), "ours": (ours, asked)}) for _ in range(pairs)]
        speeds = {side: [run[side].tokens_per_second for run in rounds] for side in ("base", "ours")}
        ours.stop()
        plain.stop()
        return {
            "model": base.name,
            "in_flight": count,
            "prompt_tokens": [shortest, longest],
            "personal_rank": rank,
            "tokens_per_second": float(np.median(speeds["ours"])),
            "ratio_to_base": common.ratio(speeds["ours"], speeds["base"]).median,
            "ttft_p50": float(np.median([seconds for run in rounds for seconds in run["ours"].first])),
            "peak_rss_mb": peak.megabytes,
        }

    most = base.context - new
    few = (1, 4), (32, 64), (4, 16)
    in_flight, lengths, ranks = few if args.small else (_IN_FLIGHT, _PROMPTS, _RANKS)
    lengths = tuple(dict.fromkeys(min(length, most) for length in lengths))
    usual = 4 if args.small else 32
    tables = {
        "users in flight": [measure(count, 32, min(256, most), 4) for count in in_flight],
        "prompt tokens": [measure(usual // 4, length, length, 4) for length in lengths],
        "personal rank": [measure(usual, 32, min(256, most), rank) for rank in ranks],
    }
    for title, rows in tables.items():
        key = title.replace("users ", "").replace(" ", "_")
        print(
            common.table(
                [title, "tokens/s", "of base", "first token, p50 s", "peak memory, MB"],
                [
                    [
                        np.max(row[key]),
                        row["tokens_per_second"],
                        f"{row['ratio_to_base']:.3f}",
                        row["ttft_p50"],
                        f"{row['peak_rss_mb']:.0f}",
                    ]
                    for row in rows
                ],
            )
            + "\n"
        )
    return {"scaling": [row for rows in tables.values() for row in rows]}


def packing(base: BaseModel, args: argparse.Namespace) -> dict[str, Any]:
    """Packed weights beside weights as they are: two engines pass by pass, prompts of 32–256 tokens."""
    pairs, new = (1, 4) if args.small else (args.pairs, _NEW_TOKENS)
    artefact = artefact_for(base)
    rows = []
    for count in (1, 4) if args.small else (1, 8, 32):
        asked = _asked(prompts(base, count, 32, min(256, base.context - new)), artefact, new)
        engines = {
            name: build_engine(
                base, {artefact.name: artefact}, GenerationSettings(pack_weights=packs), name="own"
            )
            for name, packs in (("packed", True), ("as they are", False))
        }
        rounds = [
            ask_in_step({name: (engine, asked) for name, engine in engines.items()}) for _ in range(1 + pairs)
        ]
        for engine in engines.values():
            engine.stop()
        speeds = {name: [run[name].tokens_per_second for run in rounds[1:]] for name in engines}
        first = {name: [float(np.median(run[name].first)) for run in rounds[1:]] for name in engines}
        answers = (rounds[-1][name].answers for name in engines)
        rows.append(
            {
                "model": base.name,
                "in_flight": count,
                "tokens_per_second": {name: float(np.median(of)) for name, of in speeds.items()},
                "packed": common.ratio(speeds["packed"], speeds["as they are"]).to_json(),
                "first_token": common.ratio(first["packed"], first["as they are"]).to_json(),
                "same_answers": sum(a == b for a, b in zip(*answers, strict=True)),
            }
        )
    heads = ["users in flight", *rows[0]["tokens_per_second"], "ratio [95 %]", "first token", "same answers"]
    cells = [
        [
            row["in_flight"],
            *row["tokens_per_second"].values(),
            common.Ratio(*row["packed"]),
            common.Ratio(*row["first_token"]),
            f"{row['same_answers']} of {row['in_flight']}",
        ]
        for row in rows
    ]
    print(common.table(heads, cells))
    return {"packing": rows}


def _asked(texts: list[list[int]], artefact: Artefact | None, new_tokens: int) -> list[Asked]:
    whose = uses(artefact, len(texts), len(texts))
    return [(text, use, Sampling(new_tokens)) for text, use in zip(texts, whose, strict=True)]


# -- where the time goes -------------------------------------------------------------------------

# (file, function): none calls another, and all are called within the forward pass.
_PARTS = {
    "linear layers": [
        ("", "<built-in method torch._C._nn.linear>"),
        ("", "<built-in method torch._ops.mkldnn._linear_pointwise>"),  # with packed weights
    ],
    "attention": [("model/kv_cache.py", "_packed_attention")],
    "whose rows are shifted": [("model/interventions.py", "groups_of")],
    "φ": [("model/interventions.py", "shift_rows")],
    "choosing tokens": [("engine/generation/sampling.py", "draw")],
}
_FORWARD = ("engine/generation/continuous.py", "_forward")
_TOP = 12  # functions shown by their own time


def profile(base: BaseModel, args: argparse.Namespace) -> dict[str, Any]:
    """Parts of the engine thread's time for 32 asks of 32 users, and the functions with most of their own.

    By cProfile in processor time; it makes Python look dearer than it is.
    """
    artefact = artefact_for(base)
    count, new, longest = (4, 4, 64) if args.small else (32, _NEW_TOKENS, 256)
    engine = build_engine(base, {artefact.name: artefact}, GenerationSettings(pack_weights=True))
    if not engine.continuous:
        raise SystemExit("this model's family is served in batches; there is no step to profile")
    asked = _asked(prompts(base, count, 32, longest), artefact, new)
    ask_all(engine, asked)
    profiler, step = cProfile.Profile(time.thread_time), engine._round
    engine._round = lambda: profiler.runcall(step)  # type: ignore[method-assign]
    ask_all(engine, asked)
    engine.stop()
    stats: Any = pstats.Stats(profiler)
    total = stats.total_tt

    def seconds(file: str, function: str) -> float:
        """With all that it calls."""
        return sum(of[3] for at, of in stats.stats.items() if at[0].endswith(file) and at[2] == function)

    parts = {part: sum(seconds(*each) for each in of) for part, of in _PARTS.items()}
    parts["rest of the pass: norms, rotary, activations, packing"] = seconds(*_FORWARD) - sum(parts.values())
    parts["between passes: plan, delivery"] = total - seconds(*_FORWARD)
    print(
        common.table(["part", "s", "share"], [[part, s, f"{s / total:.1%}"] for part, s in parts.items()])
        + "\n"
    )
    top = sorted(stats.stats.items(), key=lambda entry: -entry[1][2])[:_TOP]
    print(
        common.table(
            ["function", "calls", "own s"],
            [[f"{Path(at[0]).name}:{at[1]} {at[2]}" if at[1] else at[2], of[1], of[2]] for at, of in top],
        )
    )
    return {"profile": {"model": base.name, "seconds": total, "parts": parts}}
