"""pyreft itself runs our checkpoints to our logits, and we read what it trained."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.models import random_shift
from tests.support.pyreft import same_states, states

from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.interventions import ShiftGroup, active_interventions, hooked, row_index, to_torch
from perfit_cloud.model.pyreft import read_checkpoint, write_checkpoint
from perfit_shared.positions import Positions
from perfit_shared.shifts import ShiftSpec, ShiftTensors

ROOT = Path(__file__).resolve().parents[2]
PEER = ROOT / ".peers" / "pyreft" / "bin" / "python"


def peer(*words: str | Path) -> None:
    if not PEER.is_file():
        pytest.skip("no environment with pyreft; `make peers` builds it")
    script = ROOT / "scripts" / "peers" / "run_pyreft.py"
    subprocess.run([str(PEER), "-W", "ignore", str(script), *map(str, words)], check=True)


def questions(base: BaseModel, positions: str, path: Path) -> list[list[int]]:
    """Prompts of 2 to 40 tokens, written with their locations for pyreft."""
    rng = np.random.default_rng(3)
    vocabulary = base.model.config.vocab_size
    prompts = [rng.integers(3, vocabulary, length).tolist() for length in (2, 5, 9, 17, 40)]
    locations = [Positions.parse(positions).indices(len(prompt)) for prompt in prompts]
    path.write_text(json.dumps({"prompts": prompts, "locations": locations}))
    return prompts


def our_logits(
    base: BaseModel, prompt: list[int], positions: str, shifts: tuple[ShiftTensors, ...]
) -> np.ndarray:
    groups = []
    if shifts:
        index, valid = row_index([Positions.parse(positions).indices(len(prompt))], base.device)
        first, *rest = (to_torch(shift, base.device) for shift in shifts)
        groups = [ShiftGroup(index, valid, first, rest[0] if rest else None)]
    with torch.no_grad(), hooked(base.model, range(base.blocks)), active_interventions(groups):
        return base.model(torch.tensor([prompt])).logits[0].float().numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", pytest.param("newslm", marks=pytest.mark.brief)])
def test_pyreft_gives_our_logits(
    name: str, tmp_path: Path, model_folder: Callable[[str], Path], brief: Path
) -> None:
    folder = brief / "models" / name if name == "newslm" else model_folder(name)
    base = load_base(str(folder), dtype="float32")
    spec = ShiftSpec((1, 2), "f7+l7", 6, 3, base.hidden_size)
    pair = (random_shift(spec, 6, seed=1, size=0.1), random_shift(spec, 3, seed=2, size=0.1))
    prompts = questions(base, spec.positions, tmp_path / "input.json")
    seen = []
    for shifts in ((), pair[:1], pair):
        flags: list[str | Path] = []
        if shifts:
            checkpoint = tmp_path / f"checkpoint{len(shifts)}"
            checkpoint.mkdir()
            write_checkpoint(checkpoint, shifts)
            flags = ["--checkpoint", checkpoint]
        out = tmp_path / f"{len(shifts)}.npz"
        peer("logits", "--model", folder, *flags, "--input", tmp_path / "input.json", "--out", out)
        theirs = dict(np.load(out))
        seen.append(theirs)
        for i, prompt in enumerate(prompts):
            ours = our_logits(base, prompt, spec.positions, shifts)
            assert np.abs(ours - theirs[str(i)]).max() < 1e-4, (len(shifts), len(prompt))
    # The shifts do something, each of them, and their order matters.
    swapped = our_logits(base, prompts[-1], spec.positions, pair[::-1])
    assert np.abs(swapped - seen[-1][str(len(prompts) - 1)]).max() > 1e-2
    for before, after in pairwise(seen):
        assert all(np.abs(before[i] - after[i]).max() > 1e-2 for i in before)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_that_pyreft_trained(
    dtype: str, tmp_path: Path, load: Callable[[str], BaseModel], model_folder: Callable[[str], Path]
) -> None:
    folder, base, trained = model_folder("llama"), load("llama"), tmp_path / "trained"
    prompts = questions(base, "f7+l7", tmp_path / "input.json")
    peer(
        "train",
        "--model",
        folder,
        "--input",
        tmp_path / "input.json",
        "--out",
        trained,
        "--layers",
        "1",
        "2",
        "--ranks",
        "6",
        "3",
        "--dtype",
        dtype,
    )
    read = read_checkpoint(trained)
    assert (read.ranks, read.mended) == ((6, 3), 0.0)
    again = tmp_path / "again"
    again.mkdir()
    write_checkpoint(again, read.shifts)
    if dtype == "float32":
        assert same_states(trained, again)
        assert json.loads((trained / "config.json").read_text()) == json.loads(
            (again / "config.json").read_text()
        )
    else:  # values are, dtypes are not: ours are always float32
        old, new = states(trained), states(again)
        assert all(torch.equal(old[name][key].float(), new[name][key]) for name in old for key in old[name])
    peer(
        "logits",
        "--model",
        folder,
        "--checkpoint",
        trained,
        "--input",
        tmp_path / "input.json",
        "--out",
        tmp_path / "theirs.npz",
    )
    theirs = dict(np.load(tmp_path / "theirs.npz"))
    for i, prompt in enumerate(prompts):
        assert np.abs(our_logits(base, prompt, "f7+l7", read.shifts) - theirs[str(i)]).max() < 1e-4
