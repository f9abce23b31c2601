"""Tiny random models of each family, built once a session; nothing is downloaded."""

from __future__ import annotations

import hmac
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Tensors this small lose more to waking threads than they gain; on a busy machine a hundred times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from perfit_shared.grpc_environment import prepare_grpc
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors

prepare_grpc()  # gRPC is imported by the tests' own modules
pytest.register_assert_rewrite("tests.support")  # a failure there shows its values, too

if TYPE_CHECKING:
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import BaseModel

BRIEF = Path(__file__).resolve().parents[2] / "shared"
# What a tiny model of each family has beyond the sizes that all share: windows shorter than the
# sequences, and blocks with and without one where the family mixes them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 12, "head_dim": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 10, "max_window_layers": 2},
    "qwen3": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "head_dim": 16},
    "gemma2": {
        "sliding_window": 11,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 5.0,
    },
    "gemma3_text": {
        "sliding_window": 7,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "phi3": {"sliding_window": 13},
    "gpt2": {},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "falcon": {"multi_query": False, "new_decoder_architecture": True, "num_kv_heads": 2},
}
KEPT = tuple(FAMILIES)[:7]  # families whose gradient steps run from what is kept
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def pytest_configure() -> None:
    # A shell that starts us in the background makes us ignore Ctrl-C, and with us every command
    # that a test interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not BRIEF.is_dir():
        skip = pytest.mark.skip(reason="the data folder `shared` does not lie beside this checkout")
        for item in items:
            if "brief" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def brief() -> Path:
    """The folder with data and models beside the checkout; mark such tests with `brief`."""
    return BRIEF


def tiny_config(family: str, vocabulary: int) -> Any:
    """Four blocks of 32 with four heads, weights wide enough for a context to matter."""
    from transformers import AutoConfig

    grouped = {"num_key_value_heads": 2} if family in KEPT else {}  # what the others do not know
    return AutoConfig.for_model(
        family,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        initializer_range=0.3,
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        **grouped,
        **FAMILIES[family],
    )


def tiny_tokenizer() -> Any:
    """Characters and a few words, with <s> in front, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(["the cat sat on the mat and the dog ran to the door"] * 5, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model of a family, made on first use."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            import torch
            from transformers import AutoModelForCausalLM

            tokenizer = tiny_tokenizer()
            torch.manual_seed(list(FAMILIES).index(family))
            model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer)))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def load(model_folder: Callable[[str], Path]) -> Callable[[str], BaseModel]:
    """The loaded tiny model of a family, once a session."""
    from perfit_cloud.model.base import load_base

    loaded: dict[str, BaseModel] = {}

    def make(family: str) -> BaseModel:
        if family not in loaded:
            loaded[family] = load_base(str(model_folder(family)))
        return loaded[family]

    return make


def random_shift(spec: ShiftSpec, rank: int, seed: int, size: float = 0.5) -> ShiftTensors:
    """A shift that changes answers: orthonormal R, W and b off the identity by `size`."""
    rng = np.random.default_rng(seed)
    layers = {}
    for layer, shift in ShiftTensors.identity(spec, rank, seed).layers.items():
        noise = rng.standard_normal(shift.source.shape).astype(np.float32)
        bias = rng.standard_normal(rank).astype(np.float32)
        layers[layer] = LayerShift(shift.rotation, shift.source + size * noise, size * bias)
    return ShiftTensors(layers)


@pytest.fixture(scope="session")
def make_artefact() -> Callable[..., Artefact]:
    """An artefact with random, effective tensors for a base model."""
    from perfit_cloud.model.artefacts import Artefact
    from perfit_shared.tasks import Task

    def make(
        base: BaseModel,
        name: str = "news_headline",
        *,
        positions: str = "f3+l3",
        layers: tuple[int, ...] = (1, 2),
        seed: int = 0,
        ranks: tuple[int, int] = (6, 3),
    ) -> Artefact:
        spec = ShiftSpec(layers, positions, *ranks, hidden_size=base.hidden_size)
        return Artefact(
            name=name,
            spec=spec,
            task=Task(name, "{text} so", " {title}", "rouge_1"),
            fingerprint=base.fingerprint,
            collective=random_shift(spec, ranks[0], seed),
            seed=ShiftTensors.identity(spec, ranks[1], seed),
            learning_rate=5e-3,
            epochs=2,
            batch_size=4,
        )

    return make


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What is compared in constant time from here on."""
    pairs: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        pairs.append((bytes(one), bytes(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    return pairs
