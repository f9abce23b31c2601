"""A profile without the command line: values in and out, nothing printed, nothing asked."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.vaults import CHEAP, PASSPHRASE

from perfit_device import answers
from perfit_device.cloud.codec import Message
from perfit_device.evaluation import prompt_of
from perfit_device.history.importers import read_history
from perfit_device.nearest import nearest_examples
from perfit_device.operations.ask import AnswerPart, Ask, Question
from perfit_device.operations.complete import Complete
from perfit_device.operations.enroll import Enroll
from perfit_device.operations.evaluate import Evaluate
from perfit_device.operations.examples import AddExample, FindExamples
from perfit_device.operations.forgetting import Forget
from perfit_device.operations.imports import ImportExamples
from perfit_device.operations.operation import Emit, Event, Note, Progress
from perfit_device.operations.status import ProfileStatus
from perfit_device.operations.update import Update
from perfit_device.operations.versions import ListVersions, Undo
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_device.vault.store import Vault
from perfit_shared.errors import InvalidData, InvalidInput, InvalidPrompt, NotFound, Unavailable, VaultBusy
from perfit_shared.tasks import TASKS, Task
from perfit_shared.types import Mode


@pytest.fixture
def profile(
    home: Path, cloud: Any, history_file: Path, messages: list[str], capsys: pytest.CaptureFixture[str]
) -> Iterator[Profile]:
    """Enrolled, with 20 examples."""
    with Profile.create(DeviceSettings("one", home), passphrase=PASSPHRASE, notify=messages.append) as opened:
        opened.perform(Enroll(cloud.invite().encode()))
        items = read_history(history_file, TASKS["news_headline"])
        assert opened.perform(ImportExamples(items, offline=True)).added == 20
        yield opened
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def answer(profile: Profile, mode: Mode, emit: Emit = lambda _: None) -> str:
    asking = Ask(Question("The council met.", temperature=0.0), (mode,))
    return profile.perform(asking, emit).by_mode[mode].text


SHORT = Update(settings={"epochs": 2})


def test_a_day_with_a_profile(profile: Profile) -> None:
    events: list[Event] = []
    assert answer(profile, Mode.PERSONAL, events.append) == "Hello world personal "
    assert events[0] == Note(
        "no personal shift for news_headline yet, so this is the seed; `perfit update` trains one"
    )
    said = [event.chunk.text for event in events if isinstance(event, AnswerPart)]
    assert "".join(said) == "Hello world personal " and len(said) > 2
    steps: list[int] = []

    def happened(event: Event) -> None:
        if isinstance(event, Progress):
            steps.append(event.done)

    done = profile.perform(SHORT, happened)
    assert done.trained is not None and done.trained.gate.accepted
    assert steps == list(range(1, done.trained.steps + 1))
    profile.perform(Update(settings={"epochs": 3}))
    found = profile.perform(ListVersions())
    name, kept = found.artefact, found.versions
    assert (name, [v.number for v in kept.kept], kept.current) == ("news_headline", [1, 2], 2)
    assert kept.kept[0].learned.gate_after == done.trained.gate.after
    assert profile.perform(Undo()).version.number == 1
    report = profile.perform(Evaluate())
    assert (report.examples, list(report.loss)) == (4, ["base", "collective", "personal"])
    assert report.answers[0]["personal"] == "Hello world personal"
    status = profile.perform(ProfileStatus())
    assert status.exit_code == 0 and status.tasks[name].examples == 20 and status.tasks[name].current == 1
    assert profile.perform(AddExample("It rained.", "Rain")).added == 1
    items = profile.perform(FindExamples("news_headline"))
    assert len(items) == 21
    names = [item.name for item in items]
    done = profile.perform(Forget(names))
    assert done.count == 21 and [each.number for each in done.left] == [1]
    assert profile.perform(ListVersions()).versions.before is None


def test_what_cannot_be_asked_is_an_error(profile: Profile) -> None:
    with pytest.raises(InvalidInput, match="empty"):
        Question(" ")
    with pytest.raises(InvalidInput):
        profile.perform(Ask(Question("x", max_tokens=65), (Mode.BASE,)))
    with pytest.raises(NotFound):
        profile.perform(Ask(Question("x", task="poems"), (Mode.BASE,)))
    with pytest.raises(InvalidInput, match="log-probabilities of no tokens"):  # an older cloud
        profile.perform(Ask(Question("x", logprobs=1), (Mode.BASE,)))


def test_own_examples_stand_before_a_question(profile: Profile, cloud: Any) -> None:
    """The nearest first and never the question itself; as many as fit; the same in every mode."""
    task = TASKS["news_headline"]
    examples = profile.perform(FindExamples(task.name))
    wanted = examples[7]
    text = wanted.fields["text"]
    asked = Question(f"{text} Again.", temperature=0.0, examples=3)
    profile.perform(Ask(asked, (Mode.BASE, Mode.COLLECTIVE)))
    *before, own = cloud.prompts[-1].text.split("\n", 3)
    assert cloud.prompts[-1] == cloud.prompts[-2]
    assert before[0] == f"article: {text} title: {wanted.fields['title']}" and len({*before}) == 3
    assert own == task.prompt({"text": asked.text})
    profile.perform(Ask(replace(asked, text=text), (Mode.BASE,)))
    assert f"article: {text} title: " not in cloud.prompts[-1].text
    profile.perform(Ask(replace(asked, examples=0), (Mode.BASE,)))
    assert cloud.prompts[-1].text == own
    assert nearest_examples(profile, task, wanted, 3, tokens=40) == []
    with pytest.raises(InvalidInput, match="from 0 to 64"):
        replace(asked, examples=65)


def test_the_passphrase_is_asked_for_once(profile: Profile, home: Path) -> None:
    asked: list[str] = []

    def passphrase() -> str:
        asked.append("")
        return PASSPHRASE

    profile.close()
    with Profile.open(DeviceSettings("one", home), passphrase=passphrase) as again:
        with pytest.raises(VaultBusy):
            Vault.open(again.settings.vault_path, PASSPHRASE, wait_seconds=0.0)
        again.release_vault()
        Vault.open(again.settings.vault_path, PASSPHRASE, wait_seconds=0.0).close()
        assert answer(again, Mode.COLLECTIVE) == "Hello world collective "
    assert len(asked) == 1
    with pytest.raises(NotFound, match='no profile "two"'):
        Profile.open(DeviceSettings("two", home), passphrase=passphrase)


def test_a_released_vault_that_is_busy_can_be_tried_again(
    profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile.release_vault()

    def busy(*_: Any, **__: Any) -> None:
        raise VaultBusy("another perfit is using it")

    monkeypatch.setattr(Vault, "open", busy)
    with pytest.raises(Unavailable), profile.vault():
        pass


def test_one_profile_answers_while_it_trains(profile: Profile, cloud: Any) -> None:
    """A process that keeps a profile open serves several callers at once."""
    under_way, answered = threading.Event(), threading.Event()

    def waiting(method: str) -> None:
        if method == "ComputeGradient":
            under_way.set()
            assert answered.wait(30)

    cloud.fail = waiting
    done: list[Any] = []
    training = threading.Thread(target=lambda: done.append(profile.perform(SHORT)))
    training.start()
    try:
        assert under_way.wait(30)
        assert answer(profile, Mode.PERSONAL) == "Hello world personal "
        assert profile.perform(AddExample("It rained.", "Rain")).added == 1
    finally:
        answered.set()
        training.join(60)
    assert done[0].trained.gate.accepted
    assert len(profile.perform(FindExamples())) == 21


def test_a_thread_s_change_is_no_part_of_another_s(tmp_path: Path) -> None:
    """It was undone with it."""
    under_way, written = threading.Event(), threading.Event()
    with Vault.create(tmp_path / "v.db", PASSPHRASE, kdf=CHEAP) as vault:

        def write() -> None:
            assert under_way.wait(30)
            vault.put("a", "other", b"x")
            written.set()

        other = threading.Thread(target=write)
        other.start()
        with pytest.raises(InvalidInput), vault.transaction():
            vault.put("a", "mine", b"x")
            under_way.set()
            assert not written.wait(0.3), "it waits"
            raise InvalidInput("all of it goes back")
        other.join(30)
        assert vault.list("a") == {"other": b"x"}


def test_white_space_is_left_out_at_the_front_alone(profile: Profile, cloud: Any) -> None:
    cloud.answer = " Hello  world"
    assert answer(profile, Mode.BASE) == "Hello  world base "


def test_nothing_below_the_command_line_knows_typer() -> None:
    """The import contract says the same; this also finds what would import a module of the CLI."""
    program = (
        "import importlib, pkgutil, sys, perfit_device\n"
        "for module in pkgutil.walk_packages(perfit_device.__path__, 'perfit_device.'):\n"
        "    if not module.name.startswith('perfit_device.cli'):\n"
        "        importlib.import_module(module.name)\n"
        "sys.exit('typer' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_released_vault_is_shared_by_all_who_need_it(profile: Profile) -> None:
    """Each opened it anew, and found it held by its own process; a release closed it under a user's hands."""
    profile.release_vault()
    with profile.vault() as vault, profile.vault() as again:
        assert vault is again
        profile.release_vault()
        vault.put("note", "new", b"x")
    assert vault.closed
    found: list[int] = []
    threads = [
        threading.Thread(target=lambda: found.append(len(profile.perform(FindExamples())))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 12


def test_in_a_chat_own_examples_are_earlier_turns(profile: Profile) -> None:
    """As many as there is room for, by two bytes a token and what stands around a turn."""
    task = TASKS["news_headline"].resolved(True)
    examples = profile.perform(FindExamples(task.name))
    wanted = replace(
        examples[7], fields={**examples[7].fields, "text": f"{examples[7].fields['text']} Again."}
    )
    nearest = nearest_examples(profile, task, wanted, 2, tokens=4096)
    assert nearest[0] == examples[7].fields and len(nearest) == 2
    far, near = reversed(nearest)
    turns = [("user", far), ("assistant", far), ("user", near), ("assistant", near), ("user", wanted.fields)]
    said = [Message(role, (task.prompt if role == "user" else task.target)(item)) for role, item in turns]
    assert prompt_of(task, wanted, before=nearest) == said
    tokens = sum(len(one.content.encode()) // 2 + 8 for one in said[2:])
    assert nearest_examples(profile, task, wanted, 2, tokens=tokens) == nearest[:1]
    assert nearest_examples(profile, task, wanted, 2, tokens=tokens - 1)[:1] != nearest[:1]
    with pytest.raises(InvalidData, match='"text" is missing'):
        nearest_examples(profile, task, replace(wanted, fields={}), 2, tokens=4096)


@pytest.mark.parametrize("examples", [None, 0, 2])
def test_own_examples_stand_before_questions_of_one_line(
    newcomer: Profile, cloud: Any, examples: int | None
) -> None:
    """In a personal answer alone, before an update and after; always as many as are asked for."""
    asked = Question("The council met.", temperature=0.0, examples=examples)

    def turns(mode: Mode, emit: Emit = lambda _: None) -> int:
        newcomer.perform(Ask(asked, (mode,)), emit)
        return len(cloud.prompts[-1].chat.messages)

    always = 2 * (examples or 0) + 1
    first = 9 if examples is None else always
    events: list[Event] = []
    assert turns(Mode.PERSONAL, events.append) == first
    assert turns(Mode.COLLECTIVE) == turns(Mode.BASE) == always
    behind = f" behind {first // 2} of your examples" if first > 1 else ""
    assert isinstance(events[0], Note)
    assert f"so this is the seed{behind}; `perfit update`" in events[0].text
    newcomer.perform(SHORT)
    assert turns(Mode.PERSONAL) == first


def test_apps_are_answered_as_their_user_is(newcomer: Profile, cloud: Any) -> None:
    """By the task's own name or as `personal`; without examples where the cloud refuses them, and says so."""
    said = (answers.Message("user", "The council met."),)
    events: list[Event] = []

    def turns(model: str) -> int:
        newcomer.perform(Complete(said, model=model), events.append)
        return len(cloud.prompts[-1].chat.messages)

    def falls_back() -> bool:
        return any(isinstance(event, Note) and "without them" in event.text for event in events)

    assert turns("news_headline") == turns("personal") == 9
    assert turns("base") == turns("collective") == 1
    newcomer.perform(Complete(prompt="As it is", model="news_headline"))
    assert cloud.prompts[-1].text == "As it is" and not falls_back()
    cloud.refuses = lambda _: len(cloud.prompts[-1].chat.messages) > 1
    assert turns("news_headline") == 1 and falls_back()
    events.clear()
    newcomer.perform(Ask(Question("The council met."), (Mode.PERSONAL,)), events.append)
    assert len(cloud.prompts[-1].chat.messages) == 1 and falls_back()
    with pytest.raises(InvalidPrompt):
        newcomer.perform(Ask(Question("The council met.", examples=2), (Mode.PERSONAL,)))
    cloud.refuses = lambda _: False
    newcomer.perform(SHORT)
    assert turns("news_headline") == turns("personal") == 9


@pytest.mark.parametrize("task", [TASKS["reply"], TASKS["news_categorize"]])
def test_answers_of_lines_and_labels_have_no_examples_unless_asked(
    home: Path, cloud: Any, messages: list[str], task: Task
) -> None:
    """It was not measured there."""
    task = task.resolved(True)
    cloud.tasks, cloud.own_tasks = [task.name], {task.name: task}
    with Profile.create(
        DeviceSettings("one", home), passphrase=PASSPHRASE, notify=messages.append
    ) as profile:
        profile.perform(Enroll(cloud.invite().encode()))
        for n in range(3):
            profile.perform(AddExample(f"Text {n}?", task.labels[0] if task.labels else "x", task.name))
        profile.perform(Ask(Question("Text 1, again?", task=task.name), (Mode.PERSONAL,)))
        assert len(cloud.prompts[-1].chat.messages) == 1


def test_open_talk_has_no_examples_unless_asked(home: Path, cloud: Any, messages: list[str]) -> None:
    cloud.tasks.append("chat")
    with Profile.create(
        DeviceSettings("one", home), passphrase=PASSPHRASE, notify=messages.append
    ) as profile:
        profile.perform(Enroll(cloud.invite().encode()))
        for n in range(3):
            profile.perform(AddExample(f"Question {n}?", f"Answer {n}.", "chat"))
        profile.perform(Ask(Question("Question 1, again?", task="chat"), (Mode.PERSONAL,)))
        assert [turn.content for turn in cloud.prompts[-1].chat.messages] == ["Question 1, again?"]
        profile.perform(Ask(Question("Question 1, again?", task="chat", examples=1), (Mode.PERSONAL,)))
        said = [turn.content for turn in cloud.prompts[-1].chat.messages]
        assert said == ["Question 1?", "Answer 1.", "Question 1, again?"]
