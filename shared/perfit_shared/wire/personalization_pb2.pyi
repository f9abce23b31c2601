from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ShiftMode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SHIFT_MODE_UNSPECIFIED: _ClassVar[ShiftMode]
    SHIFT_MODE_BASE: _ClassVar[ShiftMode]
    SHIFT_MODE_COLLECTIVE: _ClassVar[ShiftMode]
    SHIFT_MODE_PERSONAL: _ClassVar[ShiftMode]

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_END: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
SHIFT_MODE_UNSPECIFIED: ShiftMode
SHIFT_MODE_BASE: ShiftMode
SHIFT_MODE_COLLECTIVE: ShiftMode
SHIFT_MODE_PERSONAL: ShiftMode
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_END: FinishReason
FINISH_REASON_LENGTH: FinishReason

class Shift(_message.Message):
    __slots__ = ("mode", "artefact", "version", "personal")
    MODE_FIELD_NUMBER: _ClassVar[int]
    ARTEFACT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    mode: ShiftMode
    artefact: str
    version: str
    personal: bytes
    def __init__(self, mode: _Optional[_Union[ShiftMode, str]] = ..., artefact: _Optional[str] = ..., version: _Optional[str] = ..., personal: _Optional[bytes] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("text", "chat")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: Chat
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ...) -> None: ...

class ShiftSpec(_message.Message):
    __slots__ = ("layers", "positions", "collective_rank", "personal_rank", "hidden_size")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_RANK_FIELD_NUMBER: _ClassVar[int]
    PERSONAL_RANK_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedScalarFieldContainer[int]
    positions: str
    collective_rank: int
    personal_rank: int
    hidden_size: int
    def __init__(self, layers: _Optional[_Iterable[int]] = ..., positions: _Optional[str] = ..., collective_rank: _Optional[int] = ..., personal_rank: _Optional[int] = ..., hidden_size: _Optional[int] = ...) -> None: ...

class Artefact(_message.Message):
    __slots__ = ("name", "version", "spec", "task_json", "learning_rate", "epochs", "batch_size", "communities")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TASK_JSON_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    COMMUNITIES_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    spec: ShiftSpec
    task_json: str
    learning_rate: float
    epochs: int
    batch_size: int
    communities: int
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., spec: _Optional[_Union[ShiftSpec, _Mapping]] = ..., task_json: _Optional[str] = ..., learning_rate: _Optional[float] = ..., epochs: _Optional[int] = ..., batch_size: _Optional[int] = ..., communities: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("prompt_tokens", "new_tokens", "examples", "message_bytes", "adapt_examples", "adapt_tokens", "questions", "context", "call_tokens", "logprobs")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ADAPT_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ADAPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUESTIONS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CALL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    new_tokens: int
    examples: int
    message_bytes: int
    adapt_examples: int
    adapt_tokens: int
    questions: int
    context: int
    call_tokens: int
    logprobs: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., new_tokens: _Optional[int] = ..., examples: _Optional[int] = ..., message_bytes: _Optional[int] = ..., adapt_examples: _Optional[int] = ..., adapt_tokens: _Optional[int] = ..., questions: _Optional[int] = ..., context: _Optional[int] = ..., call_tokens: _Optional[int] = ..., logprobs: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("base_model", "fingerprint", "artefacts", "limits", "cloud_id", "continuous", "keeps", "sealing_keys")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ARTEFACTS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    CLOUD_ID_FIELD_NUMBER: _ClassVar[int]
    CONTINUOUS_FIELD_NUMBER: _ClassVar[int]
    KEEPS_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEYS_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    fingerprint: str
    artefacts: _containers.RepeatedCompositeFieldContainer[Artefact]
    limits: Limits
    cloud_id: str
    continuous: bool
    keeps: bool
    sealing_keys: _containers.RepeatedCompositeFieldContainer[SealingKey]
    def __init__(self, base_model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., artefacts: _Optional[_Iterable[_Union[Artefact, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., cloud_id: _Optional[str] = ..., continuous: _Optional[bool] = ..., keeps: _Optional[bool] = ..., sealing_keys: _Optional[_Iterable[_Union[SealingKey, _Mapping]]] = ...) -> None: ...

class SealingKey(_message.Message):
    __slots__ = ("certificate", "evidence")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    evidence: bytes
    def __init__(self, certificate: _Optional[bytes] = ..., evidence: _Optional[bytes] = ...) -> None: ...

class FetchSeedRequest(_message.Message):
    __slots__ = ("artefact",)
    ARTEFACT_FIELD_NUMBER: _ClassVar[int]
    artefact: str
    def __init__(self, artefact: _Optional[str] = ...) -> None: ...

class FetchSeedResponse(_message.Message):
    __slots__ = ("version", "seed", "communities")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    COMMUNITIES_FIELD_NUMBER: _ClassVar[int]
    version: str
    seed: bytes
    communities: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, version: _Optional[str] = ..., seed: _Optional[bytes] = ..., communities: _Optional[_Iterable[bytes]] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "logprobs", "frequency_penalty", "presence_penalty")
    MAX_NEW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    logprobs: int
    frequency_penalty: float
    presence_penalty: float
    def __init__(self, max_new_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ..., logprobs: _Optional[int] = ..., frequency_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("prompt", "shift", "sampling")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    shift: Shift
    sampling: Sampling
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., shift: _Optional[_Union[Shift, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("text", "finish", "prompt_tokens", "answer_tokens", "logprobs")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    text: str
    finish: FinishReason
    prompt_tokens: int
    answer_tokens: int
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprob]
    def __init__(self, text: _Optional[str] = ..., finish: _Optional[_Union[FinishReason, str]] = ..., prompt_tokens: _Optional[int] = ..., answer_tokens: _Optional[int] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprob, _Mapping]]] = ...) -> None: ...

class TokenLogprob(_message.Message):
    __slots__ = ("text", "data", "logprob", "top")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    text: str
    data: bytes
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, text: _Optional[str] = ..., data: _Optional[bytes] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("text", "data", "logprob")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    text: str
    data: bytes
    logprob: float
    def __init__(self, text: _Optional[str] = ..., data: _Optional[bytes] = ..., logprob: _Optional[float] = ...) -> None: ...

class AskRequest(_message.Message):
    __slots__ = ("shift", "question")
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    shift: Shift
    question: Question
    def __init__(self, shift: _Optional[_Union[Shift, _Mapping]] = ..., question: _Optional[_Union[Question, _Mapping]] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("number", "prompt", "sampling")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    number: int
    prompt: Prompt
    sampling: Sampling
    def __init__(self, number: _Optional[int] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ...) -> None: ...

class AskResponse(_message.Message):
    __slots__ = ("number", "part", "failure")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    number: int
    part: GenerateResponse
    failure: Failure
    def __init__(self, number: _Optional[int] = ..., part: _Optional[_Union[GenerateResponse, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "retry_ms")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_MS_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_ms: int
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_ms: _Optional[int] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("prompt", "answer")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    answer: str
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., answer: _Optional[str] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("candidates", "shift")
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    shift: Shift
    def __init__(self, candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., shift: _Optional[_Union[Shift, _Mapping]] = ...) -> None: ...

class CandidateScore(_message.Message):
    __slots__ = ("log_likelihood", "tokens")
    LOG_LIKELIHOOD_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    log_likelihood: float
    tokens: int
    def __init__(self, log_likelihood: _Optional[float] = ..., tokens: _Optional[int] = ...) -> None: ...

class ScoreResponse(_message.Message):
    __slots__ = ("scores",)
    SCORES_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedCompositeFieldContainer[CandidateScore]
    def __init__(self, scores: _Optional[_Iterable[_Union[CandidateScore, _Mapping]]] = ...) -> None: ...

class Example(_message.Message):
    __slots__ = ("prompt", "target")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    target: str
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., target: _Optional[str] = ...) -> None: ...

class ComputeGradientRequest(_message.Message):
    __slots__ = ("examples", "shift")
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    shift: Shift
    def __init__(self, examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., shift: _Optional[_Union[Shift, _Mapping]] = ...) -> None: ...

class ComputeGradientResponse(_message.Message):
    __slots__ = ("loss", "tokens", "gradient")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    loss: float
    tokens: int
    gradient: bytes
    def __init__(self, loss: _Optional[float] = ..., tokens: _Optional[int] = ..., gradient: _Optional[bytes] = ...) -> None: ...

class AdaptRequest(_message.Message):
    __slots__ = ("open", "examples", "step")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    open: AdaptOpen
    examples: AdaptExamples
    step: AdaptStep
    def __init__(self, open: _Optional[_Union[AdaptOpen, _Mapping]] = ..., examples: _Optional[_Union[AdaptExamples, _Mapping]] = ..., step: _Optional[_Union[AdaptStep, _Mapping]] = ...) -> None: ...

class AdaptOpen(_message.Message):
    __slots__ = ("artefact", "version")
    ARTEFACT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    artefact: str
    version: str
    def __init__(self, artefact: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class AdaptExamples(_message.Message):
    __slots__ = ("examples",)
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    def __init__(self, examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ...) -> None: ...

class AdaptStep(_message.Message):
    __slots__ = ("personal", "rows", "loss_only")
    PERSONAL_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LOSS_ONLY_FIELD_NUMBER: _ClassVar[int]
    personal: bytes
    rows: _containers.RepeatedScalarFieldContainer[int]
    loss_only: bool
    def __init__(self, personal: _Optional[bytes] = ..., rows: _Optional[_Iterable[int]] = ..., loss_only: _Optional[bool] = ...) -> None: ...

class AdaptResponse(_message.Message):
    __slots__ = ("loss", "tokens", "gradient", "scores")
    LOSS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRADIENT_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    loss: float
    tokens: int
    gradient: bytes
    scores: _containers.RepeatedCompositeFieldContainer[CandidateScore]
    def __init__(self, loss: _Optional[float] = ..., tokens: _Optional[int] = ..., gradient: _Optional[bytes] = ..., scores: _Optional[_Iterable[_Union[CandidateScore, _Mapping]]] = ...) -> None: ...
