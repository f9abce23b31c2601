"""Random Llamas, with artefacts and a history for them: what scripts and soaks run on. Nothing is downloaded.

    python scripts/tiny.py build/tiny        # build/tiny/model, build/tiny/news_headline, build/tiny/chat

The tokenizer learned its words from this repo's LICENSE, so text is cut into real words. Answers are
noise, and always the same noise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfit_shared.shifts import ShiftSpec, ShiftTensors
from perfit_shared.starts import near_identity
from perfit_shared.tasks import Task

if TYPE_CHECKING:
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import BaseModel

__all__ = ["SMALL", "TINY", "Shape", "Tiny", "build", "headlines", "tokenizer"]

_LICENSE = Path(__file__).resolve().parents[1] / "LICENSE"
_HEADLINE = "Generate a headline for the following article: {text} headline:"
TASKS = {  # with the layers and positions of each
    Task("news_headline", _HEADLINE, " {title}", "rouge_1"): ((1, 2), "f3+l3"),
    Task("chat", "{prompt}", "{reply}", "rouge_1", stop=(), answer_tokens=256, chat=True): ((0, 3), "l4"),
}


@dataclass(frozen=True)
class Shape:
    """Of a Llama. Weights wide enough for a context to matter."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int | None = None
    max_position_embeddings: int = 512
    initializer_range: float = 0.3


TINY = Shape(32, 64)  # thousands of calls a minute
SMALL = Shape(256, 768, 6, 8, 4, initializer_range=0.05)  # wide enough for the kernels of real models


@dataclass(frozen=True)
class Tiny:
    """Folders, as `perfit-cloud serve` takes them."""

    model: Path
    artefacts: tuple[Path, ...]


def tokenizer(lines: Iterable[str] = (), *, size: int = 2048, longest: int = 512) -> Any:
    """Bytes, and words of the lines (of the LICENSE), with <s> in front, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(lines or _LICENSE.read_text("utf-8").splitlines(), trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=longest, **names)


def build(folder: Path, *, seed: int = 0, shape: Shape = TINY) -> Tiny:
    """A model and two artefacts in `folder`; the same seed makes the same weights and tensors."""
    model = folder / "model"
    base = save_model(model, seed=seed, shape=shape)
    folders = []
    for task, (layers, positions) in TASKS.items():
        spec = ShiftSpec(layers, positions, 6, 3, hidden_size=base.hidden_size)
        collective = near_identity(spec, spec.collective_rank, seed=seed + 1, size=0.3)
        folders.append(folder / task.name)
        artefact_of(base, task, spec, collective, seed=seed + 2).save(folders[-1])
    return Tiny(model, tuple(folders))


def save_model(folder: Path, *, seed: int = 0, shape: Shape = TINY) -> BaseModel:
    """A random Llama with its tokenizer, saved, and loaded from there."""
    from dataclasses import asdict

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from perfit_cloud.model.base import load_base

    logging.disable_progress_bar()
    words = tokenizer(longest=shape.max_position_embeddings)
    config = LlamaConfig(
        **asdict(shape), vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    words.save_pretrained(folder)
    return load_base(str(folder))


def artefact_of(
    base: BaseModel, task: Task, spec: ShiftSpec, collective: ShiftTensors, *, seed: int
) -> Artefact:
    """One whose seed changes nothing."""
    from perfit_cloud.model.artefacts import Artefact

    return Artefact(
        name=task.name,
        spec=spec,
        task=task,
        fingerprint=base.fingerprint,
        collective=collective,
        seed=ShiftTensors.identity(spec, spec.personal_rank, seed),
        learning_rate=5e-3,
        epochs=1,
        batch_size=4,
    )


def headlines(count: int) -> list[dict[str, str]]:
    """Items of news_headline: stretches of the LICENSE, each with its first words as its headline."""
    words = _LICENSE.read_text("utf-8").split()
    starts = range(0, 12 * count, 12)
    texts = [[words[(start + i) % len(words)] for i in range(40)] for start in starts]
    return [{"text": " ".join(text), "title": " ".join(text[:5]).title()} for text in texts]


if __name__ == "__main__":
    print(*[(made := build(Path(sys.argv[1]), shape=SMALL)).model, *made.artefacts], sep="\n")
