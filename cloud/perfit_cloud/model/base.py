"""Load any Hugging Face decoder, find its blocks, and turn text into token ids."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from perfit_shared.errors import ConfigError, InvalidData, InvalidPrompt

__all__ = ["BaseModel", "block_list", "depends_on_length", "fingerprint", "load_base", "model_folder"]

_log = logging.getLogger(__name__)
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
# Keys of config.json that do not change what the model computes.
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal LM with its tokenizer. Nothing here is written to after loading."""

    name: str  # what it was loaded by
    fingerprint: str  # sha-256 of configuration, tokenizer and weight files, hex
    model: Any  # transformers PreTrainedModel, eval mode, no parameter requires grad
    tokenizer: Any
    # Fast tokenizers fail with "Already borrowed" when two threads enter one.
    _tokenizing: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(block_list(self.model))

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        config = self.model.config.get_text_config()
        return int(getattr(config, "max_position_embeddings", None) or 2**20)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        return (ids,) if isinstance(ids, int) else tuple(ids or ())

    @property
    def end_id(self) -> int | None:
        """The one that targets are taught to end with: of several, the one the tokenizer calls its own."""
        own = self.tokenizer.eos_token_id
        return own if own in self.end_ids else next(iter(self.end_ids), None)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with whatever the tokenizer puts in front. Raises InvalidPrompt if empty."""
        if not text.strip():
            raise InvalidPrompt("the prompt is empty")
        with self._tokenizing:
            return list(self.tokenizer(text)["input_ids"])

    def encode_chat(self, messages: list[tuple[str, str]]) -> list[int]:
        """Token ids of (role, content) turns, oldest first, up to where the reply begins."""
        if not messages or not all(content.strip() for _, content in messages):
            raise InvalidPrompt("a chat needs messages, none of them empty")
        if not getattr(self.tokenizer, "chat_template", None):
            # A model that was never taught turns reads them as plain text.
            if len(messages) == 1:
                return self.encode(messages[0][1])
            return self.encode("\n".join(f"{role}: {text}" for role, text in messages) + "\nassistant:")
        turns = [{"role": role, "content": content} for role, content in messages]
        with self._tokenizing:
            encoded = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def encode_target(self, text: str) -> list[int]:
        """Token ids of an answer, nothing in front, end of sequence behind."""
        with self._tokenizing:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids if self.end_id is None else [*ids, self.end_id]

    def decode(self, ids: list[int]) -> str:
        with self._tokenizing:
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def twin(self) -> Any:
        """Another module tree over the very same tensors.

        Continuous batching may switch a model's attention implementation, and hooks differ; a twin
        keeps generation and gradients out of each other's way at no cost in memory.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        twin = copy.deepcopy(self.model, memo={id(t): t for t in tensors})
        for module in twin.modules():
            module._forward_hooks.clear()  # those of the original are not the twin's
        return twin


def block_list(model: Any) -> nn.ModuleList:
    """The decoder's blocks. Raises InvalidData for a model that has no such list."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    count = model.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InvalidData("no list of decoder blocks found in this model")


def depends_on_length(model: Any) -> bool:
    """Whether rotary frequencies change with the longest sequence of a batch, so with one's neighbours."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(r.get("rope_type") for r in rope.values() if isinstance(r, dict))}
    return bool(kinds & {"dynamic", "longrope"})


def load_base(name_or_folder: str, *, dtype: str = "auto", device: str = "auto") -> BaseModel:
    """Load a causal LM from a folder or by hub name.

    `dtype`: "auto" (float32 on a CPU, bfloat16 on a GPU), "float32", "bfloat16" or "float16".
    `device`: "auto", "cpu", "cuda", "cuda:1". Raises ConfigError for values it does not know and
    InvalidData when there is no usable model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not _device_exists(device):
        raise ConfigError(f'there is no device "{device}" here; use auto or cpu')
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype not in dtypes:
        raise ConfigError(f'dtype "{dtype}" should be auto, {", ".join(dtypes)}')
    folder = model_folder(name_or_folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtypes[dtype]).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidData(f"cannot load a causal LM from {name_or_folder}: {first}") from error
    model.requires_grad_(False)
    _stop_remembering(tokenizer)
    base = BaseModel(Path(name_or_folder).name, fingerprint(folder), model, tokenizer)
    block_list(model)
    return base


def _device_exists(name: str) -> bool:
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu"


def model_folder(name: str) -> Path:
    """A model's folder, fetched from the hub where `name` is none. Raises InvalidData."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.msgpack", "*.h5", "*.onnx", "original/*"]))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InvalidData(f"{name} is neither a folder nor a model that the hub gives") from error


def _stop_remembering(tokenizer: Any) -> None:
    """Turn the BPE word cache off: it would keep words of prompts for the life of the process."""
    try:
        tokenizer.backend_tokenizer.model._resize_cache(0)
    except AttributeError:
        _log.info("tokenizer has no word cache to turn off")


def fingerprint(folder: Path) -> str:
    """sha-256 over what decides a model's answers: configuration, tokenizer and weights; hex.

    The dtype that weights are loaded in does not change it; another export of them does.
    """
    h = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kept = {k: v for k, v in config.items() if k not in _VOLATILE}
    generation = folder / "generation_config.json"
    if generation.is_file():  # of its sampling defaults none is used
        kept["end"] = json.loads(generation.read_text("utf-8")).get("eos_token_id")
    h.update(json.dumps(kept, sort_keys=True).encode())
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    for path in [*(folder / name for name in _TOKENIZER_FILES), *weights]:
        if path.is_file():
            h.update(path.name.encode())
            with path.open("rb") as file:
                h.update(hashlib.file_digest(file, "sha256").digest())
    return h.hexdigest()
