"""Enrol, ask and update with the `perfit` of $PERFIT_DEVICE_BIN against a cloud of this environment."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import local
import tiny
from local import Device, LocalCloud


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        served = tiny.build(work / "served")
        history = work / "headlines.jsonl"
        history.write_text("".join(json.dumps(item) + "\n" for item in tiny.headlines(60)), "utf-8")
        with LocalCloud(served.model, served.artefacts, work / "cloud") as cloud:
            invite = cloud.invite()
            local.BIN = Path(os.environ["PERFIT_DEVICE_BIN"])
            device = Device(work / "home", "default")
            device("enroll", "-", text=invite)
            device("history", "import", str(history), "--task", "news_headline")
            answer = device.json("ask", "Court Blocks New Voting Law.", "--task", "news_headline")
            update = device.json("update", "--task", "news_headline", "--epochs", "1")
    print(f"device alone: answered {answer['answer'].strip()!r}, {update['steps']} update steps")


if __name__ == "__main__":
    main()
