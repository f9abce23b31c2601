"""Enrol, ask and update with the `perfit` of $PERFIT_DEVICE_BIN against a cloud of this environment."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import local
from local import Device, LocalCloud

ROOT = Path(__file__).resolve().parents[1]
STARTER = ROOT / "cloud" / "perfit_cloud" / "starter"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with LocalCloud(STARTER / "perfit-starter", [STARTER / "news_categorize"], work / "cloud") as cloud:
            invite = cloud.invite()
            local.BIN = Path(os.environ["PERFIT_DEVICE_BIN"])
            device = Device(work / "home", "default")
            device("enroll", "-", text=invite)
            answer = device.json("ask", "Court Blocks New Voting Law. Judges ruled on Friday.")
            device(
                "history",
                "import",
                str(ROOT / "demo" / "people" / "folders.jsonl"),
                "--task",
                "news_categorize",
            )
            update = device.json("update", "--epochs", "1")
    print(f"device alone: answered {answer['answer'].strip()!r}, {update['steps']} update steps")


if __name__ == "__main__":
    main()
