"""The operator's ceiling: parts that fit under it together, and room that is given out in turn."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tests.support.waiting import wait_for

from perfit_cloud.config import CloudConfig
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.service.catalog import Catalog
from perfit_cloud.service.limits import Budget
from perfit_cloud.service.memory import MemoryPlan, machine_bytes, plan_memory, resident_bytes
from perfit_cloud.service.messages import Messages
from perfit_shared.errors import Busy, Cancelled, ConfigError

MIB = 2**20


@pytest.fixture
def planned(base: BaseModel, artefact: Artefact) -> Callable[..., MemoryPlan]:
    def plan(process: int = 200 * MIB, machine: int = 2**37, **change: int) -> MemoryPlan:
        config = CloudConfig(**change)
        catalog = Catalog.build(config, base, [artefact], "c0")
        return plan_memory(config, catalog, process=process, continuous=True, machine=machine)

    return plan


def test_without_a_ceiling_everything_is_as_it_is_set(planned: Callable[..., MemoryPlan]) -> None:
    plan = planned(cache_tokens=4096, keep_bytes=123 * MIB)
    assert (plan.cache_tokens, plan.kept, plan.pass_tokens) == (4096, 123 * MIB, 1024)  # rows
    assert plan.total > 1024 * MIB  # of messages alone


@pytest.mark.parametrize(
    ("machine", "kept", "freed"),
    [(2**37, 2048, 256), (2**34, 1024, 256), (2**33, 512, 128), (2**30, 64, 64), (2**29, 32, 64)],
)
def test_what_only_saves_time_follows_the_machine(
    planned: Callable[..., MemoryPlan], machine: int, kept: int, freed: int
) -> None:
    plan = planned(machine=machine)
    assert (plan.kept, plan.freed) == (kept * MIB, freed * MIB)
    assert planned(machine=machine, keep_bytes=5 * MIB).kept == 5 * MIB


def test_the_machine_is_what_its_control_groups_leave(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    whole = machine_bytes(groups, own)  # there are none
    assert 2**28 < whole < 2**50
    (groups / "service" / "worker").mkdir(parents=True)
    own.write_text("0::/service/worker\n")
    for folder, limit in ((groups, "max\n"), (groups / "service", f"{100 * MIB}\n")):
        (folder / "memory.max").write_text(limit)
    assert machine_bytes(groups, own) == 100 * MIB  # of the group above its own
    (groups / "service" / "worker" / "memory.max").write_text(f"{90 * MIB}\n")
    assert machine_bytes(groups, own) == 90 * MIB
    own.write_text("0::/../../elsewhere\n")  # seen from a namespace: nothing above its root is read
    assert machine_bytes(groups, own) == whole


@pytest.mark.parametrize("ceiling", [1000 * MIB, 1500 * MIB, 4000 * MIB])
def test_parts_shrink_until_they_fit(planned: Callable[..., MemoryPlan], ceiling: int) -> None:
    free, bound = planned(), planned(memory_bytes=ceiling)
    assert 0.8 * ceiling < bound.total <= 0.9 * ceiling
    for part in ("messages", "examples", "cache", "gradients", "kept", "freed"):
        assert 0 < getattr(bound, part) < getattr(free, part), part
    assert bound.process == free.process
    assert bound.cache_tokens < free.cache_tokens and bound.pass_tokens < free.pass_tokens


def test_more_room_than_is_wanted_stays_free(planned: Callable[..., MemoryPlan]) -> None:
    assert planned(memory_bytes=2**36) == planned()


def test_the_longest_request_fits_into_the_smallest_parts(
    planned: Callable[..., MemoryPlan], base: BaseModel
) -> None:
    config = CloudConfig()
    with pytest.raises(ConfigError, match=r"too small by \d+ MiB") as caught:
        planned(memory_bytes=10 * MIB)
    for part in ("process 200", "messages", "examples", "cache", "gradients"):
        assert part in str(caught.value)
    missing = int(str(caught.value).split("too small by ")[1].split()[0])
    bound = planned(memory_bytes=int((10 + missing / 0.9 + 2) * MIB))
    assert bound.cache_tokens >= 2 * min(base.context, config.cache_tokens // 2)
    assert bound.pass_tokens >= min(base.context, config.prompt_tokens + config.new_tokens)
    # One device's updates leave room for another's.
    assert bound.examples >= (config.adaptations_each + 1) * 8 * config.adapt_tokens


def test_a_larger_model_has_larger_parts(
    planned: Callable[..., MemoryPlan], base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = planned()
    config = base.model.config.get_text_config()
    monkeypatch.setattr(config, "intermediate_size", 100 * config.intermediate_size)
    assert planned().gradients > 2 * small.gradients


def test_every_call_has_room_for_a_shift(
    planned: Callable[..., MemoryPlan], base: BaseModel, artefact: Artefact
) -> None:
    """A stream of questions keeps its shift when its message is not counted any more."""
    catalog = Catalog.build(CloudConfig(), base, [artefact], "c0")
    assert planned(calls=32).calls >= 32 * (catalog.limits.message_bytes + catalog.tensor_bytes + 2**19)


def test_what_the_process_has_is_read() -> None:
    before = resident_bytes()
    block = bytearray(b"x") * (64 * MIB)
    assert resident_bytes() - before > 50 * MIB
    del block


# -- room -------------------------------------------------------------------------------------------


def budget(size: int, told: list[str] | None = None) -> Budget:
    return Budget("messages", size, retry_ms=70, refused=(told if told is not None else []).append)


def test_room_is_given_back_and_refused_where_there_is_none() -> None:
    told: list[str] = []
    room = budget(100, told)
    with room.hold(60) as shrink:
        with pytest.raises(Busy) as caught, room.hold(50, 0.01):
            pass
        assert (caught.value.retry_ms, told) == (70, ["messages"])
        with room.hold(40):
            pass
        shrink(10)
        with room.hold(90):
            pass
    with room.hold(100):
        pass


def test_the_end_of_a_call_waits_for_no_message() -> None:
    """It waited for as long as the message did for room: half a minute."""
    room = budget(100)

    @contextmanager
    def arrive(data: bytes) -> Iterator[None]:
        with room.hold(len(data), 30):
            yield

    messages = Messages(iter([bytes(60)]), bytes, arrive)
    errors: list[Exception] = []

    def read() -> None:
        try:
            next(messages)
        except Exception as error:
            errors.append(error)

    reader = threading.Thread(target=read, daemon=True)
    with room.hold(50):
        reader.start()
        wait_for(lambda: room.waiting == 1)
        closing = threading.Thread(target=messages.close, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()
    reader.join(10)
    assert [type(error) for error in errors] == [Cancelled]
    with room.hold(100):  # what came too late holds nothing
        pass


def test_room_is_given_in_turn() -> None:
    """Small ones that come again and again would keep a large one out for ever."""
    room, taken = budget(100), []
    with ExitStack() as held:
        first = held.enter_context(room.hold(60))

        def take(amount: int) -> None:
            with room.hold(amount, 30):
                taken.append(amount)

        threads = []
        for number, amount in enumerate((90, 20), 1):
            threads.append(threading.Thread(target=take, args=(amount,), daemon=True))
            threads[-1].start()
            wait_for(lambda n=number: room.waiting == n)  # type: ignore[misc]
        assert taken == []
        first(0)
        for thread in threads:
            thread.join(30)
    assert taken == [90, 20]


def test_what_is_small_stands_behind_nothing_large() -> None:
    """One large message made every later one wait, even those without a byte."""
    room = budget(25600)
    with room.hold(20000):

        def wait() -> None:
            with room.hold(10000, 30):
                pass

        large = threading.Thread(target=wait, daemon=True)
        large.start()
        wait_for(lambda: room.waiting == 1)
        with room.hold(0), room.hold(100):
            assert room.waiting == 1
        with pytest.raises(Busy), room.hold(101):
            pass
    large.join(30)
    assert room.waiting == 0
