"""A profile that seals its calls, at a cloud that cannot open them."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.support.device import Perfit
from tests.support.fake_cloud import FakeCloud

from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.identity import Identity
from perfit_device.cloud.sealing import Sealer, Sealing
from perfit_shared.errors import TooSlow, Unavailable
from perfit_shared.sealing.keys import SealingKey


def test_a_sealed_profile_sends_nothing_in_the_clear(ready: Perfit, cloud: Any) -> None:
    before = ready.ok("ask", "x")
    ready.ok("config", "set", "sealed", "true")
    cloud.calls.clear()
    for command in (("ask", "x"), ("update",), ("evaluate",), ("unenroll", "--yes")):
        code, _, err = ready(*command)
        assert code == 4, err
        assert "nothing was sent" in err
    assert set(cloud.calls) == {"Describe"}  # in the clear it holds nothing
    ready.ok("config", "unset", "sealed")
    assert ready.ok("ask", "x") == before


def test_calls_that_wait_for_keys_together_give_up_together(cloud: FakeCloud) -> None:
    """With a front that says nothing each call tried for 20 s after the one before it."""
    is_tried, may_fail, tries = threading.Event(), threading.Event(), []

    def fetch() -> Any:
        tries.append(1)
        is_tried.set()
        may_fail.wait(30)
        raise TooSlow("nobody answered")

    def asked(began: threading.Barrier) -> SealingKey:
        began.wait(30)
        return sealer.key()

    sealer = Sealer(enrolments.enroll(cloud.invite(), Identity.create()), Sealing(), fetch)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(sealer.key)]
        assert is_tried.wait(30)
        began = threading.Barrier(4)
        calls += [threads.submit(asked, began) for _ in range(3)]
        began.wait(30)
        time.sleep(0.2)  # for them to come to the lock
        may_fail.set()
        errors = [type(call.exception(30)) for call in calls]
    assert errors == [TooSlow, Unavailable, Unavailable, Unavailable]
    assert len(tries) == 1
