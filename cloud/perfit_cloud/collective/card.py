"""The card of a trained artefact, the same as CARD.md, and a plot of its losses."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perfit_cloud.collective.community_card import community_lines
from perfit_cloud.collective.optimizer import CLIP
from perfit_cloud.collective.steps import WARM_UP
from perfit_cloud.collective.training import Stage1Training
from perfit_cloud.collective.trials import ranks_rates, trial_steps
from perfit_cloud.text_tables import markdown_table
from perfit_shared.prompts import prompts_of

__all__ = ["draw_losses", "libraries", "make_card", "write_card"]


def make_card(
    training: Stage1Training, *, preset: str, device_rate: float, losses: Mapping[str, float]
) -> dict[str, Any]:
    """The card, plain JSON values without a path. `losses`: validation loss of base, collective, seed."""
    record, settings, privacy = training.record, training.settings, training.privacy
    last = record.train[-training.steps_an_epoch :]
    seconds = record.step_seconds or math.inf
    card = {
        "model": training.base.name,
        "data": training.corpus.summary() if privacy is None else training.corpus.private_summary(),
        "hyper_parameters": {
            "preset": preset,
            "prompts": prompts_of(training.task),
            **settings.spec.to_json(),
            "blocks": training.base.blocks,
            "epochs": settings.epochs,
            "steps": record.step,
            "batch_size": settings.batch_size,
            "learning_rate": record.learning_rate,
            "warm_up": WARM_UP,
            "schedule": "linear",
            "gradient_clipping": CLIP if privacy is None else None,
            "weight_decay": 0,
            "seed": settings.seed,
            "dtype": str(training.base.model.dtype).removeprefix("torch."),
            "processes": training.processes.count,
            "accumulate": settings.accumulate,
            "gradient_checkpointing": settings.gradient_checkpointing,
            "optimizer": "Adam, rotations on the Stiefel manifold by QR retraction",
            "collective_parameters": settings.spec.parameters(settings.spec.collective_rank),
            "personal_parameters": settings.spec.personal_parameters(),
            "device_learning_rate": device_rate,
            "device_epochs": settings.device_epochs,
        },
        "trials": record.trials,
        "trials_note": _trials_note(training),
        "device_trials": record.device_trials,
        "device_trials_note": _device_note(training),
        "losses": {
            "unit": "nats a target token",
            "validation": dict(losses),
            "validation_curve": record.validation,
            "taken_at_step": record.best_step,
            "stopped_early": record.stopped,
            "train_last": sum(last) / len(last) if last else None,
            "note": "collective is φ₁ alone, seed is φ₂∘φ₁: both were trained together",
        },
        "seconds": round(record.seconds, 1),
        "speed": {"steps_per_second": record.step / seconds, "tokens_per_second": record.tokens / seconds},
        "privacy": {"note": _privacy_note(training), "mechanism": privacy and privacy.to_json()},
        "libraries": libraries(),
    }
    return dict(_plain(card))


def _privacy_note(training: Stage1Training) -> str:
    """Who can hold φ₁, and what it may reveal of the people it was learned from."""
    holders = (
        "Every enrolled device can recover φ₁ from about as many gradient calls as a hidden state has "
        "numbers, so it is as good as published to all members"
    )
    privacy = training.privacy
    if privacy is None:
        return (
            f"{holders}. It was trained without differential privacy: it may tell who holds it something of "
            "any person it was learned from"
        )
    return (
        f"{holders}. φ₁ and the seed were trained with differential privacy by person: epsilon "
        f"{privacy.epsilon:g}, delta {privacy.delta:.2g} for one of {privacy.people:,} people more or less. "
        f"A person's gradient was clipped to norm {privacy.clip_norm:g}, people were drawn by Poisson "
        f"sampling at rate {privacy.sampling_rate:.4g}, {privacy.steps:,} steps had noise of "
        f"{privacy.noise_multiplier:.4g} clip norms, R stayed as drawn at random. Validation examples are "
        "public; the number of people and the time it took are told besides"
    )


def _trials_note(training: Stage1Training) -> str:
    if training.settings.learning_rate is not None:
        return "It was given"
    return (
        f"Trials of {trial_steps(training)} steps from the start, same batches, ended half-way where that "
        "was worse than no training; the lowest rate that gains nine tenths of what the best does in the "
        "validation loss of φ₂∘φ₁"
    )


def _device_note(training: Stage1Training) -> str:
    if training.settings.device_learning_rate is not None:
        return "It was given"
    trials = training.record.device_trials
    if not trials:
        return "No user has enough examples to try on, so it is stage 1's rate"
    users, held_out = int(trials[0]["users"]), training.corpus.held_out_histories
    note = (
        "Updates of the users with the longest histories, as devices make them, measured on the test part "
        f"of their examples; {min(users, held_out)} of {users} were not part of stage 1. "
        "The lowest rate that gains nine tenths of what the best does"
    )
    if ranks_rates(trials):
        return note
    return f"{note}, but not above stage 1's rate, since they gained too little to tell rates apart"


def libraries() -> dict[str, str]:
    """What this ran with, by name."""
    names = ("perfit", "torch", "transformers", "accelerate", "numpy")
    return {"python": platform.python_version(), **{n: importlib.metadata.version(n) for n in names}}


def _plain(value: Any) -> Any:
    """Floats to six significant digits, those that JSON lacks to None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def write_card(path: Path, name: str, card: Mapping[str, Any]) -> None:
    """CARD.md: the same for people."""
    data, hyper, losses = card["data"], card["hyper_parameters"], card["losses"]
    rows = [[label, f"{losses['validation'][key]:.4f}"] for key, label in _LOSSES.items()]
    lines = [
        f"# {name}: a collective shift for {card['model']}",
        "",
        f"φ₁ (rank {hyper['collective_rank']}) and the seed φ₂ (rank {hyper['personal_rank']}) after blocks "
        f"{', '.join(map(str, hyper['layers']))} of {hyper['blocks']} (counted from 0), "
        f"positions {hyper['positions']}; {hyper['personal_parameters']:,} numbers in a personal shift.",
        "",
        *markdown_table(["validation loss (nats a target token)", ""], rows),
        "",
        "![losses](loss.png)",
        "",
        f"**Data.** {data['source']} ({data['rows']}): {_data_words(data)}. Validation: "
        f"{data['validation_examples']} examples {_validation_of(data['validation_users'])}.",
        "",
        f"**Training.** {hyper['prompts']} prompts, {hyper['epochs']} epochs, "
        f"{hyper['steps']:,} steps{_batches(card)}, base in {hyper['dtype']}, {hyper['optimizer']}, "
        f"peak rate {hyper['learning_rate']:g}, warm-up {hyper['warm_up']}, linear decay"
        f"{_clipped(hyper['gradient_clipping'])}, no weight decay, seed {hyper['seed']}"
        f"{_train_loss(losses['train_last'])}. The shifts are those of step {losses['taken_at_step']}, "
        f"where the validation loss was lowest{_early(losses['stopped_early'])}. {card['seconds']:.0f} s, "
        f"{card['speed']['steps_per_second']:.2f} steps/s.",
        "",
        f"**Learning rate.** {card['trials_note']}.",
        *_table(card["trials"], ("learning_rate", "validation_loss", "steps")),
        "",
        f"**Learning rate for devices: {hyper['device_learning_rate']:g}**, {hyper['device_epochs']} epochs. "
        f"{card['device_trials_note']}.",
        *_table(card["device_trials"], ("learning_rate", "before", "after", "users")),
        "",
        *community_lines(card),
        f"**Privacy.** {card['privacy']['note']}.",
        "",
        "**Libraries.** " + ", ".join(f"{k} {v}" for k, v in card["libraries"].items()) + ".",
    ]
    path.write_text("\n".join(lines) + "\n", "utf-8")


_LOSSES = {"base": "base model", "collective": "collective (φ₁)", "seed": "with the seed (φ₂∘φ₁)"}


def _early(early: bool) -> str:
    return "; training ended early, since it no longer fell" if early else ""


def _data_words(data: Mapping[str, Any]) -> str:
    """Of data that were trained on privately, only how many people there were."""
    if "examples" not in data:
        return f"{data['users']:,} people"
    dropped = data["dropped"]
    alone = dropped["users_without_queries"]
    return (
        f"{data['examples']:,} examples of {data['users']:,} users, {data['mean_prompt_tokens']} + "
        f"{data['mean_target_tokens']} tokens on average; left out: {dropped['empty_field']} with an "
        f"empty field, {dropped['too_long']} with an answer too long for {data['token_cap']} tokens; "
        f"{data['shortened']} prompts cut to that"
        + f"; {alone:,} users with a profile and no query, since others have queries"
        * bool(alone)
    )


def _batches(card: Mapping[str, Any]) -> str:
    hyper = card["hyper_parameters"]
    if card["privacy"]["mechanism"] is not None:
        return ""  # private training has no batches of examples
    spread = f" over {hyper['processes']} processes" if hyper["processes"] > 1 else ""
    return f" of {hyper['batch_size']} examples{spread}"


def _clipped(norm: float | None) -> str:
    return "" if norm is None else f", clipping {norm}"


def _train_loss(loss: float | None) -> str:
    return "" if loss is None else f"; last epoch's mean training loss {loss:.4f}"


def _validation_of(users: int) -> str:
    return f"of {users} users who were not trained on" if users else "of the only user, the latest"


def _table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> list[str]:
    cells = [[None if row[key] is None else f"{row[key]:g}" for key in keys] for row in rows]
    return ["", *markdown_table([key.replace("_", " ") for key in keys], cells)] if rows else []


def draw_losses(path: Path, training: Stage1Training, *, base: float) -> None:
    """A PNG of training loss (thin: every step, thick: running mean) and validation points."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    record = training.record
    losses = np.array(record.train)
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    if len(losses):  # none is kept of private data
        window = max(1, min(50, len(losses) // 10))
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        steps = np.arange(1, len(losses) + 1)
        axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.7)
        axes.plot(steps[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window} steps")
    axes.plot(*zip(*record.validation, strict=True), "o-", color="tab:orange", label="validation, φ₂∘φ₁")
    axes.axhline(base, color="gray", linestyle=":", label="validation, base model")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a target token)")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
