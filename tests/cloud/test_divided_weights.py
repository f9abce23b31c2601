"""How vLLM's worker processes get the weights: no vLLM is needed to look at that."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from perfit_cloud.engine.generation.vllm.weights import _read, offered

PROGRAM = """
import os
from multiprocessing import get_context
from perfit_cloud.engine.generation.vllm.weights import InheritedDescriptor

def look(told):
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    files = [os.readlink(link) for link in links if os.path.exists(link) or os.path.islink(link)]
    print(os.fstat(told).st_size, [file for file in files if "memfd" in file])

if __name__ == "__main__":
    one, _other = os.memfd_create("one"), os.memfd_create("other")
    os.ftruncate(one, 4321)
    process = get_context("spawn").Process(target=look, args=(InheritedDescriptor(one),))
    process.start()
    process.join()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_come_bit_for_bit_and_the_file_goes(dtype: torch.dtype, load: Any) -> None:
    """Gemma's head is its embedding, which is sent once."""
    base = load("gemma3_text")
    base = replace(base, model=copy.deepcopy(base.model).to(dtype))
    with offered(base, 2) as told:
        got = dict(_read(told["descriptor"], told["tensors"]))
    assert set(base.model.state_dict()) - set(got) == {"lm_head.weight"}
    for name, tensor in got.items():
        assert torch.equal(tensor, base.model.state_dict()[name]) and tensor.dtype == dtype
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(told["descriptor"])


def test_a_process_inherits_the_descriptor_that_it_is_started_with(tmp_path: Any) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    said = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120, check=True)
    assert said.stdout == "4321 ['/memfd:one (deleted)']\n", said.stderr
