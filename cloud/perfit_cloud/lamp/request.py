"""What a researcher may ask a LaMP run for."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

from perfit_cloud.lamp.measure import Decoding
from perfit_cloud.lamp.methods import METHODS
from perfit_shared.errors import InvalidInput
from perfit_shared.optimizer import OptimizerConfig
from perfit_shared.training import Schedule

__all__ = ["ABLATIONS", "HISTORIES", "LampRequest"]

# full; φ₁ alone; φ₂ alone from the identity, at the personal rank or at the sum of both (Table 4)
ABLATIONS = ("full", "stage1", "stage2", "stage2_sum")
HISTORIES = ("own", "other")  # whose history a user's shift is trained on (Table 15)


@dataclass(frozen=True)
class LampRequest:
    """What a researcher asks for; None stands for the preset's value, or a choice on the data."""

    task: str | None  # the artefact's, else the one that the folder's task.json names
    model: str  # folder or hub name
    data: Path  # folder with one task's files
    out: Path
    artefact: Path | None = None  # a collective shift that is there already, perhaps of another task
    preset: str | None = None  # the task's own
    prompts: str | None = None  # of perfit_shared.prompts; the artefact's, else task.json's, else built in
    chat: str | None = None  # of perfit_shared.prompts.READINGS; as the task says
    schedule: str = "paper"  # of stage 2: as the paper trains, or "device"
    users: int | None = None  # the first N of the test cohort
    examples: int | None = None  # of each history, the latest N
    collective_users: int | None = None  # so many of user_others.json, chosen by the seed
    ablation: str = "full"
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
    seed: int = 0
    decoding: Decoding = field(default_factory=Decoding)
    users_together: int = 8  # a cohort of stage 2
    keep_bytes: int = 4 << 30  # for activations that no user's tensors change
    threads: int = 0  # of the CPU; 0: torch's own choice
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.ablation not in ABLATIONS:
            raise InvalidInput(f'no ablation "{self.ablation[:20]}"; there are {", ".join(ABLATIONS)}')
        if self.histories not in HISTORIES:
            raise InvalidInput(f"histories should be {' or '.join(HISTORIES)}")
        for name in ("users", "examples", "collective_users", "users_together", "collective_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidInput(f"{name.replace('_', ' ')} should be at least 1")
        if self.keep_bytes < 0:
            raise InvalidInput("the memory for activations should not be negative")
        # Raises on what no schedule can have, before anything is trained or written.
        Schedule(
            epochs=1 if self.epochs is None else self.epochs,
            seed=self.seed,
            examples=1,
            batch_size=1 if self.batch_size is None else self.batch_size,
            learning_rate=1e-4 if self.learning_rate is None else self.learning_rate,
        )
        OptimizerConfig(1.0, 1, schedule=self.schedule)
        self._check_options()

    def _check_options(self) -> None:
        """No option that would change nothing."""
        method = METHODS[self.method]
        of_methods = frozenset().union(*(each.options for each in METHODS.values()))
        given = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        idle = sorted(given & (of_methods - method.options))
        if idle:
            names = ", ".join(name.replace("_", " ") for name in idle)
            raise InvalidInput(f"{names}: {self.ablation} does not use that; leave it out")
        method.check(self)

    @property
    def method(self) -> str:
        """The name in `methods.METHODS`."""
        return "perfit" if self.ablation == "full" else f"perfit_{self.ablation}"
