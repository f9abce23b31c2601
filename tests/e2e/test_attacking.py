"""Short forms of attacks (scripts/soak/attacking): what they may not do, however busy the machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak.attacking import counts, refused, unpaid
from soak.attacking.common import Attack, Outcome, measure

ATTACKS = [*counts.ATTACKS, *unpaid.ATTACKS, *refused.ATTACKS]


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_nobody_else_is_refused_and_memory_is_bounded(attack: Attack, tmp_path: Path) -> None:
    found = measure(attack, tmp_path, seconds=2.0)
    assert (found.server, found.honest_refused) == ("alive", 0)
    assert found.peak_mib < found.idle_mib + 300
    assert sum(found.attacker.values()) > 0 and "OK" not in found.attacker
    assert found.legal_after == ("OK" if attack.is_legal_after else "")


def test_what_is_too_much_is_told() -> None:
    fine = Outcome("x", idle_p95_ms=60, beside_p95_ms=350)
    assert fine.allowed_ms == 360 and fine.is_within
    assert Outcome("x", idle_p95_ms=200, beside_p95_ms=590).is_within
    for bad in (
        Outcome("x", idle_p95_ms=60, beside_p95_ms=370),
        Outcome("x", idle_p95_ms=60, beside_p95_ms=70, honest_refused=1),
        Outcome("x", idle_p95_ms=60, beside_p95_ms=70, server="ended with -9"),
    ):
        assert not bad.is_within
