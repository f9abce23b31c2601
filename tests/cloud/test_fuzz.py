"""A twentieth of the long run (scripts/soak/fuzz.py), and that its checks can fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import strategies as st

from perfit_shared.errors import InvalidInput
from soak.fuzz import all_targets, run, shares
from soak.fuzzing.checking import Target, Unsound, fuzz

INPUTS = 5_000
SEED = 1


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Target]]:
    with all_targets(tmp_path_factory.mktemp("fuzz")) as made:
        yield made


@pytest.mark.slow
def test_no_input_does_harm(targets: list[Target]) -> None:
    result = run(targets, inputs=INPUTS, seed=SEED)
    failures = [failure for tally in result["targets"] for failure in tally["failures"]]
    assert not failures, failures[0]
    assert result["inputs"] >= INPUTS
    assert len(result["targets"]) == len(targets)
    for tally in result["targets"]:
        # Where everything is refused at once nothing behind the first check was tried.
        assert tally["inputs"] == sum(tally["outcomes"].values()) > 0
    tried = {tally["name"]: set(tally["outcomes"]) for tally in result["targets"]}
    for name, outcomes in {
        "shift tensors": {"value", "InvalidTensors"},
        "tasks": {"value", "InvalidData"},
        "vault files": {"VaultDamaged", "the rows of the sound vault"},
        "cloud: Generate and questions": {"value", "InvalidPrompt"},
        "agent: frames": {"closed", "done"},
        "rpc: messages": {"answered", "invalid_input", "invalid_prompt"},
        "rpc: streams": {"answered", "left"},
        "rpc: enrolment": {"answered", "not_authenticated"},
    }.items():
        assert outcomes <= tried[name], name


def unsound(_: int) -> None:
    raise Unsound("whatever it is")


def unmapped(value: int) -> None:
    if value > 100:
        raise KeyError("of nobody's tree")


def endless(value: int) -> None:
    while value > 100:
        pass


def bomb(value: int) -> str:
    return str(len(bytearray((value > 100) << 36)))


@pytest.mark.parametrize(
    ("check", "error"),
    [(unsound, "Unsound"), (unmapped, "KeyError"), (endless, "TookTooLong"), (bomb, "MemoryError")],
)
def test_what_may_not_happen_is_told(check: Callable[[int], Any], error: str) -> None:
    result = run([Target("bad", 1, st.integers(0, 1000), check, seconds=0.05)], inputs=50, seed=0)
    assert result["failures"] == 1
    (failure,) = result["targets"][0]["failures"]
    assert failure["error"].startswith(error)
    if check is not unsound:
        assert failure["input"] == "101"  # the smallest that does it


def test_our_errors_are_outcomes_and_the_seed_decides() -> None:
    seen: list[list[int]] = []

    def check(value: int) -> str | None:
        seen[-1].append(value)
        if value % 2:
            raise InvalidInput("odd")
        return None

    tallies = []
    for seed in (3, 3, 4):
        seen.append([])
        tallies.append(fuzz(Target("numbers", 1, st.integers(0, 10**9), check), count=600, seed=seed))
    assert all(tally.inputs == 600 and set(tally.outcomes) == {"value", "InvalidInput"} for tally in tallies)
    assert seen[0] == seen[1] != seen[2]


def test_shares_come_to_at_least_what_is_asked() -> None:
    made = [Target(str(share), share, st.none(), unmapped) for share in (5, 3, 0)]
    assert shares(made, 80) == [50, 30, 1]
    assert sum(shares(made, 7)) >= 7
