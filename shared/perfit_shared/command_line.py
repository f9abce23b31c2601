"""What both programs do around their work: streams, signals, and the one place where errors end.

    def run() -> None:
        run_command("perfit", app)

Every error is one line on stderr, with `--json` one JSON object, and an exit code of
`perfit_shared.errors`. No traceback, unless PERFIT_TRACEBACK is set.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from typer.core import TyperOption
from typer.exceptions import TyperException

from perfit_shared.errors import INTERNAL, INTERRUPTED, USAGE, PerfitError, exit_code
from perfit_shared.terminal import discard_unwritable, one_line, prepare_streams, utf8

__all__ = ["command_of", "run_command"]

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


@functools.cache
def command_of(app: typer.Typer) -> Any:
    """The whole tree: every command has --version and refuses arguments that are not UTF-8."""
    command = typer.main.get_command(app)
    _prepare(command, is_root=True)
    return command


def _prepare(command: Any, *, is_root: bool = False) -> None:
    version = TyperOption(
        param_decls=["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        hidden=not is_root,
        callback=_show_version,
        help="Show the version and exit.",
    )
    command.params.append(version)
    children = getattr(command, "commands", {})
    for child in children.values():
        _prepare(child)
    if not children and command.callback is not None:
        command.callback = _check_text(command.callback)


def _show_version(context: Any, _parameter: Any, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"{context.find_root().info_name} {version('perfit')}")
        context.exit()


def _check_text(callback: Callable[..., Any]) -> Callable[..., Any]:
    """The callback, with arguments that are text in UTF-8. Paths may be any bytes."""

    def checked(name: str, value: Any) -> Any:
        if isinstance(value, str):
            return utf8(value, name.strip("_").replace("_", "-"))
        if isinstance(value, list | tuple):
            return [checked(name, one) for one in value]
        return value

    @functools.wraps(callback)
    def taking(**values: Any) -> Any:
        return callback(**{name: checked(name, value) for name, value in values.items()})

    return taking


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
    print(_as_json(code, message) if as_json else f"{program}: {message}", file=sys.stderr)
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
    """Wrong words on the command line."""
    hint = ""
    context: Any = getattr(error, "ctx", None)
    takes_text = context is not None and any(
        parameter.param_type_name == "argument" and parameter.type.name == "str"
        for parameter in context.command.params
    )
    if takes_text and hasattr(error, "option_name"):
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
