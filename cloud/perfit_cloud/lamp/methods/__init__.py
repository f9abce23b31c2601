"""Methods of personalisation that a LaMP run can measure, by name. `interface.Method` says what one is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perfit_cloud.lamp.methods.interface import Method
from perfit_cloud.lamp.methods.perfit import BothRanks, CollectiveOnly, PerFit, PersonalOnly

__all__ = ["METHODS"]

METHODS: Mapping[str, type[Method[Any]]] = {
    method.name: method for method in (PerFit, CollectiveOnly, PersonalOnly, BothRanks)
}
