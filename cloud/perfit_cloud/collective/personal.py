"""Personal training in this process, with gradients of the engine that serves devices.

The research pipeline trains many people with it, and the trials of learning rates one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack

from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import S, Training, train

__all__ = ["train_people"]


def train_people(
    engine: UpdateEngine,
    artefact: Artefact,
    histories: Sequence[Sequence[Pair]],
    trainings: list[Training[S]],
) -> Iterator[list[int]]:
    """`train`, one pass for the steps of all people.

    What a history holds behind the examples of its schedule is held out: epochs are judged on it.
    """
    judges = any(len(h) > t.schedule.examples for h, t in zip(histories, trainings, strict=True))
    with ExitStack() as stack:
        opened = {
            i: stack.enter_context(engine.open(histories[i], artefact))
            for i, training in enumerate(trainings)
            if not training.done or (judges and training.at_epoch_end)
        }

        def gradients(pending: Mapping[int, Training[S]]) -> Callable[[], list[tuple[float, ShiftTensors]]]:
            steps = [GradientRequest(opened[i], each.rows, each.tensors) for i, each in pending.items()]
            return lambda: [(found.loss, found.tensors) for found in engine.gradients(steps)]

        def losses(pending: Mapping[int, Training[S]]) -> Callable[[], list[float]]:
            steps = [
                GradientRequest(opened[i], range(each.schedule.examples, len(histories[i])), each.tensors)
                for i, each in pending.items()
            ]
            return lambda: [loss for loss, _tokens in engine.losses(steps)]

        yield from train(trainings, gradients=gradients, losses=losses if judges else None)
