"""A model on the disk, and whether all of it was read: no weight may be left random."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import InvalidData

__all__ = ["ModelFiles", "check_folder", "check_loaded", "weight_files"]

_log = logging.getLogger(__name__)
_SHOWN = 3  # keys that a message names
_SHOWN_LETTERS = 300  # of what a library says of a file
# What programs put in front of every key of a model that they save inside their own wrapper.
_WRAPPERS = {
    "base_model.model.": "PEFT's: merge the adapter and save the model itself "
    "(`model.merge_and_unload().save_pretrained(FOLDER)`)",
    "module.": "DataParallel's: save `model.module`",
    "_orig_mod.": "torch.compile's: save the model that was compiled",
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Keys of config.json that do not change what the model computes.
_VOLATILE = {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"}
_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)
# Masks and positions that older versions of transformers saved beside the weights.
_BUFFERS = re.compile(r"(\.(attn|attention|self_attention)\.bias|masked_bias|inv_freq|position_ids)$")


class ModelFiles:
    """A model as transformers saved it to a folder. Subclasses are other forms of one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def folder(self) -> Path:
        return self.path

    @property
    def config_arguments(self) -> dict[str, Any]:
        """Of `from_pretrained`, beside the folder."""
        return {}

    @property
    def tokenizer_arguments(self) -> dict[str, Any]:
        return {}

    @property
    def model_arguments(self) -> dict[str, Any]:
        return {}

    def fingerprint(self) -> str:
        """sha-256 over what decides a model's answers: configuration, tokenizer and weights; hex.

        The dtype that weights are loaded in does not change it; another export of them does.
        """
        h = hashlib.sha256()
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        relevant = {k: v for k, v in config.items() if k not in _VOLATILE}
        generation = self.folder / "generation_config.json"
        if generation.is_file():  # its sampling defaults are not used
            relevant["end"] = json.loads(generation.read_text("utf-8")).get("eos_token_id")
        h.update(json.dumps(relevant, sort_keys=True).encode())
        for path in [*(self.folder / name for name in _TOKENIZER_FILES), *weight_files(self.folder)]:
            if path.is_file():
                h.update(path.name.encode())
                with path.open("rb") as file:
                    h.update(hashlib.file_digest(file, "sha256").digest())
        return h.hexdigest()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around calls that read it: what they raise becomes InvalidData."""
        try:
            yield
        except _UNREADABLE as error:
            raise self.unreadable(error) from error

    def unreadable(self, error: Exception) -> InvalidData:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shown = "".join(c if c.isprintable() else "?" for c in first[:_SHOWN_LETTERS])  # it quotes the file
        return InvalidData(f"cannot load a causal LM from {self.path}: {shown}")

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder, **self.config_arguments)

    def finish(self, model: Any) -> None:
        """What is left to do on a model that was read."""


def check_folder(folder: Path) -> None:
    """Raises InvalidData, with what to do instead, on folders that hold something else than a model."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        try:
            of = json.loads(adapter.read_text("utf-8")).get("base_model_name_or_path")
        except (OSError, ValueError, AttributeError):
            of = None
        raise InvalidData(
            f"{folder} holds a LoRA adapter{f' for {of}' if of else ''}, not a model; load both with PEFT, "
            "`merge_and_unload()`, and save model and tokenizer to a folder of their own"
        )
    if not (folder / "config.json").is_file():
        raise InvalidData(f"{folder} has no config.json; name a folder that transformers saved a model to")


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads a model's weights from, by name."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            names = json.loads(index.read_text("utf-8"))["weight_map"].values()
            return [folder / shard for shard in sorted(set(names))]
    return []


def check_loaded(name: str, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that was not read whole; `info` is what `from_pretrained` says of it.

    Keys that are missing, or of another shape than the model's, would be random numbers. Tied weights
    and a family's own exceptions are not in `info`. Raises InvalidData that names some; what has no
    place in the model, and no part in it, is listed once.
    """
    unexpected = sorted(info["unexpected_keys"])
    for prefix, advice in _WRAPPERS.items():
        if unexpected and all(key.startswith(prefix) for key in unexpected):
            raise InvalidData(
                f"{name}: {_named(unexpected, 'weights')} have no place in the model; {prefix} is {advice}"
            )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        shown = [f"{key} {list(has)} where the model has {list(wants)}" for key, has, wants in mismatched]
        raise InvalidData(f"{name}: {_named(shown, 'weights')} are of another shape; mend config.json")
    missing = sorted(info["missing_keys"])
    if missing:
        none = " none of the checkpoint's weights fits;" if len(missing) >= len(model.state_dict()) else ""
        raise InvalidData(
            f"{name}:{none} {_named(missing, 'weights')} are not in the checkpoint and would be random; "
            "fetch it again, or mend config.json"
        )
    if info["error_msgs"]:
        raise InvalidData(f"{name}: {info['error_msgs'][0].strip().splitlines()[0]}")
    own = [key for key in unexpected if _belongs(key, model)]
    if own:
        raise InvalidData(
            f"{name}: {_named(own, 'weights')} belong to the decoder but have no place in it; "
            "config.json does not describe this checkpoint"
        )
    if unexpected:
        _log.warning("%s: %s are not the decoder's and are left out", name, _named(unexpected, "weights"))


def _named(keys: Collection[str], what: str) -> str:
    shown = ", ".join(list(keys)[:_SHOWN])
    return f"{len(keys):,} {what} ({shown}{', …' if len(keys) > _SHOWN else ''})"


def _belongs(key: str, model: Any) -> bool:
    """Whether a key lies in the list of blocks, or in a module that has weights of its own."""
    if _BUFFERS.search(key):
        return False
    prefix = f"{model.base_model_prefix}."
    names = {key, key.removeprefix(prefix), prefix + key}
    modules: dict[str, nn.Module] = dict(model.named_modules())
    blocks = block_list(model)
    under = next(f"{name}." for name, module in modules.items() if module is blocks)
    numbers = {name.removeprefix(under).partition(".")[0] for name in names if name.startswith(under)}
    if numbers:  # blocks behind the last are for predicting several tokens at once, where the family has any
        more = getattr(model.config.get_text_config(), "num_nextn_predict_layers", None) or 0
        return not numbers <= {str(len(blocks) + i) for i in range(more)}
    parents = (modules.get(name.rpartition(".")[0]) for name in names if "." in name)
    return any(parent is not None and any(True for _ in parent.parameters(False)) for parent in parents)
