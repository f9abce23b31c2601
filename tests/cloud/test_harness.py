"""`perfit-cloud capabilities`: lm-eval's own figures with the shift off, hand-made ones with it on."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tests.support.models import random_shift
from torch import Tensor, nn
from typer.testing import CliRunner

from perfit_cloud.cli.capabilities import capabilities as command
from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.harness.evaluate import GROUPS, check_installed, names_of
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import ConfigError, InvalidInput
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Mode

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed; `make capabilities`"
)
CONTEXTS = ("the cat sat on", "the dog ran to the door and the mat ", "", "a", "cat")
QUESTIONS = [(context, answer) for context in CONTEXTS for answer in (" the mat", " dog ran", "x")]


def test_names_and_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    assert names_of("table17, mine,boolq") == [*GROUPS["table17"], "mine"]
    with pytest.raises(InvalidInput, match="table18"):
        names_of(" ,")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"perfit\[capabilities\]"):
        check_installed()


def test_bundled_tasks_have_one_right_answer() -> None:
    folder = Path(__file__).resolve().parents[2] / "cloud" / "perfit_cloud" / "harness" / "tasks"
    items = [json.loads(line) for line in (folder / "everyday.jsonl").read_text().splitlines()]
    assert all(len(set(item["choices"])) == 2 and item["right"] in (0, 1) for item in items)
    assert sum(item["right"] for item in items) * 2 == len(items), "guessing one side is right half the time"


# -- against lm-eval's own model ---------------------------------------------------------------


def _asked(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, each, at) for at, each in enumerate(arguments)]


def _by_hand(
    base: BaseModel, artefact: Artefact, personal: ShiftTensors, context: list[int], answer: list[int]
) -> float:
    """φ₂(φ₁(x)) on the prompt's rows by plain torch, one sequence, hooks of its own."""
    rows = [0, 1, 2, len(context) - 3, len(context) - 2, len(context) - 1]  # f3+l3 of six tokens or more

    def phi(x: Tensor, tensors: ShiftTensors, layer: int) -> Tensor:
        rotation, source, bias = map(torch.tensor, tensors.layers[layer])
        return x + (x @ source.T + bias - x @ rotation.T) @ rotation

    def hook(layer: int) -> Any:
        def apply(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[0, rows] = phi(phi(hidden[0, rows], artefact.collective, layer), personal, layer)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return apply

    model = base.share_weights()
    for layer in artefact.spec.layers:
        block_list(model)[layer].register_forward_hook(hook(layer))
    with torch.no_grad():
        scores = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    return float(sum(scores[len(context) - 1 + at, token] for at, token in enumerate(answer)))


@pytest.mark.slow
@needs_lm_eval
def test_off_is_lm_eval_s_own_model_and_on_is_a_hooked_pass(
    load: Callable[[str], BaseModel], make_artefact: Callable[..., Artefact]
) -> None:
    from lm_eval.models.huggingface import HFLM

    from perfit_cloud.harness.adapter import ShiftedModel

    base = load("llama")
    artefact = make_artefact(base)
    personal = random_shift(artefact.spec, artefact.spec.personal_rank, seed=7)
    theirs = HFLM(pretrained=base.share_weights(), tokenizer=base.tokenizer, batch_size=4)
    off = ShiftedModel(base, ShiftUse(Mode.BASE))
    on = ShiftedModel(base, ShiftUse(Mode.PERSONAL, artefact, personal))

    asked = _asked("loglikelihood", QUESTIONS)
    expected, plain, shifted = (model.loglikelihood(asked) for model in (theirs, off, on))
    assert [score for score, _ in plain] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in plain] == [greedy for _, greedy in expected]
    six = [at for at, (context, _) in enumerate(QUESTIONS) if len(theirs.tok_encode(context)) >= 6]
    assert len(six) >= 3
    for at in six:
        pair = on._encode_pair(*QUESTIONS[at])
        assert shifted[at][0] == pytest.approx(_by_hand(base, artefact, personal, *pair), abs=1e-3)
        assert abs(shifted[at][0] - plain[at][0]) > 1e-2, "and the shift does something"

    whole = _asked("loglikelihood_rolling", [("the cat sat on the mat and the dog ran to the door",)])
    assert off.loglikelihood_rolling(whole) == pytest.approx(theirs.loglikelihood_rolling(whole), abs=1e-3)

    told = {"until": ["door"], "max_gen_toks": 12}
    questions = _asked("generate_until", [(context, told) for context in CONTEXTS if context])
    assert off.generate_until(questions) == theirs.generate_until(questions)
    assert on.generate_until(questions) != off.generate_until(questions)


@pytest.mark.slow
@needs_lm_eval
def test_the_command_runs_the_bundled_tasks(
    load: Callable[[str], BaseModel],
    model_folder: Callable[[str], Path],
    make_artefact: Callable[..., Artefact],
    tmp_path: Path,
) -> None:
    base = load("llama")
    make_artefact(base).save(tmp_path / "artefact")
    app = typer.Typer()
    app.command()(command)
    words = ["--model", str(model_folder("llama")), "--artefact", str(tmp_path / "artefact"), "--limit", "8"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0, done.output
    found = {(one["task"], one["metric"]): one for one in json.loads(done.stdout.splitlines()[-1])}
    assert set(found) == {("perfit_everyday", "acc"), ("perfit_naming", "exact_match")}
    assert all(one["queries"] == 8 and 0 <= one["off"] <= 1 for one in found.values())
    written = json.loads((tmp_path / "run" / "capabilities.json").read_text())
    assert [(one["task"], one["metric"]) for one in written["results"]] == list(found)
    refused = CliRunner().invoke(app, [*words, "--tasks", "no_such_task"])
    assert refused.exit_code != 0 and isinstance(refused.exception, InvalidInput)
