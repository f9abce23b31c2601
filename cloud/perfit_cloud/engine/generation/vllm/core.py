"""Starts vLLM's engine core with what perfit promises set, and talks to it.

vLLM's own front end stays out: no tokenizer, no text, no request log, no statistics of its.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from perfit_cloud.engine.generation.sampling import Likelihood
from perfit_cloud.engine.generation.vllm.plugin import KEY, forget_failures, register
from perfit_cloud.engine.generation.vllm.processes import WorkerProcesses, starting_workers
from perfit_cloud.engine.generation.vllm.weights import LOAD_FORMAT, offered
from perfit_cloud.engine.interface import GenerationSettings
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import ConfigError, InvalidData
from perfit_shared.types import MOST_LOGPROBS, Sampling

__all__ = ["EngineCore", "Output", "check_installed", "copy_bytes", "takes"]

_BLOCK_TOKENS = 32  # of a page of keys and values, on a CPU; on a GPU vLLM chooses
_GPU_BLOCK_TOKENS = 16
_LEAST_TEMPERATURE, _LEAST_TOP_P = 1e-2, 1e-6  # what vLLM takes at least; below that it is greedy in effect
_SEEDS = 2**63
_OF_FREE = 0.9  # of a card's free memory
# Read by vLLM when it is imported and in its processes.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a process of the core's would not be hardened
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plug-in is around the first one's methods
    "VLLM_NO_USAGE_STATS": "1",  # it would send what it runs on to its makers
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_CONFIGURE_LOGGING": "0",  # our own logging's levels and format
    "VLLM_LOG_STATS_INTERVAL": "1e9",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other engines compute in the same cores
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # never fork with gRPC's threads
    # All workers are on this machine, and no other is to reach what they listen on.
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",  # cards' memory that other processes are to open
}
# vLLM compiles a few small functions when a request first needs them: with g++, which takes long, and not at
# all where there is none.
_ON_CPU = {"TORCHDYNAMO_DISABLE": "1"}
_STARTING = threading.Lock()
_REFUSALS = (AssertionError, ImportError, RuntimeError, ValueError)  # of a model by vLLM
# Models of vLLM's own that the contract of engines is asked of (tests/vllm/test_contract.py).
_SHOWN = {
    f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3", "OPT")
} | {"GPT2LMHeadModel"}
_NO_WINDOWS_IN_PART = {"qwen2", "qwen3"}  # where some blocks have a sliding window, vLLM takes none of these


class Output(NamedTuple):
    """What a step made for one request."""

    request: str
    tokens: list[int]
    likelihoods: list[Likelihood | None]  # of each token


def check_installed() -> None:
    """Raises ConfigError where vLLM is not installed."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "vLLM is not installed; pip install 'perfit[vllm]', or serve with --engine own"
        ) from error


def takes(base: BaseModel) -> bool:
    """Whether vLLM's build here is for the base's device, and is known to answer as it should on its family.

    For who leaves the engine to us; who names vLLM may try any family.
    """
    from vllm.platforms import current_platform

    config = base.model.config.get_text_config()
    windows = set(getattr(config, "layer_types", None) or ()) == {"sliding_attention", "full_attention"}
    if (
        (base.device.type == "cpu") != current_platform.is_cpu()
        or type(base.model).__name__ not in _SHOWN
        or getattr(base.model.config, "quantization_config", None) is not None
        or (windows and config.model_type in _NO_WINDOWS_IN_PART)
    ):
        return False
    if not current_platform.is_cpu():
        return True
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width in CPUAttentionBackend.get_supported_head_sizes()


def copy_bytes(base: BaseModel) -> int:
    """Of the host's memory that vLLM's copy of the weights takes."""
    from vllm.platforms import current_platform

    return sum(weight.nbytes for weight in base.model.parameters()) if current_platform.is_cpu() else 0


class EngineCore:
    """One engine core, in this process. For one thread at a time."""

    def __init__(
        self,
        base: BaseModel,
        settings: GenerationSettings,
        told: dict[str, Any],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`told` reaches the plug-in in every worker; `ended` is called when a worker process ends early.

        Raises InvalidData if vLLM takes no such model.
        """
        os.environ.update(_ENVIRONMENT)
        if base.device.type == "cpu":
            os.environ.update(_ON_CPU)
        check_installed()
        logging.getLogger("vllm").setLevel(logging.ERROR)
        forget_failures()
        register()
        self._unfinished: dict[str, int] = {}  # how many log probabilities each asks for
        with _STARTING:
            self._client = _start(base, settings, told)
        self._core = self._client.engine_core
        self._workers: WorkerProcesses | None = None
        if settings.tensor_parallel > 1:
            self._workers = WorkerProcesses(self._core.model_executor, ended)

    @property
    def is_alive(self) -> bool:
        """Whether all workers are."""
        return self._workers is None or self._workers.are_alive

    @property
    def is_busy(self) -> bool:
        """Whether `step` has something to do: also to tell workers who has ended."""
        return bool(self._core.scheduler.has_requests())

    def add(
        self,
        request: str,
        prompt: Sequence[int],
        sampling: Sampling,
        end_ids: Sequence[int],
        told: Sequence[int],
    ) -> None:
        """Queue a request. `told` says to the workers' plug-in how it is shifted; empty: not at all."""
        from vllm.v1.engine import EngineCoreRequest

        self._client.add_request(
            EngineCoreRequest(
                request_id=request,
                prompt_token_ids=list(prompt),
                mm_features=None,
                sampling_params=_parameters(sampling, end_ids, told),
                pooling_params=None,
                arrival_time=time.time(),
                lora_request=None,
                cache_salt=None,
                data_parallel_rank=None,
            )
        )
        self._unfinished[request] = sampling.logprobs

    def abort(self, requests: Sequence[str]) -> None:
        """Let go of these; harmless for those that are finished."""
        if known := [request for request in requests if request in self._unfinished]:
            self._client.abort_requests(known)
            for request in known:
                del self._unfinished[request]

    def step(self) -> list[Output]:
        """Run a step. Call it while the core `is_busy` alone."""
        torch.get_num_threads()  # has OpenMP told in this thread; vLLM plans attention before PyTorch would
        outputs = []
        for each in self._client.get_output().outputs:
            tokens = list(each.new_token_ids)
            wanted = self._unfinished.get(each.request_id, 0)
            found = _likelihoods(each.new_logprobs, len(tokens), wanted)
            outputs.append(Output(each.request_id, tokens, found))
            if each.finished:
                self._unfinished.pop(each.request_id, None)
        if self._workers is not None:
            self._workers.overwrite_messages(wait=not self.is_busy)
        return outputs

    def close(self) -> None:
        self._client.shutdown()

    @property
    def runner(self) -> Any:
        """vLLM's model runner."""
        return self._core.model_executor.driver_worker.worker.model_runner


def _import_class(name: str) -> None:
    """Import vLLM's model of this name, or vLLM starts a process to look at it, and imports itself there."""
    from vllm import ModelRegistry

    if (found := ModelRegistry.models.get(name)) is not None:
        ModelRegistry.register_model(name, found.load_model_cls())


def _start(base: BaseModel, settings: GenerationSettings, told: dict[str, Any]) -> Any:
    """vLLM's client of a new core. Raises InvalidData."""
    from vllm.v1.engine.core_client import EngineCoreClient
    from vllm.v1.executor import Executor

    workers = settings.tensor_parallel
    # Of a worker process that fails to start vLLM knows no more than that, and says it with an Exception.
    refusals: tuple[type[Exception], ...] = _REFUSALS if workers == 1 else (Exception,)
    set_threads = torch.set_num_threads  # which vLLM's worker takes away
    with (
        _folder_of(base) as folder,
        offered(base, workers) as weights,
        starting_workers(workers, base.device, folder) as of_workers,
        _library_s_classes_kept(),
    ):
        try:
            _import_class(type(base.model).__name__)
            arguments = _arguments(base, settings, folder, weights, told | of_workers)
            config = arguments.create_engine_config()
            return EngineCoreClient.make_client(
                multiprocess_mode=False,
                asyncio_mode=False,
                vllm_config=config,
                executor_class=Executor.get_class(config),
                log_stats=False,
            )
        except refusals as error:
            raise InvalidData(f"vLLM does not take {base.name}; set engine to own: {error}") from error
        finally:
            torch.set_num_threads = set_threads


@contextlib.contextmanager
def _library_s_classes_kept() -> Iterator[None]:
    """Models of the transformers library work as before, for whoever else has one.

    Behind its transformers backend vLLM would change the very class of the model, so that it compiles.
    """
    from vllm.model_executor.models.transformers.base import Base

    decorate = Base._decorate_for_torch_compile
    Base._decorate_for_torch_compile = lambda _: None
    try:
        yield
    finally:
        Base._decorate_for_torch_compile = decorate


def _arguments(
    base: BaseModel, settings: GenerationSettings, folder: Path, weights: dict[str, Any], told: dict[str, Any]
) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()  # the model here may be on the host, and vLLM's workers on cards
    page = _BLOCK_TOKENS if on_cpu else _GPU_BLOCK_TOKENS
    requests = 1 if settings.alone else settings.max_requests
    workers = settings.tensor_parallel
    # Each request may leave its last page part empty, and vLLM keeps one that nobody has.
    pages = -(-settings.cache_tokens // page) + settings.max_requests + 1
    if on_cpu:
        graphs: dict[str, Any] = {"enforce_eager": True}
    else:
        from vllm.config import CompilationConfig

        # Passes with prompts run eagerly, where hooks run; decoding replays graphs, where none does.
        graphs = {"compilation_config": CompilationConfig(mode=0, cudagraph_mode="FULL_DECODE_ONLY")}
        alone = workers == 1 and base.device.type == "cuda"
        cards = [base.device] if alone else [torch.device("cuda", n) for n in range(workers)]
        free = min(free / total for free, total in map(torch.cuda.mem_get_info, cards))
        graphs["gpu_memory_utilization"] = _OF_FREE * free  # vLLM refuses to start beyond that
    return EngineArgs(
        model=str(folder),
        load_format=LOAD_FORMAT,
        model_loader_extra_config=weights,
        tensor_parallel_size=workers,
        distributed_executor_backend=None if workers == 1 else "mp",
        skip_tokenizer_init=True,
        generation_config="vllm",  # what the model's folder suggests is not used
        dtype=str(base.model.dtype).removeprefix("torch."),
        max_model_len=min(base.context, settings.cache_tokens),
        max_num_seqs=requests,
        max_num_batched_tokens=max(settings.batch_tokens, requests),
        enable_chunked_prefill=True,
        enable_prefix_caching=False,  # keys and values hold one user's shift, and timing tells of text
        disable_hybrid_kv_cache_manager=True,
        block_size=page,
        num_gpu_blocks_override=pages,
        kv_cache_memory_bytes=_cache_bytes(base, pages * page, workers),
        max_logprobs=MOST_LOGPROBS,
        logprobs_mode="raw_logprobs",
        async_scheduling=False,
        disable_log_stats=True,
        additional_config={KEY: told},
        **graphs,
    )


def _cache_bytes(base: BaseModel, tokens: int, workers: int) -> int:
    """Keys and values of so many tokens in each of the workers, with room for vLLM's own rounding."""
    config = base.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    groups = max(1, groups // workers)
    return int(2 * base.blocks * groups * width * base.model.dtype.itemsize * tokens * 1.1) + 2**20


def _parameters(sampling: Sampling, end_ids: Sequence[int], told: Sequence[int]) -> Any:
    from vllm import SamplingParams

    is_greedy = sampling.temperature <= 0
    made = SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=0.0 if is_greedy else 1.0,
        top_k=0 if is_greedy else min(sampling.top_k, 2**31 - 1),
        top_p=1.0 if is_greedy else max(sampling.top_p, _LEAST_TOP_P),
        seed=None if is_greedy else sampling.seed % _SEEDS,
        logprobs=sampling.logprobs or None,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        stop_token_ids=list(end_ids),
        ignore_eos=True,  # the model's own are among these
        detokenize=False,
        extra_args={KEY: list(told)} if told else None,
    )
    if not is_greedy:
        # Not above: vLLM refuses what is hotter than 2, though it draws from it as from any other.
        made.temperature = max(sampling.temperature, _LEAST_TEMPERATURE)
    return made


def _likelihoods(found: Any, count: int, wanted: int) -> list[Likelihood | None]:
    """vLLM names the chosen token first, then the likeliest: as many as anybody in the batch asks for."""
    if found is None:
        return [None] * count
    most = 1 + wanted
    rows = zip(found.logprob_token_ids[:, :most].tolist(), found.logprobs[:, :most].tolist(), strict=True)
    return [Likelihood(values[0], tuple(zip(ids[1:], values[1:], strict=True))) for ids, values in rows]


@contextlib.contextmanager
def _folder_of(base: BaseModel) -> Iterator[Path]:
    """A folder that vLLM reads the model's configuration from; gone when it has."""
    with tempfile.TemporaryDirectory(prefix="perfit-vllm-") as name:
        config = copy.deepcopy(base.model.config)
        config.architectures = [type(base.model).__name__]  # a model that was never saved does not say
        config.save_pretrained(name)
        yield Path(name)
