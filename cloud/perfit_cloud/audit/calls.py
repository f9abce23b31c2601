"""One call of each RPC, made of canaries: what it sends, how it is made to fail, what to look for.

Every text is random words and every tensor is random, so that each needle stands for this call alone.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import grpc
import numpy as np

from perfit_cloud.audit.needles import (
    LETTERS,
    Needle,
    canary_words,
    gradient_forms,
    gradient_sent,
    tensor_forms,
    text,
    token_ids,
)
from perfit_cloud.audit.reference import ReferenceEngines
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors
from perfit_shared.types import Sampling
from perfit_shared.wire import personalization_pb2 as pb

__all__ = ["CALLS", "Canaries", "PersonalCall", "Running"]

_PROMPT_WORDS = 5
_TARGET_WORDS = 2
_TEMPERATURE = 10.0  # answers of random tokens: canaries, too
_REFUSED_TEMPERATURE = 99.0
_LOGPROBS = 2  # so that the text of each token of an answer is in memory, too
_TRIES = 8  # of seeds, for an answer that goes on for long
_SIZE = 0.05  # of a random change to a rotation


class Canaries:
    """Random texts and tensors of one call."""

    def __init__(self, seed: Sequence[int], reference: ReferenceEngines) -> None:
        self.rng = np.random.default_rng(seed)
        self.reference = reference

    def words(self, count: int) -> str:
        return " ".join(canary_words(self.rng, count))

    def pairs(self, count: int, words: int) -> list[tuple[str, str]]:
        """(prompt, target) of so many examples; `words` of a prompt."""
        return [(self.words(words), f" {self.words(_TARGET_WORDS)}") for _ in range(count)]

    def tensors(self, dtype: str) -> bytes:
        """A random personal shift, in a form of the wire."""
        spec: ShiftSpec = self.reference.artefact.spec
        layers = {}
        of_seed = ShiftTensors.identity(spec, spec.personal_rank, seed=int(self.rng.integers(2**62)))
        for layer, (rotation, source, bias) in of_seed.layers.items():
            change = self.rng.standard_normal(source.shape).astype(np.float32)
            wide = self.rng.standard_normal(bias.shape).astype(np.float32)
            layers[layer] = LayerShift(rotation, source + _SIZE * change, _SIZE * wide)
        return ShiftTensors(layers).to_bytes(dtype=dtype)


class Running:
    """A call under way: its requests go out as they are put in, its replies are read by a thread."""

    def __init__(
        self, call: Callable[[Iterator[Any]], Any], first: Iterable[Any] = (), *, is_future: bool = False
    ) -> None:
        """`call`: starts the RPC for its requests; returns its replies, or (`is_future`) that of one."""
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for request in first:
            self._requests.put(request)
        self._changed = threading.Condition()
        self._replies: list[Any] = []
        self._status: str | None = None
        self._is_future = is_future
        self._call = call(iter(self._requests.get, None))
        threading.Thread(target=self._read, name="audit-call", daemon=True).start()

    @property
    def replies(self) -> list[Any]:
        return list(self._replies)

    @property
    def status(self) -> str | None:
        """Name of the status it ended with; None while it runs."""
        return self._status

    def send(self, *requests: Any) -> None:
        """`None` says that no more will come."""
        for request in requests:
            self._requests.put(request)

    def cancel(self) -> None:
        self._call.cancel()

    def wait(self, seconds: float, is_enough: Callable[[list[Any]], bool] = lambda _: False) -> None:
        """Wait for its end or enough replies. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._status or is_enough(self._replies), seconds):
                raise TimeoutError

    def _read(self) -> None:
        status = "OK"
        try:
            for reply in [self._call.result()] if self._is_future else self._call:
                with self._changed:
                    self._replies.append(reply)
                    self._changed.notify_all()
        except grpc.RpcError as error:
            status = error.code().name
        except grpc.FutureCancelledError:
            status = "CANCELLED"
        finally:
            self._requests.put(None)  # lets go of the thread that sends
            with self._changed:
                self._status = status
                self._changed.notify_all()


class PersonalCall(ABC):
    """One call of an RPC that carries personal data, ready to start."""

    rpc: ClassVar[str]
    needles: list[Needle]

    @abstractmethod
    def start(self, stub: Any, seconds: float) -> Running:
        """Send enough to put the server to work, with this deadline."""

    @abstractmethod
    def refused(self, stub: Any, seconds: float) -> Running:
        """The same with a mistake in it, which the server meets when all else has been decoded."""

    def is_answered(self, replies: list[Any]) -> bool:
        """Whether these are all the replies, of a stream that may go on."""
        return False

    def received(self, replies: list[Any]) -> list[Needle]:
        """The needles of what came back: the gradients as they were sent."""
        sent = [reply.gradient for reply in replies if getattr(reply, "gradient", b"")]
        return [gradient_sent(gradient) for gradient in sent]


class Generate(PersonalCall):
    rpc = "Generate"

    def __init__(self, canaries: Canaries, dtype: str, *, tokens: int) -> None:
        """`tokens`: of the answer, as long as it takes to catch the server at it."""
        personal = canaries.tensors(dtype)
        self._shift = _shift(canaries, personal)
        self._question = _Question(canaries, personal, tokens)
        self.needles = [*tensor_forms(personal, canaries.reference.artefact.spec), *self._question.needles]

    def start(self, stub: Any, seconds: float) -> Running:
        return self._run(stub, seconds, self._question.sampling())

    def refused(self, stub: Any, seconds: float) -> Running:
        return self._run(stub, seconds, self._question.sampling(_REFUSED_TEMPERATURE))

    def _run(self, stub: Any, seconds: float, sampling: pb.Sampling) -> Running:
        request = pb.GenerateRequest(prompt=self._question.prompt, shift=self._shift, sampling=sampling)
        return Running(lambda _: stub.Generate(request, timeout=seconds))


class Ask(PersonalCall):
    rpc = "Ask"

    def __init__(self, canaries: Canaries, dtype: str, *, tokens: int) -> None:
        personal = canaries.tensors(dtype)
        self._questions = [_Question(canaries, personal, tokens) for _ in range(2)]
        self._first = [
            pb.AskRequest(shift=_shift(canaries, personal)),
            *(
                pb.AskRequest(question=pb.Question(number=n, prompt=q.prompt, sampling=q.sampling()))
                for n, q in enumerate(self._questions, 1)
            ),
        ]
        self.needles = list(tensor_forms(personal, canaries.reference.artefact.spec))
        for question in self._questions:
            self.needles += question.needles

    def start(self, stub: Any, seconds: float) -> Running:
        return Running(lambda requests: stub.Ask(requests, timeout=seconds), self._first)

    def refused(self, stub: Any, seconds: float) -> Running:
        running = self.start(stub, seconds)
        running.send(self._first[0])  # a second shift
        return running

    def is_answered(self, replies: list[Any]) -> bool:
        return sum(1 for r in replies if r.failure.code or r.part.finish) == len(self._questions)


class _OneReply(PersonalCall):
    """A request that is answered once."""

    _request: Any

    @abstractmethod
    def _spoil(self, request: Any) -> None:
        """Put the mistake into a request that is like the right one."""

    def start(self, stub: Any, seconds: float) -> Running:
        return self._run(stub, seconds, self._request)

    def refused(self, stub: Any, seconds: float) -> Running:
        request = type(self._request)()
        request.CopyFrom(self._request)
        self._spoil(request)
        return self._run(stub, seconds, request)

    def _run(self, stub: Any, seconds: float, request: Any) -> Running:
        method = getattr(stub, self.rpc)
        return Running(lambda _: method.future(request, timeout=seconds), is_future=True)


class Score(_OneReply):
    rpc = "Score"

    def __init__(self, canaries: Canaries, dtype: str, *, examples: int, words: int) -> None:
        personal, pairs = canaries.tensors(dtype), canaries.pairs(examples, words)
        candidates = [pb.Candidate(prompt=pb.Prompt(text=p), answer=t) for p, t in pairs]
        self._request = pb.ScoreRequest(candidates=candidates, shift=_shift(canaries, personal))
        self.needles = [
            *tensor_forms(personal, canaries.reference.artefact.spec),
            *_of_pairs(canaries, pairs),
        ]

    def _spoil(self, request: Any) -> None:
        request.candidates[-1].answer = " "


class ComputeGradient(_OneReply):
    rpc = "ComputeGradient"

    def __init__(self, canaries: Canaries, dtype: str, *, examples: int, words: int) -> None:
        personal, pairs = canaries.tensors(dtype), canaries.pairs(examples, words)
        self._request = pb.ComputeGradientRequest(examples=_examples(pairs), shift=_shift(canaries, personal))
        reference = canaries.reference
        self.needles = [
            *tensor_forms(personal, reference.artefact.spec),
            *_of_pairs(canaries, pairs),
            *gradient_forms(reference.gradient(pairs, reference.decoded(personal))),
        ]

    def _spoil(self, request: Any) -> None:
        request.examples[-1].target = " "


class Adapt(PersonalCall):
    rpc = "Adapt"

    def __init__(self, canaries: Canaries, dtype: str, *, examples: int, words: int) -> None:
        personal, pairs = canaries.tensors(dtype), canaries.pairs(examples, words)
        reference = canaries.reference
        artefact = reference.artefact
        self._first = [
            pb.AdaptRequest(open=pb.AdaptOpen(artefact=artefact.name, version=artefact.version)),
            pb.AdaptRequest(examples=pb.AdaptExamples(examples=_examples(pairs))),
        ]
        self._personal, self._rows = personal, range(examples)
        self.needles = [
            *tensor_forms(personal, artefact.spec),
            *_of_pairs(canaries, pairs),
            *gradient_forms(reference.step(pairs, reference.decoded(personal))),
        ]

    def start(self, stub: Any, seconds: float) -> Running:
        return self._run(stub, seconds, self._rows)

    def refused(self, stub: Any, seconds: float) -> Running:
        return self._run(stub, seconds, [0, len(self._rows)])  # examples are counted from 0

    def _run(self, stub: Any, seconds: float, rows: Iterable[int]) -> Running:
        step = pb.AdaptRequest(step=pb.AdaptStep(personal=self._personal, rows=rows))
        return Running(lambda requests: stub.Adapt(requests, timeout=seconds), [*self._first, step])

    def is_answered(self, replies: list[Any]) -> bool:
        return bool(replies)


CALLS: dict[str, type[Any]] = {kind.rpc: kind for kind in (Generate, Ask, Score, ComputeGradient, Adapt)}


class _Question:
    """A prompt, and the answer that it will get."""

    def __init__(self, canaries: Canaries, personal: bytes, tokens: int) -> None:
        reference, words = canaries.reference, canaries.words(_PROMPT_WORDS)
        tensors = reference.decoded(personal)
        answers = []
        for _ in range(_TRIES):
            seed = int(canaries.rng.integers(2**32))
            settings = Sampling(max_new_tokens=tokens, temperature=_TEMPERATURE, seed=seed)
            answers.append((reference.answer(words, tensors, settings), settings))
            if len(answers[-1][0][1]) >= tokens * 2 // 3:
                break
        (answer, ids), self._settings = max(answers, key=lambda answered: len(answered[0][1]))
        self.prompt = pb.Prompt(text=words)
        self.needles = [
            *text("prompt text", words.split()),
            *token_ids("prompt ids", [reference.base.encode(words)]),
            *text("answer text", _windows(answer, reference, ids)),
            *token_ids("answer ids", [ids]),
        ]

    def sampling(self, temperature: float | None = None) -> pb.Sampling:
        settings = self._settings
        return pb.Sampling(
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            temperature=settings.temperature if temperature is None else temperature,
            logprobs=_LOGPROBS,
        )


def _windows(answer: str, reference: ReferenceEngines, ids: list[int]) -> list[str]:
    """Every 8 characters of an answer that parts of three tokens made.

    Its words are the model's own, and stand in many a library; three random tokens in a row do not.
    """
    ends = [len(reference.base.decode(ids[: n + 1])) for n in range(len(ids))]
    return [
        answer[at : at + LETTERS]
        for at in range(len(answer) - LETTERS + 1)
        if sum(1 for end in ends if at < end < at + LETTERS) >= 2
    ]


def _of_pairs(canaries: Canaries, pairs: list[tuple[str, str]]) -> Iterator[Needle]:
    ids = canaries.reference.ids(pairs)
    yield from text("example text", [word for pair in pairs for word in " ".join(pair).split()])
    yield from token_ids("example ids", [of_side for pair in ids for of_side in pair])


def _shift(canaries: Canaries, personal: bytes) -> pb.Shift:
    artefact = canaries.reference.artefact
    return pb.Shift(
        mode=pb.SHIFT_MODE_PERSONAL, artefact=artefact.name, version=artefact.version, personal=personal
    )


def _examples(pairs: list[tuple[str, str]]) -> list[pb.Example]:
    return [pb.Example(prompt=pb.Prompt(text=prompt), target=target) for prompt, target in pairs]
