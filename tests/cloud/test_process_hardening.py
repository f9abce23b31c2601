"""How the process starts: what it overwrites, forbids and locks, and what it says when it cannot."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.memory import looking

from perfit_cloud.audit.memory import look_at
from perfit_cloud.audit.needles import raw
from perfit_cloud.audit.search import Index
from perfit_cloud.cli.start_up import with_torch
from perfit_cloud.hardening import process as process_hardening

_PROCESSOR = Path("/proc/cpuinfo").read_text("utf-8") if sys.platform == "linux" else ""

PROGRAM = """
import json, logging, os, sys
from dataclasses import asdict
from perfit_cloud.hardening.process import harden, restart_hardened
logging.basicConfig(format="%(message)s")
print("started", file=sys.stderr)
if "restart" in sys.argv:
    restart_hardened(returns_memory="ceiling" in sys.argv)
held = asdict(harden())
core = [line.split()[4:6] for line in open("/proc/self/limits") if line.startswith("Max core")]
environment = {name: os.environ.get(name) for name in ("GLIBC_TUNABLES", "MALLOC_PERTURB_", "LD_PRELOAD")}
print(json.dumps({"held": held, "core": core, "environment": environment}))
"""

# Starts a child that hardens itself, and one that does not.
PARENT = """
import subprocess, sys
from perfit_cloud.hardening.process import harden, hardening_children, restart_hardened
restart_hardened()
harden()
with hardening_children() as library:
    for word in ("hardened", ""):
        subprocess.run([sys.executable, "-c", sys.argv[1], word], check=True, pass_fds=[library])
"""
CHILD = """
import ctypes, json, os, sys
from perfit_cloud.hardening.process import _overwrites_freed, harden_child, is_hardened
if sys.argv[1]:
    harden_child()
with open("/proc/self/maps") as maps:
    has_ours = "perfit-allocator" in maps.read()
preloads = os.environ.get("LD_PRELOAD")
is_dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
print(json.dumps([is_hardened(), is_dumpable, _overwrites_freed(), has_ours, preloads]))
"""


def started(*words: str, through: tuple[str, ...] = (), **environment: str) -> tuple[dict[str, Any], str]:
    """What the program says of itself on stdout and stderr."""
    unset = {*process_hardening._ENVIRONMENT, "GLIBC_TUNABLES", process_hardening._RESTARTED}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [*through, sys.executable, "-c", PROGRAM, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=kept | environment,
    )
    return json.loads(done.stdout), done.stderr


@pytest.mark.parametrize(("given", "turns"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_that_wait_soon_sleep_unless_the_operator_says_otherwise(
    given: dict[str, str], turns: str
) -> None:
    assert process_hardening._environment(given, None)["GOMP_SPINCOUNT"] == turns


def test_under_a_ceiling_memory_goes_back_to_the_system() -> None:
    """Four heaps kept what each had at most, of all that had run in its threads."""
    free, bound = (started("restart", *words)[0]["environment"] for words in ((), ("ceiling",)))
    assert "top_pad=67108864" in free["GLIBC_TUNABLES"] and "arena_max=4" in free["GLIBC_TUNABLES"]
    assert "top_pad=1048576" in bound["GLIBC_TUNABLES"] and "arena_max=2" in bound["GLIBC_TUNABLES"]


@pytest.mark.parametrize("compiler", ["cc", "/nowhere/cc"])
def test_it_starts_once_more_and_then_overwrites_what_is_freed(compiler: str) -> None:
    tunables = "glibc.malloc.arena_max=3:glibc.malloc.tcache_count=9"
    told, errors = started("restart", GLIBC_TUNABLES=tunables, CC=compiler)
    assert told["held"]["overwrites_freed"]
    assert told["held"]["no_core_dumps"]
    assert told["held"]["not_dumpable"]
    assert told["core"] == [["0", "0"]]
    environment = told["environment"]
    assert "arena_max=3" in environment["GLIBC_TUNABLES"]  # theirs
    is_filling = shutil.which(compiler) is None
    assert ("tcache_count=0" in environment["GLIBC_TUNABLES"]) is is_filling  # ours, or some is left
    assert (environment["MALLOC_PERTURB_"] is not None) is is_filling
    assert environment["LD_PRELOAD"] is None  # nothing for programs that this one starts
    assert errors.count("started") == 2
    assert "stays in memory" not in errors


def test_what_does_not_hold_is_said() -> None:
    told, errors = started()
    assert not told["held"]["overwrites_freed"]
    assert errors.count("what is freed stays in memory") == 1


def test_a_program_that_is_not_given_its_settings_starts_once_more_only() -> None:
    """As the loader has it with one that has privileges of its own: it would have started for ever."""
    through = ("sh", "-c", 'PERFIT_RESTARTED=$$ exec "$@"', "sh")
    told, errors = started("restart", through=through)
    assert errors.count("started") == 1
    assert not told["held"]["overwrites_freed"]


@pytest.mark.parametrize(
    ("locked", "swap", "held"), [(True, True, True), (False, False, True), (False, True, False)]
)
def test_memory_that_may_reach_the_swap_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, locked: bool, swap: bool, held: bool
) -> None:
    for name, found in (
        ("_overwrites_freed", True),
        ("_forbids_core_dumps", True),
        ("_forbids_reading", True),
        ("_locks_memory", locked),
        ("_has_swap", swap),
    ):
        monkeypatch.setattr(process_hardening, name, lambda found=found: found)
    assert process_hardening.harden().no_swap is held
    assert caplog.text.count("may reach the swap") == (not held)


@pytest.mark.parametrize(
    ("limits", "capabilities", "users", "may"),
    [
        ((4096, -1), 0, "0 0 4294967295", True),  # the limit can be lifted
        ((4096, 8192), 1 << 14, "0 0 4294967295", True),
        ((4096, 8192), 0, "0 0 4294967295", False),  # later allocations would fail
        ((4096, 8192), 1 << 14, "0 1000 1", False),  # a capability of a user namespace lifts no limit
    ],
)
def test_memory_is_locked_only_where_no_limit_can_be_met(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], capabilities: int, users: str, may: bool
) -> None:
    files = {"/proc/self/status": f"Name: x\nCapEff:\t{capabilities:016x}\n", "/proc/self/uid_map": users}
    monkeypatch.setattr(process_hardening.Path, "read_text", lambda path, _: files[str(path)])
    monkeypatch.setattr(process_hardening.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(process_hardening.resource, "setrlimit", lambda *_: None)
    assert process_hardening._may_lock_all() is may


@pytest.mark.parametrize("tensors", [True, False])
@pytest.mark.parametrize("stacks", [True, False])
def test_what_stays_of_tensors_is_said(
    caplog: pytest.LogCaptureFixture, *, tensors: bool, stacks: bool
) -> None:
    class Sweeping:
        def overwrites_tensors(self) -> bool:
            return tensors

        def overwrites_stacks(self) -> bool:
            return stacks

    held = process_hardening.Hardening(True, False, True, True, True)
    told = with_torch(held, Sweeping())  # type: ignore[arg-type]
    assert (told.overwrites_freed, told.overwrites_stacks) == (tensors, stacks)
    assert caplog.text.count("traces of tensors stay") == (not tensors)
    assert caplog.text.count("keep copies of them on their stacks") == (not stacks)


FIRST_CALLS = """
import ctypes, sys
blas = ctypes.CDLL(sys.argv[1])
first = [blas.scipy_cblas_dasum64_, blas.scipy_cblas_dnrm264_, blas.scipy_cblas_idamax64_]
given, copy, four = (ctypes.c_char * 256)(), (ctypes.c_char * 256)(), (ctypes.c_double * 4)()
sys.stdin.buffer.raw.readinto(given)
for function in first:
    ctypes.memmove(copy, given, 256)
    function(ctypes.c_int64(4), four, ctypes.c_int64(1))
print("done", flush=True)
sys.stdin.read()
"""


@looking
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="other loaders save other registers")
@pytest.mark.parametrize(
    "names",
    [
        pytest.param(
            set(),
            marks=pytest.mark.skipif(
                "avx512f" not in _PROCESSOR, reason="a copy stays that long in registers of AVX-512 alone"
            ),
        ),
        {"LD_BIND_NOW"},
    ],
)
def test_no_first_call_of_a_function_saves_what_was_copied_before_it(names: set[str]) -> None:
    """The loader looks it up, and saves all vector registers on the stack before: the control finds them."""
    (blas,) = (Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*")
    secret = np.random.default_rng(5).bytes(256)
    kept = {name: value for name, value in os.environ.items() if name != "LD_BIND_NOW"}
    with subprocess.Popen(
        [sys.executable, "-c", FIRST_CALLS, str(blas)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=kept | {name: process_hardening._ENVIRONMENT[name] for name in names},
    ) as process:
        assert process.stdin and process.stdout
        process.stdin.write(secret)
        process.stdin.flush()
        process.stdout.readline()
        look = look_at(process.pid, Index([raw("secret", secret)]))
        process.stdin.close()
    places = {found.where for found in look.found}
    assert places  # the copy itself
    assert ("stack" in places) is not bool(names)


@pytest.mark.skipif(shutil.which("cc") is None, reason="our free() needs a C compiler")
def test_a_child_that_handles_calls_is_hardened_as_its_parent() -> None:
    """It loads our free() from the descriptor that it inherits, and hands on neither."""
    said = subprocess.run(
        [sys.executable, "-c", PARENT, CHILD], capture_output=True, text=True, timeout=120, check=True
    )
    one, other = map(json.loads, said.stdout.splitlines())
    assert one == [True, 0, True, True, None]
    assert other[:2] == [False, 1]  # or this shows nothing
