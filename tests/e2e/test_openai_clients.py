"""Five foreign clients, unchanged, at `perfit serve` in front of a real cloud."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.processes import ForkedCloud

from local import Device
from perfit_shared.tasks import TASKS
from run_clients import commands, missing, run_client, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason="the clients are not installed; `make clients` does it"),
]
SAYS = {
    "openai (Python)": ["models: base, collective, personal", "chat:", "responses, streamed:", "kept: True"],
    "openai (npm)": ["chat:", "chat, streamed:", "responses:", "responses, streamed:"],
    "llm": ["streamed:", "not streamed:", "continued:"],
    "LangChain": ["invoke:", "stream:", "responses:"],
    "Vercel AI SDK": ["generateText:", "streamText:", "streamText by chat:"],
}


@pytest.fixture(scope="module")
def endpoint(
    load: Any,
    make_artefact: Any,
    model_folder: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, str]]:
    home = tmp_path_factory.mktemp("clients")
    chat = replace(make_artefact(load("llama"), name="chat"), task=TASKS["chat"].resolved(True))
    chat.save(home / "chat")
    with ForkedCloud(model_folder("llama"), [home / "chat"], home / "cloud") as cloud:
        device = Device(home / "device", "default")
        device("enroll", "-", text=cloud.invite())
        with serving(device) as (url, token):
            yield url, token


@pytest.mark.parametrize("client", SAYS)
def test_a_client(client: str, endpoint: tuple[str, str], tmp_path: Path) -> None:
    command = commands("personal", tmp_path)[client]
    lines = run_client(command, *endpoint)
    for beginning in SAYS[client]:
        said = [line for line in lines.splitlines() if line.startswith(beginning)]
        assert said, lines
        if beginning.endswith(":"):  # behind it stand a random model's words, a single one perhaps, but words
            assert said[0].removeprefix(beginning).strip()


def test_a_wrong_token_is_said(endpoint: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the token that `perfit serve` shows"):
        run_client(commands("personal", tmp_path)["openai (Python)"], endpoint[0], "wrong")
