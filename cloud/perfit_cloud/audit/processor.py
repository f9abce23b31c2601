"""On what an audit was made: the processor, and which kernels the libraries choose for it.

Kernels differ in what they leave behind, so what an audit shows is shown for these.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass

__all__ = ["Processor", "processor"]

# Of those that kernels are chosen by, as torch calls them.
_FEATURES = (
    "avx2",
    "avx512_f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "sve",
    "sve2",
)
_SECONDS = 120.0
# Work for each library, after which it tells which of its kernels it takes. Products of bfloat16 go to
# oneDNN on some processors alone, large convolutions on all.
_WORK = "import torch; a = torch.ones(64, 64); a @ a; torch.nn.Conv2d(64, 64, 3)(torch.ones(8, 64, 128, 128))"
_VERBOSE = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
_SAID = {
    "MKL": re.compile(r"^MKL_VERBOSE .* 64 architecture (.+?), \w+ [\d.]+GHz", re.MULTILINE),
    "oneDNN": re.compile(r"^onednn_verbose,.*,info,cpu,isa:(.+)$", re.MULTILINE),
}


@dataclass(frozen=True)
class Processor:
    name: str
    cores: int
    features: tuple[str, ...]
    kernels: dict[str, str]  # what each library chooses

    def __str__(self) -> str:
        kernels = "; ".join(f"{library}: {choice}" for library, choice in self.kernels.items())
        return f"{self.name}, {self.cores} cores, {' '.join(self.features)}; {kernels}"


def processor() -> Processor:
    """This machine's, and what a server that is started from here will compute with."""
    import torch

    about = torch.cpu.get_capabilities()
    kernels = {"torch": torch.backends.cpu.get_cpu_capability()}
    said = subprocess.run(
        [sys.executable, "-c", _WORK],
        capture_output=True,
        text=True,
        check=False,
        timeout=_SECONDS,
        env={**os.environ, **_VERBOSE},
    ).stdout
    for library, line in _SAID.items():
        chosen = line.search(said)
        kernels[library] = chosen[1].strip() if chosen else "not said"
    return Processor(
        name=str(about.get("cpu_name", "unknown")),
        cores=os.cpu_count() or 1,
        features=tuple(name for name in _FEATURES if about.get(name)),
        kernels=kernels,
    )
