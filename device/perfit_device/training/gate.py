"""The gate that a new version has to pass."""

from __future__ import annotations

from dataclasses import dataclass

from perfit_shared.validation import Comparison, mean_loss

__all__ = ["ValidationGate"]


@dataclass(frozen=True)
class ValidationGate:
    """The new shift (of its best epoch) on examples that it was not trained on.

    It must be better than the start by more than the standard error, and not worse than the current shift
    by more than that: on the examples that this was not trained on either, or where they are too few, by
    what its own gate found.
    """

    start: Comparison
    current: Comparison | None = None  # where training did not start with it
    recorded: float | None = None  # what the current one's gate found, where there is nothing to compare
    folds: int = 0
    anyway: bool = False  # the new one is taken even where it is no better

    @property
    def shown(self) -> Comparison:
        return self.current or self.start

    @property
    def before(self) -> float:
        """Mean nats a token."""
        return mean_loss(self.shown.before)

    @property
    def after(self) -> float:
        return mean_loss(self.shown.after)

    @property
    def accepted(self) -> bool:
        is_worse = self.current is not None and self.current.is_worse
        if self.recorded is not None:
            is_worse = self.after > self.recorded + self.start.error
        return self.anyway or (self.start.is_better and not is_worse)
