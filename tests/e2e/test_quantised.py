"""scripts/quantised.py: what rounding costs, by losses that a rounded base really has."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support.benches import ROOT
from tests.support.lamp_files import write_files

import quantised
import tiny


@pytest.mark.parametrize(("kind", "most"), [("Q8_0", 0.01), ("fp8", 0.05), ("int4", 0.15), ("Q4_0", 0.15)])
def test_what_a_format_can_hold_is_near_the_weights_and_holds_itself(kind: str, most: float) -> None:
    weights = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    quantise = quantised._KINDS[kind]
    assert quantise is not None
    rounded = quantise(weights)
    error = float((rounded - weights).norm() / weights.norm())
    assert most / 10 < error < most
    assert float((quantise(rounded) - rounded).norm() / weights.norm()) < error / 3


@pytest.mark.slow
def test_everybody_is_measured_on_every_base_and_a_run_goes_on(tmp_path: Path) -> None:
    made = tiny.build(tmp_path / "made", shape=tiny.SMALL)
    artefact = next(folder for folder in made.artefacts if folder.name == "news_headline")
    told = [
        "--model",
        str(made.model),
        "--artefact",
        str(artefact),
        "--data",
        str(write_files(tmp_path / "data")),
    ]
    command = [sys.executable, str(ROOT / "scripts" / "quantised.py"), *told, "--out", str(tmp_path / "out")]
    table = subprocess.run([*command, "--people", "2"], check=True, capture_output=True, text=True).stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "lines.jsonl").read_text().splitlines()]
    assert [(line["base"], line["person"]) for line in lines] == [
        (kind, person) for kind in quantised._KINDS for person in (0, 1)
    ]
    assert all(np.isfinite([*line["loss"].values()]).all() for line in lines)
    by_base = {(line["base"], line["person"]): line["loss"] for line in lines}
    plain = by_base["as it is", 0]
    assert plain["trained as it is"] == plain["trained on it"] != plain["seed"]
    assert by_base["Q4_0", 0]["untouched"] != plain["untouched"]
    again = subprocess.run([*command, "--table"], check=True, capture_output=True, text=True).stdout
    assert again == table
