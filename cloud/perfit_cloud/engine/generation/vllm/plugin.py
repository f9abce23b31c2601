"""What vLLM loads in each of its processes, by the entry point `vllm.general_plugins`.

It does nothing in a vLLM that perfit has not started: it acts where `additional_config` has perfit's key.
Its methods are put around those of vLLM's model runner, which no configuration can replace; the tests run
with the version that constraints name, and vLLM's internals move.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from perfit_cloud.hardening.process import harden_child

__all__ = ["KEY", "forget_failures", "register"]

KEY = "perfit"  # in vLLM's additional_config, and in a request's extra_args


def register() -> None:
    """Let perfit's part of a worker see what the model runner does. Harmless when repeated."""
    harden_child()  # a process that a hardened server has started for a worker
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.executor.multiproc_executor import WorkerProc
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner  # the base of the CPU's, too
    from vllm.v1.worker.worker_base import WorkerBase

    from perfit_cloud.engine.generation.vllm.weights import register_loader

    if getattr(GPUModelRunner, "_perfit", False):
        return
    GPUModelRunner._perfit = True
    forget_failures()
    register_loader()
    _around(WorkerBase, "__init__", _worker_made)
    _around(WorkerProc, "_init_message_queues", _queues_made)
    _around(WorkerProc, "shutdown", _worker_over)
    _around(Attention, "get_kv_cache_spec", _whole_cache)
    _around(GPUModelRunner, "initialize_kv_cache", _attached)
    _around(GPUModelRunner, "_update_states", _states_updated)
    _around(GPUModelRunner, "_prepare_inputs", _inputs_prepared)
    _around(GPUModelRunner, "_determine_batch_execution_and_padding", _execution_chosen)
    _around(GPUModelRunner, "execute_model", _executed)
    _around(GPUModelRunner, "sample_tokens", _sampled)


def forget_failures() -> None:
    """Of an engine that fails vLLM writes its input to the log; of ours it says only where it failed."""
    from vllm.v1.engine import core

    core.dump_engine_exception = lambda *_: None
    log = logging.getLogger("vllm")
    if not any(isinstance(each, _LocationAlone) for each in log.filters):
        # Filters of a logger do not see the records of loggers below it, so the handlers have one, too.
        last = [] if logging.lastResort is None else [logging.lastResort]  # where nothing is set up
        for target in (log, *log.handlers, *logging.getLogger().handlers, *last):
            target.addFilter(_LocationAlone())


class _LocationAlone(logging.Filter):
    """Of an error that vLLM logs, where it came from; not its text, which may quote what it worked on."""

    def filter(self, record: logging.LogRecord) -> bool:
        from perfit_cloud.engine.errors import error_location

        if record.name.split(".")[0] == "vllm" and record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else None
            where = f": {error_location(error)}" if isinstance(error, Exception) else ""
            record.msg, record.args = f"failed in {record.module}:{record.lineno}{where}", ()
            record.exc_info = record.exc_text = record.stack_info = None
        return True


def _around(of: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Call `wrapper(runner, original, ...)` in place of a method. Raises AttributeError on another vLLM."""
    method = getattr(of, name)

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrapper(self, functools.partial(method, self), *args, **kwargs)

    setattr(of, name, called)


def _worker_made(
    _worker: Any, original: Callable[..., None], vllm_config: Any, *args: Any, **kwargs: Any
) -> None:
    from perfit_cloud.engine.generation.vllm.processes import enter_worker

    if (told := (vllm_config.additional_config or {}).get(KEY)) is not None:
        enter_worker(told)
    original(vllm_config, *args, **kwargs)


def _queues_made(worker: Any, original: Callable[..., None], handle: Any, config: Any) -> None:
    from perfit_cloud.engine.generation.vllm.messages import forget_name_when_ready

    original(handle, config)
    if KEY in (config.additional_config or {}):
        worker.perfit = True
        forget_name_when_ready(worker.worker_response_mq)


def _worker_over(worker: Any, original: Callable[..., None]) -> None:
    """vLLM's own end and Python's collect millions of objects: longer than a server that stops waits."""
    if not hasattr(worker, "perfit"):
        original()
        return
    met = worker.worker.worker.distributed_init_method  # the file by which workers found each other
    if met.startswith("file://"):
        Path(met.removeprefix("file://")).unlink(missing_ok=True)
    os._exit(0)


def _whole_cache(_layer: Any, original: Callable[..., Any], config: Any) -> Any:
    """Also behind a sliding window a request keeps all its pages until it ends.

    Else vLLM would give pages to others before that, a worker would not hear of it, and their content would
    stay.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    spec = original(config)
    if KEY not in (config.additional_config or {}) or not isinstance(spec, SlidingWindowSpec):
        return spec
    shared = {each.name for each in fields(FullAttentionSpec) if each.init} & {f.name for f in fields(spec)}
    return FullAttentionSpec(**{name: getattr(spec, name) for name in shared})


def _attached(runner: Any, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    from perfit_cloud.engine.generation.vllm.worker import WorkerShifts

    original(*args, **kwargs)
    told = (runner.vllm_config.additional_config or {}).get(KEY)
    if told is not None and not hasattr(runner, "perfit"):
        runner.perfit = WorkerShifts(runner, told)


def _states_updated(runner: Any, original: Callable[..., Any], step: Any) -> Any:
    shifts = getattr(runner, "perfit", None)
    if shifts is None:
        return original(step)
    ended = shifts.before_update(step)
    done = original(step)
    shifts.after_update(step, ended)
    return done


def _inputs_prepared(runner: Any, original: Callable[..., Any], step: Any, counts: Any) -> Any:
    prepared = original(step, counts)
    if (shifts := getattr(runner, "perfit", None)) is not None:
        shifts.activate(counts)
    return prepared


def _execution_chosen(runner: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A replayed graph runs no hook, so a pass that shifts rows is never one."""
    shifts = getattr(runner, "perfit", None)
    if shifts is not None and shifts.is_active:
        kwargs["force_eager"] = True
    return original(*args, **kwargs)


def _executed(runner: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    shifts = getattr(runner, "perfit", None)
    if shifts is None:
        return original(*args, **kwargs)
    from perfit_cloud.engine.errors import error_location

    failed = ""
    with shifts.hold():
        try:
            return original(*args, **kwargs)
        except Exception as error:
            failed = error_location(error)
        finally:
            shifts.deactivate()
    # Not from within the handler: that error's frames and text would come along into logs and pipes.
    raise RuntimeError(f"a pass failed: {failed}")


def _sampled(runner: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    shifts = getattr(runner, "perfit", None)
    if shifts is None:
        return original(*args, **kwargs)
    with shifts.hold():
        return original(*args, **kwargs)
