"""What `accelerate launch` runs in each of two processes: DATA MODEL OUT."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from perfit_cloud.collective.run import CollectiveRequest, train_collective
from perfit_shared.errors import Cancelled, InvalidInput


def in_each_process(data: str, model: str, out: Path) -> None:
    """One whole run; one that the second process wants to stop, and that then goes on.

    Writes what this process got to OUT/{process}.json.
    """
    torch.set_num_threads(1)
    request = CollectiveRequest(
        task="news_headline",
        data=Path(data),
        model=model,
        out=out / "whole",
        layers=(1, 2),
        positions="f2+l2",
        collective_rank=4,
        personal_rank=4,
        epochs=2,
        device_epochs=1,
        dtype="float32",
    )
    whole = train_collective(request)
    rank = int(os.environ["RANK"])
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return rank == 1 and asked == 30

    request = replace(request, out=out / "parts")
    message = ""
    try:
        train_collective(request, stop=stop)
    except Cancelled as error:
        message = str(error)
    parts = train_collective(request)
    refusal = ""
    try:
        train_collective(request)  # it is the main process that looks into the folder
    except InvalidInput as error:
        refusal = str(error)
    told = {
        "whole": whole.version,
        "parts": parts.version,
        "asked": asked,
        "message": message,
        "refusal": refusal,
    }
    (out / f"{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    in_each_process(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
