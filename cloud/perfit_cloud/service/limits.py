"""What one request may ask for, what one caller may take, and how many may be at it.

ConcurrencyLimit counts what all callers have under way. RateLimiter counts what each of them has under way
and took recently. Both refuse with Busy, which says when to retry, and report the reason but not the caller.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from perfit_shared.errors import Busy, Unavailable

__all__ = [
    "BYTES_A_TOKEN",
    "FIELDS_A_TOKEN",
    "MESSAGE_COPIES",
    "UPDATE_TOKEN_BYTES",
    "AMinute",
    "AtOnce",
    "Budget",
    "ConcurrencyLimit",
    "Limits",
    "Paid",
    "Payment",
    "Quota",
    "RateLimiter",
]

AtOnce = Literal["calls", "openings", "answers", "adaptations", "gradients", "bytes"]
AMinute = Literal["requests", "tokens", "openings"]
Refused = Callable[[str], None]  # called with the reason of every refusal

_MINUTE = 60.0  # seconds
MESSAGE_COPIES = 3  # of a message while it is worked on: its bytes, parsed, decoded
UPDATE_TOKEN_BYTES = 48  # of a token of an update: a Python int in a list, then 8 bytes in an array
BYTES_A_TOKEN = 4  # what is paid for a text before it is tokenized: ordinary text has about as many
# What looking at a message is worth. A candidate has four fields and two tokens at least, so that an honest
# message is not dearer for it.
FIELDS_A_TOKEN = 2
_SMALL_PART = 256  # of a budget: a smaller amount waits behind nobody
_PRUNE_SECONDS = 60.0  # between two looks for buckets that can be dropped


@dataclass(frozen=True)
class Limits:
    """Bounds on one request."""

    prompt_tokens: int  # longest prompt
    new_tokens: int  # longest answer or target, tokens, the end-of-sequence token included
    context: int  # most tokens of prompt and answer together
    examples: int  # examples of one gradient, candidates of one Score
    call_tokens: int  # prompt and target tokens of one gradient or Score together
    message_bytes: int  # largest request
    adapt_examples: int  # examples of one Adapt stream
    adapt_tokens: int  # prompt and target tokens of one Adapt stream together
    questions: int  # of one Ask stream, waiting for their answers


@dataclass(frozen=True)
class Quota:
    """What one caller may take, over all its connections. It may take nothing that is not named."""

    at_once: Mapping[AtOnce, int]
    a_minute: Mapping[AMinute, int]  # as many at once, after a quiet minute


class ConcurrencyLimit:
    """Lets `slots` callers work at once; the rest come back later."""

    def __init__(self, name: str, *, slots: int, retry_ms: int, refused: Refused) -> None:
        self._name, self._slots, self._retry_ms, self._refused = name, slots, retry_ms, refused
        self._lock = threading.Lock()
        self.working = 0  # callers who hold a slot

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold a slot. Raises Busy when there is none."""
        with self._lock:
            if self.working >= self._slots:
                self._refused(self._name)
                raise Busy("the cloud is busy; try again shortly", retry_ms=self._retry_ms)
            self.working += 1
        try:
            yield
        finally:
            with self._lock:
                self.working -= 1


class Budget:
    """Bytes that all callers together may take, first come, first served.

    Small amounts skip the queue: however many callers there are, they leave room for a large one.
    """

    def __init__(self, name: str, size: int, *, retry_ms: int, refused: Refused) -> None:
        self._name, self._retry_ms, self._refused = name, retry_ms, refused
        self._changed = threading.Condition()
        self._free, self._small = size, size // _SMALL_PART
        self._queue: deque[object] = deque()

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._queue)

    @contextmanager
    def hold(self, amount: int, seconds: float = 0.0) -> Iterator[Callable[[int], None]]:
        """Take `amount`, waiting `seconds` for it at most. The function it gives lowers the amount later.

        Raises Busy.
        """
        mine, held = object(), 0

        def set_held(new: int) -> None:
            nonlocal held
            with self._changed:
                self._free += held - new
                held = new
                self._changed.notify_all()

        with self._changed:
            self._queue.append(mine)
            try:
                has_room = self._changed.wait_for(
                    lambda: amount <= self._free and (amount <= self._small or self._queue[0] is mine),
                    seconds,
                )
                if has_room:
                    set_held(amount)
            finally:
                self._queue.remove(mine)
                self._changed.notify_all()
        if not has_room:
            self._refused(self._name)
            raise Busy("the cloud has no memory for this just now; try again", retry_ms=self._retry_ms)
        try:
            yield set_held
        finally:
            set_held(0)


class RateLimiter:
    """What every caller has under way and took recently. Thread-safe.

    A caller is a text: a device's identity, or an address where there is none. The first thing taken makes
    the caller's bucket, which is dropped a minute or two after the last.
    """

    def __init__(
        self, quota: Quota, *, retry_ms: int, refused: Refused, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._quota, self._retry_ms, self._refused, self._clock = quota, retry_ms, refused, clock
        self._lock = threading.Lock()
        self._buckets: dict[str, _TokenBucket] = {}
        self._pruned = clock()

    def __len__(self) -> int:
        return len(self._buckets)

    @contextmanager
    def hold(self, caller: str, what: AtOnce, amount: int = 1) -> Iterator[None]:
        """Take `amount` of what is counted at once. Raises Busy when it would exceed the quota."""
        with self._lock:
            bucket = self._bucket(caller)
            if bucket.held[what] + amount > self._quota.at_once.get(what, 0):
                self._refused(f"{what}_each")
                message = "this device has as much under way as one may; try again shortly"
                raise Busy(message, retry_ms=self._retry_ms)
            bucket.held[what] += amount
        try:
            yield
        finally:
            with self._lock:
                bucket.held[what] -= amount
                if not bucket.held[what]:
                    del bucket.held[what]

    def spend(self, caller: str, what: AMinute, amount: int = 1) -> None:
        """Take `amount` of a minute's quota. Raises Busy, with the time after which there is enough again."""
        most = self._quota.a_minute.get(what, 0)
        with self._lock:
            now = self._clock()
            bucket = self._bucket(caller)
            spent = bucket.spent_by(what, most, now) + amount
            if spent > most:
                self._refused(f"{what}_minute")
                wait_ms = math.ceil(1000 * _MINUTE * (spent - most) / max(1, most))
                message = "this device asked for more than one may in a minute; try again later"
                raise Busy(message, retry_ms=max(self._retry_ms, wait_ms))
            bucket.spent[what] = (spent, now)

    def fine(self, caller: str, what: AMinute, amount: int) -> None:
        """Take `amount` even if the quota has less left: a refused request costs, too.

        A caller in debt may `spend` nothing until the debt has worn off, a minute at most.
        """
        most = self._quota.a_minute.get(what, 0)
        with self._lock:
            now = self._clock()
            bucket = self._bucket(caller)
            bucket.spent[what] = (min(2.0 * most, bucket.spent_by(what, most, now) + amount), now)

    def settle(self, caller: str, what: AMinute, paid: int, amount: int) -> None:
        """Take the rest of `amount`, or give back what was paid too much. Raises Busy as `spend` does."""
        if amount > paid:
            self.spend(caller, what, amount - paid)
        with self._lock:
            bucket = self._buckets.get(caller)
            if bucket is not None and what in bucket.spent and amount < paid:
                spent, at = bucket.spent[what]
                bucket.spent[what] = (max(0.0, spent - (paid - amount)), at)

    def _bucket(self, caller: str) -> _TokenBucket:
        """Called under the lock. Now and then it drops the buckets of quiet callers."""
        now = self._clock()
        if now - self._pruned >= _PRUNE_SECONDS:
            self._pruned = now
            self._buckets = {c: b for c, b in self._buckets.items() if not b.is_quiet(now)}
        return self._buckets.setdefault(caller, _TokenBucket())


class Payment:
    """What a caller pays for its messages before anybody works on them. Thread-safe.

    Texts are paid for by their bytes, up to the tokens that a message may have. Whoever tokenized them
    `take`s the payment and settles it. The payment of a refused message is not given back.
    """

    def __init__(self, rate_limiter: RateLimiter, caller: str, most: int) -> None:
        """`most`: tokens that may be in what is settled together."""
        self._rate_limiter, self._caller, self._most = rate_limiter, caller, most
        self._lock = threading.Lock()
        self._paid = self._fields = 0

    def charge(self, size: int) -> None:
        """For a text of so many bytes. Raises Busy."""
        with self._lock:
            tokens = min(1 + size // BYTES_A_TOKEN, self._most - self._paid)
            if tokens > 0:
                self._rate_limiter.spend(self._caller, "tokens", tokens)
                self._paid += tokens

    def walked(self, fields: int) -> None:
        """Note that the walk looked at so many fields. They are paid for whatever becomes of the message."""
        with self._lock:
            self._fields += fields

    def take(self) -> Paid:
        """What was paid since the last call of this."""
        with self._lock:
            paid = Paid(self._rate_limiter, self._caller, self._paid, self._fields // FIELDS_A_TOKEN)
            self._paid = self._fields = 0
            return paid


class Paid:
    """What was paid for one request so far, and the least that is never given back. Not thread-safe."""

    def __init__(self, rate_limiter: RateLimiter, caller: str, tokens: int, least: int) -> None:
        """`least`: tokens that reading the message is worth."""
        self._rate_limiter, self._caller, self._least = rate_limiter, caller, least
        self.tokens = tokens

    def settle(self, tokens: int) -> None:
        """Take the rest of `tokens`, or give back what is too much. Raises Busy, and gives nothing back."""
        paid, self.tokens = self.tokens, 0
        tokens = max(tokens, self._least)
        self._rate_limiter.settle(self._caller, "tokens", paid, tokens)
        self.tokens = tokens

    @contextmanager
    def refunded(self) -> Iterator[None]:
        """On Busy and Unavailable, give back all but the least."""
        try:
            yield
        except (Busy, Unavailable):
            if self.tokens > self._least:
                self.settle(0)
            raise


class _TokenBucket:
    def __init__(self) -> None:
        self.held: Counter[AtOnce] = Counter()
        self.spent: dict[AMinute, tuple[float, float]] = {}  # how much, when; it wears off evenly

    def spent_by(self, what: AMinute, most: int, now: float) -> float:
        spent, at = self.spent.get(what, (0.0, now))
        return max(0.0, spent - most * (now - at) / _MINUTE)

    def is_quiet(self, now: float) -> bool:
        return not self.held and all(now - at >= _MINUTE for _, at in self.spent.values())
