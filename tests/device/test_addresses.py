"""A cloud with several addresses, and replicas that go: a device finds another, and loses nothing."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
from tests.support.fake_cloud import FakeCloud

from perfit_device.cloud import enrolment as enrolments
from perfit_device.cloud.channels import addresses_of, shuffled
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.codec import ShiftUse
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.cloud.sealing import Sealing
from perfit_shared.errors import NotAuthenticated, NotHere, SealRequired, Unavailable
from perfit_shared.types import Sampling

SOON = RetryPolicy(give_up=30.0, first_wait=0.01, longest_wait=0.05)


@pytest.fixture
def twin(cloud: FakeCloud) -> Iterator[FakeCloud]:
    """Another replica: the same authorities, the same invites, other ports."""
    other = FakeCloud()
    other.stop()
    other.address = other.enrolment_address = "127.0.0.1:0"
    other.server_ca, other.device_ca, other.cloud_id = cloud.server_ca, cloud.device_ca, cloud.cloud_id
    other.invites = cloud.invites
    other.start()
    yield other
    other.stop()


def gone() -> str:
    """An address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return f"127.0.0.1:{found.getsockname()[1]}"


def enrolled(cloud: FakeCloud, addresses: str) -> Enrolment:
    enrolment = enrolments.enroll(cloud.invite(), Identity.create())
    return replace(enrolment, address=addresses)


def test_a_text_of_addresses() -> None:
    assert addresses_of("a:1, [::1]:2") == ["a:1", "[::1]:2"]
    for bad in ("a:1,", ",", "a:1,,b:2", "a:1;b:2", ",".join(f"h:{n}" for n in range(1, 18))):
        with pytest.raises(NotAuthenticated):
            addresses_of(bad)


def test_devices_spread_themselves() -> None:
    first = Counter(shuffled("a:1,b:2,c:3")[0] for _ in range(600))
    assert all(140 < first[each] < 260 for each in ("a:1", "b:2", "c:3")), first


def test_enrols_where_somebody_answers(cloud: FakeCloud) -> None:
    for _ in range(4):  # whichever comes first by chance
        invite = replace(cloud.invite(), address=f"{gone()},{cloud.enrolment_address}")
        assert enrolments.enroll(invite, Identity.create()).cloud_id == cloud.cloud_id


def test_another_address_is_found_when_one_is_gone(cloud: FakeCloud) -> None:
    for _ in range(4):
        with Cloud(enrolled(cloud, f"{gone()},{cloud.address}")) as device:
            assert SOON.call(device.describe).cloud_id == cloud.cloud_id


def test_a_replica_that_drains_is_left_at_once(cloud: FakeCloud, twin: FakeCloud) -> None:
    """It asks for two seconds; the other replica is there now."""
    stopping = Unavailable("the cloud is stopping", retry_ms=2000)
    with Cloud(enrolled(cloud, f"{cloud.address},{twin.address}")) as device:
        device.describe()
        first, second = (cloud, twin) if "Describe" in cloud.calls else (twin, cloud)
        first.fail = lambda method: stopping
        began = time.monotonic()
        SOON.call(device.describe)
        assert time.monotonic() - began < 1.5
        assert second.calls.count("Describe") == 1
        SOON.call(device.describe)
        assert first.calls.count("Describe") == 2, "once well, once draining, and never again"


def test_what_one_replica_does_not_do_is_asked_of_another(cloud: FakeCloud, twin: FakeCloud) -> None:
    """Pools for answers and for updates stand at addresses of their own."""
    with Cloud(enrolled(cloud, f"{cloud.address},{twin.address}")) as device:
        device.describe()
        first, second = (cloud, twin) if "Describe" in cloud.calls else (twin, cloud)
        first.fail = lambda method: NotHere("this server does other things")
        asked = len(second.calls)
        assert SOON.call(device.describe).cloud_id == cloud.cloud_id
        assert len(second.calls) == asked + 1
    cloud.fail = lambda method: None
    with Cloud(enrolled(cloud, cloud.address)) as device:
        cloud.fail = lambda method: NotHere("this server does other things")
        with pytest.raises(NotHere):  # nobody else can be asked
            device.describe()


def test_an_answer_under_way_ends_where_it_began(cloud: FakeCloud, twin: FakeCloud) -> None:
    """The connection is left when another call fails on it, and closes behind the answer."""
    with Cloud(enrolled(cloud, f"{cloud.address},{twin.address}")) as device:
        info = device.describe()
        first = cloud if "Describe" in cloud.calls else twin
        first.pause = 0.4
        texts: list[str] = []
        started = threading.Event()

        def ask() -> None:
            for chunk in device.generate("hello", ShiftUse(), Sampling(max_new_tokens=8)):
                started.set()
                texts.append(chunk.text)

        asking = threading.Thread(target=ask)
        asking.start()
        assert started.wait(20)
        old = device._connections._all[-1]
        first.fail = lambda method: Unavailable("stopping") if method == "Describe" else None
        assert SOON.call(device.describe).cloud_id == info.cloud_id
        assert device._connections._all[-1] is not old
        asking.join(20)
        assert "".join(texts).strip() == f"{first.answer} base", "to its end"
        assert not old.is_busy


def test_a_dead_replica_takes_no_connection_with_it(cloud: FakeCloud, twin: FakeCloud) -> None:
    with Cloud(enrolled(cloud, f"{cloud.address},{twin.address}")) as device:
        device.describe()
        first, second = (cloud, twin) if "Describe" in cloud.calls else (twin, cloud)
        first.stop()
        assert SOON.call(device.describe).cloud_id == cloud.cloud_id
        assert second.calls.count("Describe") == 1
        for _ in range(5):
            device._connections.move(device._connections._all[-1])
            SOON.call(device.describe)
        left = device._connections._all[:-1]
        assert len(left) <= 1 and not any(each.is_busy for each in left), "what was left is forgotten"


def test_a_delay_is_not_the_same_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand devices that are told two seconds should not come back in the same millisecond."""
    waits: list[float] = []
    for _ in range(20):
        trouble = iter([Unavailable("stopping", retry_ms=2000)])

        def call(trouble: Iterator[Unavailable] = trouble) -> None:
            for error in trouble:
                raise error

        RetryPolicy(sleep=waits.append).call(call)
    assert all(2.0 <= wait <= 2.5 for wait in waits) and max(waits) - min(waits) > 0.05


def test_an_address_that_offers_no_key_is_left_for_one_that_may(cloud: FakeCloud, twin: FakeCloud) -> None:
    """While a cloud begins to take sealed calls, some of its servers offer keys and some do not."""
    with Cloud(enrolled(cloud, f"{cloud.address},{twin.address}"), sealing=Sealing()) as device:
        cloud.calls.clear()
        with pytest.raises(Unavailable, match="nothing was sent"):
            RetryPolicy(give_up=2.0, first_wait=0.01, longest_wait=0.05).call(device.describe)
        assert set(cloud.calls) == set(twin.calls) == {"Describe"}, "both were asked for keys"
    with Cloud(enrolled(cloud, cloud.address), sealing=Sealing()) as device, pytest.raises(SealRequired):
        device.describe()  # nobody else can be asked
