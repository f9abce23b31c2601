"""Both engines of our own keep what engines promise."""

from __future__ import annotations

from tests.support.engine_contract import EngineContract
from tests.support.models import FAMILIES

from perfit_cloud.engine.generation.continuous import GenerationEngine
from perfit_cloud.engine.generation.static import BatchedEngine


class TestContinuous(EngineContract):
    kind = GenerationEngine
    # Falcon's attention does not go through the library's interface, so it cannot share a batch.
    families = tuple(family for family in FAMILIES if family != "falcon")


class TestStatic(EngineContract):
    kind = BatchedEngine
