"""All commands of both programs, their arguments, streams and locales: one clear error, never a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from soak.fuzzing.checking import Unsound
from soak.fuzzing.commands import INPUTS, OUTPUTS, Case, Commands, Outcome, bare_words, leaves, words_of

NO_TEXT = "\udcff\udcfe no text"  # bytes that are no UTF-8, as Python hands them over
FOUND = leaves()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with Commands(tmp_path_factory.mktemp("commands")) as running:
        yield running


def cases(name: tuple[str, ...]) -> Iterator[Case]:
    """One command's."""
    command = FOUND[name]
    plain = Case(name[0], tuple(words_of(name, command)))
    # Also what is said about missing words.
    yield Case(name[0], bare_words(name), encoding="ascii", stderr="full")
    asks_help = replace(plain, words=(*name[1:], "--help"))
    # Streams are the same code's business in every command: each meets a third of their forms.
    yield from [*streams(plain, asks_help)][[*FOUND].index(name) % 3 :: 3]
    for word in (NO_TEXT, "caf\u00e9 \u202e"):
        yield replace(plain, words=tuple(words_of(name, command, text=word, path=word)))
        yield replace(plain, environment={"PERFIT_PASSPHRASE": word, "PERFIT_PROFILE": word})
    valued = [p for p in command.params if p.param_type_name == "option" and not p.is_flag]
    yield from (replace(plain, words=(*plain.words, p.opts[0], NO_TEXT)) for p in valued)
    yield replace(plain, words=(*plain.words, NO_TEXT))
    yield replace(plain, words=(*plain.words, "--nonsense", "--json"))
    yield replace(plain, words=(*bare_words(name), "--json"), environment={"PERFIT_PASSPHRASE": "wrong"})
    yield replace(asks_help, environment={"COLUMNS": "1", "NO_COLOR": "1", "LC_ALL": "tr_TR.ISO-8859-9"})
    yield replace(plain, words=(*plain.words, "-5 degrees"))


def streams(plain: Case, asks_help: Case) -> Iterator[Case]:
    """All forms of a command's streams."""
    for case in (plain, asks_help):
        yield from (replace(case, stdout=kind) for kind in OUTPUTS)
        yield replace(case, encoding="ascii")
    yield replace(plain, encoding="latin-1")
    yield replace(plain, encoding="ascii", stderr="full")
    yield replace(plain, stdin="closed", stdout="closed", stderr="closed")
    yield from (replace(plain, stdin=kind) for kind in INPUTS[1:])
    yield from (replace(plain, stderr=kind) for kind in OUTPUTS[1:])


@pytest.mark.parametrize("name", FOUND, ids=" ".join)
def test_no_command_shows_a_traceback(commands: Commands, name: tuple[str, ...]) -> None:
    made = list(cases(name))
    for case, outcome in zip(made, commands.run(made), strict=True):
        outcome.check(case)


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome(1, "", "Traceback (most recent call last)"),
        Outcome(1, "", "perfit: a fault inside perfit"),
        Outcome(70, "", "x"),
        Outcome(1, "", ""),
        Outcome(0, "", "", "OSError escaped"),
        Outcome(1, "", "perfit: no JSON"),
    ],
)
def test_what_may_not_happen_is_noticed(outcome: Outcome) -> None:
    with pytest.raises(Unsound):
        outcome.check(Case("perfit", ("status", "--json")))
