"""Load any decoder that transformers reads, find its blocks, and turn text into token ids."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from perfit_cloud.model.blocks import block_list, context_of
from perfit_cloud.model.capabilities import Capabilities, try_model
from perfit_cloud.model.checkpoint import ModelFiles, check_folder, check_loaded
from perfit_cloud.model.devices import (
    check_blocks_whole,
    devices_of,
    finish_split,
    input_device,
    is_split,
    shared_by_hooks,
)
from perfit_cloud.model.forward import arguments_of
from perfit_cloud.model.gguf import EMBEDDED, GgufFile, embedded_file
from perfit_cloud.model.placement import ONE_DEVICE, Placement
from perfit_cloud.model.precision import DTYPES, choose_precision
from perfit_cloud.model.tokens import TokenCodec, check_vocabulary, forget_words
from perfit_shared.errors import ConfigError, InvalidData, InvalidPrompt

__all__ = ["EMBEDDED", "BaseModel", "PromptForm", "load_base", "open_model"]

_log = logging.getLogger(__name__)
PromptForm = str | Sequence[tuple[str, str]]  # a text, or (role, content) turns of a chat, oldest first


@dataclass(frozen=True)
class BaseModel:
    """A frozen causal LM with its tokenizer. Nothing here is written to after loading."""

    name: str  # the last part of what it was loaded by
    fingerprint: str  # sha-256 of configuration, tokenizer and weights, hex
    model: Any  # transformers PreTrainedModel, eval mode, no parameter requires grad
    tokenizer: Any
    # What the model can do; untried, what most families can.
    capabilities: Capabilities = field(default=None, repr=False)  # type: ignore[assignment]
    precision: str = ""  # the weights' dtype, and why that
    _codec: TokenCodec | None = field(default=None, repr=False)  # of the tokenizer; one for all copies

    def __post_init__(self) -> None:
        if self.capabilities is None:
            object.__setattr__(self, "capabilities", Capabilities(arguments_of(self.model)))
        if not self.precision:
            object.__setattr__(self, "precision", str(self.model.dtype).removeprefix("torch."))
        if self._codec is None and self.tokenizer is not None:
            object.__setattr__(self, "_codec", TokenCodec(self.tokenizer, self._embedded, self.context))

    @property
    def blocks(self) -> int:
        """Number of decoder blocks."""
        return len(block_list(self.model))

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def device(self) -> torch.device:
        """Where token ids go, and logits come from."""
        return input_device(self.model)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """All that the model computes on, `device` first."""
        return devices_of(self.model)

    @property
    def is_split(self) -> bool:
        """Whether it is on several devices, or has weights that are loaded for each pass."""
        return is_split(self.model)

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer together."""
        return context_of(self.model)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Token ids that end an answer: the model's, and the one that its chat template ends a turn with."""
        ids = self.model.generation_config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        own = (ids,) if isinstance(ids, int) else tuple(ids or ())
        turn_end = None if self._codec is None else self._codec.turn_end
        return own if turn_end is None or turn_end in own else (*own, turn_end)

    @property
    def end_id(self) -> int | None:
        """The one that targets end with behind a text: of several, the one the tokenizer calls its own."""
        own = self.tokenizer.eos_token_id
        return own if own in self.end_ids else next(iter(self.end_ids), None)

    @property
    def has_chat_template(self) -> bool:
        return self._codec is not None and self._codec.has_template

    def encode_pair(self, prompt: PromptForm, target: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt (a text, or the turns of a chat) and of the answer to it.

        Training, losses and gradients take their tokens from here, so that all of them agree.
        """
        return self.encode_prompt(prompt), self.encode_target(target, chat=not isinstance(prompt, str))

    def encode_prompt(self, prompt: PromptForm) -> list[int]:
        return self.encode(prompt) if isinstance(prompt, str) else self.encode_chat(list(prompt))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with whatever the tokenizer puts in front. Raises InvalidPrompt if empty."""
        if not text.strip():
            raise InvalidPrompt("the prompt is empty")
        return self._tokens.prompt(text)

    def encode_chat(self, messages: list[tuple[str, str]]) -> list[int]:
        """Token ids of (role, content) turns, oldest first, up to where the reply begins.

        Special tokens come from the template alone: a content that spells one is text.
        """
        if not messages or not all(content.strip() for _, content in messages):
            raise InvalidPrompt("a chat needs messages, none of them empty")
        ids = self._tokens.chat(messages)
        if ids is not None:
            return ids
        # A model without a chat template reads the turns as plain text.
        if len(messages) == 1:
            return self._tokens.plain_prompt(messages[0][1])
        turns = "\n".join(f"{role}: {text}" for role, text in messages)
        return self._tokens.plain_prompt(f"{turns}\nassistant:")

    def encode_target(self, text: str, *, chat: bool = False) -> list[int]:
        """Token ids of an answer as it goes on from a prompt, end of sequence behind.

        Behind a `chat`, as the model's template writes a reply: with the token that ends a turn.
        """
        tokens, end = self._tokens, self.end_id
        if not (chat and tokens.has_template):
            ids = tokens.continuation(text)
        else:
            ids, end = tokens.reply(text), end if tokens.turn_end is None else tokens.turn_end
        return ids if end is None else [*ids, end]

    def decode(self, ids: list[int]) -> str:
        return self._tokens.text(ids)

    def token(self, number: int) -> tuple[str, bytes]:
        """One token by itself: its text or name, and the bytes that it adds to an answer."""
        return self._tokens.token(number)

    @property
    def _embedded(self) -> int:
        """Tokens that have an embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def _tokens(self) -> TokenCodec:
        if self._codec is None:
            raise InvalidData("this model was loaded without a tokenizer")
        return self._codec

    def share_weights(self) -> Any:
        """Another module tree over the very same tensors.

        Engines switch the attention implementation and register hooks. With a tree for each, they do not
        disturb each other, and it costs no memory.
        """
        shared = (*self.model.parameters(), *self.model.buffers(), *shared_by_hooks(self.model))
        memo = {id(each): each for each in shared}
        for module in self.model.modules():
            # Some recurrent families leave the state of their last pass, with its graph, on their modules.
            left = (v for v in vars(module).values() if isinstance(v, torch.Tensor) and not v.is_leaf)
            memo |= {id(state): state.detach().clone() for state in left}
        copied = copy.deepcopy(self.model, memo=memo)
        for module in copied.modules():
            module._forward_hooks.clear()  # they belong to the original
        return copied


def load_base(
    name: str, *, dtype: str = "auto", device: str = "auto", placement: Placement = ONE_DEVICE
) -> BaseModel:
    """Load a causal LM: from a folder, a .gguf file, by its name on the hub, or smollm2.

    `dtype`: "auto" (what `choose_precision` finds faster), "float32", "bfloat16" or "float16".
    `device`: "auto", "cpu", "cuda", "cuda:1". `placement`, instead: over several devices. Raises ConfigError
    for values it does not know and InvalidData when there is no usable model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of every weight that is offloaded
    if placement.splits:
        if device != "auto":
            raise ConfigError("device and device_map both say where the model goes; leave one out")
        device = placement.main_device()
    elif device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not _device_exists(device):
        raise ConfigError(f'there is no device "{device}" here; use auto or cpu')
    precision = choose_precision(dtype, device)
    files = open_model(name)
    with files.reading():
        config = files.config()
        # Older transformers run soft-capped attention (Gemma 2) through sdpa, which leaves the cap out.
        is_capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
        # Other shapes are refused below, by name.
        model, info = AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=config,
            dtype=DTYPES[precision.dtype],
            attn_implementation="eager" if is_capped else None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **placement.arguments(),
            **files.model_arguments,
        )
        quantised = getattr(config, "quantization_config", None)
        if not is_split(model):
            if quantised and all(weight.dtype in DTYPES.values() for weight in model.parameters()):
                model = model.to(DTYPES[precision.dtype])  # some are unpacked to the dtype of their scales
            model = model.to(device)
        model.eval()
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **files.tokenizer_arguments)
        files.finish(model)
    name = Path(name).name
    check_loaded(name, model, info)
    model.requires_grad_(False)
    if is_split(model):
        check_blocks_whole(name, model)
        finish_split(model)
    if not forget_words(tokenizer):
        _log.info("tokenizer has no word cache to turn off")
    try:
        capabilities = try_model(model)
    except InvalidData as error:
        if not quantised:
            raise
        raise InvalidData(f"{name} is quantised in a way that cannot be used here: {error}") from error
    base = BaseModel(name, files.fingerprint(), model, tokenizer, capabilities, str(precision))
    check_vocabulary(tokenizer, base._tokens, base._embedded, base.end_ids)
    if not base.end_ids:
        _log.warning(
            "%s has no end of sequence: targets are learned without an end, and answers go on to their "
            "limit; set eos_token_id in generation_config.json",
            name,
        )
    return base


def _device_exists(name: str) -> bool:
    try:
        device = torch.device(name)
    except RuntimeError:
        return False
    if device.type == "cuda":
        return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu"


def open_model(name: str) -> ModelFiles:
    """What `name` stands for: smollm2, a .gguf file, a folder, or a model that the hub gives.

    A folder with one .gguf file and no config.json is that file. Raises InvalidData.
    """
    path = embedded_file() if name == EMBEDDED else Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        found = sorted(each for each in path.iterdir() if each.suffix.lower() == ".gguf")
        if len(found) > 1:
            names = ", ".join(each.name for each in found[:5])
            raise InvalidData(f"{path} holds {len(found)} GGUF files; name one of them: {names}")
        path = found[0] if found else path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InvalidData(f"{name} is a file; name the folder that transformers saved the model to")
        return GgufFile(path)
    folder = path if path.is_dir() else _from_hub(name)
    check_folder(folder)
    return ModelFiles(folder)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, ignore_patterns=["*.msgpack", "*.h5", "*.onnx", "original/*"]))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise InvalidData(
            f"{name} is neither a folder, a .gguf file, {EMBEDDED}, nor a model that the hub gives"
        ) from error
