"""A headless Chromium, driven over its debugging pipe: pages opened, looked at and photographed.

Debian's package is `chromium`.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_SECONDS = 60.0
# The browser reads commands from descriptor 3 and answers on 4.
_ON_PIPES = 'exec "$0" "$@" 3<&{} 4>&{}'
_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe"]


class Browser:
    """Use `with`. `events` has all that the page's tab reported."""

    def __init__(self) -> None:
        assert PROGRAM is not None
        self.events: list[dict[str, Any]] = []
        self._home = tempfile.TemporaryDirectory()
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        words = ["bash", "-c", _ON_PIPES.format(theirs_in, theirs_out), PROGRAM, *_FLAGS]
        self._process = subprocess.Popen(
            [*words, f"--user-data-dir={self._home.name}"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._waiting, self._number, self._session = b"", 0, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(_SECONDS)
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._home.name, ignore_errors=True)

    def open(self, path: Path) -> None:
        """In a new tab, until it is loaded."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = ""
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self._call("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def evaluate(self, script: str) -> Any:
        return self._call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def show(self, *, width: int, dark: bool) -> None:
        """As a screen of this width, in CSS pixels, would."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + _SECONDS
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._from], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            self._waiting += os.read(self._from, 1 << 16)
        line, _, self._waiting = self._waiting.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found
