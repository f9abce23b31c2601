"""Completion in a shell: the script that it reads once, and what the script asks for at every TAB.

The script runs the program with `_PERFIT_COMPLETE=complete_bash` and the words so far, as typer's does. What
cannot be completed falls back to names of files, and nothing is said about errors.
"""

from __future__ import annotations

import contextlib
import os
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

__all__ = ["Shell", "answer_shell", "completion"]

# Typer's own calls compdef alone, which completes nothing at the first TAB when zsh has just loaded it.
_ZSH = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local -a found
    local -x %(autocomplete_var)s=complete_zsh _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}"
    found=("${(@f)$(${words[1]})}")
    if [[ -n $found ]]; then
        _describe -V %(prog_name)s found
    else
        _files
    fi
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""


class Shell(StrEnum):
    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    context: typer.Context,
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a script that completes commands, options and names in a shell.

    \b
    eval "$(PROGRAM completion bash)"                                    in ~/.bashrc
    source <(PROGRAM completion zsh)                                     in ~/.zshrc, behind compinit
    PROGRAM completion fish > ~/.config/fish/completions/PROGRAM.fish
    """
    root = context.find_root()
    program = str(root.info_name)
    print(_completer(shell, root.command, program).source().strip())


def answer_shell(command: Any, program: str) -> bool:
    """Whether a shell has asked for words; they are on stdout then."""
    asked = os.environ.get(_variable(program), "")
    if not asked:
        return False
    with contextlib.suppress(Exception), open(os.devnull, "w") as null, contextlib.redirect_stderr(null):  # noqa: PTH123
        print(_completer(Shell(asked.removeprefix("complete_")), command, program).complete())
        sys.stdout.flush()
    return True


def _variable(program: str) -> str:
    return f"_{program}_COMPLETE".replace("-", "_").upper()


def _completer(shell: Shell, command: Any, program: str) -> Any:
    from typer import _completion_classes as of_typer

    class Bash(of_typer.BashComplete):
        @staticmethod
        def _check_version() -> None: ...  # would start a bash

    class Zsh(of_typer.ZshComplete):
        source_template = _ZSH

        def format_completion(self, item: Any) -> str:
            value = item.value.replace(":", "\\:")
            return f"{value}:{item.help}" if item.help else value

        def complete(self) -> str:
            return "\n".join(map(self.format_completion, self.get_completions(*self.get_completion_args())))

    class Fish(of_typer.FishComplete):
        def format_completion(self, item: Any) -> str:
            return f"{item.value}\t{item.help}" if item.help else str(item.value)

    made: Any = {Shell.BASH: Bash, Shell.ZSH: Zsh, Shell.FISH: Fish}[shell]
    return made(command, {}, program, _variable(program))
