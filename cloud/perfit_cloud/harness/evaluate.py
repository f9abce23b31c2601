"""Tasks of lm-eval-harness, once with the untouched model and once with a shift (Tables 17 and 18)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from perfit_cloud.engine.interface import ShiftUse
from perfit_cloud.harness import RESULTS_FILE
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_shared.errors import ConfigError, InvalidInput, ShiftMismatch
from perfit_shared.files import write_whole
from perfit_shared.shifts import ShiftTensors
from perfit_shared.types import Mode

__all__ = ["GROUPS", "Measured", "check_installed", "measure_capabilities", "names_of", "write_measured"]


_BUNDLED = {"perfit_everyday": "everyday.yaml", "perfit_naming": "naming.yaml"}
# The paper's, by lm-eval's names. Their data come from the hub, whenever a task is first run.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "table17": (
        *("boolq", "piqa", "social_iqa", "hellaswag", "winogrande"),
        *("arc_easy", "arc_challenge", "openbookqa"),
    ),
    "table18": ("sst2", "cola", "mrpc", "qqp", "qnli", "mnli", "rte"),
}


@dataclass(frozen=True)
class Measured:
    """One metric of one task; errors are lm-eval's standard errors, None where it gives none."""

    task: str
    metric: str
    queries: int
    off: float
    on: float
    off_error: float | None
    on_error: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_installed() -> None:
    """Raises ConfigError without lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("capabilities need lm-eval-harness: pip install 'perfit[capabilities]'")


def names_of(text: str) -> list[str]:
    """The tasks of "boolq,piqa" or "table17". Raises InvalidInput on none."""
    names = [
        name for part in text.split(",") if part.strip() for name in GROUPS.get(part.strip(), (part.strip(),))
    ]
    if not names:
        raise InvalidInput('--tasks should name tasks of lm-eval, like "boolq,piqa", or table17, table18')
    return list(dict.fromkeys(names))


def measure_capabilities(
    base: BaseModel,
    artefact: Artefact,
    personal: ShiftTensors | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
) -> list[Measured]:
    """Every metric of every task, with the shift off and on.

    `personal`: φ₂ after the artefact's φ₁, or the seed. `limit`: queries a task at most; `shots`: examples
    in the prompt, else as the task has them. Raises ConfigError without lm-eval, ShiftMismatch on an
    artefact of another model, InvalidInput on a task that is unknown or whose data cannot be had.
    """
    check_installed()
    if artefact.fingerprint != base.fingerprint:
        raise ShiftMismatch(
            f"the artefact {artefact.name} was trained on another base model than {base.name}"
        )
    seed = artefact.seed if personal is None else personal
    uses = (ShiftUse(Mode.BASE), ShiftUse(Mode.PERSONAL, artefact, seed))
    off, on = (_results(base, use, tasks, limit=limit, shots=shots) for use in uses)
    return [
        Measured(task, metric, queries, value, on[task, metric][0], error, on[task, metric][1])
        for (task, metric), (value, error, queries) in off.items()
    ]


def write_measured(folder: Path, model: str, artefact: Artefact, found: Sequence[Measured]) -> None:
    """FOLDER/capabilities.json: {"model", "artefact_task", "results": [...]}."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"model": model, "artefact_task": artefact.task.name, "results": [one.to_json() for one in found]}
    write_whole(folder / RESULTS_FILE, json.dumps(data, indent=1).encode())


def _results(
    base: BaseModel, use: ShiftUse, tasks: Sequence[str], *, limit: int | None, shots: int | None
) -> dict[tuple[str, str], tuple[float, float | None, int]]:
    """{(task, metric): (value, standard error, queries)}"""
    from lm_eval import simple_evaluate

    from perfit_cloud.harness.adapter import ShiftedModel

    with as_file(files("perfit_cloud.harness") / "tasks") as folder:
        asked = [_bundled(folder, name) if name in _BUNDLED else name for name in tasks]
        try:
            found = simple_evaluate(
                ShiftedModel(base, use), tasks=asked, limit=limit, num_fewshot=shots, log_samples=False
            )
        except (KeyError, ValueError, OSError) as error:
            raise InvalidInput(
                f"lm-eval cannot run {', '.join(tasks)} ({type(error).__name__}: {str(error)[:200]}); look "
                "for the names in `lm-eval ls tasks`, and whether their data can be had from the hub"
            ) from error
    made = {}
    for task, values in found["results"].items():
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if isinstance(value, float | int) and kind and not metric.endswith("_stderr"):
                spread = values.get(f"{metric}_stderr,{kind}")
                queries = int(found["n-samples"][task]["effective"]) if task in found["n-samples"] else 0
                made[task, metric] = (float(value), spread if isinstance(spread, float) else None, queries)
    return made


def _bundled(folder: Path, name: str) -> dict[str, Any]:
    """A task that ships with perfit, its data file by its whole path."""
    import yaml

    config: dict[str, Any] = yaml.safe_load((folder / _BUNDLED[name]).read_text("utf-8"))
    data = config["dataset_kwargs"]["data_files"]
    config["dataset_kwargs"]["data_files"] = {split: str(folder / file) for split, file in data.items()}
    return config
