"""Several runs that differ in one thing: the paper's ablations, figures and seeds.

layers[=0,1,2]            one intervened block at a time; every block of the model by default
ranks[=4,16,32]           every pair of collective and personal rank
seeds[=0,1,2]
collective-users[=10,100] stage 1 on so few
examples[=5,10,25,50]     histories cut to their latest so many, and whole; one stage 1 for all
ablations                 stage 1 alone, stage 2 alone at the personal rank and at the sum of both
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from perfit_cloud.lamp.request import ABLATIONS, LampRequest
from perfit_cloud.lamp.results import Run
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.model.base import load_base
from perfit_shared.errors import InvalidInput
from perfit_shared.positions import Positions

__all__ = ["SWEEPS", "run_sweep", "sweep_requests"]

_RANKS, _SEEDS, _COLLECTIVE_USERS, _EXAMPLES = (4, 16, 32), (0, 1, 2), (10, 100), (5, 10, 25, 50)
SWEEPS = ("layers", "ranks", "seeds", "collective-users", "examples", "ablations")


def sweep_requests(request: LampRequest, sweep: str, *, blocks: int) -> list[LampRequest]:
    """The runs of "ranks=4,16" and the like, each in a folder of its own under OUT.

    Raises InvalidInput on an unknown sweep or values that are no numbers.
    """
    name, _, text = sweep.partition("=")
    if name not in SWEEPS or (name == "ablations" and text):
        raise InvalidInput(f'no sweep "{sweep[:40]}"; there are {", ".join(SWEEPS)}, as "ranks=4,16"')
    parts = text.split(",") if text else []
    if not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise InvalidInput(f'values of a sweep should be whole numbers, like "{name}=1,2"')
    own = {
        "layers": request.layers,
        "ranks": request.collective_rank or request.personal_rank,
        "seeds": request.seed,
        "collective-users": request.collective_users,
        "examples": request.examples,
        "ablations": request.ablation != "full",
    }
    if own[name]:
        raise InvalidInput(f"--sweep {name} says what is given by an option of its own too; leave one out")
    return list(_requests(request, name, [int(part) for part in parts], blocks))


def _requests(request: LampRequest, name: str, values: list[int], blocks: int) -> Iterator[LampRequest]:
    out = request.out
    if name == "layers":
        for layer in values or range(blocks):
            yield replace(request, layers=(layer,), out=out / f"layer-{layer}")
    elif name == "ranks":
        for collective in values or _RANKS:
            for personal in values or _RANKS:
                yield replace(
                    request,
                    collective_rank=collective,
                    personal_rank=personal,
                    out=out / f"ranks-{collective}-{personal}",
                )
    elif name == "seeds":
        for seed in values or _SEEDS:
            decoding = replace(request.decoding, seed=seed)
            yield replace(request, seed=seed, decoding=decoding, out=out / f"seed-{seed}")
    elif name == "collective-users":
        for count in values or _COLLECTIVE_USERS:
            yield replace(request, collective_users=count, out=out / f"collective-users-{count}")
    else:
        yield from _of_one_artefact(request, name, values)


def _of_one_artefact(request: LampRequest, name: str, values: list[int]) -> Iterator[LampRequest]:
    """The first run trains stage 1, if no artefact is given; the others take it from there."""
    later = replace(request, collective_users=None, collective_epochs=None, collective_learning_rate=None)
    if name == "examples":
        yield replace(request, out=request.out / "all")
        for count in values or _EXAMPLES:
            yield replace(later, examples=count, out=request.out / f"examples-{count}")
        return
    yield replace(request, out=request.out / "full")
    for ablation in ABLATIONS[1:]:
        artefact = None if ablation.startswith("stage2") else request.artefact
        yield replace(later, ablation=ablation, out=request.out / ablation, artefact=artefact)


def run_sweep(request: LampRequest, sweep: str, *, stop: Callable[[], bool] = lambda: False) -> list[Run]:
    """All runs of a sweep; finished ones are only read. Raises what run_lamp raises."""
    base = load_base(request.model, dtype=request.dtype, device=request.device)
    runs: list[Run] = []
    for each in sweep_requests(request, sweep, blocks=base.blocks):
        like = _like_first(each, sweep.partition("=")[0], runs[0] if runs else None)
        runs.append(run_lamp(like, base=base, task=runs[0].task if runs else None, stop=stop))
    return runs


def _like_first(each: LampRequest, sweep: str, first: Run | None) -> LampRequest:
    """What a run takes from the sweep's first: its shift, or spec and rate; a seed its rate."""
    if first is None:
        return each
    if sweep == "seeds":  # stage 1's rate is part of what a seed decides; stage 2's would blur them
        return replace(each, learning_rate=first.settings["learning_rate"])
    if sweep not in {"ablations", "examples"}:
        return each
    if each.ablation.startswith("stage2"):
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
    return replace(each, artefact=each.artefact or first.folder / "artefact")
