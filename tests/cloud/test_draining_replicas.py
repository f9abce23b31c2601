"""Replicas behind a balancer that come and go: what is under way moves, and ends as it would have."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.support.balancers import environment_of, free_port, haproxy, needs_haproxy
from tests.support.cloud import Running
from tests.support.updating import KEEP, Parts, Watched, assert_near, enrolled, split_of
from tests.support.waiting import wait_for

from perfit_cloud.engine.gradients.session import UpdateEngine
from perfit_device.cloud.client import Cloud


@needs_haproxy
def test_an_update_moves_to_another_replica_when_its_own_drains(
    run: Callable[..., Running], base: Any, artefact: Any, tmp_path: Path
) -> None:
    """Two replicas behind HAProxy. The one that has the stream stops in the midst of an epoch."""
    engines = [UpdateEngine(base, keep_bytes=KEEP) for _ in range(2)]
    queues, pages = [Watched(engine) for engine in engines], [free_port(), free_port()]
    behind: dict[str, Any] = {"proxy_networks": ("127.0.0.0/8",)}
    first = run(steps=queues[0], metrics_address=f"127.0.0.1:{pages[0]}", **behind)
    second = run(
        steps=queues[1],
        state=first.config.state,
        serves_only=True,
        metrics_address=f"127.0.0.1:{pages[1]}",
        **behind,
    )
    replicas, front = [first, second], free_port()
    environment = environment_of(
        devices=front,
        enrol=free_port(),
        enrolment=(first.server.addresses.enrol_address, pages[0]),
        replicas=[(each.address, page) for each, page in zip(replicas, pages, strict=True)],
    )
    stopped: list[int] = []

    def stop_whoever_is_at_it(number: int) -> None:
        wait_for(lambda: queues[number].asked >= 3 or bool(stopped), seconds=60)
        if not stopped:
            stopped.append(number)
            assert replicas[number].server.stop(10), "its calls ended by themselves"

    with (
        haproxy(environment=environment, ports=[front]),
        Cloud(replace(enrolled(first), address=f"127.0.0.1:{front}")) as cloud,
    ):
        parts = Parts(first, engines[0], queues[0], cloud, cloud.describe(), split_of(artefact), tmp_path)
        stopping = [threading.Thread(target=stop_whoever_is_at_it, args=(n,)) for n in range(2)]
        for thread in stopping:
            thread.start()
        with parts.adapting() as source:
            tensors = parts.update(source, "moved.db")
        with parts.adapting(adapt_examples=0) as source:
            call_by_call = parts.update(source, "alone.db")
        for thread in stopping:
            thread.join(60)
    (gone,) = stopped
    assert queues[1 - gone].opened and queues[1 - gone].asked, "another stream, at the other one"
    assert_near(tensors, call_by_call, artefact.seed)
    for queue in queues:
        queue.close()
