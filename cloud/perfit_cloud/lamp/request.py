"""What a researcher may ask a LaMP run for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from perfit_cloud.collective.items import GROUPS
from perfit_cloud.lamp.measure import Decoding
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.results import MODES
from perfit_cloud.model.placement import ONE_DEVICE, Placement
from perfit_shared.errors import InvalidInput
from perfit_shared.optimizer import OptimizerConfig
from perfit_shared.presets import value_or
from perfit_shared.training import Schedule
from perfit_shared.types import Sampling

__all__ = ["HISTORIES", "LampRequest"]

_COUNTS = ("users", "examples", "queries", "collective_users", "users_together", "collective_epochs")
HISTORIES = ("own", "other")  # whose a user's shift is trained on; "other" is an ablation


@dataclass(frozen=True)
class LampRequest:
    """What a researcher asks for; None stands for the preset's value, or a choice on the data."""

    task: str | None  # the artefact's, else the one that the folder's task.json names
    model: str  # folder or hub name
    data: Path  # folder with one task's files
    out: Path
    artefact: Path | None = None  # a collective shift that is there already, perhaps of another task
    lora: Path | None = None  # a collective LoRA that is there already: its file, or OUT of its run
    lora_layers: str = "all"  # the blocks of a collective LoRA below a shift, or "perfit"'s
    preset: str | None = None  # the task's own
    prompts: str | None = None  # of perfit_shared.prompts; the artefact's, else task.json's, else built in
    chat: str | None = None  # of perfit_shared.prompts.READINGS; as the task says
    schedule: str = "paper"  # of stage 2: as the paper trains, or "device"
    users: int | None = None  # the first N of the test cohort
    examples: int | None = None  # of each history, the latest N; 0: nobody has one
    queries: int | None = None  # of each user, the first N
    modes: tuple[str, ...] | None = None  # of results.MODES, those to measure; None: all that the method has
    reuse: Path | None = None  # a finished run of the same people; what would come out the same is taken
    collective_users: int | None = None  # so many of user_others.json, chosen by the seed
    collective_group: int | None = None  # one of five disjoint groups of user_others.json (Table 15)
    method: str = "perfit"  # of methods.METHODS
    histories: str = "own"
    layers: tuple[int, ...] | None = None
    positions: str | None = None
    collective_rank: int | None = None
    personal_rank: int | None = None
    batch_size: int | None = None  # examples a step, both stages
    collective_epochs: int | None = None
    collective_learning_rate: float | None = None
    epochs: int | None = None  # of stage 2
    learning_rate: float | None = None  # of stage 2
    figures: tuple[int, int] | None = None  # epochs and batch size of a run that this one is like
    k: int = 4  # own examples before a query, nearest first
    profile_model: str | None = None  # that writes profiles; the base
    strength: float | None = None  # of a style vector; chosen on the history
    drift: bool = False  # measure `drift` too
    seed: int = 0
    decoding: Decoding = field(default_factory=Decoding)
    frequency_penalty: float | None = None  # of answers; the task's
    users_together: int = 8  # a cohort of stage 2
    keep_bytes: int = 4 << 30  # for activations that no user's tensors change
    threads: int = 0  # of the CPU; 0: torch's own choice
    dtype: str = "auto"
    device: str = "auto"
    placement: Placement = ONE_DEVICE  # over several devices, instead

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidInput(f'no method "{self.method[:20]}"; there are {", ".join(METHODS)}')
        if self.histories not in HISTORIES:
            raise InvalidInput(f"histories should be {' or '.join(HISTORIES)}")
        for name in _COUNTS:
            value, least = getattr(self, name), int(name != "examples")
            if value is not None and value < least:
                raise InvalidInput(f"{name.replace('_', ' ')} should be at least {least}")
        if self.collective_group is not None and not 0 <= self.collective_group < GROUPS:
            raise InvalidInput(f"a collective group should be from 0 to {GROUPS - 1}")
        if self.collective_users is not None and self.collective_group is not None:
            raise InvalidInput("stage 1 is on so many users, or on a group of them; leave one out")
        if self.modes is not None and (not self.modes or not set(self.modes) <= set(MODES)):
            raise InvalidInput(f"modes are some of {', '.join(MODES)}")
        own = [m for m in METHODS[self.method].modes() if m != "other" or self.histories == "own"]
        if self.modes is not None and not set(self.modes) & set(own):
            raise InvalidInput(f"{self.method} has other modes: {', '.join(own)}")
        if self.keep_bytes < 0:
            raise InvalidInput("the memory for activations should not be negative")
        # Raises on what no schedule can have, before anything is trained or written.
        for epochs, rate in (
            (self.epochs, self.learning_rate),
            (self.collective_epochs, self.collective_learning_rate),
        ):
            Schedule(
                epochs=value_or(epochs, 1),
                seed=self.seed,
                examples=1,
                batch_size=value_or(self.batch_size, 1),
                learning_rate=value_or(rate, 1e-4),
            )
        OptimizerConfig(1.0, 1, schedule=self.schedule)
        Sampling(1, frequency_penalty=value_or(self.frequency_penalty, 0.0))
        METHODS[self.method].check(self)

    @property
    def unused(self) -> tuple[str, ...]:
        """Given options of other methods, which this one does not read."""
        of_methods = frozenset().union(*(each.options for each in METHODS.values()))
        idle = of_methods - METHODS[self.method].options
        return tuple(f.name for f in fields(self) if f.name in idle and getattr(self, f.name) != f.default)

    def without_unused(self) -> Self:
        """As if those had not been given."""
        defaults: dict[str, Any] = {f.name: f.default for f in fields(self) if f.name in self.unused}
        return replace(self, **defaults)
