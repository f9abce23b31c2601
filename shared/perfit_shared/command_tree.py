"""The commands of a program as a tree that is built as far as somebody looks.

    command = command_of(app)

Typer makes every parameter of every command at each start. Here a group knows the names and the first lines
of its commands, and builds one when it is called; of a `Deferred` one even the module waits until then. Every
command has `--version` and refuses arguments that
are not UTF-8; every program has `help` and `completion`.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, cast

import typer
from typer._click.core import Command, Context
from typer._click.formatting import HelpFormatter
from typer._click.utils import make_default_short_help
from typer.core import TyperGroup, TyperOption
from typer.main import get_command_from_info, get_command_name, get_group_from_info, solve_typer_info_defaults
from typer.models import CommandInfo, TyperInfo

from perfit_shared.completion import completion
from perfit_shared.terminal import utf8

__all__ = ["Deferred", "command_of"]

_NARROW = 50  # columns below which a table's first one takes a third


class Deferred(CommandInfo):
    """A command, or a group of them, that is found in "module:name" when somebody looks it up."""

    def __init__(self, name: str, path: str, begins: str) -> None:
        """`begins` is how its help begins: a list of commands shows no more than a line of it."""
        super().__init__(name=name, help=begins)
        self._path = path

    def load(self) -> CommandInfo | TyperInfo:
        module, _, name = self._path.partition(":")
        found = getattr(importlib.import_module(module), name)
        if isinstance(found, typer.Typer):
            return TyperInfo(found, name=self.name)
        return CommandInfo(name=self.name, callback=found)


@functools.cache
def command_of(app: typer.Typer) -> Any:
    root = copy.copy(app)
    root.registered_commands = list(app.registered_commands)
    first = next(_name_of(info) for info in root.registered_commands)
    for name, callback in (("help", show_help), ("completion", completion)):
        text = (inspect.getdoc(callback) or "").replace("PROGRAM", str(app.info.name)).replace("FIRST", first)
        root.registered_commands.append(CommandInfo(name=name, callback=callback, help=text))
    return _build(TyperInfo(root), is_root=True)


def show_help(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[COMMAND]...", help="Whose help.  [default: the program's]")
    ] = None,
) -> None:
    """Show the help of a command, as -h behind it does.

    \b
    PROGRAM help
    PROGRAM help FIRST
    """
    at: Any = context.find_root()
    for word in words or []:
        if not isinstance(at.command, TyperGroup):
            at.fail(f"{at.command_path} has no commands; say {at.command_path} -h")
        name, command, _ = at.command.resolve_command(at, [word])
        at = cast("Command", command).make_context(name, [], parent=at, resilient_parsing=True)
    print(at.get_help())


# -- building ----------------------------------------------------------------------------------------


class _Formatter(HelpFormatter):
    """Help as narrow as the terminal. Typer's own has at least 50 columns."""

    def __init__(
        self, indent_increment: int = 2, width: int | None = None, max_width: int | None = None
    ) -> None:
        columns = min(shutil.get_terminal_size().columns, max_width or 80)
        super().__init__(indent_increment, width or max(10, columns - 2), max_width)

    def write_dl(self, rows: Sequence[tuple[str, str]], col_max: int = 30, col_spacing: int = 2) -> None:
        super().write_dl(rows, self.width // 3 if self.width < _NARROW - 2 else col_max, col_spacing)


class _Context(Context):
    formatter_class = _Formatter


class _Group(TyperGroup):
    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """As typer lists them, without a look at their parameters."""
        infos = cast(_Commands, self.commands).infos
        shown = {name: info for name, info in infos.items() if not _solved(info).hidden}
        limit = formatter.width - 6 - max(map(len, shown), default=0)
        rows = [(name, make_default_short_help(_help_of(info), limit)) for name, info in shown.items()]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)


class _Commands(Mapping[str, Command]):
    """The commands of a group by their names, each made when it is looked up."""

    def __init__(self, infos: Sequence[CommandInfo | TyperInfo]) -> None:
        self.infos = {_name_of(info): info for info in infos}
        self._built: dict[str, Command] = {}

    def __getitem__(self, name: str) -> Command:
        if name not in self._built:
            self._built[name] = _build(self.infos[name])
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _solved(info: CommandInfo | TyperInfo) -> CommandInfo | TyperInfo:
    return solve_typer_info_defaults(info) if isinstance(info, TyperInfo) else info


def _name_of(info: CommandInfo | TyperInfo) -> str:
    name = _solved(info).name
    return name or get_command_name(getattr(info.callback, "__name__", ""))


def _help_of(info: CommandInfo | TyperInfo) -> str:
    info = _solved(info)
    return inspect.cleandoc(info.help) if info.help else inspect.getdoc(info.callback) or ""


def _build(info: CommandInfo | TyperInfo, *, is_root: bool = False) -> Command:
    info = info.load() if isinstance(info, Deferred) else info
    if isinstance(info, CommandInfo):
        command = get_command_from_info(info, pretty_exceptions_short=False, rich_markup_mode=None)
        if command.callback is not None:
            command.callback = _check_text(command.callback)
    else:
        command = _build_group(info)
    command.context_class = _Context
    command.params.append(_version_option(hidden=not is_root))
    return command


def _build_group(info: TyperInfo) -> Command:
    """The group alone; its commands follow when they are looked up."""
    app = info.typer_instance
    if app is None:
        raise TypeError("a group without an app")
    bare, childless = copy.copy(info), copy.copy(app)
    childless.registered_commands, childless.registered_groups = [], []
    bare.typer_instance, bare.cls = childless, _Group
    group = get_group_from_info(
        bare, pretty_exceptions_short=False, suggest_commands=True, rich_markup_mode=None
    )
    group.commands = cast(Any, _Commands([*app.registered_commands, *app.registered_groups]))
    return group


# -- what every command has ----------------------------------------------------------------------------


def _version_option(*, hidden: bool) -> TyperOption:
    return TyperOption(
        param_decls=["--version"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        hidden=hidden,
        callback=_show_version,
        help="Show the version and exit.",
    )


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
