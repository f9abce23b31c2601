"""Methods that train nothing: what each one's paper says of it, on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.chat_templates import chat_base
from tests.support.lamp_files import TASK as FILES_TASK
from tests.support.lamp_files import write_files

from perfit_cloud.lamp.methods import METHODS
from perfit_cloud.lamp.methods.interface import FitContext, Method, QueryRequest, TaskData
from perfit_cloud.lamp.methods.perfit import PerFit
from perfit_cloud.lamp.methods.prefixed import pair_after, prefixed_pair
from perfit_cloud.lamp.methods.rag import OwnExamples, Rag
from perfit_cloud.lamp.methods.stylevector import _STRENGTHS, Style, StyleVector
from perfit_cloud.lamp.people import Counts, People, Person, Query
from perfit_cloud.lamp.report import write_report
from perfit_cloud.lamp.request import LampRequest
from perfit_cloud.lamp.run import run_lamp
from perfit_cloud.lamp.sweep import run_sweep
from perfit_cloud.model.artefacts import Artefact
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.blocks import block_list
from perfit_shared.errors import InvalidData, InvalidInput
from perfit_shared.lamp import Labels
from perfit_shared.tasks import Task
from perfit_shared.types import Sampling

TASK = Task("news_headline", "{text} so", " {title}", "rouge_1", answer_tokens=6)
TITLES = ("cat 1", "dog 2", "mat 3", "door 4")
TEXTS = ("the cat sat", "a dog ran", "the mat sat on", "on the door the dog")
HISTORY = tuple({"text": text, "title": title} for text, title in zip(TEXTS, TITLES, strict=True))
QUERY = Query("q", "dog 9", {"text": "a dog", "title": "dog 9"})
PERSON = Person("7", HISTORY, (QUERY,))
CONTEXT = FitContext(lambda examples, people: None, lambda examples: None, lambda: None, Path())


def data_of(base: BaseModel, task: Task = TASK) -> TaskData:
    return TaskData(task, base, People((PERSON,), Counts(0, 0, 0, 0), base.context, "", (), Labels(), {}))


def opened(name: str, base: BaseModel, task: Task = TASK, **options: Any) -> Method[Any]:
    request = LampRequest(task.name, "tiny", Path(), Path(), method=name, **options)
    method = METHODS[name](request, data_of(base, task))
    method.prepare(lambda: False)
    return method


def asked(state: Any, query: Query = QUERY, *, tokens: int = 6) -> list[QueryRequest[Any]]:
    return [QueryRequest("7", query, state, Sampling(tokens))]


def prompt_of(base: BaseModel, text: str) -> tuple[list[int], list[int]]:
    return base.encode_pair(text, " dog 9")


# -- none ------------------------------------------------------------------------------------------


def test_none_is_the_untouched_model(base: BaseModel) -> None:
    method = opened("none", base)
    ids = torch.tensor([base.encode("a dog so")])
    logits = base.model(ids).logits[0, -1]
    answer = method.answer(asked(None, tokens=1), lambda count: None)
    assert answer == [base.decode([int(logits.argmax())])]
    pair = method.pair(asked(None)[0], QUERY.item)  # type: ignore[attr-defined]
    assert pair == prompt_of(base, "a dog so")
    assert not method.learns and set(method.shared) == {"base"} and method.parameters == 0


# -- rag -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "before"),
    [
        (1, "text: a dog ran title: dog 2\n"),
        # After both words of the query, one of them.
        (2, "text: a dog ran title: dog 2\ntext: on the door the dog title: door 4\n"),
    ],
)
def test_rag_puts_the_nearest_k_before_the_query_and_no_other(base: BaseModel, k: int, before: str) -> None:
    method = opened("rag", base, k=k)
    assert isinstance(method, Rag)
    state = method.fit(PERSON, CONTEXT).state
    assert method.pair(asked(state)[0], QUERY.item) == prompt_of(base, before + "a dog so")
    assert method.pair(asked(method.start)[0], QUERY.item) == prompt_of(base, "a dog so")


def test_rag_sees_neither_the_query_nor_what_is_later() -> None:
    own = OwnExamples(TASK, HISTORY, ("2020-01-01", "2021-05-01", "", "2020-03-01"))

    def found(**changes: Any) -> list[str]:
        return [item["title"] for item in own.nearest(replace(QUERY, **changes), 9)]

    everything = found()
    assert sorted(everything) == sorted(TITLES)
    assert sorted(found(date="2020-03-01")) == ["cat 1", "door 4", "mat 3"], "what has no date stays"
    # The query's gold is neither looked for nor found.
    assert found(item={**QUERY.item, "title": "mat mat"}) == everything
    assert "cat 1" not in found(item={"text": "the cat sat", "title": "cat 1"})


def test_what_does_not_fit_is_left_out_and_the_query_never_cut(base: BaseModel) -> None:
    data, long = data_of(base), "mat " * 400
    plain = prompt_of(base, "a dog so")
    assert prefixed_pair(data, [long], QUERY.item) == plain
    assert prefixed_pair(data, [long, "a", long, "b"], QUERY.item) == prompt_of(base, "a\nb\na dog so")
    filled = {"text": "dog " * 400, "title": "dog 9"}
    assert prefixed_pair(data, ["a"], filled) == data.encoder.query(filled).pair
    near, far = ({"text": word, "title": word} for word in ("near", "far"))
    too_long = {"text": long, "title": "mat"}
    line = "text: {text} title: {title}\n".format
    both = prompt_of(base, f"{line(**near)}{line(**far)}a dog so")
    assert pair_after(data, TASK, [near, too_long, far], QUERY.item) == both
    assert pair_after(data, TASK, [near], filled) == data.encoder.query(filled).pair


def test_a_chat_has_a_text_in_the_user_s_turn_and_examples_as_turns(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    spoken = chat_base(model_folder("llama"), "chatml", tmp_path_factory.mktemp("spoken"))
    task = replace(TASK, chat=True, answer="{title}", system="write")
    data = data_of(spoken, task)
    pair = prefixed_pair(data, ["a"], QUERY.item)
    assert pair == spoken.encode_pair([("system", "write"), ("user", "a\na dog so")], "dog 9")
    nearest = [{"text": "the dog", "title": "dog 1"}, {"text": "cat", "title": "cat 2"}]
    turns = [("user", "cat so"), ("assistant", "cat 2"), ("user", "the dog so"), ("assistant", "dog 1")]
    said = [("system", "write"), *turns, ("user", "a dog so")]
    assert pair_after(data, task, nearest, QUERY.item) == spoken.encode_pair(said, "dog 9")
    method = opened("rag", spoken, k=2)
    assert method.settings["examples_as"] == "lines", "of a task that is read as text"
    method.data = data
    assert method.settings["examples_as"] == "turns"


# -- pag -------------------------------------------------------------------------------------------


def test_pag_s_profile_comes_of_the_history_alone_and_stands_in_the_prompt(
    base: BaseModel, load: Callable[[str], BaseModel], model_folder: Callable[[str], Path]
) -> None:
    method = opened("pag", base)
    profile = method.fit(PERSON, CONTEXT).state
    assert profile and "\n" not in profile
    other = replace(QUERY, gold="mat", item={"text": "mat", "title": "mat"})
    assert method.fit(replace(PERSON, queries=(other,)), CONTEXT).state == profile
    assert method.fit(replace(PERSON, history=HISTORY[:-1]), CONTEXT).state != profile
    pair = method.pair(asked("a b")[0], QUERY.item)  # type: ignore[attr-defined]
    assert pair == prompt_of(base, "profile: a b\na dog so")
    empty = method.pair(asked("")[0], QUERY.item)  # type: ignore[attr-defined]
    assert empty == prompt_of(base, "a dog so")
    # More than the writer's context holds: the latest that fit.
    assert method.fit(replace(PERSON, history=HISTORY * 9), CONTEXT).state
    written = opened("pag", base, profile_model=str(model_folder("qwen2")))
    assert written.fit(PERSON, CONTEXT).state != profile
    assert written.settings["profile_fingerprint"] != method.settings["profile_fingerprint"]


# -- stylevector -----------------------------------------------------------------------------------


def states_of(base: BaseModel, ids: list[int], layer: int) -> torch.Tensor:
    with torch.no_grad():
        hidden: torch.Tensor = base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
    return hidden[layer + 1][0]  # type: ignore[no-any-return]


def test_the_style_vector_is_the_mean_difference(base: BaseModel) -> None:
    method = opened("stylevector", base, layers=(1,), strength=0.5)
    state = method.fit(PERSON, CONTEXT).state
    untouched, differences = opened("none", base), []
    for item in HISTORY:
        query = Query("h", item["title"], item)
        neutral = TASK.parse(untouched.answer(asked(None, query), lambda count: None)[0])
        prompt = base.encode(f"{item['text']} so")
        texts = [
            prompt + base.encode_target(f" {text}")[:-1] if text else prompt
            for text in (item["title"], neutral)
        ]
        ours, models = (states_of(base, ids, 1)[-1] for ids in texts)
        differences.append(ours - models)
    expected = torch.stack(differences).mean(0)
    assert torch.allclose(torch.tensor(state.vector), expected, atol=1e-4) and expected.norm() > 0.1
    assert state.strength == 0.5 and method.parameters == base.hidden_size


def test_steering_reaches_every_token_from_the_prompt_s_end_on(base: BaseModel) -> None:
    """One text's answer under steering, by hand: h(t) + α v for t from the prompt's last token on."""
    method = opened("stylevector", base, layers=(1,))
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(base.hidden_size, generator=generator) * 3
    style = Style(0.7, tuple(vector.tolist()))
    prompt, target = prompt_of(base, "a dog so")
    block = block_list(base.model)[1]

    def logits(ids: list[int]) -> torch.Tensor:
        def add(_module: Any, _args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            hidden[:, len(prompt) - 1 :] += 0.7 * vector
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = block.register_forward_hook(add)
        with torch.no_grad():
            found: torch.Tensor = base.model(torch.tensor([ids])).logits[0]
        handle.remove()
        return found

    steps = logits(prompt + target)[len(prompt) - 1 : -1].log_softmax(-1)
    expected = float(steps[range(len(target)), target].sum())
    assert method.score(asked(style))[0].log_likelihood == pytest.approx(expected, abs=1e-3)
    ids = list(prompt)
    for _ in range(6):
        ids.append(int(logits(ids)[-1].argmax()))
        if ids[-1] in base.end_ids:
            break
    texts = method.answer(asked(style), lambda count: None)
    untouched = opened("none", base)
    plain = untouched.answer(asked(None), lambda count: None)
    assert texts == [base.decode([i for i in ids[len(prompt) :] if i not in base.end_ids])] != plain
    # Off: the untouched model, also after a steered call.
    assert method.answer(asked(method.start), lambda count: None) == plain
    off, base_score = method.score(asked(method.start))[0], untouched.score(asked(None))[0]
    assert off.log_likelihood == pytest.approx(base_score.log_likelihood, abs=1e-4)


def test_a_strength_is_chosen_on_the_latest_part(base: BaseModel) -> None:
    method = opened("stylevector", base, layers=(1,))
    person = replace(PERSON, history=HISTORY * 3)
    state = method.fit(person, CONTEXT).state
    assert isinstance(method, StyleVector) and state.strength in _STRENGTHS
    latest = [Query("h", item["title"], item) for item in person.history[-2:]]
    earlier = opened("stylevector", base, layers=(1,), strength=1.0)
    vector = earlier.fit(replace(person, history=person.history[:-2]), CONTEXT).state.vector

    def loss(strength: float) -> float:
        requests = [one for query in latest for one in asked(Style(strength, vector), query)]
        return -sum(score.log_likelihood for score in method.score(requests))

    assert state.strength == min(_STRENGTHS, key=loss)
    assert method.settings["layers"] == [1]
    assert opened("stylevector", base).settings["layers"] == [2]  # 15/32 of 4 blocks
    for wrong in ({"layers": (1, 2)}, {"strength": float("nan")}):
        with pytest.raises(InvalidInput):
            opened("stylevector", base, **wrong)
    with pytest.raises(InvalidInput, match="blocks 0 to 3"):
        opened("stylevector", base, layers=(9,))
    with pytest.raises(InvalidData, match="another model"):
        method.from_bytes(b'{"strength": 1, "vector": [1.0]}')


# -- runs ------------------------------------------------------------------------------------------


def test_runs_of_several_methods_make_one_report(
    base: BaseModel, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    data = write_files(tmp_path / "data")
    runs = [
        run_lamp(
            LampRequest(FILES_TASK, "tiny", data, tmp_path / name, users=2, method=name, **options), base=base
        )
        for name, options in (("none", {}), ("rag", {"k": 1}), ("stylevector", {"strength": 1.0}))
    ]
    assert [run.modes for run in runs] == [("base",), *[("base", "personal", "other")] * 2]
    none, *others = [run.summary() for run in runs]
    assert [one["settings"]["personal_parameters"] for one in others] == [0, base.hidden_size]
    for one in others:
        assert one["loss"]["base"] == pytest.approx(none["loss"]["base"], abs=1e-4)
        assert len(set(one["loss"].values())) == 3
        assert set(one["seconds"]) == {"preparation", "fit", "answers"}
    report = write_report([run.folder for run in runs], tmp_path / "report").read_text("utf-8")
    assert "rag, 1 own examples, task prompts, 2 users" in report and "none, task prompts" in report
    swept = LampRequest(
        FILES_TASK, str(model_folder("llama")), data, tmp_path / "sweep", users=1, method="rag"
    )
    runs = run_sweep(swept, "examples=2")
    assert [run.settings["examples"] for run in runs] == [None, 2]
    assert runs[0].users[0].loss("personal") != runs[1].users[0].loss("personal")


# -- perfit+rag ------------------------------------------------------------------------------------


def test_perfit_with_retrieval_is_one_shift_under_another_prompt(
    base: BaseModel, make_artefact: Callable[..., Artefact], tmp_path: Path
) -> None:
    make_artefact(base).save(tmp_path / "artefact")
    options: dict[str, Any] = {"artefact": tmp_path / "artefact", "epochs": 1, "learning_rate": 1e-2}
    plain, both = opened("perfit", base, **options), opened("perfit+rag", base, k=1, **options)
    assert isinstance(plain, PerFit) and isinstance(both, PerFit)
    context = replace(CONTEXT, checkpoint=tmp_path / "checkpoint")
    alone, retrieving = (method.fit(PERSON, context).state for method in (plain, both))
    assert alone.personal is not None and retrieving.personal is not None
    assert alone.personal.to_bytes() == retrieving.personal.to_bytes()
    pair = both.pair(asked(retrieving)[0], QUERY.item)
    assert pair == prompt_of(base, "text: a dog ran title: dog 2\na dog so")
    assert both.pair(asked(both.start)[0], QUERY.item) == plain.pair(asked(alone)[0], QUERY.item)
    assert both.score(asked(retrieving)) != plain.score(asked(alone))
    before = opened("perfit_stage1+rag", base, k=1, **options)
    fitted = before.fit(PERSON, context)
    assert (before.parameters, fitted.losses) == (0, ()), "there is no update yet"
    own, seed = fitted.state.personal, plain.start.personal
    assert own is not None and seed is not None
    assert own.to_bytes() == seed.to_bytes() != alone.personal.to_bytes()
    assert before.pair(asked(fitted.state)[0], QUERY.item) == pair  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput, match="--k"):
        opened("perfit+rag", base, k=0, **options)
    for method in (plain, both, before):
        method.close()


def test_a_shift_is_trained_behind_the_nearest_of_the_other_examples(
    base: BaseModel, make_artefact: Callable[..., Artefact], tmp_path: Path
) -> None:
    make_artefact(base).save(tmp_path / "artefact")
    options: dict[str, Any] = {"artefact": tmp_path / "artefact", "epochs": 1, "learning_rate": 1e-2}
    behind, plain = (opened(name, base, k=1, **options) for name in ("perfit_behind+rag", "perfit+rag"))
    assert isinstance(behind, PerFit) and isinstance(plain, PerFit)
    again = {"text": TEXTS[1], "title": "dog 5"}
    twice = replace(PERSON, history=(*HISTORY, again))
    learned = behind.learner(twice).history
    assert learned[2] == base.encode_pair("text: the cat sat title: cat 1\nthe mat sat on so", " mat 3")
    for prompt, _target in (learned[1], learned[4]):
        read = base.tokenizer.decode(prompt)
        assert read.count(TEXTS[1]) == 1, "neither itself nor one with its very input stands before it"
    assert plain.learner(twice).history != learned
    context = replace(CONTEXT, checkpoint=tmp_path / "checkpoint")
    states = [method.fit(PERSON, context).state for method in (behind, plain)]
    assert states[0].personal.to_bytes() != states[1].personal.to_bytes()
    assert behind.pair(asked(states[0])[0], QUERY.item) == plain.pair(asked(states[1])[0], QUERY.item)
    for method in (behind, plain):
        method.close()
