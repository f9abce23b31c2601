"""`perfit ask`: an answer, streamed as it comes."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Annotated

import typer

from perfit_device.cli.common import JsonFlag, ProfileOption, Session, TaskOption, say, while_opening
from perfit_shared.errors import InvalidInput, InvalidPrompt
from perfit_shared.terminal import clean, read_stdin
from perfit_shared.types import Chunk, Mode, Sampling

if TYPE_CHECKING:
    from perfit_device.cloud.client import Cloud
    from perfit_device.cloud.codec import Artefact, Prompt, ShiftUse
    from perfit_device.vault.store import Vault

_LARGEST_TEXT = 1 << 22  # bytes of a text on stdin


def ask(
    context: typer.Context,
    text: Annotated[
        str, typer.Argument(metavar="TEXT", help='What to ask about, or "-" to read it from stdin.')
    ],
    *,
    task: TaskOption = None,
    mode: Annotated[Mode, typer.Option("--mode", help="Whose model answers.")] = Mode.PERSONAL,
    compare: Annotated[
        bool, typer.Option("--compare", help="Base, collective and personal answers.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Longest answer, in tokens.  [default: the task's]")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.1,
    top_k: Annotated[int, typer.Option("--top-k", help="0 is all tokens.")] = 10,
    top_p: Annotated[float, typer.Option("--top-p", help="1 is all tokens.")] = 0.9,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Same seed, same answer.  [default: random]")
    ] = None,
    profile: ProfileOption = None,
    json: JsonFlag = False,
) -> None:
    """Ask the cloud, in your own way.

    \b
    perfit ask "The council met until dawn over the stadium's debt."
    perfit ask "The council met until dawn." --compare --temperature 0
    echo "The council met until dawn." | perfit ask - --json
    perfit ask -- "-5 degrees on Monday"       a text that begins with a dash
    """
    session = Session.of(context, profile=profile, json=json)
    text = (read_stdin(_LARGEST_TEXT) if text == "-" else text).strip()
    if not text:
        raise InvalidPrompt("the text is empty; give a text to ask about")
    with session.open_vault() as vault, session.open_cloud(vault) as (cloud, info):
        artefact = session.artefact(info, vault, task)
        prompt = _prompt(artefact, text)
        longest = max_tokens if max_tokens is not None else artefact.task.answer_tokens
        if max_tokens is not None and max_tokens > info.limits.new_tokens:
            raise InvalidInput(f"this cloud answers with at most {info.limits.new_tokens} tokens")
        sampling = Sampling(
            max_new_tokens=min(longest, info.limits.new_tokens),
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=secrets.randbits(32) if seed is None else seed,
            stop=artefact.task.stop,
        )
        uses = {m: _use(vault, cloud, artefact, m) for m in (Mode if compare else [mode])}
        vault.close()
        if compare:
            _compare(session, cloud, artefact, uses, prompt=prompt, sampling=sampling)
            return
        use = uses[mode]
        answer, last = _answer(cloud, prompt, use, sampling, show=not session.json)
        if session.json:
            session.emit(
                {
                    "task": artefact.name,
                    "mode": mode.value,
                    "answer": artefact.task.parse(answer),
                    "prompt_tokens": last.prompt_tokens,
                    "answer_tokens": last.answer_tokens,
                }
            )


def _prompt(artefact: Artefact, text: str) -> Prompt:
    from perfit_device.evaluation import prompt_of
    from perfit_device.history import HistoryItem
    from perfit_shared.errors import InvalidData

    task = artefact.task
    try:
        return prompt_of(task, HistoryItem(task.name, {task.text_field: text}))
    except InvalidData as error:
        raise InvalidInput(f"the task {task.name} cannot be asked with one text: {error}") from error


def _use(vault: Vault, cloud: Cloud, artefact: Artefact, mode: Mode) -> ShiftUse:
    """Which shift answers. A user without one of their own has the seed, and is told so."""
    from perfit_device import personal
    from perfit_device.cloud.codec import ShiftUse

    if mode is Mode.BASE:
        return ShiftUse()
    if mode is Mode.COLLECTIVE:
        return ShiftUse(artefact)
    mine = personal.load(vault, cloud.enrolment.cloud_id, artefact)
    if mine is None:
        say(f"no personal shift for {artefact.name} yet, so this is the seed; `perfit update` trains one")
        return ShiftUse(artefact, while_opening().call(lambda: cloud.fetch_seed(artefact)))
    return ShiftUse(artefact, mine.tensors)


def _answer(
    cloud: Cloud, prompt: Prompt, use: ShiftUse, sampling: Sampling, *, show: bool
) -> tuple[str, Chunk]:
    """(the whole answer, its last chunk); written to stdout as it comes if `show`."""
    from perfit_device.cloud.retry import RetryPolicy

    pieces: list[str] = []
    last = Chunk("")
    for last in RetryPolicy(tell=say).stream(lambda: cloud.generate(prompt, use, sampling)):
        # The cue's space belongs to the prompt's form, not to what a person reads.
        text = last.text if any(pieces) else last.text.lstrip()
        pieces.append(text)
        if show:
            print(clean(text), end="", flush=True)
    if show:
        print(flush=True)
    return "".join(pieces), last


def _compare(
    session: Session,
    cloud: Cloud,
    artefact: Artefact,
    uses: dict[Mode, ShiftUse],
    *,
    prompt: Prompt,
    sampling: Sampling,
) -> None:
    answers = {}
    for mode, use in uses.items():
        if not session.json:
            print(f"{mode.value + ':':<12}", end="", flush=True)
        answer, _ = _answer(cloud, prompt, use, sampling, show=not session.json)
        answers[mode.value] = artefact.task.parse(answer)
    if session.json:
        session.emit({"task": artefact.name, "answers": answers})
