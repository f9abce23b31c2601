"""What an engine for answers takes, gives, promises and forgets.

The service knows engines by this module alone, and `factory` builds them. Every engine passes the
contract suite, tests/support/engine_contract.py, which tests each promise below.

An engine takes a prompt's token ids, which shift the prompt goes through, how tokens are chosen, and whose
request it is. It gives a stream of chunks. It promises:

Right         In float32 and greedy an answer has the tokens that the model gives to this request alone,
              with the shift applied to the intervened prompt positions, however requests are batched.
              BASE is the untouched model, and so is a shift that changes nothing. Log-probabilities, of
              requests that ask for them, are the log-softmax of the logits that a token was chosen from.
Apart         While shapes stay the same, no bit of an answer depends on what others ask or send. With
              `alone`, not even on whether others are there. Tensors of other names or shapes, or with
              numbers that are not finite, are refused; others harm nobody else, however large.
Fair          Owners who want answers at the same time share passes and cache evenly.
Bounded       An answer ends at `max_new_tokens`, at an end of sequence or before a stop text. A request
              takes at most `most_tokens`, and no more than `max_requests` are in flight.
Reproducible  The same request with the same seed draws the same tokens.
Cancellable   `cancel` frees a request at once, from any thread, whether it waits or runs.
Healthy       `health` never blocks. A step that fails ends the answers that it was made for, and the
              engine goes on; when it cannot go on, `is_alive` is false and nothing is taken any more.
Forgetful     Soon after an answer is over, however it ended, the engine refers to nothing that came with
              the request, and keys and values of it are overwritten. No cache outlives a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Chunk, Mode, Sampling, Score

if TYPE_CHECKING:
    from perfit_cloud.engine.device_lock import DeviceLock  # which imports `EngineHealth`

__all__ = [
    "CompletionStream",
    "Engine",
    "EngineHealth",
    "EngineKind",
    "GenerationSettings",
    "Gradient",
    "ShiftUse",
    "most_tokens",
]


@dataclass(frozen=True)
class ShiftUse:
    """One request's shift. `personal` is set in PERSONAL mode alone, `artefact` unless BASE."""

    mode: Mode
    artefact: Artefact | None = None
    personal: ShiftTensors | None = None


class CompletionStream(Protocol):
    """An answer as it is made. `next` waits for a chunk; the last one has `finish` and the counts.

    `next` raises Unavailable when the engine stopped, or when a step that the answer needed failed. After
    `cancel` the stream ends without a last chunk.
    """

    @property
    def ids(self) -> list[int]:
        """Tokens of all chunks so far, an end of sequence included."""

    def __iter__(self) -> Iterator[Chunk]: ...
    def __next__(self) -> Chunk: ...
    def cancel(self) -> None: ...


class EngineHealth(NamedTuple):
    """What tells a working engine from a stuck or a dead one."""

    running: int  # requests or steps at work
    waiting: int  # requests or steps in the queue
    stalled_seconds: float  # since the last progress; 0 when there is nothing to do
    is_alive: bool  # false: it accepts nothing any more

    @property
    def in_flight(self) -> int:
        """Running and waiting."""
        return self.running + self.waiting


@dataclass(frozen=True)
class GenerationSettings:
    cache_tokens: int = 32_768  # tokens whose keys and values are held at once
    batch_tokens: int = 512  # most tokens of one pass, where long prompts are read in parts
    max_requests: int = 64  # answers in flight; more are refused with Busy
    alone: bool = False  # a pass for each request: who else is there changes no bit of an answer
    tensor_parallel: int = 1  # vLLM's workers, of which each computes a part of every block
    pack_weights: bool = False  # of our own engines: decode faster, with `packed_bytes` of memory more


def most_tokens(context: int, cache_tokens: int) -> int:
    """Tokens that one request may take, prompt and answer together, on a model of this context."""
    return min(context, cache_tokens // 2)


class Engine(Protocol):
    """Answers for many devices over one base model and any number of artefacts. Thread-safe."""

    @property
    def continuous(self) -> bool:
        """Whether a request joins the batch at once, or waits until those before it are over."""

    @property
    def cache_tokens_held(self) -> int:
        """Tokens that requests have set aside in the engine's own cache. Never blocks."""

    def start(self) -> None:
        """Be ready for requests; `submit` does it too when needed."""

    def stop(self) -> None:
        """End for good. Answers in flight and all later ones raise Unavailable."""

    def submit(
        self, prompt: list[int], shift: ShiftUse, sampling: Sampling, owner: str = ""
    ) -> CompletionStream:
        """Queue one answer and return at once. Owners share passes and cache evenly.

        Raises Busy when `max_requests` are in flight, InvalidPrompt when the prompt is empty, has a token
        that the model does not know or is too long with its answer, InvalidTensors when the tensors are no
        shift of the artefact's, NotFound when the engine has no such artefact, Unavailable after `stop`.
        """

    def health(self) -> EngineHealth:
        """From any thread, without waiting for any."""


class EngineKind(Protocol):
    """Makes engines, and says what they can do before one is made."""

    @property
    def continuous(self) -> bool:
        """As of the engines. If true, long prompts are read in parts of `batch_tokens`."""

    @property
    def packs(self) -> bool:
        """Whether the engines heed `pack_weights`."""

    def weight_bytes(self, base: BaseModel, tensor_parallel: int, /) -> int:
        """Of the host's memory that an engine takes, in this process, for weights beside the base's."""

    def __call__(
        self,
        base: BaseModel,
        artefacts: Mapping[str, Artefact],
        settings: GenerationSettings,
        device_lock: DeviceLock | None = None,
        /,
    ) -> Engine:
        """All engines on the base's device share `device_lock`."""


@dataclass(frozen=True)
class Gradient:
    loss: float  # nats a token, mean over all target tokens of the batch
    tokens: int
    tensors: ShiftTensors  # d loss / d personal tensor, float32
    scores: Sequence[Score] = ()  # of each example
