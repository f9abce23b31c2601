"""Personal training in this process, with gradients of the engine that serves devices.

The research pipeline trains many people with it, and the trials of learning rates one after another. Whoever
measures which start suits somebody scores their examples here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import Request, S, Training, train
from perfit_shared.types import Score

__all__ = ["mean_loss", "scores_by_start", "train_people"]


def scores_by_start(engine: UpdateEngine, artefact: Artefact, pairs: Sequence[Pair]) -> list[list[Score]]:
    """Of every start of the artefact: the scores of these examples."""
    with engine.open(pairs, artefact) as opened:
        rows = range(len(pairs))
        return engine.scores([GradientRequest(opened, rows, start) for start in artefact.starts])


def mean_loss(
    engine: UpdateEngine, artefact: Artefact, pairs: Sequence[Pair], personal: ShiftTensors
) -> float:
    """Nats a target token under this personal shift."""
    with engine.open(pairs, artefact) as opened:
        ((loss, _tokens),) = engine.losses([GradientRequest(opened, range(len(pairs)), personal)])
    return loss


def train_people(
    engine: UpdateEngine,
    artefact: Artefact,
    histories: Sequence[Sequence[Pair]],
    trainings: list[Training[S]],
) -> Iterator[list[int]]:
    """`train`, one pass for the steps of all people.

    A history holds the examples of its schedule, and those that are held out behind them.
    """
    with ExitStack() as stack:
        opened = {
            i: stack.enter_context(engine.open(histories[i], artefact))
            for i, training in enumerate(trainings)
            if not training.done or training.at_judgement
        }

        def asked(requests: Sequence[Request]) -> list[GradientRequest]:
            return [GradientRequest(opened[owner], rows, tensors) for owner, rows, tensors in requests]

        def gradients(requests: Sequence[Request]) -> Callable[[], list[tuple[float, ShiftTensors]]]:
            return lambda: [(found.loss, found.tensors) for found in engine.gradients(asked(requests))]

        def losses(requests: Sequence[Request]) -> Callable[[], list[list[Score]]]:
            return lambda: engine.scores(asked(requests))

        yield from train(trainings, gradients=gradients, losses=losses)
