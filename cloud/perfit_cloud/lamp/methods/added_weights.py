"""Weights that a method adds to the frozen model, and the one loop that trains them.

The loss is that of the target tokens, on the pairs and by the schedule that PerFit trains on: AdamW,
linear warm-up and decay, gradients clipped together.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from perfit_cloud.collective.steps import rate_at
from perfit_cloud.engine.gradients.batch import (
    Pair,
    make_batch,
    most_pass_tokens,
    passes,
    target_log_likelihoods,
)
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import InvalidData, InvalidInput, UpdateFailed
from perfit_shared.optimizer import OptimizerConfig
from perfit_shared.positions import Positions
from perfit_shared.training import PaperSchedule, Schedule

__all__ = ["AddedWeights", "WeightTraining", "Weights", "check_whole", "mean_loss", "paper_schedule"]

Weights = Mapping[str, Tensor]  # float32 on the host, by name
_DECAY = 1e-2  # weight decay (the paper's)
_NOWHERE = Positions.parse("l1")  # nothing is shifted, so the positions do not matter


@dataclass(frozen=True, eq=False)
class AddedWeights:
    """A module tree over the base model's own tensors, with weights of one adapter added to it."""

    base: BaseModel  # its module tree holds the added weights too
    parameters: Mapping[str, nn.Parameter]  # the trained ones, float32; others that were added stay frozen
    dropouts: Sequence[nn.Module] = ()  # on while these train
    buffers: Mapping[str, Tensor] = field(default_factory=dict)  # not trained, but part of the state

    @property
    def count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def version(self) -> str:
        """Of what they are now, 16 hex digits."""
        return hashlib.sha256(safetensors.torch.save(self.read())).hexdigest()[:16]

    def read(self) -> dict[str, Tensor]:
        """A copy."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._all.items()}

    @torch.no_grad()
    def write(self, weights: Weights) -> None:
        """Overwrite all of them. Raises InvalidData unless names and shapes are this adapter's."""
        theirs, ours = ({n: tuple(t.shape) for n, t in each.items()} for each in (weights, self._all))
        if theirs != ours:
            raise InvalidData("these are the weights of another adapter")
        for name, tensor in self._all.items():
            tensor.copy_(weights[name])

    @property
    def _all(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.buffers}


def check_whole(base: BaseModel) -> None:
    """Raises InvalidInput where added weights would need a device for each block."""
    if base.is_split:
        raise InvalidInput("methods that add weights want the model on one device; leave out --device-map")


def paper_schedule(
    pairs: Sequence[Pair], *, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> PaperSchedule:
    """The paper's schedule over these pairs. Raises InvalidInput."""
    lengths = tuple(len(prompt) + len(target) for prompt, target in pairs)
    size = min(batch_size, len(pairs))
    return PaperSchedule(epochs, learning_rate, size, seed, len(pairs), lengths)


def mean_loss(base: BaseModel, pairs: Sequence[Pair]) -> float:
    """Mean nats over all target tokens."""
    with torch.no_grad():
        total = sum(float(loss) for loss in _pass_losses(base, pairs))
    return total / sum(len(target) for _, target in pairs)


class WeightTraining:
    """One training of added weights, step by step, from what they are now."""

    def __init__(
        self,
        added: AddedWeights,
        pairs: Sequence[Pair],
        schedule: Schedule,
        *,
        penalty: Callable[[], Tensor] | None = None,
        steps: int | None = None,
    ) -> None:
        """`penalty`: nats added to the mean loss of every step. `steps`: a trial takes only these."""
        self.added, self.schedule = added, schedule
        self.steps = schedule.steps if steps is None else steps
        self.losses: list[float] = []  # of every step, before it, without the penalty
        self.seconds = 0.0
        self._pairs, self._penalty = pairs, penalty
        self._parameters = list(added.parameters.values())
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            betas=(OptimizerConfig.beta1, OptimizerConfig.beta2),
            eps=OptimizerConfig.epsilon,
            weight_decay=_DECAY,
        )

    @property
    def done(self) -> bool:
        return len(self.losses) >= self.steps

    def run(self, stepped: Callable[[int], None]) -> None:
        """All steps that are left; `stepped` gets the examples of each, and may raise."""
        while not self.done:
            stepped(self.step())

    def step(self) -> int:
        """Take one, and return how many examples it took. Raises UpdateFailed on a loss that is no number."""
        began, index = time.monotonic(), len(self.losses)
        pairs = [self._pairs[i] for i in self.schedule.batch(index)]
        tokens = sum(len(target) for _, target in pairs)
        schedule = self.schedule
        rate = rate_at(index, self.steps, schedule.learning_rate, schedule=schedule.name)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        with self._trainable(index):
            for loss in _pass_losses(self.added.base, pairs):
                (loss / tokens).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            if self._penalty is not None:
                self._penalty().backward()  # type: ignore[no-untyped-call]
            if not math.isfinite(total):
                raise UpdateFailed(f"the loss is not a number after step {index}; try a lower learning rate")
            nn.utils.clip_grad_norm_(self._parameters, OptimizerConfig.clip)
            self._optimizer.step()
            self._optimizer.zero_grad()
        self.losses.append(total / tokens)
        self.seconds += time.monotonic() - began
        return len(pairs)

    @contextlib.contextmanager
    def _trainable(self, step: int) -> Iterator[None]:
        """Gradients and dropout, which draws from a generator of this step's own."""
        device = self.added.base.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.schedule.seed * self.schedule.steps + step)
            try:
                for module in self.added.dropouts:
                    module.train()
                for parameter in self._parameters:
                    parameter.requires_grad_()
                yield
            finally:
                for module in self.added.dropouts:
                    module.eval()
                for parameter in self._parameters:
                    parameter.requires_grad_(False)
                    parameter.grad = None

    # -- bytes ---------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All of it, exactly, to go on from."""
        file = io.BytesIO()
        state = {
            "schedule": asdict(self.schedule),
            "losses": self.losses,
            "seconds": self.seconds,
            "weights": self.added.read(),
            "optimizer": self._optimizer.state_dict(),
        }
        torch.save(state, file)
        return file.getvalue()

    def resume(self, data: bytes) -> bool:
        """Go on from there; false, with no change, where another schedule made it. Raises InvalidData."""
        try:
            state: dict[str, Any] = torch.load(io.BytesIO(data), weights_only=True)
            if state["schedule"] != asdict(self.schedule):
                return False
            self.added.write(state["weights"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.losses, self.seconds = list(state["losses"]), float(state["seconds"])
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, OSError) as error:
            raise InvalidData("not the state of a training") from error
        return True


def _pass_losses(base: BaseModel, pairs: Sequence[Pair]) -> Iterator[Tensor]:
    """−log p of all target tokens of each pass, nats."""
    for chunk in passes(pairs, base.capabilities.passes, most_pass_tokens(base.device)):
        batch = make_batch([pairs[i] for i in chunk], _NOWHERE, base.device)
        yield -target_log_likelihoods(base, batch, ()).sum()
