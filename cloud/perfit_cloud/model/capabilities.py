"""What a model can do beside the plain pass of one sequence: tried at loading, not looked up by family.

A recurrent state may run over padding, a compressed cache may count from the left end, a table of positions
may have an offset. Families differ, and a wrong guess is a wrong loss. So a trial runs sequences of unequal
lengths together and alone, through blocks, head, backward pass and `generate`. A way of running that differs
or raises is never used. A model is refused only when no way works.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence, ValuesView
from enum import Enum
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from perfit_cloud.model.blocks import block_list, depends_on_length, hidden_of, with_hidden
from perfit_cloud.model.devices import input_device
from perfit_cloud.model.forward import arguments_of, decoder_output, forward, sliced_logits
from perfit_shared.errors import InvalidData

__all__ = ["Batching", "Capabilities", "left_padded", "try_model"]

_log = logging.getLogger(__name__)
_LENGTHS = (19, 6)  # tokens of the sequences that are tried
_PERIODS = ("attention_chunk_size", "block_size", "chunk_size", "mamba_chunk_size")  # of a configuration
_LONGEST = 1024  # tokens of a trial that looks past a family's period
_NEW = 3  # tokens that are decoded
# Mean difference that is rounding, as a share of the mean: float32, and less.
_SAME, _SAME_HALF = 1e-4, 0.05


class Batching(Enum):
    """Which sequences may share a pass and get what each would get alone."""

    ANY_LENGTHS = "any lengths"  # shorter ones padded on the left
    EQUAL_LENGTHS = "equal lengths"
    SINGLE = "one at a time"

    def fits(self, lengths: Sequence[int]) -> bool:
        """Whether sequences of these lengths may share a pass."""
        if self is Batching.ANY_LENGTHS or len(lengths) < 2:
            return True
        return self is Batching.EQUAL_LENGTHS and min(lengths) == max(lengths)


class Capabilities(NamedTuple):
    """Of one model. The defaults are what most families can do."""

    arguments: frozenset[str]  # of its forward pass that we give
    passes: Batching = Batching.ANY_LENGTHS  # forward and backward
    answers: Batching = Batching.ANY_LENGTHS  # `generate`
    caches: bool = True  # whether `generate` may cache keys and values
    in_slices: bool = True  # whether the head can be run apart, on some rows
    keeps_state: bool = False  # whether modules hold on to what the last pass computed


def left_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """ids, attention mask and position ids, each (B, T), zeros in the padding."""
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def try_model(model: Any) -> Capabilities:
    """Run a few short sequences in every way. Raises InvalidData on a model that cannot be used at all."""
    trial = _Trial(model)
    try:
        trial.check_causal()
        trial.check_blocks()
    except InvalidData:
        raise
    except Exception as error:
        raise InvalidData(
            f"a model of the family {model.config.model_type} cannot be run here ({_words(error)})"
        ) from error
    passes = trial.best(trial.passes_alike, "passes") or Batching.SINGLE
    answers, caches = trial.best(partial(trial.answers_alike, caches=True), "answers"), True
    if answers is None:
        answers, caches = trial.best(partial(trial.answers_alike, caches=False), "answers anew"), False
    if answers is None:
        raise InvalidData(f"answers of the family {model.config.model_type} are not what its passes predict")
    if depends_on_length(model):
        passes = Batching.EQUAL_LENGTHS if passes is Batching.ANY_LENGTHS else passes
        answers = Batching.SINGLE
    in_slices = trial.holds(trial.slices_alike, "head in slices")
    return Capabilities(trial.arguments, passes, answers, caches, in_slices, trial.keeps_state())


class _Trial:
    def __init__(self, model: Any) -> None:
        self._model = model
        self._vocabulary = model.config.get_text_config().vocab_size
        self._same = _SAME if model.dtype == torch.float32 else _SAME_HALF
        self.arguments = arguments_of(model) & {
            "attention_mask",
            "position_ids",
            "logits_to_keep",
            "use_cache",
        }
        self._sequences = [self._sequence(7, 3, _LENGTHS[0] + _period(model.config)), self._sequence(11, 5)]
        if "position_ids" in self.arguments and not self.holds(self._positions_alike, "positions"):
            self.arguments -= {"position_ids"}

    def _sequence(self, step: int, first: int, length: int = _LENGTHS[1]) -> list[int]:
        return [(step * i + first) % self._vocabulary for i in range(length)]

    def keeps_state(self) -> bool:
        """Whether modules hold tensors of the last pass, beside weights and buffers."""
        held = []
        for sequence in self._sequences:
            self._logits([sequence])
            held.append({name: tensor.clone() for name, tensor in _plain_tensors(self._model)})
        one, other = held
        return one.keys() != other.keys() or not all(torch.equal(one[name], other[name]) for name in one)

    # -- what must be ------------------------------------------------------------------------------

    def check_causal(self) -> None:
        """Raises InvalidData where a token changes what is predicted before it: losses would mean nothing."""
        changed = [*self._sequences[1][:-1], (self._sequences[1][-1] + 1) % self._vocabulary]
        one, other = (self._logits([s])[0] for s in (self._sequences[1], changed))
        if not self._close(one[:-1], other[:-1]):
            raise InvalidData(
                "this model reads ahead: a token changes the predictions before it; "
                'if it is a decoder, set "is_decoder": true in its config.json'
            )

    def check_blocks(self) -> None:
        """Raises InvalidData unless a block gives (B, T, d), one row a token, and later blocks read it."""
        width = self._model.config.get_text_config().hidden_size
        pair = [self._sequence(7, 3), self._sequences[1]]
        plain = self._logits(pair)
        at = len(pair[1]) // 2

        def change(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = hidden_of(output)
            if hidden.shape[-3:] != (2, len(pair[1]), width):
                raise InvalidData("the blocks of this model do not give one hidden state a token")
            flat = hidden.reshape(-1, width).clone()
            flat[len(pair[1]) + at] += flat.abs().mean() * torch.linspace(-1, 1, width).to(flat)
            return with_hidden(output, flat.view_as(hidden))

        handle = block_list(self._model)[0].register_forward_hook(change)
        try:
            shifted = self._logits(pair)
        finally:
            handle.remove()
        before = [(plain[0], shifted[0]), (plain[1][:at], shifted[1][:at])]
        if not all(self._close(*both) for both in before) or torch.equal(plain[1][at:], shifted[1][at:]):
            raise InvalidData("hidden states of this model cannot be shifted behind a block")

    # -- what is of use ----------------------------------------------------------------------------

    def best(self, alike: Callable[[Sequence[Sequence[int]]], bool], what: str) -> Batching | None:
        """The most that sequences may differ and still be run together; None where not even one can be."""
        long, short = self._sequences
        for batching, tries in (
            (Batching.ANY_LENGTHS, [[long, short]]),
            (Batching.EQUAL_LENGTHS, [[long, self._sequence(13, 7, len(long))]]),
            (Batching.SINGLE, [[long], [short]]),
        ):
            if all(self.holds(partial(alike, tried), f"{what} of {batching.value}") for tried in tries):
                return batching
        return None

    def holds(self, check: Callable[[], bool], what: str) -> bool:
        try:
            found = check()
        except Exception as error:
            _log.info("%s do not fit this model (%s)", what, _words(error))
            return False
        if not found:
            _log.info("%s give other numbers with this model", what)
        return found

    def _positions_alike(self) -> bool:
        """Whether giving positions from 0 is the same as giving none."""
        ids, _, positions = self._on_device([self._sequences[1]])
        with torch.no_grad():
            without = forward(self._model, self.arguments, ids).logits
            given = forward(self._model, self.arguments, ids, position_ids=positions).logits
        return self._close(without, given)

    def passes_alike(self, sequences: Sequence[Sequence[int]]) -> bool:
        """Logits, and the gradient of a loss for the first block's output."""
        together = self._with_gradient(sequences)
        alone = [self._with_gradient([s])[0] for s in sequences]
        return all(
            self._close(*both)
            for a, b in zip(together, alone, strict=True)
            for both in zip(a, b, strict=True)
        )

    def answers_alike(self, sequences: Sequence[Sequence[int]], *, caches: bool) -> bool:
        """Logits of a few tokens that `generate` decodes, against one pass over all tokens."""
        decoded = self._decoded(sequences, caches=caches)
        new = [self._forced(i) for i in range(_NEW - 1)]
        whole = [self._logits([[*s, *new]])[0][len(s) - 1 :] for s in sequences]
        return all(self._close(*both) for both in zip(decoded, whole, strict=True))

    def slices_alike(self) -> bool:
        ids, mask, _ = self._on_device([self._sequences[1]])
        with torch.no_grad():
            output = decoder_output(self._model, self.arguments, ids, attention_mask=mask)
            found = sliced_logits(self._model, self.arguments, output, output[0][0, 2:4])
        return self._close(found, self._logits([self._sequences[1]])[0][2:4])

    # -- helpers -----------------------------------------------------------------------------------

    def _on_device(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
        return tuple(tensor.to(input_device(self._model)) for tensor in left_padded(sequences))

    def _run(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits of each sequence, (its length, V)."""
        ids, mask, positions = self._on_device(sequences)
        logits = forward(self._model, self.arguments, ids, attention_mask=mask, position_ids=positions).logits
        return [row[len(row) - len(s) :] for row, s in zip(logits, sequences, strict=True)]

    @torch.no_grad()
    def _logits(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return self._run(sequences)

    def _with_gradient(self, sequences: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
        """Logits, and the gradient of their loss for what the first block gives, of each sequence."""
        found: list[Tensor] = []

        def take(_module: nn.Module, _args: Any, output: Any) -> Any:
            found.append(hidden_of(output).detach().requires_grad_())
            return with_hidden(output, found[0])

        handle = block_list(self._model)[0].register_forward_hook(take)
        try:
            with torch.enable_grad():
                logits = self._run(sequences)
                loss = sum(row.float().logsumexp(-1).sum() - row[:, 1].float().sum() for row in logits)
                (gradient,) = torch.autograd.grad(loss, found[0])  # type: ignore[arg-type]
        finally:
            handle.remove()
        width = gradient.shape[-2]
        gradients = gradient.reshape(-1, *gradient.shape[-3:])[0]  # of what a shift reaches
        return [
            (row.detach(), of_row[width - len(row) :]) for row, of_row in zip(logits, gradients, strict=True)
        ]

    @torch.no_grad()
    def _decoded(self, sequences: Sequence[Sequence[int]], *, caches: bool) -> list[Tensor]:
        """Logits (new tokens, V) of each, the tokens being the same whatever the logits are."""
        ids, mask, _ = self._on_device(sequences)
        own = self._model.generation_config
        self._model.generation_config = GenerationConfig()
        try:
            logits = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=_NEW,
                do_sample=False,
                use_cache=caches,
                output_logits=True,
                return_dict_in_generate=True,
                logits_processor=LogitsProcessorList([_Forced(ids.shape[1], self._forced)]),
            ).logits
        finally:
            self._model.generation_config = own
        return list(torch.stack(logits, 1))

    def _forced(self, number: int) -> int:
        """The token at this index of every answer."""
        return int((5 * number + 3) % self._vocabulary)

    def _close(self, one: Tensor, other: Tensor) -> bool:
        one, other = one.float(), other.float().to(one.device)
        if not bool(other.isfinite().all()):
            return False
        return bool((one - other).abs().mean() <= self._same * other.abs().mean())


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Chooses tokens by their number in the answer alone."""

    def __init__(self, width: int, token: Callable[[int], int]) -> None:
        self._width, self._token = width, token

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self._token(ids.shape[1] - self._width)] = 0
        return chosen


def _plain_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are attributes of a module, or in a list or dict that is one; no weights, no buffers."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            inside = value.values() if isinstance(value, dict) else value
            for at, part in enumerate(inside if isinstance(inside, list | tuple | ValuesView) else [value]):
                if isinstance(part, Tensor):
                    yield f"{name}.{key}.{at}", part


def _period(config: Any) -> int:
    """Tokens after which a family begins another chunk or compresses a past one, which a trial must see."""
    text = config.get_text_config()
    rates = getattr(text, "compress_rates", None) or {}
    found = [getattr(text, name, None) or 0 for name in _PERIODS]
    found += rates.values() if isinstance(rates, dict) else rates
    return min(max([*(int(n) for n in found if isinstance(n, int)), 0]), _LONGEST)


def _words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__
