"""What an artefact's card says of its communities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from perfit_shared.starts import CHOOSING, LEAST_TO_CHOOSE

__all__ = ["HEADING", "community_lines", "listed"]

HEADING = "**Communities.**"


def community_lines(card: Mapping[str, Any]) -> list[str]:
    """What CARD.md says of them; nothing where there are none."""
    told = card.get("communities")
    if not told:
        return []
    if not told["sizes"]:
        return [
            f"{HEADING} None. Seeds were refined for clusters of people ({told['requested']} asked for), "
            "and none was better than the plain seed, by more than chance, for those who did not train it.",
            "",
        ]
    held_out = told["held_out"]
    sizes = listed(told["sizes"])
    return [
        f"{HEADING} {len(told['sizes'])} more seeds, each refined from the seed for {sizes} people, by the "
        f"latest {told['examples_a_person']} examples of each at most; φ₁ is unchanged. "
        f"{_measured(held_out)}. A person's device picks among all by the loss of {LEAST_TO_CHOOSE} to "
        f"{CHOOSING} own examples. Seeds are public: one tells something of its community, of "
        f"{told['least_people']} people or more, and without differential privacy it may tell something of "
        "each of them. Whoever asks with a seed that was not trained further shows the cloud which one they "
        "picked.",
        "",
    ]


def _measured(held_out: Mapping[str, Any] | None) -> str:
    if held_out is None:
        return "Nobody who was not trained on has enough examples to measure them"
    return (
        f"Of {held_out['people']} people who were not trained on, {held_out['picked_a_community']} pick a "
        "community by the older half of their examples; on the newer half the loss is "
        f"{held_out['seed']:.4f} with the plain seed and {held_out['chosen']:.4f} with what each picks"
    )


def listed(sizes: Sequence[int]) -> str:
    """As words."""
    return ", ".join(map(str, sizes))
