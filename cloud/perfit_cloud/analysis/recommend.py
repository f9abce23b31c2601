"""Layers, ranks and positions to begin with, from what the δ-vectors of every block look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from perfit_cloud.analysis.spectrum import BlockStatistics

__all__ = ["Recommendation", "recommend"]

_LAYERS = 3
_LEAST_RANK, _MOST_RANK = 4, 64  # the search space of the paper's Table 8
_NEAR_CONTROL = 0.5  # a control of this part of δ's length is no small one
_USERS_A_RANK = 3  # fewer users than this many times a rank leave the rank open


@dataclass(frozen=True)
class Recommendation:
    layers: tuple[int, ...]
    collective_rank: int
    personal_rank: int
    positions: str
    reason: str


def recommend(blocks: Sequence[BlockStatistics], *, users: int, hidden_size: int) -> Recommendation:
    """Blocks where users share a strong direction and few directions explain 0.9 of the squares.

    The last block is left out (its shift reaches no later one). Collective rank: r at 0.9, personal: r at
    0.95, each the largest over the layers, rounded up to a power of two from 4 to 64.
    """
    able = list(blocks[:-1]) or list(blocks)
    by_strength = sorted(able, key=lambda b: (-b.strength, b.block))
    by_rank = sorted(able, key=lambda b: (b.ranks["0.9"], b.block))
    place = {b.block: by_strength.index(b) + by_rank.index(b) for b in able}
    chosen = sorted(sorted(able, key=lambda b: (place[b.block], b.block))[:_LAYERS], key=lambda b: b.block)
    ranks = {share: max(b.ranks[share] for b in chosen) for share in ("0.9", "0.95")}
    collective, personal = (_rounded(rank, hidden_size) for rank in ranks.values())
    layers = tuple(b.block for b in chosen)
    strongest = max(chosen, key=lambda b: b.strength)
    control = _control(chosen)
    few = users < _USERS_A_RANK * ranks["0.95"]
    reason = (
        f"Of blocks 0 to {blocks[-1].block - 1}, {_listed(layers)} stand best when both are counted: the "
        f"direction that users share (in block {strongest.block} its mean is {strongest.strength:.1f} "
        f"standard deviations from zero) and the number of directions that explain nine tenths of the "
        f"squares (at most {ranks['0.9']} there). That number, rounded up to a power of two, is the "
        "collective rank; "
        f"the number at 0.95, {ranks['0.95']}, gives the personal one. "
        + (f"{users} users bound every rank from above, so more of them may show more. " if few else "")
        + control
        + "The vectors are of the last token, so the last tokens are where to begin; they say nothing of the "
        "first ones. Neither do they say which rate, how many epochs, or whether a shift there helps: that "
        "a history moves a block does not mean that moving it makes answers better. Validation decides; try "
        "these layers, earlier ones, and f7+l7 on held-out users."
    )
    return Recommendation(layers, collective, personal, "l7", reason)


def _control(blocks: Sequence[BlockStatistics]) -> str:
    """A sentence where random prefixes of the same length move these blocks nearly as far or further."""
    ratios = [b.control_norm / b.norm for b in blocks if b.control_norm is not None and b.norm]
    if not ratios or max(ratios) < _NEAR_CONTROL:
        return ""
    return (
        f"Random tokens in the histories' place move these blocks {min(ratios):.2f} to {max(ratios):.2f} "
        "times as far, so much of the shared direction may belong to any longer prompt and not to people. "
    )


def _rounded(rank: int, hidden_size: int) -> int:
    """The power of two that is at least `rank`, within the search space and the model's width."""
    power = 1 << max(rank - 1, 0).bit_length()
    return min(max(power, _LEAST_RANK), _MOST_RANK, hidden_size)


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers[:-1])) + f" and {layers[-1]}" if len(layers) > 1 else str(layers[0])
