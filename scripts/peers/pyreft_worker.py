"""pyreft at work, told by lines of JSON: answering many users one after another, and training one.

    .peers/pyreft/bin/python scripts/peers/pyreft_worker.py --model FOLDER --threads 2 --answers FD

Reads one command a line from stdin, and writes one line of JSON for each to an open file descriptor,
since libraries print on stdout what they like. Prompts and targets are token ids; *locations* are
the places of a prompt that its interventions touch.

    {"do": "load", "checkpoints": [FOLDER, …]}                      one a user
    {"do": "answer", "requests": [[user, prompt, locations], …], "new_tokens": 64}
        → {"seconds": …, "answers": [[id, …], …]}
    {"do": "train", "start": FOLDER, "examples": [[prompt, target, locations], …],
     "batches": [[row, …], …], "learning_rate": …, "warm_up": …, "clip": …}
        → {"seconds": …, "losses": [nats a token, one a batch]}

Seconds leave out what is done once a user or a run: building modules, reading files.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyreft
import torch
from run_pyreft import load_checkpoint, load_model
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.utils import logging as hf_logging

_PAD = 0


class Worker:
    def __init__(self, folder: Path) -> None:
        self._model = load_model(folder)
        self._model.generation_config.eos_token_id = None  # an answer has all its tokens
        self._model.generation_config.pad_token_id = _PAD
        self._reft: Any = None
        self._users: list[dict[str, Any]] = []  # by user, states of the interventions by key

    def load(self, checkpoints: list[str]) -> dict[str, Any]:
        """One user's shift is active at a time; the others' wait in memory, read and ready."""
        self._reft = load_checkpoint(Path(checkpoints[0]), self._model)
        self._reft.eval()
        self._users = [
            {
                key: torch.load(Path(folder) / f"intkey_{key}.bin", weights_only=True)
                for key in self._reft.interventions
                if key.endswith("#1")  # φ₂: φ₁ is everyone's
            }
            for folder in checkpoints
        ]
        return {}

    @torch.no_grad()
    def answer(self, requests: list[Any], new_tokens: int) -> dict[str, Any]:
        answers = []
        begun = time.perf_counter()
        active = None
        for user, prompt, locations in requests:
            if user != active:
                for key, state in self._users[user].items():
                    self._reft.interventions[key].load_state_dict(state)
                active = user
            ids = torch.tensor([prompt])
            where = {"sources->base": (None, [[locations]] * len(self._reft.interventions))}
            _, out = self._reft.generate(
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                unit_locations=where,
                intervene_on_prompt=True,
                max_new_tokens=new_tokens,
                do_sample=False,
            )
            answers.append(out[0, len(prompt) :].tolist())
        return {"seconds": time.perf_counter() - begun, "answers": answers}

    def train(
        self,
        start: str,
        examples: list[Any],
        batches: list[list[int]],
        *,
        learning_rate: float,
        warm_up: float,
        clip: float,
    ) -> dict[str, Any]:
        reft = load_checkpoint(Path(start), self._model)
        reft.train()
        losses: list[torch.Tensor] = []
        with tempfile.TemporaryDirectory() as out:
            arguments = TrainingArguments(
                output_dir=out,
                num_train_epochs=1,
                per_device_train_batch_size=len(batches[0]),
                learning_rate=learning_rate,
                lr_scheduler_type="linear",
                warmup_ratio=warm_up,
                max_grad_norm=clip,
                weight_decay=0.0,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                remove_unused_columns=False,
            )
            begun = time.perf_counter()
            trainer = _Trainer(model=reft, args=arguments, train_dataset=examples)
            trainer.batches, trainer.losses = batches, losses
            trainer.train()
            seconds = time.perf_counter() - begun
        return {"seconds": seconds, "losses": [float(loss) for loss in losses]}


class _Trainer(pyreft.ReftTrainerForCausalLM):
    """pyreft's own, but for the order of its batches, which is given."""

    batches: list[list[int]]
    losses: list[torch.Tensor]

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataset, batch_sampler=self.batches, collate_fn=_collate)

    def compute_loss(self, *given: Any, **more: Any) -> Any:
        loss = super().compute_loss(*given, **more)
        self.losses.append(loss.detach())
        return loss


def _collate(examples: list[Any]) -> dict[str, torch.Tensor]:
    """Padded on the right, as pyreft's does by a tokenizer."""
    longest = max(len(prompt) + len(target) for prompt, target, _ in examples)
    ids = torch.full((len(examples), longest), _PAD)
    labels = torch.full_like(ids, -100)
    for row, (prompt, target, _) in enumerate(examples):
        ids[row, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        labels[row, len(prompt) : len(prompt) + len(target)] = torch.tensor(target)
    lengths = torch.tensor([len(prompt) + len(target) for prompt, target, _ in examples])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "labels": labels,
        # (examples, interventions, places); an artefact of ours here has one intervention
        "intervention_locations": torch.tensor([[places] for _, _, places in examples]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--answers", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    hf_logging.set_verbosity_error()
    logging.getLogger().setLevel(logging.ERROR)
    answers = os.fdopen(args.answers, "w")
    worker = Worker(args.model)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(getattr(worker, command.pop("do"))(**command)), file=answers, flush=True)


if __name__ == "__main__":
    main()
