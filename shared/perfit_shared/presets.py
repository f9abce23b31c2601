"""PerFit's hyper-parameters a task (Table 9), with layers as relative depth.

The paper counts layers in Llama-2-7B's 32 blocks. A preset keeps layer / 32 and maps it to the
model at hand: the set of distinct blocks nearest to the wanted depths. Appendix E.4 has the same
layers for backbones of 16 to 32 blocks; its preset has too, where the model is deep enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from perfit_shared.errors import InvalidInput, NotFound
from perfit_shared.shifts import ShiftSpec

__all__ = ["PRESETS", "Preset", "preset_for", "preset_name", "spaced_layers", "value_or"]

T = TypeVar("T")

_PAPER_BLOCKS = 32


@dataclass(frozen=True)
class Preset:
    """One row of Table 9, with the training settings that the paper shares between tasks."""

    collective_rank: int
    personal_rank: int
    paper_layers: tuple[int, ...]  # of 32
    positions: str
    epochs: int  # passes over one user's history
    batch_size: int = 16  # examples a step, both stages
    collective_epochs: int = 3  # passes over everybody's examples
    learning_rate: float = 1e-4  # for billions of parameters; chosen on data for small models
    of_any_depth: bool = False  # the paper has these layers for every backbone
    from_paper: bool = True

    def layers_for(self, blocks: int) -> tuple[int, ...]:
        """Distinct blocks of a model with `blocks` blocks, nearest to the paper's depths."""
        if self._as_printed(blocks):
            return self.paper_layers
        if blocks < len(self.paper_layers):
            raise InvalidInput(f"a model of {blocks} blocks has no {len(self.paper_layers)} to intervene on")
        targets = [layer / _PAPER_BLOCKS * blocks for layer in self.paper_layers]
        near = range(max(0, int(targets[0]) - len(targets)), min(blocks, int(targets[-1]) + len(targets) + 1))
        return min(
            combinations(near, len(targets)),
            key=lambda c: (sum(abs(a - b) for a, b in zip(c, targets, strict=True)), c),
        )

    def _as_printed(self, blocks: int) -> bool:
        return self.of_any_depth and blocks > self.paper_layers[-1]

    def mapping(self, spec: ShiftSpec, *, blocks: int, given: bool) -> str:
        """A line on a spec for a model of `blocks` blocks, and where its layers are from."""
        paper = ";".join(map(str, self.paper_layers))
        mapped = "the paper's, for every depth" if self._as_printed(blocks) else f"from {paper} of 32"
        return (
            f"layers {';'.join(map(str, spec.layers))} of {blocks} ({'as given' if given else mapped}), "
            f"positions {spec.positions}, ranks {spec.collective_rank}/{spec.personal_rank}"
        )

    def spec(
        self,
        *,
        blocks: int,
        hidden_size: int,
        layers: tuple[int, ...] | None = None,
        positions: str | None = None,
        collective_rank: int | None = None,
        personal_rank: int | None = None,
    ) -> ShiftSpec:
        """For a model of that size; what is given replaces the preset's. Raises InvalidInput."""
        chosen = layers or self.layers_for(blocks)
        if chosen[-1] >= blocks:
            raise InvalidInput(f"layer {chosen[-1]} asked for, but the model has blocks 0 to {blocks - 1}")
        return ShiftSpec(
            layers=chosen,
            positions=positions or self.positions,
            # A given rank is taken as it is, or refused; the preset's may be too large for a small model.
            collective_rank=value_or(collective_rank, min(self.collective_rank, hidden_size)),
            personal_rank=value_or(personal_rank, min(self.personal_rank, hidden_size)),
            hidden_size=hidden_size,
        )


def spaced_layers(count: int, blocks: int) -> tuple[int, ...]:
    """`count` blocks symmetric about the middle one, blocks / count apart (Fig. 6). Raises InvalidInput."""
    if not 1 <= count <= blocks:
        raise InvalidInput(f"a model of {blocks} blocks has no {count} layers to choose")
    # (at + ½) blocks / count − ½, a half rounded down, so that one of 32 is the paper's 15.
    return tuple(-((2 * count - (2 * at + 1) * blocks) // (2 * count)) for at in range(count))


def value_or(value: T | None, default: T) -> T:
    """`value`, or `default` where it is None."""
    return default if value is None else value


PRESETS: dict[str, Preset] = {
    "news_categorize": Preset(16, 32, (14, 15, 16), "f7+l7", 6),
    "movie_tagging": Preset(32, 4, (14, 15), "f7+l7", 4),
    "product_rating": Preset(32, 4, (14, 15, 16), "l7", 4, batch_size=2),
    "news_headline": Preset(32, 4, (14, 15, 16), "l7", 4),
    "scholarly_title": Preset(32, 8, (15,), "f7+l7", 4, batch_size=4),
    "tweet_paraphrase": Preset(32, 16, (14, 15), "f7+l7", 4),
    "appendix_e4": Preset(32, 32, (7, 9, 11), "f7+l7", 2, of_any_depth=True),  # for every task
    # Not in the paper, whose Table 11 does best with layers as early as these.
    **dict.fromkeys(
        ("chat", "reply", "commit_message"), Preset(32, 16, (5, 9, 12), "l7", 4, from_paper=False)
    ),
}


def preset_name(task: str, chosen: str | None = None) -> str:
    """The one that is chosen, else the task's own, else for a task that the paper lacks chat's."""
    return chosen or (task if task in PRESETS else "chat")


def preset_for(name: str) -> Preset:
    """Raises NotFound and lists what there is."""
    try:
        return PRESETS[name]
    except KeyError:
        raise NotFound(f'no preset "{name}"; there are {", ".join(sorted(PRESETS))}') from None
