"""A model split by accelerate's device map over a CPU and its disk: the same bits, nothing of users on it."""

from __future__ import annotations

import json
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tests.support.collective import small_request, write_toy
from tests.support.generation import NEW, SMALL, alone, prompts, serve, uses
from tests.support.gguf_files import gguf_model, write_gguf
from tests.support.gradients import OF_TOKENIZER, PLENTY, person
from torch.multiprocessing.reductions import StorageWeakRef

from perfit_cloud.cli.roles import opened_identity
from perfit_cloud.cli.start_up import load_parts
from perfit_cloud.collective.run import train_collective
from perfit_cloud.config import CloudConfig
from perfit_cloud.engine.generation.continuous import GenerationEngine, can_share
from perfit_cloud.engine.generation.factory import engine_kind
from perfit_cloud.engine.generation.static import BatchedEngine
from perfit_cloud.engine.gradients.session import GradientRequest, UpdateEngine
from perfit_cloud.engine.gradients.stateless import GradientEngine
from perfit_cloud.engine.interface import Gradient, ShiftUse
from perfit_cloud.lamp.methods.added_weights import check_whole
from perfit_cloud.model.base import BaseModel, load_base
from perfit_cloud.model.blocks import block_list
from perfit_cloud.model.devices import weights_of
from perfit_cloud.model.placement import Placement
from perfit_shared.errors import ConfigError, InvalidData, InvalidInput
from perfit_shared.types import Mode, Sampling, Score

FAMILIES = ("llama", "gemma2", "qwen3", "gpt2")


class Both(NamedTuple):
    whole: BaseModel
    split: BaseModel
    offload: Path


def write_map(path: Path, family: str, **other: Any) -> str:
    """Every second block on the disk, and what stands around the blocks in turns. `other`: by last name."""
    if family == "gpt2":
        around = {"transformer.wte": "cpu", "lm_head": "cpu", "transformer.wpe": "disk"}
        around |= {"transformer.ln_f": "disk"}
        blocks = "transformer.h"
    else:
        around = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        around |= {"lm_head": "disk"}
        blocks = "model.layers"
    found = around | {f"{blocks}.{i}": ("cpu", "disk")[i % 2] for i in range(4)}
    found |= {name: other[last] for name in found if (last := name.rpartition(".")[2]) in other}
    path.write_text(json.dumps(found))
    return str(path)


@pytest.fixture(scope="module", params=FAMILIES)
def both(
    request: pytest.FixtureRequest,
    model_folder: Callable[[str], Path],
    load: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Both:
    folder = tmp_path_factory.mktemp("maps")
    placement = Placement(
        write_map(folder / "map.json", request.param), offload_folder=folder / "state" / "offload"
    )
    split = load_base(str(model_folder(request.param)), placement=placement)
    return Both(load(request.param), split, folder / "state" / "offload")


def updated(base: BaseModel, artefact: Any, *, keep: int, spill: int = 0) -> list[Gradient]:
    """Two people's steps in one pass, from cached activations where there is room."""
    engine = UpdateEngine(base, keep_bytes=keep, spill_bytes=spill)
    sessions = [engine.open(pairs, artefact) for pairs in (OF_TOKENIZER[:5], OF_TOKENIZER[3:])]
    try:
        steps = [
            GradientRequest(session, range(session.examples), person(artefact, seed))
            for seed, session in enumerate(sessions, 3)
        ]
        return engine.gradients(steps)
    finally:
        engine.close()


def same_bits(one: Gradient, other: Gradient) -> bool:
    return one.loss == other.loss and one.tensors.digest() == other.tensors.digest()


def test_every_second_block_is_on_the_disk_and_the_model_can_do_the_same(both: Both) -> None:
    on_disk = [block for block in block_list(both.split.model) if next(block.parameters()).is_meta]
    assert len(on_disk) == 2 and both.split.is_split and not both.whole.is_split
    assert both.split.capabilities == both.whole.capabilities
    assert both.split.fingerprint == both.whole.fingerprint
    assert both.split.devices == (torch.device("cpu"),)


@pytest.mark.parametrize("kind", [GenerationEngine, BatchedEngine])
def test_answers_have_the_same_tokens(both: Both, kind: Any, make_artefact: Any) -> None:
    if kind is GenerationEngine and not can_share(both.whole):
        pytest.skip("not a family that shares a batch")
    artefact = make_artefact(both.whole)
    whose = uses({"one": artefact, "same": artefact}, 6)
    asked = [(prompt, use, Sampling(NEW)) for prompt, use in zip(prompts(6), whose, strict=True)]
    found = []
    for base in (both.split, both.whole):
        engine = kind(base, {artefact.name: artefact}, SMALL)
        try:
            found.append(serve(engine, asked))
        finally:
            engine.stop()
    assert found[0] == found[1] == [alone(both.whole, prompt, use) for prompt, use, _ in asked]
    assert engine_kind(both.split).continuous == engine_kind(both.whole).continuous


@pytest.mark.parametrize("room", [{"keep": PLENTY}, {"keep": 0}, {"keep": 0, "spill": PLENTY}], ids=str)
def test_gradients_of_updates_have_the_same_bits(both: Both, room: Any, make_artefact: Any) -> None:
    artefact = make_artefact(both.whole)
    split, whole = (updated(base, artefact, **room) for base in (both.split, both.whole))
    assert all(map(same_bits, split, whole))
    assert all(each.tensors.norm() > 1e-3 for each in whole)


def test_scores_and_gradients_of_calls_have_the_same_bits(both: Both, make_artefact: Any) -> None:
    artefact, found = make_artefact(both.whole), []
    use = ShiftUse(Mode.PERSONAL, artefact, person(artefact, 3))
    for base in (both.split, both.whole):
        engine = GradientEngine(base)
        try:
            found.append((engine.score(OF_TOKENIZER, use), engine.gradient(OF_TOKENIZER, use)))
        finally:
            engine.close()
    (scores, gradient), (of_whole, wanted) = found
    assert scores == of_whole and all(isinstance(score, Score) for score in scores)
    assert same_bits(gradient, wanted)


def test_stage_1_learns_the_same_numbers(both: Both, model_folder: Any, tmp_path: Path) -> None:
    family, data = both.whole.model.config.model_type, write_toy(tmp_path / "toy", users=6, items=6)
    made = []
    for name, placement in (
        ("whole", Placement()),
        ("split", Placement(write_map(tmp_path / "map.json", family))),
    ):
        request = small_request(data, str(model_folder(family)), tmp_path / name, dtype="float32")
        made.append(train_collective(replace(request, placement=placement)))
    assert made[0].version == made[1].version
    assert made[0].collective.digest() == made[1].collective.digest()


# -- weights and memory --------------------------------------------------------------------------------


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[StorageWeakRef]:
    """Storage of every weight that a pass reads from the disk, in order; gone ones show it."""
    from accelerate.utils import OffloadedWeightsLoader

    read, found = OffloadedWeightsLoader.__getitem__, []

    def noting(self: Any, key: str) -> torch.Tensor:
        tensor: torch.Tensor = read(self, key).clone()  # a storage of its own, as on a GPU
        found.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(OffloadedWeightsLoader, "__getitem__", noting)
    return found


def test_a_backward_pass_holds_the_weights_of_one_block(
    both: Both, make_artefact: Any, loaded: list[StorageWeakRef]
) -> None:
    """Autograd would hold all that the forward pass has loaded."""
    artefact = make_artefact(both.whole, layers=(0,))
    engine = GradientEngine(both.split)
    most, blocks = 0, block_list(engine._base.model)

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(not each.expired() for each in loaded))

    handles = [block.register_forward_hook(count) for block in blocks]
    try:
        engine.gradient(OF_TOKENIZER, ShiftUse(Mode.PERSONAL, artefact, person(artefact, 3)))
    finally:
        for handle in handles:
            handle.remove()
        engine.close()
    of_blocks = sum(1 for _ in blocks[1].parameters())
    assert len(loaded) > 2 * of_blocks, "the pass read what is on the disk"
    assert most < of_blocks, "behind a block none of its weights is left"
    assert all(each.expired() for each in loaded)
    assert all(p.is_meta for p in blocks[1].parameters())


def test_another_tree_of_modules_reads_the_same_weights(both: Both) -> None:
    def sources(model: Any) -> set[int]:
        hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
        return {id(hook.weights_map.dataset) for hook in hooks if getattr(hook, "weights_map", None)}

    assert len(sources(both.split.model)) == 1
    assert sources(both.split.share_weights()) == sources(both.split.model)


# -- what lies on the disk -----------------------------------------------------------------------------


@pytest.fixture
def opened() -> Iterator[list[str]]:
    """Files that Python opens to write them, from here on."""
    found: list[str] | None = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and found is not None:
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & 3:
                found.append(str(path))

    sys.addaudithook(hook)  # it cannot be taken off
    yield found
    found = None


def test_passes_write_nothing_to_the_disk(both: Both, make_artefact: Any, opened: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in both.offload.iterdir()}
    artefact = make_artefact(both.whole)
    engine = engine_kind(both.split)(both.split, {artefact.name: artefact}, SMALL)
    use = ShiftUse(Mode.PERSONAL, artefact, person(artefact, 3))
    opened.clear()
    try:
        serve(engine, [(prompts(6)[5], use, Sampling(NEW))])
        updated(both.split, artefact, keep=PLENTY)
    finally:
        engine.stop()
    assert opened == []
    assert {path: path.stat().st_mtime_ns for path in both.offload.iterdir()} == before
    assert stat.S_IMODE(both.offload.stat().st_mode) == 0o700


def test_the_audit_sees_what_is_written(opened: list[str], tmp_path: Path) -> None:
    (tmp_path / "note").write_text("of a user")
    assert opened == [str(tmp_path / "note")]


def test_weights_that_are_written_are_all_that_the_folder_has(
    model_folder: Any, load: Any, tmp_path: Path, make_artefact: Any
) -> None:
    """A checkpoint that is no safetensors file cannot be read weight by weight, so those are written."""
    pickled, offload = Path(shutil.copytree(model_folder("llama"), tmp_path / "m")), tmp_path / "offload"
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    offload.mkdir(mode=0o755)
    (offload / "old.safetensors").write_bytes(b"of an earlier process")
    whole, placement = load("llama"), Placement(write_map(tmp_path / "map.json", "llama"), "", offload)
    split = load_base(str(pickled), placement=placement)
    weights = dict(whole.model.named_parameters())
    on_disk = {name for name, weight in split.model.named_parameters() if weight.is_meta}
    artefact = make_artefact(whole)
    found = [updated(base, artefact, keep=PLENTY) for base in (split, whole)]
    assert all(map(same_bits, *found))
    assert {path.name for path in offload.iterdir()} == {f"{name}.safetensors" for name in on_disk}
    assert len(on_disk) > 18 and stat.S_IMODE(offload.stat().st_mode) == 0o700
    for name in on_disk:
        (held,) = load_file(offload / f"{name}.safetensors").values()
        assert torch.equal(held, weights[name])


def test_all_weights_can_be_looked_at(both: Both) -> None:
    names = [name for name, _ in both.split.model.named_parameters()]
    for name, weight in zip(names, weights_of(both.split.model), strict=True):
        assert torch.equal(weight, both.whole.model.get_parameter(name))


# -- what is refused -----------------------------------------------------------------------------------


def test_maps_that_cannot_be_are_refused(model_folder: Any, tmp_path: Path) -> None:
    folder = str(model_folder("llama"))
    for given, message in (
        ({"device_map": "everywhere"}, "device_map should be none, auto"),
        ({"max_memory": "cpu=1GB"}, "goes with a device_map"),
        ({"device_map": "auto", "max_memory": "cpu:1GB"}, 'should read like "0=70GiB'),
        ({"device_map": "auto", "max_memory": "disk=1GB"}, 'should read like "0=70GiB'),
    ):
        with pytest.raises(ConfigError, match=message):
            Placement(**given)
    path = tmp_path / "map.json"
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "should be an object"),
        ('{"": "tape"}', "which is no device here"),
        (f'{{"": {torch.cuda.device_count()}}}', "which is no device here"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_base(folder, placement=Placement(str(path)))
    with pytest.raises(ConfigError, match="cannot read the device map"):
        load_base(folder, placement=Placement(str(tmp_path / "none.json")))
    with pytest.raises(ConfigError, match="leave one out"):
        load_base(folder, device="cpu", placement=Placement("auto"))
    gguf_file = write_gguf(tmp_path / "m.gguf", gguf_model("llama", "F32"), "F32")
    with pytest.raises(InvalidData, match="Disk offload is not supported"):
        load_base(str(gguf_file), placement=Placement(write_map(path, "llama")))
    path.write_text('{"model.embed_tokens": "cpu", "model.layers": "disk"}')
    with pytest.raises(InvalidData, match="lm_head"):
        load_base(folder, placement=Placement(str(path)))


def test_auto_on_a_machine_with_room_is_one_device(model_folder: Any, load: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("of a machine without GPUs")
    base = load_base(str(model_folder("llama")), placement=Placement("auto"))
    assert not base.is_split and base.device == torch.device("cpu")
    assert base.capabilities == load("llama").capabilities


def test_auto_with_little_memory_goes_to_the_disk(model_folder: Any, load: Any, make_artefact: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("of a machine without GPUs")
    base = load_base(str(model_folder("llama")), placement=Placement("auto", "cpu=100KB"))
    assert base.is_split and any(weight.is_meta for weight in base.model.parameters())
    artefact = make_artefact(base)
    found = [updated(each, artefact, keep=PLENTY) for each in (base, load("llama"))]
    assert all(map(same_bits, *found))


def test_vllm_and_added_weights_want_one_device(both: Both) -> None:
    with pytest.raises(ConfigError, match="does not take a device_map"):
        engine_kind(both.split, "vllm")
    with pytest.raises(InvalidInput, match="leave out --device-map"):
        check_whole(both.split)
    check_whole(both.whole)


def test_a_server_splits_its_model_and_keeps_weights_in_its_state_folder(
    model_folder: Any, load: Any, tmp_path: Path, make_artefact: Any
) -> None:
    make_artefact(load("llama")).save(tmp_path / "artefact")
    config = CloudConfig(
        model=str(model_folder("llama")),
        artefacts=(str(tmp_path / "artefact"),),
        state=tmp_path / "state",
        dtype="float32",
        device_map=write_map(tmp_path / "map.json", "llama"),
    )
    with opened_identity(config, lambda close: close()) as authenticator:
        parts, _ = load_parts(config, authenticator)
    assert parts.catalog.base.is_split
    assert stat.S_IMODE((tmp_path / "state" / "offload").stat().st_mode) == 0o700
    parts.generation.stop()
    parts.scheduler.close()
