"""What both programs do around their work: streams, signals, and the one place where errors end.

    def run() -> None:
        run_command("perfit", app)

Every error is one line on stderr, with `--json` one JSON object, and an exit code of
`perfit_shared.errors`. No traceback, unless PERFIT_TRACEBACK is set.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import typer
from typer.exceptions import TyperException

from perfit_shared.command_tree import command_of
from perfit_shared.completion import answer_shell
from perfit_shared.errors import INTERNAL, INTERRUPTED, USAGE, PerfitError, exit_code
from perfit_shared.terminal import discard_unwritable, one_line, paint, prepare_streams

__all__ = ["run_command"]

# Signals that end a program but leave it time to save its work.
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def run_command(program: str, app: typer.Typer) -> None:
    """Run the command that sys.argv names, and exit with its code."""
    prepare_streams()
    words = sys.argv[1:]
    command: Any = None
    with _interrupted_by_signals() as received:
        try:
            command = command_of(app)
            if answer_shell(command, program):
                sys.exit(0)
            code = command.main(args=list(words), prog_name=program, standalone_mode=False)
            code = code if isinstance(code, int) else 0
            sys.stdout.flush()
        except KeyboardInterrupt:
            code = INTERRUPTED
        except BaseException as error:
            if isinstance(error, SystemExit):
                raise
            code = _report(error, program, as_json=_wants_json(command, words))
    discard_unwritable()
    if code == INTERRUPTED and received:
        code = 128 + received[0]  # as shells report a signal
    sys.exit(code)


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does; the list holds those that came.

    One that is ignored stays so, as under nohup.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def interrupt(number: int, _frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    old = {number: signal.getsignal(number) for number in _ENDING}
    for number, handler in old.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in old.items():
            if signal.getsignal(number) is interrupt:
                signal.signal(number, handler)


# -- errors ----------------------------------------------------------------------------------------


def _report(error: BaseException, program: str, *, as_json: bool) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, TyperException):
        return _report_usage(error, as_json=as_json)
    if isinstance(error, OSError) and error.errno == errno.EPIPE:
        return 1  # the reader of our output has closed it
    if os.environ.get("PERFIT_TRACEBACK"):
        traceback.print_exception(error)
    code, message = _describe(error, program)
    message = one_line(message)
    name = paint(f"{program}:", "red", sys.stderr)
    print(_as_json(code, message) if as_json else f"{name} {message}", file=sys.stderr)
    return 1 if isinstance(error, typer.Abort) else exit_code(error)


def _describe(error: BaseException, program: str) -> tuple[str, str]:
    """(code word, one line)."""
    if isinstance(error, PerfitError):
        return error.code, str(error)
    if isinstance(error, OSError):  # a folder that cannot be written, a disk or an output that is full
        reason = error.strerror or type(error).__name__
        return "system", f"{error.filename}: {reason}" if error.filename else f"cannot write: {reason}"
    if isinstance(error, MemoryError):
        return "system", "there is not enough memory; close other programs, or use a smaller model"
    if isinstance(error, typer.Abort):
        return "aborted", "the input ended before it was complete"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    location = f"{os.path.basename(frame.filename)}:{frame.lineno}"  # noqa: PTH119 - no file to open
    return INTERNAL, (
        f"a fault inside {program} ({type(error).__name__} at {location}); please report it, with what "
        "PERFIT_TRACEBACK=1 shows"
    )


def _report_usage(error: TyperException, *, as_json: bool) -> int:
    """Wrong words on the command line: how they go, what is wrong, and what may be meant."""
    hint = ""
    context: Any = getattr(error, "ctx", None)
    takes_text = context is not None and any(
        parameter.param_type_name == "argument" and parameter.type.name == "str"
        for parameter in context.command.params
    )
    if possible := sorted(getattr(error, "possibilities", None) or []):
        error.possibilities = None  # type: ignore[attr-defined]  # it would list them in its own words
        hint = f"did you mean {' or '.join(possible)}?"
    elif takes_text and hasattr(error, "option_name"):
        hint = f'a text that begins with "-" goes behind --: {context.command_path} … -- "-text"'
    if as_json:
        message = one_line(error.format_message())
        print(_as_json("usage", f"{message}; {hint}" if hint else message), file=sys.stderr)
    else:
        error.show()  # type: ignore[attr-defined]
        if hint:
            print(hint, file=sys.stderr)
    return getattr(error, "exit_code", USAGE)


def _as_json(code: str, message: str) -> str:
    return json.dumps({"error": {"code": code, "message": message}})


def _wants_json(command: Any, words: Sequence[str]) -> bool:
    """Whether a flag --json stands among the words; of some commands it is no flag but names a file."""
    flags, options = False, list(words[: words.index("--")] if "--" in words else words)
    for word in options:
        flags = flags or any(p.is_flag for p in _options(command) if "--json" in p.opts)
        command = getattr(command, "commands", {}).get(word, command)
    flags = flags or any(p.is_flag for p in _options(command) if "--json" in p.opts)
    return flags and "--json" in options


def _options(command: Any) -> list[Any]:
    return [p for p in getattr(command, "params", []) if p.param_type_name == "option"]
