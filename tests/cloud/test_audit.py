"""What an audit's calls and rows mean, and when a promise counts as kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from perfit_cloud.audit.calls import Generate, Running
from perfit_cloud.audit.processor import processor
from perfit_cloud.audit.rows import Row, forms_found, passed, unseen
from perfit_cloud.audit.scenarios import _ended, caught
from perfit_shared.errors import PerfitError


class Refusal(grpc.RpcError):
    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.INVALID_ARGUMENT


def test_a_call_that_ends_in_another_way_than_it_should_shows_nothing() -> None:
    """Answers that were refused were searched for, not found, and taken for forgotten."""

    def refused() -> Iterator[None]:
        raise Refusal
        yield

    answered = Generate.__new__(Generate)
    _ended(Running(lambda _: refused()), answered, "refused", "Generate refused")
    _ended(Running(lambda _: iter([None])), answered, "done", "Generate done")
    with pytest.raises(PerfitError, match="Generate done: the call ended with INVALID_ARGUMENT"):
        _ended(Running(lambda _: refused()), answered, "done", "Generate done")


@pytest.mark.slow
def test_a_report_names_the_processor_and_the_kernels_that_libraries_choose() -> None:
    """What was shown on one processor was not so on another."""
    made_on = processor()
    if sys.platform == "linux" and os.uname().machine == "x86_64":
        told = Path("/proc/cpuinfo").read_text("utf-8")  # with marks in the name that torch leaves out
        assert all(word in told for word in made_on.name.split())
        assert made_on.kernels.keys() == {"torch", "MKL", "oneDNN"}
        assert "not said" not in made_on.kernels.values()
    for told in (made_on.name, *made_on.features, *made_on.kernels.values()):
        assert told in str(made_on)


# -- what rows mean ------------------------------------------------------------------------------

TENSOR, TEXT = {"tensor fp32": ("heap",)}, {"prompt text utf-8": ("heap",)}
SOUGHT = ("tensor fp16", "tensor fp32", "prompt text utf-8", "prompt ids int64", "device key")


def row(hardening: str, moment: str, found: dict[str, tuple[str, ...]]) -> Row:
    return Row(hardening, "Generate", "done", moment, found, SOUGHT, 1, ())


CONTROL, CLEAN = row("off", "closed", TENSOR), row("on", "closed", {})
DURING = row("on", "during", TENSOR | TEXT)


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([CONTROL, DURING, CLEAN], True),
        ([CONTROL, DURING, row("on", "after", TEXT), CLEAN], True),
        ([CONTROL, DURING, row("on", "during", TENSOR | {"example ids int64": ("heap",)}), CLEAN], True),
        ([CONTROL, DURING, CLEAN, row("on", "closed", TEXT)], False),
        ([CONTROL, DURING, CLEAN, row("on", "before", TEXT)], False),
        ([CONTROL, DURING, CLEAN, row("on", "during", TENSOR)], False),
        ([CONTROL, DURING, CLEAN, row("on", "during", TEXT)], False),
        ([row("off", "closed", {}), DURING, CLEAN], False),  # nothing says that it would have been found
        ([DURING, CLEAN], False),
        ([CONTROL, DURING], False),  # nobody looked at what the promise is about
        ([CONTROL, CLEAN], False),  # no look found any text
        ([CONTROL, row("off", "before", TEXT), CLEAN], False),
    ],
)
def test_the_promise_is_kept_only_where_every_control_finds(rows: list[Row], kept: bool) -> None:
    assert passed(rows) is kept


IDS = {"example ids int64": ("heap",)}


@pytest.fixture
def process() -> Iterator[int]:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as server:
        yield server.pid
        server.kill()


def test_a_call_is_looked_at_until_nothing_is_wanted(process: int) -> None:
    """Ids of examples were there only later than their words, and counted as never found."""
    looks = iter([row("on", "during", {}), DURING, DURING, row("on", "during", TENSOR | IDS), CLEAN])
    sought = replace(DURING, sought=(*SOUGHT, *IDS))
    running = Running(lambda requests: requests)  # ends where its requests do
    with ExitStack() as held:
        found = caught(
            process,
            running,
            lambda: replace(next(looks), sought=sought.sought),
            held,
            lambda r: bool(unseen([r])),
        )
        assert found is not None
        assert found.found == TENSOR | TEXT | IDS
        assert (found.searched, found.fault) == (3, "")  # the blind look does not count
        assert next(looks) is CLEAN
        assert Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"


def test_a_look_that_found_its_controls_counts_when_the_call_ends_before_the_next(process: int) -> None:
    running = Running(lambda requests: requests)

    def look() -> Row:
        running.send(None)
        running.wait(10)
        return DURING

    with ExitStack() as held:
        assert caught(process, running, look, held, lambda _: True) == DURING
        assert caught(process, running, look, held, lambda _: True) is None


def test_it_is_said_which_needles_no_look_found() -> None:
    rows = [row("off", "before", TEXT), CONTROL, row("on", "after", {"tensor fp16": ("heap",)}), CLEAN]
    assert forms_found(rows) == {
        "tensor": {"fp16": True, "fp32": True},
        "prompt text": {"utf-8": False},
        "prompt ids": {"int64": False},
        "device key": {"as sent": False},
    }
    assert unseen(rows) == ["prompt text"]  # of the others a server may hold nothing that a look meets
