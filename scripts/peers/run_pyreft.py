"""pyreft itself on a model folder of ours: logits under a checkpoint, or a freshly trained checkpoint.

    bash scripts/peers/build.sh
    .peers/pyreft/bin/python scripts/peers/run_pyreft.py logits --model FOLDER --checkpoint FOLDER --input FILE --out FILE
    .peers/pyreft/bin/python scripts/peers/run_pyreft.py train --model FOLDER --input FILE --out FOLDER --layers 1 2 --ranks 6 3

Runs in an environment of its own, which knows nothing of perfit and reads no tokenizer of ours, so
prompts come as token ids: FILE is {"prompts": [[id, …], …], "locations": [[index, …], …]}, the
indices those that every intervention touches. `logits` writes an .npz, one float32 array
(tokens, vocabulary) a prompt, named by its number; without a checkpoint they are the base model's.
"""  # noqa: E501 - a command keeps its line

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyreft
import torch
from transformers import AutoModelForCausalLM


def load_model(folder: Path) -> Any:
    """The model in float32. Its configuration is put as transformers 4.45 reads it, in a copy."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters", {"rope_type": "default"})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype", "float32")
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "config.json").write_text(json.dumps(config))
        for weights in folder.glob("*.safetensors*"):
            (Path(place) / weights.name).symlink_to(weights.resolve())
        return AutoModelForCausalLM.from_pretrained(place, torch_dtype=torch.float32).eval()


def load_checkpoint(folder: Path, model: Any) -> Any:
    """By pyreft's loader. It puts weight and bias in bfloat16, so both are widened and loaded again."""
    reft = pyreft.ReftModel.load(str(folder), model)
    for key, intervention in reft.interventions.items():
        intervention.learned_source.float()
        intervention.load_state_dict(torch.load(folder / f"intkey_{key}.bin", weights_only=True))
    return reft


def intervened(reft: Any, ids: torch.Tensor, locations: list[int], **more: Any) -> Any:
    """pyreft's output for ids (1, T) with every intervention at the same places."""
    where = {"sources->base": (None, [[locations]] * len(reft.interventions))}
    return reft({"input_ids": ids}, unit_locations=where, **more)[1]


def write_logits(args: argparse.Namespace) -> None:
    given = json.loads(args.input.read_text())
    model = load_model(args.model)
    reft = load_checkpoint(args.checkpoint, model) if args.checkpoint else None
    arrays = {}
    with torch.no_grad():
        for i, (prompt, locations) in enumerate(zip(given["prompts"], given["locations"], strict=True)):
            ids = torch.tensor([prompt])
            output = model(ids) if reft is None else intervened(reft, ids, locations)
            arrays[str(i)] = output.logits[0].float().numpy()
    np.savez(args.out, **arrays)


def train(args: argparse.Namespace) -> None:
    """A few steps on the prompts themselves, so that every tensor leaves where it started."""
    torch.manual_seed(0)
    given = json.loads(args.input.read_text())
    model = load_model(args.model)
    dtype = getattr(torch, args.dtype)
    representations = [
        {
            "layer": layer,
            "component": "block_output",
            "low_rank_dimension": rank,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=model.config.hidden_size, low_rank_dimension=rank, dtype=torch.float32
            ),
        }
        for rank in args.ranks
        for layer in args.layers
    ]
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    optimizer = torch.optim.AdamW(reft.get_trainable_parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        for prompt, locations in zip(given["prompts"], given["locations"], strict=True):
            ids = torch.tensor([prompt])
            intervened(reft, ids, locations, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for intervention in reft.interventions.values():
        intervention.learned_source.to(dtype)
    reft.save(str(args.out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, action in (("logits", write_logits), ("train", train)):
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("--input", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True)
        if name == "logits":
            command.add_argument("--checkpoint", type=Path)
        else:
            command.add_argument("--layers", type=int, nargs="+", required=True)
            command.add_argument("--ranks", type=int, nargs="+", required=True, help="of #0, of #1")
            command.add_argument("--dtype", default="float32", help="of weight and bias, when saved")
    args = parser.parse_args()
    args.action(args)


if __name__ == "__main__":
    main()
