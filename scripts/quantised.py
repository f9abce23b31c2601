"""What a quantised base loses, with shifts trained on the base as it is, and on the quantised one.

    python scripts/quantised.py --model smollm2 --artefact cloud/perfit_cloud/artefacts/commit_message \\
        --data ../shared/data/commits --out runs/quantised
    python scripts/quantised.py … --out runs/quantised --table

The weights of every linear layer in the blocks are rounded to what a format can hold, and the model
computes with the rounded ones as before: GGUF's Q8_0 and Q4_0 by llama.cpp's own package; fp8 (e4m3, one
scale for a row, as compressed-tensors and vLLM keep it); int4 (a scale and a least value for each 64 weights,
to the nearest), the format of AWQ and GPTQ without the calibration by which those lose less. The collective
shift and the seed are those of the artefact. People, history and queries are those of `lamp run`; a shift is
trained by the paper's schedule. OUT gets a line for each person and base (`lines.jsonl`), figures only, and
the shifts that were trained on the base as it is, so that an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from scipy.stats import wilcoxon

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.collective.personal import train_people
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.lamp.people import Learner, Person, read_people
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_shared.shifts import ShiftTensors
from perfit_shared.training import PaperSchedule, Training, schedule_for
from perfit_shared.validation import mean_loss

_CACHE = 2 << 30  # bytes
_LINES = "lines.jsonl"
_PLAIN = "as it is"
_GROUP = 64  # weights
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
Weights = torch.Tensor  # float32 (outputs, inputs)


def as_gguf(kind: str) -> Callable[[Weights], Weights]:
    quant = gguf.GGMLQuantizationType[kind]
    return lambda w: torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(w.numpy(), quant), quant))


def as_fp8(weights: Weights) -> Weights:
    scale = weights.abs().amax(1, keepdim=True).clamp(min=1e-12) / _LARGEST
    return (weights / scale).to(torch.float8_e4m3fn).float() * scale


def as_int4(weights: Weights) -> Weights:
    groups = weights.view(len(weights), -1, _GROUP)
    least = groups.amin(2, keepdim=True)
    scale = (groups.amax(2, keepdim=True) - least).clamp(min=1e-12) / 15
    return (((groups - least) / scale).round() * scale + least).view_as(weights)


_KINDS: dict[str, Callable[[Weights], Weights] | None] = {
    _PLAIN: None,
    "Q8_0": as_gguf("Q8_0"),
    "fp8": as_fp8,
    "int4": as_int4,
    "Q4_0": as_gguf("Q4_0"),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--artefact", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with a user_top_100_history.json")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--people", type=int, default=12)
    parser.add_argument("--examples", type=int, help="latest of each history [default: all]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print what OUT holds; measure nothing")
    return parser.parse_args()


def quantised(given: argparse.Namespace, kind: str) -> BaseModel:
    """The base whose blocks hold what this kind can hold; embeddings, head and norms stay as they are."""
    base = load_base(given.model)
    if quantise := _KINDS[kind]:
        head = base.model.get_output_embeddings()
        for layer in base.model.modules():
            if isinstance(layer, torch.nn.Linear) and layer is not head:
                layer.weight.data.copy_(quantise(layer.weight.data.float()))
    return base


class Measure:
    """Everybody's losses on one base."""

    def __init__(self, given: argparse.Namespace, kind: str) -> None:
        self._given, self._kind = given, kind
        base = quantised(given, kind)
        self._artefact = artefact = Artefact.load(given.artefact)
        spec = artefact.spec
        none = ShiftTensors.identity(spec, spec.collective_rank, seed=0)
        self._untouched = replace(artefact, collective=none)
        self._engine = UpdateEngine(base, keep_bytes=_CACHE)
        self._encoder = Encoder(base, artefact.task)
        self.people = read_people(
            given.data, artefact.task, base, users=given.people, examples=given.examples
        ).people

    def of(self, index: int, person: Person) -> dict[str, Any]:
        artefact, plain = self._artefact, self._given.out / f"{index}.safetensors"
        rank = artefact.spec.personal_rank
        identity = ShiftTensors.identity(artefact.spec, rank, seed=0)
        own = self._trained(person)
        if self._kind == _PLAIN:
            plain.write_bytes(own.to_bytes())
        ported = ShiftTensors.from_bytes(plain.read_bytes(), artefact.spec, rank)
        return {
            "untouched": self._loss(person, self._untouched, identity),
            "collective": self._loss(person, artefact, identity),
            "seed": self._loss(person, artefact, artefact.seed),
            "trained as it is": self._loss(person, artefact, ported),
            "trained on it": self._loss(person, artefact, own),
        }

    def _trained(self, person: Person) -> ShiftTensors:
        learner = Learner.of(person, self._encoder)
        figures = self._artefact
        schedule = schedule_for("paper", figures, len(learner.history), lengths=learner.lengths)
        trainings: list[Training[PaperSchedule]] = [Training.start(schedule, figures.seed)]
        for _ in train_people(self._engine, self._artefact, [learner.history], trainings):
            pass
        return trainings[0].tensors

    def _loss(self, person: Person, artefact: Artefact, tensors: ShiftTensors) -> float:
        queries = [self._encoder.query(query.item).pair for query in person.queries]
        with self._engine.open(queries, artefact) as opened:
            (scores,) = self._engine.scores([GradientRequest(opened, range(len(queries)), tensors)])
        return round(mean_loss(scores), 5)


def read(given: argparse.Namespace) -> list[dict[str, Any]]:
    path = given.out / _LINES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A row a base: means over people, and Wilcoxon's signed ranks of what a shift loses by being moved."""
    modes = ["untouched", "collective", "seed", "trained as it is", "trained on it"]
    yield f"| base | people | {' | '.join(modes)} | moved over trained on it | better, worse | p |"
    yield "|---" * (len(modes) + 5) + "|"
    for kind in _KINDS:
        its = [line["loss"] for line in lines if line["base"] == kind]
        if its:
            means = " | ".join(f"{np.mean([each[mode] for each in its]):.3f}" for mode in modes)
            gaps = np.array([each["trained as it is"] - each["trained on it"] for each in its])
            p = f"{wilcoxon(gaps).pvalue:.2g}" if gaps.any() else "–"
            yield (
                f"| {kind} | {len(its)} | {means} | {gaps.mean():+.4f} | {(gaps < 0).sum()}, "
                f"{(gaps > 0).sum()} | {p} |"
            )


def main() -> None:
    given = arguments()
    torch.set_num_threads(given.threads)
    if not given.table:
        given.out.mkdir(parents=True, exist_ok=True)
        done = {(line["base"], line["person"]) for line in read(given)}
        for kind in _KINDS:
            if {(kind, index) for index in range(given.people)} <= done:
                continue
            measure = Measure(given, kind)
            for index, person in enumerate(measure.people):
                if (kind, index) not in done:
                    line = {"base": kind, "person": index, "loss": measure.of(index, person)}
                    with (given.out / _LINES).open("a") as file:
                        file.write(json.dumps(line) + "\n")
    print(*table(read(given)), sep="\n")


if __name__ == "__main__":
    main()
