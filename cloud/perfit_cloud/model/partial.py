"""Part of a decoder on packed rows: any of its blocks, over any hidden states, without padding.

Sequences lie one behind another in one (N, d), and norms, projections and MLPs see nothing else.
Only attention needs them side by side, so this module gives the model an attention of ours: it spreads
the packed queries, keys and values over (B, T), puts the known keys and values of a *prefix* in front,
attends, and packs again. The blocks are the library's own.

Exact for the families of `supports`: between embedding and head they have blocks and one norm only. What
differs in their attention (scale, soft-capping, sliding window) reaches an attention function as an
argument, and the embedding scales itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perfit_cloud.model.attention import attend, hiding
from perfit_cloud.model.blocks import depends_on_length
from perfit_cloud.model.devices import Copies, block_devices
from perfit_cloud.model.forward import slice_rows
from perfit_cloud.model.interventions import ShiftGroup, shift_rows

__all__ = ["Indices", "Packing", "PartialDecoder", "ragged", "supports"]

Indices = npt.NDArray[np.int64]

_FAMILIES = frozenset({"gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"})
_ATTENTION = "perfit_packed"
_CACHED = 2**19  # numbers of float32 that a CPU's cache holds
_FAR = 2**40  # a position that no query has reached


def supports(model: Any) -> bool:
    """Whether `PartialDecoder` computes what this causal LM computes."""
    config = model.config
    if config.model_type not in _FAMILIES or getattr(config, "use_bidirectional_attention", False):
        return False
    return not depends_on_length(model)


def ragged(first: Indices, count: Indices) -> Indices:
    """first[0], first[0] + 1, … (count[0] numbers), first[1], …: ranges one behind another."""
    before: Indices = first - count.cumsum() + count
    return np.arange(count.sum(), dtype=np.int64) + np.repeat(before, count)


class Packing:
    """How N packed rows form B sequences, each behind a prefix of its own.

    `starts` (B,): tokens of a sequence before its first row, `lengths` (B,): its rows. `past`, needed
    where a start is not 0, gives a layer's keys and values of the prefixes as two tensors
    (B · keys, width) to be written to, prefixes from slot 0; other slots only have to hold
    finite numbers. `capture` is handed (layer, keys, values) of every block, two (N, width).
    """

    def __init__(
        self,
        starts: Indices,
        lengths: Indices,
        device: torch.device,
        *,
        past: Callable[[int], tuple[Tensor, Tensor]] | None = None,
        capture: Callable[[int, Tensor, Tensor], None] | None = None,
    ) -> None:
        self.batch = len(lengths)
        self.longest = int(lengths.max())  # T
        self.prefix = int(starts.max())  # P
        self.keys = self.prefix + self.longest  # S
        self._past, self._capture = past, capture
        self._starts, self._device = starts, device
        self._reach = int((starts + lengths).max())
        self._masks: dict[tuple[int | None, torch.dtype, torch.device], Tensor] = {}
        self._is_even = bool((lengths == self.longest).all())
        which = np.arange(self.batch)
        slots = ragged(which * self.longest, lengths)
        self.position_ids = self._on_device(ragged(starts, lengths)).unsqueeze(0)  # (1, N)
        self._slots = Copies(self._on_device(slots))  # (N,) rows of (B · T)
        self._key_slots = Copies(
            self._on_device(ragged(which * self.keys + self.prefix, lengths))
        )  # of (B · S)

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        softcap: float | None,
        window: int | None,
    ) -> Tensor:
        """Attention of packed query (1, H, N, D) over key and value (1, K, N, D): (1, N, H, D).

        A query at position p sees the positions of its own sequence in (p − window, p].
        """
        heads, width, groups = query.shape[1], query.shape[3], query.shape[1] // key.shape[1]
        rows = [t[0].transpose(0, 1).reshape(t.shape[2], -1) for t in (query, key, value)]
        if self._capture is not None:
            self._capture(layer, rows[1], rows[2])
        q = self._spread(rows[0]).view(self.batch, self.longest, heads, width)
        k, v = (
            t.view(self.batch, self.keys, -1, width).transpose(1, 2)
            for t in self._with_past(layer, rows[1], rows[2])
        )
        if softcap is None and not self._needs_mask(window):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k, v, is_causal=True, scale=scaling, enable_gqa=groups > 1
            ).transpose(1, 2)
        else:
            # Heads that share keys become one long query, so that no key is repeated.
            q = q.view(self.batch, self.longest, -1, groups, width).permute(0, 2, 3, 1, 4)
            q = q.reshape(self.batch, -1, groups * self.longest, width)  # (B, K, G · T, D)
            mask = self._mask(window, groups, q)
            out = attend(q, k, v, mask, scale=scaling, softcap=softcap)
            out = out.reshape(self.batch, -1, groups, self.longest, width).permute(0, 3, 1, 2, 4)
        out = out.reshape(self.batch * self.longest, -1)
        out = out if self._is_even else out.index_select(0, self._slots.on(out.device))
        return out.view(1, -1, heads, width)

    def _with_past(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B · S, width) of whole sequences."""
        if self._past is None:
            return self._spread(key), self._spread(value)
        keys, values = (past.to(key.device) for past in self._past(layer))
        slots = self._key_slots.on(key.device)
        return keys.index_copy_(0, slots, key), values.index_copy_(0, slots, value)

    def _spread(self, rows: Tensor) -> Tensor:
        """(N, width) to (B · T, width), zeros behind shorter sequences."""
        if self._is_even:
            return rows
        spread = rows.new_zeros(self.batch * self.longest, rows.shape[1])
        return spread.index_copy_(0, self._slots.on(rows.device), rows)

    def _needs_mask(self, window: int | None) -> bool:
        """Whether more than causality keeps a query from a key. What pads a sequence lies behind it."""
        return self.prefix > 0 or (window is not None and window < self._reach)

    def _mask(self, window: int | None, groups: int, like: Tensor) -> Tensor:
        """(B, 1, G · T, S) to be added to scores: 0 or −∞. Every query sees itself at least."""
        key = (window, like.dtype, like.device)
        if key not in self._masks:
            starts = self._on_device(self._starts).unsqueeze(1)
            before = torch.arange(self.prefix, device=self._device)
            rows = starts + torch.arange(self.longest, device=self._device)  # (B, T)
            positions = torch.cat([torch.where(before < starts, before, _FAR), rows], 1)  # (B, S)
            hidden = positions.unsqueeze(1) > rows.unsqueeze(2)
            if window is not None:
                hidden |= positions.unsqueeze(1) <= rows.unsqueeze(2) - window
            mask = hiding(hidden, like.dtype).repeat(1, groups, 1).unsqueeze(1)
            self._masks[key] = mask.to(like.device)
        return self._masks[key]

    def _on_device(self, index: Indices) -> Tensor:
        return torch.from_numpy(index).to(self._device)


def _packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: None,
    *,
    packing: Packing,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    out = packing.attend(
        module.layer_idx, query, key, value, scaling=scaling, softcap=softcap, window=sliding_window
    )
    return out, None


class PartialDecoder:
    """Runs parts of one model on packed rows. It changes `model`: pass a copy from `share_weights`."""

    def __init__(self, model: Any) -> None:
        ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _packed_attention)
        model.set_attn_implementation(_ATTENTION)
        self._config = model.config
        self._decoder = model.get_decoder()
        self._head = model.get_output_embeddings()
        self._softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self.blocks = len(self._decoder.layers)
        self.hidden_size = int(model.config.hidden_size)
        self.dtype: torch.dtype = model.dtype
        self.devices = block_devices(model)  # of each block
        attention = self._decoder.layers[0].self_attn
        # Numbers of one token's keys at one block, and as many of its values.
        self.past_width = int(model.config.num_key_value_heads * attention.head_dim)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids (N,) to what the first block reads, (N, d)."""
        embedded: Tensor = self._decoder.embed_tokens(ids)
        return embedded

    def run(
        self,
        hidden: Tensor,
        layers: range,
        packing: Packing,
        *,
        groups: Sequence[ShiftGroup] = (),
        rows: Tensor | None = None,
    ) -> Tensor:
        """hidden (N, d), the input of block layers.start, to the output of the last of `layers`.

        Shifts of `groups` (rows of the packed hidden) apply behind the blocks they name. With `rows`
        (M,), gives those rows alone, (M, d), and the last block computes little else for the others
        than their keys and values.
        """
        embeddings = self._rotary(hidden, packing.position_ids)
        hidden = hidden.unsqueeze(0)
        for layer in layers:
            block, hidden = self._decoder.layers[layer], hidden.to(self.devices[layer])
            arguments = {
                "attention_mask": None,
                "position_ids": packing.position_ids,
                "packing": packing,
                "position_embeddings": embeddings(layer),
            }
            if layer == layers[-1] and rows is not None and not any(layer in g.collective for g in groups):
                return _narrow(block, hidden, rows.to(hidden.device), arguments).squeeze(0)
            hidden = block(hidden, **arguments)
            for group in groups:
                hidden = shift_rows(hidden, group, layer)
        hidden = hidden.squeeze(0)
        return hidden if rows is None else hidden.index_select(0, rows.to(hidden.device))

    def losses(self, hidden: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """−log p of labels (M,) after hidden (M, d), the last block's output: (M,), float32.

        And the gradient of their sum, weighted by `weights` (M,), for hidden: (M, d), empty without
        weights. Computed in chunks, so that logits of all rows never exist at once.
        """
        losses, gradients = [], [hidden.new_empty(0, hidden.shape[1])]
        chunk = slice_rows(self._config.vocab_size)
        for at in range(0, len(hidden), chunk):
            part = hidden[at : at + chunk].detach().requires_grad_(weights is not None)
            with torch.set_grad_enabled(weights is not None):
                logits = self._head(self._decoder.norm(part))
                if self._softcap is not None:
                    logits = torch.tanh(logits / self._softcap) * self._softcap
            of_chunk = labels[at : at + chunk].to(logits.device)
            weight = None if weights is None else weights[at : at + chunk].to(logits.device)
            found, slope = _cross_entropy(logits.detach(), of_chunk, weight)
            losses.append(found)
            if weights is not None:
                gradients += torch.autograd.grad(logits, part, slope)
        return torch.cat(losses), torch.cat(gradients)

    def _rotary(self, hidden: Tensor, position_ids: Tensor) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Layer to its (cos, sin), each (1, N, D)."""
        rotary = self._decoder.rotary_emb
        if self._config.model_type != "gemma3_text":
            one: tuple[Tensor, Tensor] = rotary(hidden, position_ids)
            return lambda _layer: one
        types = self._config.layer_types
        of_type = {kind: rotary(hidden, position_ids, kind) for kind in set(types)}
        return lambda layer: of_type[types[layer]]


def _cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """−log p of labels (M,) by logits (M, V): (M,), float32. And the gradient of their weighted sum, (M, V).

    Autograd would write three (M, V) of float32. Here a few rows at a time stay in a CPU's cache.
    """
    slope = None if weights is None else torch.empty_like(logits)
    losses = []
    size = max(1, _CACHED // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for at in range(0, len(logits), size):
        of_part = labels[at : at + size].unsqueeze(1)
        scores = logits[at : at + size].float().log_softmax(-1)
        losses.append(-scores.gather(1, of_part).squeeze(1))
        if weights is not None and slope is not None:
            weight = weights[at : at + size].unsqueeze(1)  # (softmax − one-hot) · weight
            slope[at : at + size] = scores.exp_().mul_(weight).scatter_add_(1, of_part, -weight)
    return torch.cat(losses), slope


def _narrow(block: Any, hidden: Tensor, rows: Tensor, arguments: dict[str, Any]) -> Tensor:
    """`block` on hidden (1, N, d), its MLP on `rows` (M,) alone: (1, M, d).

    With one norm around attention and MLP each in front, or one in front and one behind (Gemma).
    """
    attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden), **arguments)
    attended, hidden = attended.index_select(1, rows), hidden.index_select(1, rows)
    if hasattr(block, "pre_feedforward_layernorm"):
        hidden = hidden + block.post_attention_layernorm(attended)
        changed = block.mlp(block.pre_feedforward_layernorm(hidden))
        return hidden + block.post_feedforward_layernorm(changed)  # type: ignore[no-any-return]
    hidden = hidden + attended
    return hidden + block.mlp(block.post_attention_layernorm(hidden))  # type: ignore[no-any-return]
