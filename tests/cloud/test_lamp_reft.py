"""ReFT, PerFit's baseline that learns from a person alone, against the formula that its paper gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.lamp_files import TASK, write_files
from tests.support.lamp_requests import task_data

from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import FitContext, QueryRequest
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list, hidden_of


def test_reft_is_loreft_s_formula_at_both_ranks_on_the_chosen_rows(base: BaseModel, tmp_path: Path) -> None:
    """h + Rᵀ(Wh + b − Rh) behind block 1 on a prompt's last two tokens and nowhere else (Wu et al., 2024)."""
    folder = write_files(tmp_path / "data")
    data = task_data(folder, base)
    asked = {"layers": (1,), "positions": "l2", "collective_rank": 2, "personal_rank": 1, "epochs": 2}
    asked |= {"learning_rate": 1e-2, "batch_size": 4}
    method = METHODS["reft"](LampRequest(TASK, "tiny", folder, tmp_path, method="reft", **asked), data)
    method.prepare(lambda: False)
    ignore = lambda *_: None  # noqa: E731
    person = data.people.people[0]
    state = method.fit(person, FitContext(ignore, ignore, ignore, tmp_path / "checkpoint")).state
    found = state.personal.layers[1]
    rotation, source, bias = (torch.from_numpy(t) for t in (found.rotation, found.source, found.bias))
    assert rotation.shape == (3, base.hidden_size)  # 2 + 1
    assert torch.allclose(rotation @ rotation.T, torch.eye(3), atol=1e-5)
    assert method.parameters == 3 * (2 * base.hidden_size + 1)
    query = person.queries[0]
    prompt, target = data.encoder.query(query.item).pair

    def edit(_module: Any, _args: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        h = hidden[0, len(prompt) - 2 : len(prompt)]
        hidden[0, len(prompt) - 2 : len(prompt)] = h + (h @ source.T + bias - h @ rotation.T) @ rotation
        return output

    def log_likelihood() -> float:
        with torch.no_grad():
            logits = base.model(torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1)[torch.arange(len(target)), torch.tensor(target)].sum())

    untouched = log_likelihood()
    handle = block_list(base.model)[1].register_forward_hook(edit)
    edited = log_likelihood()
    handle.remove()
    requests = [QueryRequest(person.user_id, query, one, None) for one in (state, method.start)]
    scores = [score.log_likelihood for score in method.score(requests)]
    method.close()
    assert scores == pytest.approx([edited, untouched], rel=1e-4) and abs(edited - untouched) > 0.01
