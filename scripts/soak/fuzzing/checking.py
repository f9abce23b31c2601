"""A target, its inputs, and what may become of them: a sound value or one of our errors, in time.

target = Target("positions", share=2, inputs=TEXT, check=positions)
tally = fuzz(target, count=2000, seed=7)
"""

from __future__ import annotations

import faulthandler
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

from perfit_shared.errors import PerfitError

__all__ = ["Tally", "Target", "Unsound", "bounded_memory", "fuzz", "outcome_of"]

_HANG_SECONDS = 300.0  # of a chunk: in C code that no signal interrupts the process ends, and says where
_MEMORY_BYTES = 3 << 30  # beyond what is mapped at the start: a bomb shows as MemoryError
_CHUNK = 500  # inputs a run of hypothesis, whose memory of them grows
_FAILURES = 5  # of one target, after which it has said enough


class Unsound(Exception):
    """A value was made that does not pass its own checks, or an honest caller felt a hostile one."""


class TookTooLong(BaseException):
    """No Exception, so that nobody on the way handles it."""


@dataclass(frozen=True)
class Target:
    name: str
    share: int  # of all inputs, in proportion
    inputs: st.SearchStrategy[Any]
    check: Callable[[Any], str | None]  # says what it was, where "value" does not; raises what it may not
    seconds: float = 5.0  # most time of one input, also on a busy machine


@dataclass
class Tally:
    """What became of a target's inputs."""

    name: str
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: float = 0.0  # seconds
    failures: list[dict[str, str]] = field(default_factory=list)  # the smallest input of each, and why

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"outcomes": dict(self.outcomes.most_common())}


def fuzz(target: Target, *, count: int, seed: int) -> Tally:
    """Give `count` inputs to a target. What fails is shrunk, kept, and does not end it."""
    tally = Tally(target.name)
    begun = time.monotonic()
    chunk = 0
    while tally.inputs < count and len(tally.failures) < _FAILURES:
        before = tally.inputs
        failure = _chunk(target, tally, min(_CHUNK, count - tally.inputs), seed + 1_000_003 * chunk)
        if failure is not None and failure["error"] not in {known["error"] for known in tally.failures}:
            tally.failures.append(failure)
        chunk += 1
        if tally.inputs == before:  # hypothesis has no more that differ
            break
    tally.seconds = time.monotonic() - begun
    return tally


def _chunk(target: Target, tally: Tally, count: int, number: int) -> dict[str, str] | None:
    """One run of hypothesis; its failure, if there is one."""
    last: dict[str, str] = {}
    limit = tally.inputs + count

    # Not given a database: a run is a function of its seed alone.
    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(target.inputs)
    def run(value: Any) -> None:
        try:
            outcome, seconds = _one(target, value)
        except BaseException as error:
            last.update(input=repr(value)[:2000], error=_told(error))
            raise Unsound(_told(error)) from error
        if tally.inputs < limit:  # shrinking is no input more
            tally.inputs += 1
            tally.outcomes[outcome] += 1
            tally.slowest = max(tally.slowest, seconds)

    faulthandler.dump_traceback_later(_HANG_SECONDS, exit=True)
    try:
        run()
    except (Unsound, Flaky):  # flaky is what depends on the calls before
        tally.inputs += 1
        tally.outcomes["FAILED"] += 1
        return last
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def _one(target: Target, value: Any) -> tuple[str, float]:
    begun = time.monotonic()
    with _in_time(target.seconds):
        outcome = outcome_of(target.check, value)
    return outcome, time.monotonic() - begun


def outcome_of(check: Callable[[Any], str | None], value: Any) -> str:
    """What `check` says, or the class of the PerfitError that it raises. Any other error goes up."""
    try:
        return check(value) or "value"
    except PerfitError as error:
        return type(error).__name__


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise TookTooLong(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def bounded_memory() -> Iterator[None]:
    """While it lasts, whoever wants gigabytes gets MemoryError instead of the machine's memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123 - no file on a disk
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + _MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _told(error: BaseException) -> str:
    """Type, message and the last places inside perfit."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "perfit" in f.filename]
    places = " < ".join(f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in reversed(frames[-3:]))
    return f"{type(error).__name__}: {str(error)[:300]} [{places}]"
