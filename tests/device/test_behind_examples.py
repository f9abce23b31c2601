"""Shifts that are trained behind own examples: what is sent, what is remembered, and what is asked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_cloud import SPEC, text_of

from perfit_device import history, personal, shift_files
from perfit_device.cloud.retry import RetryPolicy
from perfit_device.config import Config
from perfit_device.history.importers import read_history
from perfit_device.nearest import NearestExamples, examples_of_task
from perfit_device.operations.ask import Ask, Question
from perfit_device.operations.evaluate import Evaluate
from perfit_device.operations.examples import FindExamples
from perfit_device.operations.imports import ImportExamples
from perfit_device.operations.insight import ShowInsight
from perfit_device.operations.migrate import Migrate
from perfit_device.operations.operation import Event, Note
from perfit_device.operations.shift_import import ImportShift
from perfit_device.operations.update import Update
from perfit_device.operations.versions import ListVersions, ShowVersion, Undo
from perfit_device.profile import Profile
from perfit_device.settings import DeviceSettings
from perfit_device.shift_versions import Version, Versions
from perfit_device.starts import start_of
from perfit_shared.shifts import ShiftTensors, read_metadata
from perfit_shared.tasks import TASKS
from perfit_shared.types import Mode
from perfit_shared.wire import personalization_pb2 as pb

TASK = TASKS["news_headline"].resolved(True)
ASKED = Question("The council met.", temperature=0.0)


def update(profile: Profile, **changes: Any) -> list[str]:
    """Trains, and gives what it told."""
    events: list[Event] = []
    done = profile.perform(Update(settings={"epochs": 2}, **changes), events.append)
    assert done.trained is not None and done.trained.gate.accepted
    return [event.text for event in events if isinstance(event, Note)]


def turns(profile: Profile, cloud: Any, mode: Mode = Mode.PERSONAL) -> int:
    """In the prompt of a question: two for each example before it."""
    profile.perform(Ask(ASKED, (mode,)))
    return len(cloud.prompts[-1].chat.messages)


def replies(prompts: Iterable[pb.Prompt]) -> set[str]:
    """The texts of earlier examples in these prompts."""
    said = (message for prompt in prompts for message in prompt.chat.messages)
    return {message.content for message in said if message.role == "assistant"}


def more(profile: Profile, folder: Path) -> None:
    """So many examples that the newest judge alone."""
    lines = [
        {"text": f"The mayor met guest {n}.", "title": f"Guest {n}", "date": f"2025-01-01T00:{n:02}:00"}
        for n in range(60)
    ]
    path = folder / "more.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    profile.perform(ImportExamples(read_history(path, TASK), offline=True))


def test_each_example_is_learned_behind_the_nearest_of_the_others(newcomer: Profile, cloud: Any) -> None:
    """None behind itself, and none behind one of the test part; those of a judgement likewise."""
    told = update(newcomer)
    assert any("each behind up to 4 of them that are nearest to it" in text for text in told)
    items = newcomer.perform(FindExamples(TASK.name))
    parts = history.split(items)
    titles = {item.fields["title"] for item in parts.trained}
    assert len(titles) == 16 and parts.gate, "in folds all of them train"
    for example in cloud.learned:
        *before, own = example.prompt.chat.messages
        said = [message.content for message in before if message.role == "assistant"]
        assert len(said) == len(set(said)) == 4 and example.target not in said
        assert own.role == "user" and own.content.count("The council") == 1
    assert replies(example.prompt for example in cloud.learned) <= titles
    assert {example.target for example in cloud.learned} == titles
    judged = [prompt for _, prompt in cloud.scored]
    assert {len(prompt.chat.messages) for prompt in judged} == {9} and replies(judged) <= titles


def test_what_judges_stands_before_nothing(newcomer: Profile, cloud: Any, tmp_path: Path) -> None:
    """With a part of its own, as longer histories have one."""
    more(newcomer, tmp_path)
    parts = history.split(newcomer.perform(FindExamples(TASK.name)))
    assert parts.trained == parts.train and len(parts.gate) >= 10
    update(newcomer)
    titles = {item.fields["title"] for item in parts.train}
    judged = [prompt for _, prompt in cloud.scored]
    assert {example.target for example in cloud.learned} == titles
    before = replies([*(example.prompt for example in cloud.learned), *judged])
    assert before <= titles and len(before) > 4
    assert {text_of(prompt).rsplit("\n", 1)[-1] for prompt in judged} == {
        TASK.prompt(item.fields).rsplit("\n", 1)[-1] for item in parts.gate
    }


def test_an_item_that_reads_the_same_is_not_before_it() -> None:
    """Its answer may be the very one that is asked for."""
    make = history.HistoryItem.make
    texts = ["a cat", "a cat", "a dog"]
    items = [make(TASK, {"text": text, "title": f"t{n}"}) for n, text in enumerate(texts)]
    assert NearestExamples(TASK, items, 3, tokens=4096).before(items[0]) == [items[2].fields]
    assert NearestExamples(TASK, items, 0, tokens=4096).before(items[0]) == []
    assert NearestExamples(TASK, [], 3, tokens=4096).count == 0


def test_long_examples_cost_a_bounded_number_of_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    from perfit_device import nearest

    tried = []
    read_after = nearest.read_after
    monkeypatch.setattr(nearest, "read_after", lambda *args: tried.append(1) or read_after(*args))
    items = [history.HistoryItem.make(TASK, {"text": f"cat {n} " * 400, "title": "x"}) for n in range(500)]
    assert NearestExamples(TASK, items, 4, tokens=100).before(items[7]) == []
    assert len(tried) == 16


def test_of_a_long_history_the_newest_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perfit_device.nearest._SEARCHED", 3)
    items = [
        history.HistoryItem.make(TASK, {"text": f"cat {n}", "title": f"t{n}"}, date=f"2024-01-0{9 - n}")
        for n in range(8)
    ]
    before = NearestExamples(TASK, items, 8, tokens=4096).before(items[6])
    assert {fields["title"] for fields in before} == {"t0", "t1", "t2"}


def test_questions_follow_the_version_that_is_current(newcomer: Profile, cloud: Any, home: Path) -> None:
    """Also after an undo; what the config file says stands over it."""
    examples = Config().with_value("examples.one", 0)
    examples.write(home / "config.toml")
    assert turns(newcomer, cloud) == 1
    assert not any("behind" in text for text in update(newcomer))
    assert all(len(example.prompt.chat.messages) == 1 for example in cloud.learned)
    examples.with_value("examples.one", None).write(home / "config.toml")
    assert turns(newcomer, cloud) == 1, "it was trained without"
    update(newcomer)
    assert turns(newcomer, cloud) == 9
    assert turns(newcomer, cloud, Mode.COLLECTIVE) == turns(newcomer, cloud, Mode.BASE) == 1
    kept = newcomer.perform(ListVersions()).versions.kept
    assert [version.behind for version in kept] == [0, 4]
    newcomer.perform(Undo())
    assert turns(newcomer, cloud) == 1
    newcomer.perform(Undo(to=2))
    Config().with_value("examples.one", "2").write(home / "config.toml")
    assert turns(newcomer, cloud) == 5
    Config().with_value("examples.one", "0").write(home / "config.toml")
    assert turns(newcomer, cloud) == 1


def test_a_talk_is_never_behind_examples(home: Path) -> None:
    """Apps send its turns as they are, so an update learns it so whatever is set."""
    settings = DeviceSettings("one", home)
    home.mkdir()
    Config().with_value("examples.one", 3).write(home / "config.toml")
    for name, count in (("chat", 0), ("reply", 3), ("news_headline", 3), ("news_categorize", 3)):
        assert examples_of_task(settings, TASKS[name].resolved(True)) == count
    (home / "config.toml").unlink()
    for name, count in (("chat", 0), ("reply", 0), ("news_headline", 4), ("news_categorize", 0)):
        assert examples_of_task(settings, TASKS[name].resolved(True)) == count
        assert examples_of_task(settings, TASKS[name].resolved(False)) == 0


def test_an_equal_update_is_one_that_reads_the_same(newcomer: Profile, cloud: Any, home: Path) -> None:
    update(newcomer)
    assert newcomer.perform(Update(settings={"epochs": 2})).trained is None
    Config().with_value("examples.one", 1).write(home / "config.toml")
    assert newcomer.perform(Update(settings={"epochs": 2})).trained is not None


def test_a_half_done_update_goes_on_behind_as_many(newcomer: Profile, cloud: Any, home: Path) -> None:
    def interrupted() -> None:
        calls = len(cloud.learned)

        def stop(event: Event) -> None:
            if len(cloud.learned) > calls + 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            newcomer.perform(Update(settings={"epochs": 2}), stop)

    interrupted()
    assert any("resuming after step" in text for text in update(newcomer))
    Config().with_value("examples.one", 1).write(home / "config.toml")
    interrupted()
    Config().with_value("examples.one", 2).write(home / "config.toml")
    told = update(newcomer)
    assert any("behind others than they were" in text for text in told)
    assert not any("resuming" in text for text in told)


def test_what_is_refused_behind_others_is_read_alone(newcomer: Profile, cloud: Any) -> None:
    """And what is refused alone, too, is left out; later updates know both."""
    items = newcomer.perform(FindExamples(TASK.name))
    longest = TASK.prompt(items[3].fields)
    cloud.refuses = lambda said: said.endswith(longest) and said != longest
    update(newcomer)
    prompts = {text_of(example.prompt) for example in cloud.learned}
    assert longest in prompts and len([each for each in prompts if each.endswith(longest)]) == 1
    assert {example.target for example in cloud.learned} >= {items[3].fields["title"]}
    assert turns(newcomer, cloud) == 9
    cloud.learned.clear()
    cloud.refuses = lambda said: said.endswith(longest)
    told = update(newcomer, again=True)
    assert any("1 examples are too long for this cloud and are left out" in text for text in told)
    assert items[3].fields["title"] not in {example.target for example in cloud.learned}
    cloud.calls.clear()
    told = update(newcomer, again=True)
    assert any("1 examples are too long" in text for text in told)


def test_what_is_refused_behind_four_is_read_behind_fewer(newcomer: Profile, cloud: Any, home: Path) -> None:
    longest = TASK.prompt(newcomer.perform(FindExamples(TASK.name))[3].fields)
    cloud.refuses = lambda said: said.endswith(longest) and said.count("\n") > 4
    update(newcomer)
    Config().with_value("examples.one", 2).write(home / "config.toml")
    cloud.learned.clear()
    update(newcomer, again=True)
    assert {len(e.prompt.chat.messages) for e in cloud.learned if text_of(e.prompt).endswith(longest)} == {5}


def test_a_half_done_update_goes_on_only_where_it_reads_the_same(newcomer: Profile, cloud: Any) -> None:
    """Another limit of the cloud's lets other examples fit: losses of before say nothing of them."""
    cloud.prompt_tokens = 60
    newcomer.disconnect()

    def stop(event: Event) -> None:
        if len(cloud.learned) > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        newcomer.perform(Update(settings={"epochs": 2}), stop)
    alone = {len(example.prompt.chat.messages) for example in cloud.learned}
    assert max(alone) < 9
    cloud.prompt_tokens = 512
    newcomer.disconnect()
    told = update(newcomer)
    assert any("behind others than they were" in text for text in told)


def test_a_long_history_is_read_behind_fewer(newcomer: Profile, cloud: Any) -> None:
    """As many as the cloud takes tokens of one update: else it would go call by call."""
    trained = history.split(newcomer.perform(FindExamples(TASK.name))).trained
    two = NearestExamples(TASK, trained, 2, tokens=512).tokens(trained)
    for room, count in ((0, 4), (100_000, 4), (two, 2), (two - 1, 1), (100, 0)):
        cloud.adapt_tokens = room
        newcomer.disconnect()
        cloud.learned.clear()
        newcomer.perform(Update(settings={"epochs": 1}, again=True, anyway=True))
        assert newcomer.perform(ShowVersion()).version.behind == count
        assert {len(example.prompt.chat.messages) for example in cloud.learned} == {2 * count + 1}
        assert turns(newcomer, cloud) == 2 * count + 1


def test_a_shift_that_is_asked_alone_is_judged_so(
    newcomer: Profile, cloud: Any, home: Path, tmp_path: Path
) -> None:
    """One of before learned alone; what takes its place is no worse than it is in use."""
    Config().with_value("examples.one", 0).write(home / "config.toml")
    update(newcomer)
    (home / "config.toml").unlink()
    more(newcomer, tmp_path)
    parts = history.split(newcomer.perform(FindExamples(TASK.name)))
    cloud.scored.clear()
    update(newcomer)
    of = {count: [p for _, p in cloud.scored if len(p.chat.messages) == count] for count in (1, 9)}
    assert len(of[1]) == len(parts.gate) and len(of[9]) > len(parts.gate)


@pytest.mark.parametrize("before", [0, 4])
def test_a_migration_says_whether_both_were_read_alike(
    newcomer: Profile, cloud: Any, home: Path, before: int
) -> None:
    Config().with_value("examples.one", before).write(home / "config.toml")
    update(newcomer)
    (home / "config.toml").unlink()
    cloud.version = "v2"
    newcomer.disconnect()
    (done,) = newcomer.perform(Migrate())
    assert done.same_model and done.same_reading is (before == 4)


def test_somebody_elses_shift_is_asked_as_it_was_trained(newcomer: Profile, cloud: Any, home: Path) -> None:
    """One that was trained alone is measured alone, beside one's own behind examples; or as is set."""
    Config().with_value("examples.one", 0).write(home / "config.toml")
    update(newcomer)
    name = newcomer.artefact(None).name
    with newcomer.vault() as vault:
        data, _ = shift_files.export(vault, newcomer.connect()[1].cloud_id, name)
    for said, counts in ((None, {1, 9}), (2, {1, 5})):
        Config().with_value("examples.one", said).write(home / "config.toml")
        update(newcomer, again=True)
        cloud.scored.clear()
        report = newcomer.perform(Evaluate(shift=data, shift_name="theirs"))
        assert {*report.loss} == {"base", "collective", "personal", "other"}
        personal_ones = [prompt for mode, prompt in cloud.scored if mode == pb.SHIFT_MODE_PERSONAL]
        of_count = [len(prompt.chat.messages) for prompt in personal_ones]
        assert {1, *of_count} == counts and of_count.count(1) == (4 if said is None else 0)


def test_insight_and_starts_take_what_is_refused_behind_others(newcomer: Profile, cloud: Any) -> None:
    update(newcomer)
    parts = history.split(newcomer.perform(FindExamples(TASK.name)))
    longest = TASK.prompt(parts.test[0].fields)
    cloud.refuses = lambda said: said.endswith(longest) and said != longest
    assert len(newcomer.perform(ShowInsight(online=True)).answers) == len(parts.test) == 4
    cloud.communities = [cloud.seed.to_bytes()]
    newcomer.disconnect()
    cloud.refuses = lambda said: said.count("The council") > 1
    choice = start_of(newcomer, newcomer.artefact(None), RetryPolicy()).choice
    assert choice is not None and choice.seed_loss > 0


def test_evaluation_asks_as_questions_are_asked(newcomer: Profile, cloud: Any) -> None:
    """Seed and personal behind examples, base and collective alone; none of the test part before another."""
    events: list[Event] = []
    for trained in (False, True):
        if trained:
            update(newcomer)
        cloud.scored.clear(), cloud.prompts.clear(), events.clear()
        cloud.refuses = lambda said: False
        report = newcomer.perform(Evaluate(with_seed=True), events.append)
        assert report.examples == 4 and not report.skipped
        of_mode: dict[int, set[int]] = {}
        for mode, prompt in cloud.scored:
            of_mode.setdefault(mode, set()).add(len(prompt.chat.messages))
        assert of_mode[pb.SHIFT_MODE_PERSONAL] == {9}
        assert of_mode[pb.SHIFT_MODE_BASE] == of_mode[pb.SHIFT_MODE_COLLECTIVE] == {1}
        assert {len(prompt.chat.messages) for prompt in cloud.prompts} == {1, 9}
        parts = history.split(newcomer.perform(FindExamples(TASK.name)))
        assert not replies(cloud.prompts) & {item.fields["title"] for item in parts.test}
        assert any(isinstance(e, Note) and "asked behind 4 of your examples" in e.text for e in events)
    cloud.refuses = lambda said: said.count("\n") > 2
    again = newcomer.perform(Evaluate(with_seed=True))
    assert again.examples == 4 and not again.skipped, "alone, as a question is asked then"


def test_insight_scores_as_it_was_trained(newcomer: Profile, cloud: Any) -> None:
    update(newcomer)
    cloud.scored.clear(), cloud.prompts.clear()
    found = newcomer.perform(ShowInsight(online=True))
    assert len(found.examples) == 16 and found.answers
    assert {len(prompt.chat.messages) for _, prompt in cloud.scored} == {9}
    assert {len(prompt.chat.messages) for prompt in cloud.prompts} == {1, 9}


def test_a_shift_takes_along_what_it_was_trained_behind(newcomer: Profile, cloud: Any) -> None:
    """In an exported file, and what a hostile one says is bounded; a list of versions of before says none."""
    update(newcomer)
    assert newcomer.perform(ShowVersion()).version.behind == 4
    name = newcomer.artefact(None).name
    with newcomer.vault() as vault:
        data, _ = shift_files.export(vault, newcomer.connect()[1].cloud_id, name)
    tensors = ShiftTensors.from_bytes(data, SPEC, SPEC.personal_rank)
    for said, behind in (("4", 4), ("3", 3), ("999", 4), ("9" * 9, 0), ("-1", 0), ("x", 0)):
        changed = tensors.to_bytes(metadata=read_metadata(data) | {"behind": said})
        newcomer.perform(ImportShift(changed))
        assert newcomer.perform(ListVersions()).versions.now.behind == behind
    plain = Versions("t", 1, (Version(1, "v", 1),))
    assert b"behind" not in plain.to_bytes() and Versions.from_bytes(plain.to_bytes()) == plain
    with newcomer.vault() as vault:
        cloud_id = newcomer.connect()[1].cloud_id
        shift = personal.load(vault, cloud_id, newcomer.artefact(None))
    assert shift is not None and shift.behind == 0
