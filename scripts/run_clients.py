"""Drive the endpoint by apps' own libraries, unchanged; `make clients` installs them.

    python scripts/run_clients.py                  prints what each of them said
    python scripts/run_clients.py --write-docs     and writes docs/results/clients.md

A cloud with the default model starts, a device enrols, and `perfit serve` serves it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from local import Device, LocalCloud

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "What is a good name for a small grey cat?"
_BUILT = Path("build/clients")
_HERE = Path("scripts/clients")
_SECONDS = 300


def commands(model: str, scratch: Path) -> dict[str, list[str]]:
    """Each client's name and command."""
    asked = [model, QUESTION]
    return {
        "openai (Python)": [f"{_BUILT}/openai/bin/python", f"{_HERE}/openai_client.py", *asked],
        "openai (npm)": ["node", f"{_BUILT}/npm-openai/client.mjs", *asked],
        "llm": ["bash", f"{_HERE}/llm_client.sh", *asked, str(scratch / "llm")],
        "LangChain": [f"{_BUILT}/langchain/bin/python", f"{_HERE}/langchain_client.py", *asked],
        "Vercel AI SDK": ["node", f"{_BUILT}/npm-ai/client.mjs", *asked],
    }


def missing() -> list[str]:
    """Environments that `make clients` has yet to build."""
    names = ("openai", "llm", "langchain", "npm-openai", "npm-ai")
    return [name for name in names if not any((ROOT / _BUILT / name).glob("built.*"))]


def run_client(command: Sequence[str], url: str, token: str) -> str:
    """What it prints. Node looks for packages beside the script, so the script is copied there."""
    if command[0] == "node":
        home = ROOT / command[1]
        source = {"npm-openai": "openai_client.mjs", "npm-ai": "ai_client.mjs"}[home.parent.name]
        home.write_text((ROOT / _HERE / source).read_text())
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OPENAI", "PYTHON"))}
    env |= {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": token}
    env |= {"AI_SDK_LOG_WARNINGS": "false", "LANGSMITH_TRACING": "false", "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=_SECONDS, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


@contextmanager
def serving(device: Device) -> Iterator[tuple[str, str]]:
    """(url, token) of `perfit serve`, a process of its own that ends with 0."""
    process = device.popen("serve", "--port", "0", "--json")
    assert process.stdout is not None  # noqa: S101 - a pipe
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(process.communicate()[1])
    said = json.loads(line)
    try:
        yield said["url"], said["token"]
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=30)
    if process.returncode or errors:
        raise RuntimeError(f"perfit serve ended with {process.returncode}: {errors}")


def page(said: dict[str, str], model: str) -> str:
    versions = {
        "openai (Python)": _pinned("openai.txt", "openai"),
        "llm": _pinned("llm.txt", "llm"),
        "LangChain": _pinned("langchain.txt", "langchain-openai"),
        "openai (npm)": _locked("npm-openai"),
        "Vercel AI SDK": _locked("npm-ai"),
    }
    parts = [
        "# Five clients at the endpoint\n",
        f"`make clients`, then `python scripts/run_clients.py --write-docs`, on {os.cpu_count()} cores of "
        f"{platform.machine()}. A cloud with the default model (SmolLM2-135M-Instruct), one device, and "
        f"`perfit serve`; the model asked for is `{model}`. What each client is and does stands in "
        "[scripts/clients](../../scripts/clients).\n",
    ]
    for name, text in said.items():
        parts.append(f"## {name}: {versions[name]}\n\n```\n{text.strip()}\n```\n")
    return "\n".join(parts)


def _pinned(file: str, package: str) -> str:
    lines = (ROOT / _HERE / file).read_text().splitlines()
    return next(line.replace("==", " ") for line in lines if line.startswith(f"{package}=="))


def _locked(folder: str) -> str:
    wanted = json.loads((ROOT / _HERE / folder / "package.json").read_text())["dependencies"]
    return ", ".join(f"{name} {version}" for name, version in wanted.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="personal", help="what the clients name as the model")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    if names := missing():
        sys.exit(f"{', '.join(names)}: not built yet; run make clients")
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with LocalCloud(None, [], scratch / "cloud") as cloud:
            device = Device(scratch / "home", "default")
            device("enroll", "-", text=cloud.invite())
            said = {}
            with serving(device) as (url, token):
                for client, command in commands(options.model, scratch).items():
                    said[client] = run_client(command, url, token)
                    print(f"-- {client}\n{said[client]}", flush=True)
    if options.write_docs:
        (ROOT / "docs/results/clients.md").write_text(page(said, options.model))


if __name__ == "__main__":
    main()
