"""Communities for an artefact, within stage 1 or later: train the seeds, measure them, say so on the card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from perfit_cloud.collective.communities import FILE, LEAST_PEOPLE, CommunityTraining
from perfit_cloud.collective.community_card import HEADING, community_lines, listed
from perfit_cloud.collective.data import Corpus, read_items, tokenise
from perfit_cloud.collective.files import check_out, make_out
from perfit_cloud.collective.items import Items, first_users
from perfit_cloud.collective.personal import scores_by_start
from perfit_cloud.collective.progress import Progress
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.placement import ONE_DEVICE, Placement
from perfit_shared.errors import InvalidData, InvalidInput, ShiftMismatch
from perfit_shared.starts import LEAST_TO_CHOOSE, choose_start
from perfit_shared.types import Score
from perfit_shared.validation import mean_loss

__all__ = ["CommunitiesRequest", "add_communities", "with_communities"]

_EXAMPLES = 16  # latest of each person, at most
_KEEP_BYTES = 1 << 31  # of activations


@dataclass(frozen=True)
class CommunitiesRequest:
    """What an operator asks for."""

    artefact: Path
    data: Path  # that the artefact was trained on: a folder or a file
    model: str
    out: Path
    communities: int
    users: int | None = None  # learn from so many, drawn by the seed; all
    seed: int = 0  # that the artefact was trained with, so that the same people are held out
    examples: int = _EXAMPLES
    force: bool = False  # replace a finished artefact
    threads: int = 0
    dtype: str = "auto"
    device: str = "auto"
    placement: Placement = ONE_DEVICE  # over several devices, instead


def add_communities(
    request: CommunitiesRequest, *, base: BaseModel | None = None, stop: Callable[[], bool] = lambda: False
) -> Artefact:
    """Write the artefact with seeds of communities to `request.out`, or go on with an interrupted run.

    Raises as `train_collective`, and ShiftMismatch where the artefact is of another model.
    """
    check_out(request.out, force=request.force)
    if request.threads > 0:
        torch.set_num_threads(request.threads)
    artefact = replace(Artefact.load(request.artefact), communities=())
    if (artefact.card.get("privacy") or {}).get("mechanism") is not None:
        raise InvalidInput(
            f"{request.artefact} was trained with differential privacy, and communities are not: they would "
            "tell of its people beyond its epsilon"
        )
    card = _card(request.artefact, artefact.name)
    seed = (artefact.card.get("hyper_parameters") or {}).get("seed", request.seed)
    if seed != request.seed:
        raise InvalidInput(
            f"the artefact's people were drawn by seed {seed}; by another one they are not held out"
        )
    items = read_items(request.data, artefact.task)
    base = base or load_base(
        request.model, dtype=request.dtype, device=request.device, placement=request.placement
    )
    if base.fingerprint != artefact.fingerprint:
        raise ShiftMismatch(f"{request.artefact} was trained on another base model than {base.name}")
    total = artefact.card["data"]["users"] if _is_of(artefact, items) else len(items.users)
    if total < len(items.users):
        items = items.first_users(total, request.seed)
    # Whom the artefact holds out is drawn among all whom stage 1 read, before some of the rest are taken.
    corpus = tokenise(items, base=base, task=artefact.task, seed=request.seed)
    if request.users is not None:
        corpus = replace(corpus, train=first_users(corpus.train, request.users, request.seed))
    make_out(request.out)
    found = with_communities(
        artefact,
        corpus,
        base,
        request.communities,
        seed=request.seed,
        examples=request.examples,
        out=request.out,
        stop=stop,
    )
    (request.out / "CARD.md").write_text("\n".join([card, "", *community_lines(found.card)]) + "\n", "utf-8")
    found.save(request.out)
    (request.out / FILE).unlink(missing_ok=True)
    return found


def _is_of(artefact: Artefact, items: Items) -> bool:
    """Whether stage 1 read this file."""
    return (artefact.card.get("data") or {}).get("source") == items.source


def _card(folder: Path, name: str) -> str:
    """CARD.md without what earlier communities added. Raises InvalidData where it is no text."""
    page = folder / "CARD.md"
    if not page.is_file():
        return f"# {name}"
    try:
        return page.read_text("utf-8").split(f"\n{HEADING}")[0].rstrip()
    except UnicodeDecodeError as error:
        raise InvalidData(f"{page} is no text in UTF-8") from error


def with_communities(
    artefact: Artefact,
    corpus: Corpus,
    base: BaseModel,
    count: int,
    *,
    seed: int,
    out: Path,
    examples: int = _EXAMPLES,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Artefact:
    """The artefact with seeds of at most `count` communities. An unfinished run is kept in `out`."""
    people = [pairs[-examples:] for pairs in corpus.train.values()]
    progress = progress or Progress(0)
    engine = UpdateEngine(base, keep_bytes=_KEEP_BYTES)
    try:
        training = CommunityTraining(
            engine, artefact, people, count, seed=seed, out=out, progress=progress, stop=stop
        )
        progress.total += training.work
        found = training.run()
        artefact = replace(artefact, communities=found.seeds)
        held_out = _held_out(engine, artefact, list(corpus.validated.values()))
    finally:
        engine.close()
    told: dict[str, Any] = {
        "requested": count,
        "sizes": list(found.sizes),
        "least_people": LEAST_PEOPLE,
        "examples_a_person": examples,
        "held_out": held_out,
    }
    progress.say(f"{len(found.seeds)} communities of {listed(found.sizes)} people")
    return replace(artefact, card={**artefact.card, "communities": told})


def _held_out(
    engine: UpdateEngine, artefact: Artefact, people: Sequence[Sequence[Pair]]
) -> dict[str, Any] | None:
    """Of people who were not trained on: the loss on the newer half of their examples, by start.

    Each picks a start by the older half, as a device does. None where nobody has enough examples.
    """
    plain: list[Score] = []
    chosen: list[Score] = []
    picked = 0
    people = [pairs for pairs in people if len(pairs) >= 2 * LEAST_TO_CHOOSE]
    for pairs in people:
        scores = scores_by_start(engine, artefact, pairs)
        half = len(pairs) // 2
        start = choose_start([each[:half] for each in scores])
        plain += scores[0][half:]
        chosen += scores[start][half:]
        picked += start > 0
    if not people:
        return None
    return {
        "people": len(people),
        "picked_a_community": picked,
        "seed": round(mean_loss(plain), 5),
        "chosen": round(mean_loss(chosen), 5),
    }
