"""Tiny random models of each family, built once a session; nothing is downloaded."""

from __future__ import annotations

import gc
import hmac
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Tensors this small lose more to waking threads than they gain; on a busy machine a hundred times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Processes that tests start serve in float32 on every processor, as the tests' own do (`_plain_precision`).
os.environ["PERFIT_CLOUD_DTYPE"] = "float32"

import pytest

from perfit_shared.grpc_environment import prepare_grpc
from tests.support.models import FAMILIES, random_artefact, tiny_config, tiny_tokenizer

prepare_grpc()  # gRPC is imported by the tests' own modules

if TYPE_CHECKING:
    from perfit_cloud.model.artefacts import Artefact
    from perfit_cloud.model.base import BaseModel

# What else is looked for in the home: registries and caches of these, and the Pythons of pyenv.
_TOOLS = {
    "PIP_CONFIG_FILE": ".config/pip/pip.conf",
    "PIP_CACHE_DIR": ".cache/pip",
    "NPM_CONFIG_USERCONFIG": ".npmrc",
    "NPM_CONFIG_CACHE": ".npm",
    "PYENV_ROOT": ".pyenv",
}
_OURS = (".perfit", ".perfit-cloud", ".config/systemd")  # what a test that forgets to say where would make
ROOT = Path(__file__).parent
_FOLDERS = ("e2e", "vllm", "cloud", "device", "shared")  # by how long their files take
BRIEF = ROOT.resolve().parents[1] / "shared"


_IN_MEMORY = Path("/dev/shm")  # noqa: S108


def _takes_files(folder: Path) -> bool:
    """4 GiB of them, and programs too: a container's may be small and run none."""
    if not os.access(folder, os.W_OK):
        return False
    of_it = os.statvfs(folder)
    return of_it.f_bavail * of_it.f_frsize > 4 << 30 and not of_it.f_flag & os.ST_NOEXEC


def pytest_configure() -> None:
    # Vaults wait for the disk at every change: folders of tests lie in memory where there is room for them.
    if _takes_files(_IN_MEMORY):
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(_IN_MEMORY))
    # A shell that starts us in the background makes us ignore Ctrl-C, and with us every command
    # that a test interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    gc.freeze()  # millions of objects of libraries and tests: no collection needs to look at them


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files first: when one worker has none left, the other is in a short one.
    items.sort(key=lambda item: _FOLDERS.index(item.path.relative_to(ROOT).parts[0]))
    if not BRIEF.is_dir():
        skip = pytest.mark.skip(reason="the data folder `shared` does not lie beside this checkout")
        for item in items:
            if "brief" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def brief() -> Path:
    """The folder with data and models beside the checkout; mark such tests with `brief`."""
    return BRIEF


@pytest.fixture(scope="session", autouse=True)
def _plain_precision() -> Iterator[None]:
    """What a test does not say is float32, also where the processor is fast in bfloat16."""
    from perfit_cloud.model import precision

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "_features", list)
        yield


@pytest.fixture(scope="session")
def _session_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    real, home = Path.home(), tmp_path_factory.mktemp("nobodys")
    with pytest.MonkeyPatch.context() as patch:
        for name, place in _TOOLS.items():
            if name not in os.environ and (real / place).exists():
                patch.setenv(name, str(real / place))
        for name in [*os.environ]:
            if name.startswith(("PERFIT_", "XDG_")) and name != "PERFIT_CLOUD_DTYPE":
                patch.delenv(name)
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(autouse=True)
def _no_traces_at_home(_session_home: Path) -> Iterator[None]:
    """Tests have a home of their own, and write nothing there that they do not name."""
    yield
    made = [name for name in _OURS if (_session_home / name).exists()]
    for name in made:  # the next test did nothing
        shutil.rmtree(_session_home / name)
    assert not made, f"written to the home: {made}"


@pytest.fixture(scope="session")
def head_width() -> int:
    """Of tiny models."""
    return 8


@pytest.fixture(scope="session")
def left_out() -> tuple[str, ...]:
    """What tiny models do without of what FAMILIES gives them."""
    return ()


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, head_width: int, left_out: tuple[str, ...]
) -> Callable[[str], Path]:
    """Folder of a tiny random model of a family, made on first use."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            import torch
            from transformers import AutoModelForCausalLM

            tokenizer = tiny_tokenizer()
            torch.manual_seed(list(FAMILIES).index(family))
            config = tiny_config(family, len(tokenizer), head_width, left_out)
            model = AutoModelForCausalLM.from_config(config)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="session")
def load(model_folder: Callable[[str], Path]) -> Callable[[str], BaseModel]:
    """The loaded tiny model of a family, once a session."""
    from perfit_cloud.model.base import load_base

    loaded: dict[str, BaseModel] = {}

    def make(family: str) -> BaseModel:
        if family not in loaded:
            loaded[family] = load_base(str(model_folder(family)))
        return loaded[family]

    return make


@pytest.fixture(scope="session")
def make_artefact() -> Callable[..., Artefact]:
    """An artefact with random, effective tensors for a base model."""
    return random_artefact


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """What is compared in constant time from here on."""
    pairs: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def noting(one: bytes, other: bytes) -> bool:
        pairs.append((bytes(one), bytes(other)))
        return compare(one, other)

    monkeypatch.setattr(hmac, "compare_digest", noting)
    return pairs
