"""Several runs that differ in one thing: the paper's ablations, figures and seeds.

layers[=0,1,2]            one intervened block at a time; every block of the model by default (Table 11)
layer-counts[=1,2,4]      so many blocks, evenly spaced about the middle; powers of two, and all (Fig. 6)
ranks[=4,16,32]           every pair of collective and personal rank
seeds[=0,1,2]
collective-users[=10,100] stage 1 on so few (Table 14)
groups[=0,1,2,3,4]        stage 1 on disjoint groups of users of equal size (Table 15)
artefacts=DIR,DIR         on collective shifts that are there, of other tasks; the task's own first (Table 16)
examples[=5,10,25,50]     histories cut to their latest so many (0: none), and whole; one stage 1 for all
ablations                 stage 1 alone, stage 2 alone at the personal rank and at the sum of both
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from perfit_cloud.collective.items import GROUPS
from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.ray_workers import RayCluster
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import load_base
from perfit_shared.errors import InvalidInput
from perfit_shared.positions import Positions
from perfit_shared.presets import spaced_layers

__all__ = ["SWEEPS", "run_sweep", "sweep_requests"]

_ABLATIONS = ("perfit_stage1", "perfit_stage2", "perfit_stage2_sum")
_RANKS, _SEEDS, _COLLECTIVE_USERS, _EXAMPLES = (4, 16, 32), (0, 1, 2), (10, 100), (5, 10, 25, 50)
SWEEPS = (
    *("layers", "layer-counts", "ranks", "seeds", "collective-users", "groups"),
    *("examples", "ablations", "artefacts"),
)


def sweep_requests(request: LampRequest, sweep: str, *, blocks: int) -> list[LampRequest]:
    """The runs of "ranks=4,16" and the like, each in a folder of its own under OUT.

    Raises InvalidInput on an unknown sweep, values that are no numbers, and runs that would be equal.
    """
    name, _, text = sweep.partition("=")
    if name not in SWEEPS or (name == "ablations" and text):
        raise InvalidInput(f'no sweep "{sweep[:40]}"; there are {", ".join(SWEEPS)}, as "ranks=4,16"')
    parts = text.split(",") if text else []
    if name == "artefacts":
        return _on_artefacts(request, [Path(part.strip()) for part in parts if part.strip()])
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise InvalidInput(f'values of a sweep should be whole numbers, like "{name}=1,2"')
    own = {
        "layers": request.layers,
        "layer-counts": request.layers,
        "ranks": request.collective_rank or request.personal_rank,
        "seeds": request.seed,
        "collective-users": request.collective_users,
        "groups": request.collective_group is not None,
        "examples": request.examples is not None,
        "ablations": request.method != "perfit",
    }
    if own[name]:
        raise InvalidInput(f"--sweep {name} says what is given by an option of its own too; leave one out")
    made = list(_requests(request, name, [int(part) for part in parts], blocks))
    if len({replace(each.without_unused(), out=request.out) for each in made}) < len(made):
        raise InvalidInput(
            f"--sweep {sweep[:40]} makes equal runs: {request.method} does not use what differs"
        )
    return made


def _requests(request: LampRequest, name: str, values: list[int], blocks: int) -> Iterator[LampRequest]:
    if name in {"examples", "ablations"}:
        yield from _of_one_artefact(request, name, values)
    elif name == "ranks":
        for collective, personal in product(values or _RANKS, repeat=2):
            out = request.out / f"ranks-{collective}-{personal}"
            yield replace(request, collective_rank=collective, personal_rank=personal, out=out)
    else:
        for value in values or _defaults(name, blocks):
            folder, changes = _changes(request, name, value, blocks)
            yield replace(request, out=request.out / f"{folder}-{value}", **changes)


def _defaults(name: str, blocks: int) -> Sequence[int]:
    return {
        "layers": range(blocks),
        "layer-counts": sorted({*(2**power for power in range(blocks.bit_length())), blocks}),
        "seeds": _SEEDS,
        "groups": range(GROUPS),
        "collective-users": _COLLECTIVE_USERS,
    }[name]


def _changes(request: LampRequest, name: str, value: int, blocks: int) -> tuple[str, dict[str, Any]]:
    """How a run's folder begins, and what it changes."""
    if name == "layers":
        return "layer", {"layers": (value,)}
    if name == "layer-counts":
        return "layer-count", {"layers": spaced_layers(value, blocks)}
    if name == "seeds":
        return "seed", {"seed": value, "decoding": replace(request.decoding, seed=value)}
    if name == "groups":
        return "group", {"collective_group": value}
    return "collective-users", {"collective_users": value}


def _on_artefacts(request: LampRequest, folders: list[Path]) -> list[LampRequest]:
    """The task's own collective shift, given or trained, then those of `folders`."""
    if not folders:
        raise InvalidInput('name the folders of collective shifts, like "artefacts=runs/a/artefact,runs/b"')
    later = _without_stage_1(request)
    return [
        replace(request, out=request.out / "own"),
        *(
            replace(later, artefact=folder, out=request.out / f"{at}-{Artefact.load(folder).task.name}")
            for at, folder in enumerate(folders, 1)
        ),
    ]


def _without_stage_1(request: LampRequest) -> LampRequest:
    """For a run that is given its collective shift."""
    return replace(
        request,
        collective_users=None,
        collective_group=None,
        collective_epochs=None,
        collective_learning_rate=None,
    )


def _of_one_artefact(request: LampRequest, name: str, values: list[int]) -> Iterator[LampRequest]:
    """The first run trains stage 1, if no artefact is given; the others take it from there."""
    later = _without_stage_1(request)
    if name == "examples":
        yield replace(request, out=request.out / "all")
        for count in values or _EXAMPLES:
            yield replace(later, examples=count, out=request.out / f"examples-{count}")
        return
    yield replace(request, out=request.out / "full")
    for method in _ABLATIONS:
        artefact = request.artefact if "artefact" in METHODS[method].options else None
        out = request.out / method.removeprefix("perfit_")
        yield replace(later, method=method, out=out, artefact=artefact)


def run_sweep(
    request: LampRequest,
    sweep: str,
    *,
    stop: Callable[[], bool] = lambda: False,
    ray: RayCluster | None = None,
) -> list[Run]:
    """All runs of a sweep; finished ones are only read. Raises what run_lamp raises."""
    base = load_base(request.model, dtype=request.dtype, device=request.device, placement=request.placement)
    runs: list[Run] = []
    for each in sweep_requests(request, sweep, blocks=base.blocks):
        like = _like_first(each, sweep.partition("=")[0], runs[0] if runs else None)
        runs.append(run_lamp(like, base=base, task=runs[0].task if runs else None, stop=stop, ray=ray))
    return runs


def _like_first(each: LampRequest, sweep: str, first: Run | None) -> LampRequest:
    """What a run takes from the sweep's first: its shift, or spec and rate; a seed its rate.

    And what the untouched model answers, which a seed decides as well.
    """
    options = METHODS[each.method].options
    if first is not None and sweep != "seeds":
        each = replace(each, reuse=each.reuse or first.folder)
    if first is None or "learning_rate" not in options:
        return each
    if sweep == "seeds":  # stage 1's rate is part of what a seed decides; stage 2's would blur them
        return replace(each, learning_rate=first.settings["learning_rate"])
    if sweep not in {"ablations", "examples"}:
        return each
    if "artefact" in options:
        return replace(each, artefact=each.artefact or first.folder / "artefact")
    if "personal_rank" in options:
        full = first.settings
        return replace(
            each,
            layers=tuple(full["layers"]),
            positions=Positions.parse(full["positions"]).explicit(),
            collective_rank=full["collective_rank"],
            personal_rank=full["personal_rank"],
            learning_rate=full["learning_rate"],
            figures=(full["epochs"], full["batch_size"]),
        )
    return each
