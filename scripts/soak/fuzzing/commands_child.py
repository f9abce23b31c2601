"""The process behind soak.fuzzing.commands: loads both programs, and forks for every case on stdin."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_SECONDS = 30
_INPUT = b"Words for the command.\n"
_NO_TEXT = b"\xff\xfe\xe9 no text \xff"


def main(folder: Path) -> None:
    runs = _load(folder)
    answers = os.fdopen(os.dup(1), "w")
    (folder / "in").write_bytes(_INPUT)
    (folder / "no-text").write_bytes(_NO_TEXT)
    home = _Home(folder / "home")
    gc.freeze()  # or every fork would copy what it only counts
    for line in sys.stdin:
        cases = json.loads(line)
        said = folder / "said"
        said.write_bytes(b"")
        child = os.fork()
        if not child:
            _child(cases, folder, home, runs)
        _, status = os.waitpid(child, 0)
        outcomes = [json.loads(text) for text in said.read_text().splitlines()]
        if len(outcomes) < len(cases):
            problem = f"the process ended by {os.waitstatus_to_exitcode(status)}"
            outcomes += [{"code": 0, "out": "", "err": "", "problem": problem}]
        answers.write(json.dumps(outcomes) + "\n")
        answers.flush()


class _Home:
    """Files that every case finds as they were."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._files = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}

    def restore(self) -> None:
        for path in self._home.rglob("*"):
            if path.is_file() and path not in self._files:
                path.unlink()
        for path, data in self._files.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)  # removing a profile takes its folder
                path.write_bytes(data)


# -- one case ------------------------------------------------------------------------------------------


def _child(
    cases: list[dict[str, Any]], folder: Path, home: _Home, runs: dict[str, Callable[[], None]]
) -> None:
    """Never returns."""
    said = os.open(folder / "said", os.O_WRONLY)
    environment = dict(os.environb)
    try:
        for case in cases:
            signal.alarm(_SECONDS)
            home.restore()
            os.environb.clear()
            os.environb.update(environment)
            for name in ("out", "err"):
                (folder / name).write_bytes(b"")
            code, problem = _outcome(case, folder, runs[case["program"]])
            out, err = ((folder / name).read_bytes().decode(errors="replace") for name in ("out", "err"))
            value = {"code": code, "out": out, "err": err, "problem": problem}
            os.write(said, json.dumps(value).encode() + b"\n")
    finally:
        os._exit(0)


def _outcome(case: dict[str, Any], folder: Path, run: Callable[[], None]) -> tuple[int, str]:
    """(exit code, what escaped)."""
    code = 0
    try:
        for name, value in case["environment"].items():
            os.environb[name.encode()] = os.fsencode(value)
        sys.argv = [case["program"], *case["words"]]
        _make_streams(case, folder)
        try:
            run()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # as the interpreter does at exit
    except BaseException as error:
        return code, f"{type(error).__name__} escaped: {str(error)[:200]}"
    return code, ""


def _make_streams(case: dict[str, Any], folder: Path) -> None:
    """File descriptors 0 to 2, and Python's objects on them as it makes them at start."""
    files = {"text": "in", "bytes": "no-text"}
    sources = {"empty": os.devnull} | {k: str(folder / v) for k, v in files.items()}
    _point(0, lambda: os.open(sources[case["stdin"]], os.O_RDONLY) if case["stdin"] in sources else None)
    for number, name in ((1, "stdout"), (2, "stderr")):
        _point(
            number, lambda number=number, name=name: _output(case[name], folder / ("out", "err")[number - 1])
        )
    sys.stdin = sys.__stdin__ = _stream(0, case["encoding"], "strict")  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = _stream(1, case["encoding"], "strict")  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = _stream(2, case["encoding"], "backslashreplace")  # type: ignore[misc]


def _output(kind: str, path: Path) -> int | None:
    if kind == "gone":
        read, write = os.pipe()
        os.close(read)
        return write
    if kind == "closed":
        return None
    return os.open("/dev/full" if kind == "full" else path, os.O_WRONLY)


def _point(number: int, make: Callable[[], int | None]) -> None:
    made = make()
    if made is None:
        with contextlib.suppress(OSError):  # of the case before
            os.close(number)
    elif made != number:
        os.dup2(made, number)
        os.close(made)


def _stream(number: int, encoding: str, errors: str) -> Any:
    try:
        os.fstat(number)
    except OSError:
        return None
    raw = io.FileIO(number, "r" if number == 0 else "w", closefd=False)
    buffered: Any = io.BufferedReader(raw) if number == 0 else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffered, encoding=encoding, errors=errors, line_buffering=number == 2)


# -- both programs -------------------------------------------------------------------------------------


def _load(folder: Path) -> dict[str, Callable[[], None]]:
    """Import what commands import, once; a profile with a cloud that is made up."""
    import matplotlib.pyplot  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import scipy.stats  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import perfit_cloud.cli.main as cloud
    import perfit_cloud.collective.run
    import perfit_cloud.lamp.run
    import perfit_cloud.lamp.sweep
    import perfit_cloud.model.base
    import perfit_cloud.service.server  # noqa: F401
    import perfit_device.cli.main as device
    import perfit_device.openai_api.server  # noqa: F401
    from perfit_device import history, personal
    from perfit_device.agent import install, launch
    from perfit_device.cloud_record import write_record
    from perfit_device.profile import Profile
    from perfit_device.shift_versions import PersonalShift
    from perfit_device.vault.crypto import KdfParams
    from perfit_device.vault.store import Vault
    from perfit_shared.errors import Unavailable
    from perfit_shared.tasks import TASKS

    info = _info()
    task = TASKS["news_headline"]
    path = folder / "home" / "profiles" / "default" / "vault.db"
    passphrase = os.environ["PERFIT_PASSPHRASE"]
    KdfParams.__init__.__defaults__ = (32, 1, 4)  # what commands seal is as cheap
    with Vault.create(path, passphrase) as vault:
        write_record(vault, info)
        items = [{"text": f"Café № {n} …", "title": f"Türe {n} \u202e 🙂"} for n in range(12)]
        history.add(vault, [history.HistoryItem.make(task, item) for item in items])
        seed = _Cloud().fetch_seed(None)
        personal.store(vault, info.cloud_id, info.artefacts[0], PersonalShift(seed, 1))

    def connect(profile: Any, retry_policy: Any = None, **_: Any) -> tuple[Any, Any]:
        return _Cloud(), info

    def start(*_: Any, **__: Any) -> None:
        raise Unavailable("no agent starts here: it would outlive its case")

    Profile.connect = connect  # type: ignore[method-assign]
    launch.start = start
    install._run = lambda words: False
    return {"perfit": device.run, "perfit-cloud": cloud.run}


def _info() -> Any:
    from perfit_device.cloud.codec import Artefact, CloudInfo, Limits
    from perfit_shared.tasks import TASKS
    from soak.fuzzing.shared import SPEC

    artefact = Artefact("news_headline", "v1", SPEC, TASKS["news_headline"].resolved(False), 5e-3, 1, 4)
    return CloudInfo("a model", "f" * 64, "0" * 32, (artefact,), Limits(512, 64, 4, 1 << 20, 0, 0))


class _Cloud:
    """Answers at once, with characters that few encodings have."""

    bytes_up = bytes_down = 0
    enrolment = SimpleNamespace(cloud_id="0" * 32)

    def fetch_seed(self, artefact: Any) -> Any:
        from soak.fuzzing.shared import TENSORS

        return TENSORS[0]

    def generate(self, prompt: Any, use: Any, sampling: Any) -> Iterator[Any]:
        from perfit_shared.types import Chunk, Finish

        yield Chunk(" Türe … 🙂 \x1b[2J")
        yield Chunk("", Finish.END, 3, 4)

    def score(self, pairs: Any, use: Any) -> Any:
        from perfit_shared.types import Score

        return [Score(-4.0, 4) for _ in pairs]

    def compute_gradient(self, pairs: Any, artefact: Any, tensors: Any) -> Any:
        from soak.fuzzing.shared import TENSORS

        return 1.0, 4, TENSORS[1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
