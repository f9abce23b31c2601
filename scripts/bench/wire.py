"""What a personal shift costs on the wire, and what its rounding does to answers and updates.

    python scripts/bench/wire.py --json docs/results/bench/wire.json
    python scripts/bench/wire.py --run runs/lamp/news_headline/seeds/seed-0 \\
        --model ../shared/models/newslm --data ../shared/data/lamp_news/news_headline

First the bytes of real messages at Llama-2-7B's shapes: a Generate request with the preset of LaMP-2M
and a prompt of 300 characters, in every form, and one step of Adapt up and down; and the time to encode
and decode the largest shift, that of LaMP-2N, on one core.

With `--run`, a folder that `perfit-cloud lamp run` left: the held-out loss of all its users, with their
tensors as they were trained and as they arrive in each form, and after training again with every tensor
and every gradient rounded as updates send them. Differences are shares of the personal gain: what the
personal shift takes off the loss of the collective one; `furthest_user` is the largest change, up or
down, of any one user's loss, in nats a token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import common
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from perfit_device.cloud.codec import (
    ANSWER_DTYPE,
    LOSS_DTYPE,
    Artefact,
    ShiftUse,
    prompt_to_wire,
    sampling_to_wire,
    shift_to_wire,
)
from perfit_shared.presets import preset_for
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors, gradient_from_bytes, gradient_to_bytes
from perfit_shared.tasks import Task
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb

_FORMS = ("float32", "float16", "int8")
_BLOCKS, _WIDTH = 32, 4096  # of Llama-2-7B
_SMALL_WIDTH = 64
_QUERY_TASK, _LARGEST_TASK = "movie_tagging", "news_categorize"  # LaMP-2M, LaMP-2N
_PROMPT = ("Which of these tags fits the film best? " * 8)[:300]
_BATCH = 16  # rows of a step
_KEEP_BYTES = 4 << 30  # of activations, as `lamp run` keeps by default


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--run", type=Path, help="folder of a `perfit-cloud lamp run`")
    parser.add_argument("--model", help="the base model of that run")
    parser.add_argument("--data", type=Path, help="the task folder of that run")
    args = parser.parse_args()
    result = sizes(_SMALL_WIDTH if args.small else _WIDTH, rounds=2 if args.small else 15)
    if args.run is not None:
        result |= effect(args)
    common.finish(result, args.json)


# -- bytes and milliseconds ------------------------------------------------------------------------


def sizes(width: int, *, rounds: int) -> dict[str, Any]:
    asked = preset_for(_QUERY_TASK).spec(blocks=_BLOCKS, hidden_size=width)
    largest = preset_for(_LARGEST_TASK).spec(blocks=_BLOCKS, hidden_size=width)
    tensors = _shift(largest)
    rows = []
    for form in _FORMS:
        data = tensors.to_bytes(dtype=form)
        decode = lambda data=data: ShiftTensors.from_bytes(data, largest, largest.personal_rank)  # noqa: E731
        rows.append(
            {
                "form": form,
                "query_bytes": query(asked, form).ByteSize(),
                "step_bytes": step_bytes(asked, form),
                "encode_ms": _ms(lambda form=form: tensors.to_bytes(dtype=form), rounds),
                "decode_ms": _ms(decode, rounds),
            }
        )
    print(common.table(list(rows[0]), [list(row.values()) for row in rows]))
    by_form = {row["form"]: row for row in rows}
    return {
        "query_bytes": by_form[ANSWER_DTYPE]["query_bytes"],
        "step_bytes": by_form[LOSS_DTYPE]["step_bytes"],
        "forms": rows,
    }


def query(spec: ShiftSpec, form: str) -> pb.GenerateRequest:
    artefact = Artefact("movies", "0" * 16, spec, Task("movies", "{text}", " {tag}", "accuracy"), 1e-4, 4, 16)
    return pb.GenerateRequest(
        prompt=prompt_to_wire(_PROMPT),
        shift=shift_to_wire(ShiftUse(artefact, _shift(spec)), form),
        sampling=sampling_to_wire(Sampling(16)),
    )


def step_bytes(spec: ShiftSpec, form: str) -> int:
    """One step of Adapt, request and response together."""
    tensors = _shift(spec)
    step = pb.AdaptStep(personal=tensors.to_bytes(dtype=form), rows=range(_BATCH))
    gradient = gradient_to_bytes(tensors, "float32" if form == "float32" else "float16")
    response = pb.AdaptResponse(loss=1.0, tokens=100, gradient=gradient)
    return pb.AdaptRequest(step=step).ByteSize() + response.ByteSize()


def _shift(spec: ShiftSpec) -> ShiftTensors:
    """A shift of the spec's shapes, off the identity by as much as a trained one."""
    rng = np.random.default_rng(0)
    layers = {
        layer: LayerShift(
            shift.rotation,
            shift.source + np.float32(0.01) * rng.standard_normal(shift.source.shape, dtype=np.float32),
            shift.bias + np.float32(0.01),
        )
        for layer, shift in ShiftTensors.identity(spec, spec.personal_rank).layers.items()
    }
    return ShiftTensors(layers)


def _ms(call: Callable[[], object], rounds: int) -> float:
    """Median on one core."""
    times = []
    with threadpool_limits(1):
        for _ in range(rounds):
            begun = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begun))
    return median(times)


# -- what rounding does ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Losses:
    """Of held-out queries, by user."""

    sums: npt.NDArray[np.float64]  # nats
    tokens: npt.NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats a token, over all users' tokens."""
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def by_user(self) -> npt.NDArray[np.float64]:
        return self.sums / self.tokens


def effect(args: argparse.Namespace) -> dict[str, Any]:
    """Losses in nats a token over all users' held-out queries, by what happened to their tensors."""
    import tempfile

    from perfit_cloud.collective.encoding import Encoder
    from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
    from perfit_cloud.engine.gradients.stateless import GradientEngine
    from perfit_cloud.engine.interface import Gradient
    from perfit_cloud.engine.interface import ShiftUse as Use
    from perfit_cloud.lamp import stage2
    from perfit_cloud.lamp.people import Learner, Person, cohorts, read_people
    from perfit_cloud.lamp.results import UserFolder
    from perfit_cloud.model.artefacts import Artefact as Trained
    from perfit_cloud.model.base import load_base
    from perfit_shared.types import Mode

    base = load_base(args.model)
    artefact = Trained.load(args.run / "artefact")
    spec, rank = artefact.spec, artefact.spec.personal_rank
    people = read_people(args.data, artefact.task, base).people
    encoder = Encoder(base, artefact.task)
    was = json.loads((args.run / "settings.json").read_text("utf-8"))
    settings = stage2.Stage2Settings(**{each.name: was[each.name] for each in fields(stage2.Stage2Settings)})

    def arrived(tensors: ShiftTensors, form: str) -> ShiftTensors:
        return ShiftTensors.from_bytes(tensors.to_bytes(dtype=form), spec, rank)

    class OverTheWire(UpdateEngine):
        """Computes gradients of what arrives, and gives what arrives back."""

        def gradients(self, steps: Any) -> list[Gradient]:
            sent = [GradientRequest(s.session, s.rows, arrived(s.personal, LOSS_DTYPE)) for s in steps]
            return [
                Gradient(
                    g.loss, g.tokens, gradient_from_bytes(gradient_to_bytes(g.tensors, "float16"), spec, rank)
                )
                for g in super().gradients(sent)
            ]

    def trained_again() -> dict[str, ShiftTensors]:
        found: dict[str, ShiftTensors] = {}
        engine = OverTheWire(base, keep_bytes=_KEEP_BYTES)
        with tempfile.TemporaryDirectory() as folder:
            for number, cohort in enumerate(cohorts(people, was["users_together"])):
                learners = [Learner.of(person, encoder) for person in cohort]
                trainings = stage2.train(
                    engine,
                    learners,
                    artefact,
                    settings,
                    checkpoint=Path(folder) / str(number),
                    resumed=lambda examples: None,
                    progress=lambda examples, through: None,
                    stop=lambda: None,
                )
                found |= {p.user_id: t.tensors for p, t in zip(cohort, trainings, strict=True)}
                print(f"trained {len(found)} of {len(people)} users again", flush=True)
        engine.close()
        return found

    scorer = GradientEngine(base)

    def losses(use_of: Callable[[Person], Use]) -> Losses:
        scores = [
            scorer.score([encoder.query(q.item).pair for q in person.queries], use_of(person))
            for person in people
        ]
        return Losses(
            np.array([-sum(s.log_likelihood for s in of_one) for of_one in scores]),
            np.array([sum(s.tokens for s in of_one) for of_one in scores]),
        )

    def personal(tensors: dict[str, ShiftTensors]) -> Losses:
        return losses(lambda person: Use(Mode.PERSONAL, artefact, tensors[person.user_id]))

    trained = {
        person.user_id: ShiftTensors.from_bytes(
            UserFolder(args.run, person.user_id, "personal.safetensors").state_path.read_bytes(), spec, rank
        )
        for person in people
    }
    exact = personal(trained)
    gain = losses(lambda person: Use(Mode.COLLECTIVE, artefact)).mean - exact.mean
    found = {form: personal({u: arrived(t, form) for u, t in trained.items()}) for form in _FORMS[1:]}
    found["updates in float16"] = personal(trained_again())
    scorer.close()
    rows = [
        {
            "tensors": name,
            "loss": of.mean,
            "share_of_gain": (of.mean - exact.mean) / gain,
            "furthest_user": float(np.abs(of.by_user - exact.by_user).max()),
        }
        for name, of in {"as trained": exact, **found}.items()
    ]
    print(f"\n{len(people)} users of {args.data.name}, personal gain {gain:.5f} nats a token\n")
    shown = [
        [row["tensors"], f"{row['loss']:.5f}", f"{row['share_of_gain']:.3%}", f"{row['furthest_user']:.5f}"]
        for row in rows
    ]
    print(common.table(list(rows[0]), shown))
    return {"effect": {"users": len(people), "gain": gain, "rows": rows}}


if __name__ == "__main__":
    main()
