"""Stage 1 over several processes, micro-batches and recomputed activations: the same steps."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import two_processes
from tests.support.collective import small_request
from tests.support.waiting import wait_for

from perfit_cloud.collective.checkpoint import FILE
from perfit_cloud.collective.data import read_items, tokenise
from perfit_cloud.collective.forward import Forward, forward_for
from perfit_cloud.collective.optimizer import StiefelAdam
from perfit_cloud.collective.processes import Processes
from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_cloud.collective.steps import Losses, trainable
from perfit_cloud.engine.gradients.batch import Pair
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import Cancelled, InvalidInput
from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.tasks import load_task

WORDS = ("cat", "dog", "mat", "door")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight users whose headline depends on the first word, so that something can be learned."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("toy") / "news"
    folder.mkdir()
    lines = []
    for user in range(8):
        for _ in range(16):
            words = rng.choice(WORDS, rng.integers(3, 10)).tolist()
            lines.append({"user_id": str(user), "text": " ".join(words), "title": f"the {words[0]} sat"})
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "task.json").write_text(json.dumps({"template": "{text} so", "answer": " {title}"}))
    return folder


@pytest.fixture
def request_for(
    toy: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> Callable[..., CollectiveRequest]:
    def make(**changes: Any) -> CollectiveRequest:
        given = {"data": toy / "items.jsonl", "model": str(model_folder("llama")), "out": tmp_path / "out"}
        return small_request(**{**given, **changes})

    return make


def distance(a: Artefact, b: Artefact) -> float:
    """The largest difference between two numbers of the artefacts' shifts."""
    return max(
        float(np.abs(x - y).max())
        for ours, theirs in ((a.collective, b.collective), (a.seed, b.seed))
        for layer in ours.layers
        for x, y in zip(ours.layers[layer], theirs.layers[layer], strict=True)
    )


# -- processes ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def launched(*command: str, precision: str = "no") -> Iterator[subprocess.Popen[str]]:
    """Two processes by accelerate's launcher, which on CPUs starts several only if told of several GPUs."""
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        "1",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "--mixed_precision",
        precision,
        "--dynamo_backend",
        "no",
    ]
    process = subprocess.Popen(
        [*launcher, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    try:
        yield process
    finally:
        process.terminate()  # the launcher ends its processes, those that hang after half a minute
        process.communicate()


@pytest.mark.slow  # half a minute of both cores; the quick ones spread batches over processes in this one
def test_two_processes_train_what_one_does(request_for: Any, tmp_path: Path) -> None:
    request = request_for(learning_rate=None, device_learning_rate=None, out=tmp_path / "one")
    with launched(two_processes.__file__, str(request.data), request.model, str(tmp_path)) as process:
        one = train_collective(request)
        _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second  # both ended with the same bits, and stopped after the same step
    assert "the same command goes on" in first["message"] and "--force" in first["refusal"]
    assert first["parts"] == first["whole"]  # and going on changed none of them
    # Two finished runs, each reported by one process.
    assert len(re.findall(r"step (\d+) of \1: validation loss", err)) == 2

    two = Artefact.load(tmp_path / "whole")
    assert two.version == first["whole"]
    assert two.card["hyper_parameters"]["processes"] == 2
    assert two.learning_rate == one.learning_rate
    # Float32 sums in another order; measured 1.3e-6, where the shifts have moved by more than 0.1.
    assert distance(one, two) < 2e-5
    moved = ShiftTensors.identity(one.spec, 4, 0)
    assert float(np.abs(one.collective.layers[1].source - moved.layers[1].source).max()) > 0.1
    for key in ("validation_curve", "train_last"):
        np.testing.assert_allclose(two.card["losses"][key], one.card["losses"][key], rtol=1e-4)
    for ours, theirs in zip(two.card["trials"], one.card["trials"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow  # the quick one: Ctrl-C in test_collective
def test_ctrl_c_and_precision_reach_the_processes_of_a_launched_command(
    request_for: Any, tmp_path: Path
) -> None:
    request = request_for()
    command = Path(sys.executable).with_name("perfit-cloud")
    arguments = [
        "collective",
        "train",
        "--task",
        request.task,
        "--data",
        str(request.data),
        "--model",
        request.model,
        "--layers",
        "1;2",
        "--lr",
        "1e-2",
        "--device-lr",
        "1e-2",
        "--epochs",
        "500",
        "--threads",
        "1",
        "--out",
        str(request.out),
    ]
    with launched(str(command), *arguments, precision="bf16") as process:
        wait_for((request.out / FILE).exists, seconds=120, what="the end of the first epoch")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert out == ""
    assert err.count("the same command goes on from there") == 1
    saved = json.loads(torch.load(request.out / FILE, weights_only=True)["arguments"])
    assert saved["dtype"] == "torch.bfloat16"  # as accelerate was told


# -- what changes memory, not steps ------------------------------------------------------------------


@pytest.fixture
def pairs(toy: Path, load: Callable[[str], BaseModel]) -> list[Pair]:
    task = load_task(toy, "news_headline")
    corpus = tokenise(read_items(toy / "items.jsonl", task), base=load("llama"), task=task, seed=0)
    return corpus.examples()[:12]


SPEC = ((1, 2), "f2+l2", 4, 4)


def gradients(
    forward: Forward, hidden_size: int, pairs: list[Pair], accumulate: int = 1
) -> list[torch.Tensor]:
    """Of all tensors of both shifts, off the identity: what a step on these pairs starts from."""
    spec = ShiftSpec(*SPEC, hidden_size)
    collective, personal = (
        trainable(ShiftTensors.identity(spec, 4, seed), torch.device("cpu")) for seed in (0, 1)
    )
    optimizer = StiefelAdam([collective, personal])
    seen: list[torch.Tensor] = []
    step = optimizer.step

    def watched(rate: float) -> float:
        seen.extend(g.clone() for g in optimizer.gradients())
        return step(rate)

    optimizer.step = watched  # type: ignore[method-assign]
    losses = Losses(forward, processes=Processes(), accumulate=accumulate)
    for _ in range(2):  # of the second step, since rotations have no gradient at the identity
        seen.clear()
        losses.step(pairs, collective=collective, personal=personal, optimizer=optimizer, rate=1e-2)
    return seen


@contextlib.contextmanager
def calls_of(model: Any, block: int) -> Iterator[list[None]]:
    """A list that grows by one whenever this block's attention runs."""
    calls: list[None] = []
    handle = block_list(model)[block].self_attn.register_forward_hook(lambda *_: calls.append(None))
    yield calls
    handle.remove()


@pytest.mark.parametrize("accumulate", [3, 5, 12])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    load: Any, pairs: list[Pair], accumulate: int
) -> None:
    base = load("llama")
    forward = forward_for(base, ShiftSpec(*SPEC, base.hidden_size))
    with calls_of(forward.model, 3) as calls:
        whole = gradients(forward, base.hidden_size, pairs)
    assert len(calls) == 2  # two steps of one pass
    with calls_of(forward.model, 3) as calls:
        parts = gradients(forward, base.hidden_size, pairs, accumulate)
    assert len(calls) == 2 * accumulate
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert float(theirs.abs().max()) > 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_recomputed_activations_give_the_same_gradient(load: Any, pairs: list[Pair], family: str) -> None:
    base = load(family)
    forward = forward_for(base, ShiftSpec(*SPEC, base.hidden_size))
    plain = gradients(forward, base.hidden_size, pairs)
    with forward.recomputing(), contextlib.ExitStack() as stack:
        calls = [stack.enter_context(calls_of(forward.model, block)) for block in range(4)]
        again = gradients(forward, base.hidden_size, pairs)
    assert [len(of_block) for of_block in calls] == [2, 2, 4, 2]  # only block 2, above the first shift, twice
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, plain, strict=True))
    assert not any("forward" in vars(block) for block in block_list(forward.model))


@pytest.mark.slow
def test_options_that_save_memory_learn_the_same(request_for: Any, tmp_path: Path) -> None:
    plain = train_collective(request_for(out=tmp_path / "plain"))
    saving = request_for(out=tmp_path / "saving", accumulate=4, gradient_checkpointing=True)
    with pytest.raises(Cancelled):
        train_collective(replace(saving, accumulate=2), stop=lambda: True)
    assert distance(train_collective(saving), plain) < 2e-5  # they may change when a run goes on
    with pytest.raises(InvalidInput, match="into 17 micro-batches"):
        train_collective(request_for(accumulate=17))
    with pytest.raises(InvalidInput, match="accumulate should be at least 1"):
        train_collective(request_for(accumulate=0))


@pytest.mark.slow
def test_a_bfloat16_base_learns_and_its_shifts_are_float32(request_for: Any) -> None:
    artefact = train_collective(request_for(dtype="bfloat16", epochs=3))
    losses = artefact.card["losses"]["validation"]
    assert losses["seed"] < 0.8 * losses["base"]
    assert artefact.card["hyper_parameters"]["dtype"] == "bfloat16"
    tensors = [t for layer in artefact.collective.layers.values() for t in layer]
    assert all(t.dtype == np.float32 for t in tensors)
    # Had the masters been bfloat16 somewhere, the low half of every number would be zero.
    assert any((t.view(np.uint32) & 0xFFFF).any() for t in tensors)


def test_a_loaded_base_is_used_and_left_as_it_was(
    request_for: Any, model_folder: Any, pairs: list[Pair], tmp_path: Path
) -> None:
    plain = train_collective(request_for(out=tmp_path / "plain"))
    base = load_base(str(model_folder("llama")))
    ids = torch.tensor([pairs[0][0]])
    with torch.no_grad():
        before = base.model(ids).logits
    engine = GradientEngine(base)  # whose hooks, were they to run in training, would apply shifts twice
    request = request_for(model="nowhere", gradient_checkpointing=True)
    with pytest.raises(Cancelled):
        train_collective(request, base=base, stop=lambda: True)
    assert distance(train_collective(request, base=base), plain) < 2e-5
    engine.close()
    with torch.no_grad():
        assert torch.equal(base.model(ids).logits, before)
    for module in base.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


def test_few_users_are_drawn_by_the_seed(request_for: Any, tmp_path: Path) -> None:
    few = train_collective(request_for(users=4, epochs=1))
    assert few.card["data"]["users"] == 4
    others = train_collective(request_for(users=4, epochs=1, seed=1, out=tmp_path / "others"))
    assert few.version != others.version
    with pytest.raises(InvalidInput, match="holds 8 users"):
        train_collective(request_for(users=9, out=tmp_path / "more"))
