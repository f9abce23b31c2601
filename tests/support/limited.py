"""Changes to a vault that end at any byte, by a kill or because the disk takes no more."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["run_limited"]

# Forks, for which a process with gRPC's threads is no good place.
_SCRIPT = """
import importlib, json, os, resource, shutil, signal, sys
from pathlib import Path
from perfit_shared.errors import VaultError

module, _, name = sys.argv[5].partition(":")
change = getattr(importlib.import_module(module), name)

def limited(path, limit, action):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGXFSZ, action)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            change(path)
        except VaultError as error:
            os.write(told, str(error).encode() + b"\\n")
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

source, work = Path(sys.argv[1]), Path(sys.argv[2])
action = signal.SIG_DFL if sys.argv[3] == "killed" else signal.SIG_IGN
told = os.open(work / "told", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
for number, limit in enumerate(json.loads(sys.argv[4])):
    folder = work / str(number)
    shutil.copytree(source, folder)
    (folder / "status").write_text(str(limited(folder / "vault.db", limit, action)))
"""


def run_limited(
    change: str, source: Path, work: Path, *, how: str, limits: Sequence[int]
) -> tuple[list[Path], set[str]]:
    """Make a change ("module:function" of the vault's path) to a copy of the folder `source` for each limit.

    `how` is "killed", in the middle of a write, or "refused", which the process lives to see. Gives the
    vaults, and what the processes that were refused a write said.
    """
    work.mkdir()
    subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(source), str(work), how, json.dumps(limits), change],
        check=True,
        cwd=Path(__file__).parents[2],
    )
    found = [work / str(number) / "vault.db" for number in range(len(limits))]
    return found, set((work / "told").read_text().splitlines())
