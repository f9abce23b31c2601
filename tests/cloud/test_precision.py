"""Which dtype `auto` takes: of what the processor says, and of how long a product took."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch

from perfit_cloud.model import precision
from perfit_cloud.model.base import load_base
from perfit_cloud.model.precision import Precision, choose_precision, decide
from perfit_shared.errors import ConfigError


@pytest.mark.parametrize(
    ("features", "seconds", "dtype", "says"),
    [
        (["avx2"], (3.0, 1.0), "float32", "does not multiply bfloat16 natively"),
        (["avx512_f", "avx512_bf16"], (1.4, 1.0), "bfloat16", "natively, 1.4 times as fast as float32"),
        (["amx_tile", "amx_bf16"], (3.7, 1.0), "bfloat16", "3.7 times"),
        (["neon", "bf16"], (2.0, 1.0), "bfloat16", "2.0 times"),
        (["avx512_bf16"], (0.9, 1.0), "float32", "only 0.9 times as fast"),
        (["avx512_bf16"], (1.05, 1.0), "float32", "only"),
        ([], (9.0, 1.0), "float32", "natively"),
    ],
)
def test_it_takes_both_the_features_and_the_time(
    features: list[str], seconds: tuple[float, float], dtype: str, says: str
) -> None:
    found = decide(features, *seconds)
    assert found.dtype == dtype
    assert says in str(found) and str(found).startswith(f"{dtype}: ")


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_timed", lambda: pytest.fail("nothing is to be timed"))
    assert [choose_precision(each, "cpu").dtype for each in precision.DTYPES] == list(precision.DTYPES)
    assert choose_precision("auto", "cuda").dtype == "bfloat16"
    assert choose_precision("auto", "cpu").dtype == "float32"  # the tests' own processor has no features
    with pytest.raises(ConfigError, match="float8"):
        choose_precision("float8", "cpu")


def test_auto_asks_this_processor_and_times_both(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {name: has for name, has in torch.cpu.get_capabilities().items() if has is True}
    monkeypatch.setattr(precision, "_features", lambda: [*asked, "avx512_bf16"])
    products: list[torch.dtype] = []
    linear = torch.nn.functional.linear

    def watched(left: Any, right: Any) -> Any:
        products.append(left.dtype)
        return linear(left, right)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    found = choose_precision("auto", "cpu")
    assert isinstance(found, Precision) and found.dtype in ("float32", "bfloat16")
    assert products[::2] == [torch.float32] * 10 and products[1::2] == [torch.bfloat16] * 10


def test_other_work_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most rounds are disturbed while bfloat16 has its turn."""
    took = [(3.0, 30.0)] * 8 + [(3.0, 1.0)] * 2
    times = iter(itertools.accumulate(one for plain, half in took for one in (0.0, plain, half)))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    assert precision._timed() == (3.0, 1.0)


def test_a_model_says_what_it_was_loaded_in(model_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(model_folder("llama"))
    assert load_base(folder).precision == "float32: the processor does not multiply bfloat16 natively"
    assert load_base(folder, dtype="bfloat16").precision == "bfloat16: as asked for"
    monkeypatch.setattr(precision, "_features", lambda: ["amx_bf16"])
    monkeypatch.setattr(precision, "_timed", lambda: (3.0, 1.0))
    base = load_base(folder)
    assert base.model.dtype == torch.bfloat16
    assert base.precision == "bfloat16: the processor multiplies it natively, 3.0 times as fast as float32"
