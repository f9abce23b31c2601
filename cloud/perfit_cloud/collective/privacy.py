"""Stage 1 with differential privacy by person (DP-SGD, Abadi et al. 2016; by person, McMahan et al. 2018).

Each step draws every person independently (Poisson sampling at rate q). It clips each drawn person's
gradient g of their mean loss over all trained tensors, and follows

    (Σ g · min(1, C / ‖g‖) + N(0, σ²C² I)) / (q · people)

so no person can move the sum by more than C, whatever they wrote. What is trained is W and b of φ₁ and
of the seed; R stays as drawn at random from the public seed. The accountant of `dp-accounting` (privacy
loss distributions) says what ε all steps together cost for a δ, one person more or less. Everything
else comes from public examples: rates, the step that is taken, the losses on the card.

What it does not cover: that the number of people is known, and floating-point noise being no true
Gaussian (Mironov 2012).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.steps import Losses
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.model.interventions import Shift
from perfit_shared.errors import ConfigError, InvalidInput

__all__ = ["Budget", "Privacy", "PrivateSteps", "clip", "draw", "epsilon_spent", "noise_for"]

_DELTA_SHARE = 0.1  # of 1 / people, where no δ is given
_STEPS_AN_EPOCH = 10  # default, without an expected number of people a step
_MOST_EXAMPLES = 16  # of one person in one step
_MOST_EPSILON = 100.0
_NOISE_STEP = 1e-3  # of σ, relative
_DISCRETIZATION = 4e-3  # of privacy losses; rounded up, which costs under 0.5 % of σ


@dataclass(frozen=True)
class Budget:
    """The operator's privacy budget. Raises InvalidInput on values that promise nothing."""

    epsilon: float
    delta: float | None = None  # below 1 / people; a tenth of that
    clip_norm: float = 1.0  # C: largest norm of one person's gradient
    people_per_step: int | None = None  # expected; a tenth of all

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= _MOST_EPSILON:
            raise InvalidInput(
                f"epsilon should be above 0 and at most {_MOST_EPSILON:g}, where it promises little"
            )
        if self.delta is not None and not 0 < self.delta < 1:
            raise InvalidInput("delta should lie between 0 and 1, and below 1 / people")
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise InvalidInput("the clip norm should be above 0")
        if self.people_per_step is not None and self.people_per_step < 1:
            raise InvalidInput("people per step should be at least 1")

    def privacy(self, *, people: int, epochs: int) -> Privacy:
        """The mechanism that keeps to it. Everybody is expected once in each of the `epochs`.

        Raises InvalidInput where δ promises nothing, ConfigError without dp-accounting.
        """
        delta = _DELTA_SHARE / people if self.delta is None else self.delta
        if delta >= 1 / people:
            raise InvalidInput(
                f"a delta of {delta:g} allows publishing one of {people} people; it should be below "
                f"{1 / people:.2g}"
            )
        per_step = self.people_per_step or max(1, round(people / _STEPS_AN_EPOCH))
        rate = min(1.0, per_step / people)
        steps = epochs * math.ceil(1 / rate)
        noise = noise_for(self.epsilon, delta, rate=rate, steps=steps)
        return Privacy(self.epsilon, delta, self.clip_norm, people, rate, steps, noise)


@dataclass(frozen=True)
class Privacy:
    """A promise and the mechanism that keeps it."""

    epsilon: float
    delta: float
    clip_norm: float  # C
    people: int
    sampling_rate: float  # q
    steps: int
    noise_multiplier: float  # σ

    @property
    def expected(self) -> float:
        """People a step, on average."""
        return self.sampling_rate * self.people

    def to_json(self) -> dict[str, Any]:
        """For the card; what was promised, and what the steps cost by the accountant."""
        spent = epsilon_spent(self.noise_multiplier, self.delta, rate=self.sampling_rate, steps=self.steps)
        return asdict(self) | {
            "unit": "person, added or removed",
            "epsilon_spent": spent,
            "trained": "W and b of φ₁ and the seed; R drawn at random from the public seed",
            "accountant": "dp-accounting, PLD, Poisson-sampled Gaussian",
        }


# -- accounting --------------------------------------------------------------------------------------


def epsilon_spent(noise_multiplier: float, delta: float, *, rate: float, steps: int) -> float:
    """ε of `steps` Gaussian mechanisms on Poisson samples at `rate`. Raises ConfigError."""
    accountant = _accountant()
    accountant.compose(_event(noise_multiplier, rate, steps))
    return float(accountant.get_epsilon(delta))


@functools.lru_cache(maxsize=64)  # seconds each, and a run that goes on asks again
def noise_for(epsilon: float, delta: float, *, rate: float, steps: int) -> float:
    """The least σ that keeps to (ε, δ). Raises ConfigError."""
    accounting, _ = _library()

    def spends(noise: float) -> bool:
        return epsilon_spent(noise, delta, rate=rate, steps=steps) > epsilon

    least = 1.0  # by halves and doubles: the account of far too little noise would take minutes
    while spends(2 * least):
        least *= 2
    while not spends(least):
        least /= 2
    return float(
        accounting.calibrate_dp_mechanism(
            _accountant,
            lambda noise: _event(noise, rate, steps),
            epsilon,
            delta,
            accounting.ExplicitBracketInterval(least, 2 * least),
            tol=_NOISE_STEP * least,
        )
    )


def _event(noise_multiplier: float, rate: float, steps: int) -> Any:
    accounting, _ = _library()
    step = accounting.PoissonSampledDpEvent(rate, accounting.GaussianDpEvent(noise_multiplier))
    return accounting.SelfComposedDpEvent(step, steps)


def _accountant() -> Any:
    _, pld = _library()
    return pld.PLDAccountant(value_discretization_interval=_DISCRETIZATION)


def _library() -> tuple[Any, Any]:
    try:
        import dp_accounting
        from dp_accounting import pld
    except ImportError as error:
        raise ConfigError(
            "differential privacy needs dp-accounting; pip install 'perfit[research]'"
        ) from error
    return dp_accounting, pld


# -- steps -------------------------------------------------------------------------------------------


def draw(names: Sequence[str], rate: float, rng: np.random.Generator) -> list[str]:
    """Each of `names` with probability `rate`, independently: perhaps nobody."""
    return [name for name, coin in zip(names, rng.random(len(names)), strict=True) if coin < rate]


def clip(gradients: Sequence[Tensor], norm: float) -> list[Tensor]:
    """The gradients scaled down together so that their global norm is at most `norm`.

    One that is no number counts for nothing: its person may not spoil the sum.
    """
    length = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    if not math.isfinite(length):
        return [torch.zeros_like(g) for g in gradients]
    # The product of a rounded scale may come out a hair longer than `norm`.
    scale = 1.0 if length <= norm else norm / length * (1 - 1e-6)
    return [g * scale for g in gradients]


class PrivateSteps:
    """Takes the steps of a private run; `people` are everybody's training pairs."""

    def __init__(
        self,
        losses: Losses,
        people: Mapping[str, Sequence[Pair]],
        privacy: Privacy,
        *,
        rng: np.random.Generator | None = None,
    ) -> None:
        """`rng`: for tests. Who is drawn and the noise come from the system's entropy otherwise, never from
        the run's seed: the card shows it, and noise that can be drawn again protects nobody.
        """
        self._losses, self._people, self._privacy = losses, people, privacy
        self._rng = rng or np.random.default_rng()

    def step(self, *, collective: Shift, personal: Shift, optimizer: StiefelAdam, rate: float) -> int:
        """One step; returns how many examples it ran, which must not be published."""
        sums = [torch.zeros_like(g) for g in optimizer.gradients()]
        examples = 0
        for name in draw(list(self._people), self._privacy.sampling_rate, self._rng):
            pairs = self._some(self._people[name])
            examples += len(pairs)
            self._losses.backward(pairs, collective=collective, personal=personal)
            gradients = optimizer.gradients()
            for total, mine in zip(sums, clip(gradients, self._privacy.clip_norm), strict=True):
                total.add_(mine)
            for gradient in gradients:
                gradient.zero_()
        for gradient, noised in zip(optimizer.gradients(), self.noised_mean(sums), strict=True):
            gradient.copy_(noised)
        optimizer.step(rate)
        return examples

    def noised_mean(self, sums: Sequence[Tensor]) -> list[Tensor]:
        """Sums of clipped gradients, each number with noise of deviation σC, over the people expected."""
        deviation = self._privacy.noise_multiplier * self._privacy.clip_norm
        return [
            (total + torch.from_numpy(self._rng.normal(0.0, deviation, tuple(total.shape))).to(total))
            / self._privacy.expected
            for total in sums
        ]

    def _some(self, pairs: Sequence[Pair]) -> list[Pair]:
        if len(pairs) <= _MOST_EXAMPLES:
            return list(pairs)
        return [pairs[i] for i in self._rng.choice(len(pairs), _MOST_EXAMPLES, replace=False)]
