"""Methods of personalisation that a LaMP run can measure, by name. `interface.Method` says what one is.

What they share: `frozen` (answers and losses of the frozen model), `prefixed` (texts before a query).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perfit_cloud.lamp.methods.interface import Method
from perfit_cloud.lamp.methods.lofit import Lofit
from perfit_cloud.lamp.methods.lora_c import LoraC
from perfit_cloud.lamp.methods.lora_c_perfit import LoraCPerFit
from perfit_cloud.lamp.methods.lora_p import LoraP
from perfit_cloud.lamp.methods.none import Untouched
from perfit_cloud.lamp.methods.oppu import Oppu
from perfit_cloud.lamp.methods.pag import Pag
from perfit_cloud.lamp.methods.perfit import BothRanks, CollectiveOnly, PerFit, PersonalOnly
from perfit_cloud.lamp.methods.perfit_rag import PerFitBehindRag, PerFitRag, SeedRag
from perfit_cloud.lamp.methods.rag import Rag
from perfit_cloud.lamp.methods.stylevector import StyleVector

__all__ = ["METHODS"]

_ALL: tuple[type[Method[Any]], ...] = (
    *(PerFit, CollectiveOnly, PersonalOnly, BothRanks, PerFitRag, PerFitBehindRag, SeedRag),
    *(Untouched, Rag, Pag, StyleVector),
    *(LoraC, LoraP, Oppu, LoraCPerFit, Lofit),
)
# The paper's tables call stage 2 alone at both ranks' sum ReFT too.
METHODS: Mapping[str, type[Method[Any]]] = {each.name: each for each in _ALL} | {"reft": BothRanks}
