"""Prompts and replies of chats, as the templates of five families write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.cloud.test_tokens import prepending
from tests.support.chat_templates import FORMS, chat_base, chat_tokenizer
from tests.support.hostile import LIMITS

from perfit_cloud.collective.encoding import Encoder
from perfit_cloud.model.base import BaseModel
from perfit_cloud.model.tokens import TokenCodec
from perfit_cloud.service.codec import PromptReader
from perfit_device.cloud.codec import prompt_to_wire
from perfit_device.evaluation import pair_of
from perfit_device.history import HistoryItem
from perfit_shared.positions import Positions
from perfit_shared.tasks import Task
from perfit_shared.wire import personalization_pb2 as pb

EMBEDDED = 100_000
TURNS = [("system", "the cat"), ("user", "the dog sat")]
REPLY = "on the mat"


def rendered(tokenizer: Any, turns: list[tuple[str, str]], *, prompt: bool = False) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in turns]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=True)
    return list(encoded["input_ids"])


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_and_its_reply_are_the_conversation_that_the_template_writes(form: str) -> None:
    """Mistral's puts a space before a reply; Phi-3's ends the whole conversation too, which nobody trains."""
    tokenizer = chat_tokenizer(form)
    codec = TokenCodec(tokenizer, EMBEDDED)
    end = tokenizer.convert_tokens_to_ids(FORMS[form].end)
    assert codec.turn_end == end
    prompt = codec.chat([TURNS[1]])
    assert prompt is not None
    ours = [*prompt, *codec.reply(REPLY), end]
    whole = rendered(tokenizer, [TURNS[1], ("assistant", REPLY)])
    assert whole[: len(ours)] == ours
    assert tokenizer.decode(whole[len(ours) :]).replace("</s>", "").strip() == ""


@pytest.mark.parametrize("form", FORMS)
def test_a_system_turn_is_never_lost(form: str) -> None:
    """Gemma's template refuses one, Mistral's left it out in silence: there it begins the user's turn."""
    codec = TokenCodec(tokenizer := chat_tokenizer(form), EMBEDDED)
    ids = codec.chat(TURNS)
    assert ids is not None
    want = FORMS[form].prompt.format(TURNS[0][1], TURNS[1][1])
    assert tokenizer.decode(ids) == want
    # Contents that spell a token go another way through the tokenizer.
    hostile = codec.chat([("system", "the <s> cat"), TURNS[1]])
    assert hostile is not None and tokenizer.decode(hostile) == want.replace("the cat", "the <s> cat")


@pytest.mark.parametrize("form", FORMS)
def test_no_special_token_comes_twice(form: str) -> None:
    """The tokenizer puts a beginning in front of every text, and some templates write one, too."""
    tokenizer = chat_tokenizer(form)
    assert tokenizer("the cat")["input_ids"][0] == 0
    ids = TokenCodec(tokenizer, EMBEDDED).chat(TURNS)
    assert ids is not None and ids.count(0) == FORMS[form].prompt.count("<s>")


def test_a_reply_of_a_tokenizer_that_puts_spaces_in_front() -> None:
    """[/INST] business, as Mistral's and Llama 2's templates have it, is one piece with its space."""
    tokenizer = prepending()
    tokenizer.add_special_tokens({"additional_special_tokens": list(FORMS["mistral"].tokens)})
    tokenizer.chat_template = FORMS["mistral"].template
    codec = TokenCodec(tokenizer, EMBEDDED)
    assert tokenizer.convert_ids_to_tokens(codec.reply("business")) == ["▁business"]


@pytest.fixture
def base_of(model_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], BaseModel]:
    return lambda form: chat_base(model_folder("llama"), form, tmp_path)


TASK = Task("tickets", "About {product}: {ticket}", "{answer}", "rouge_1", chat=True, system="the cat")


@pytest.mark.parametrize("form", FORMS)
def test_all_calls_and_stage_1_read_the_same_tokens(base_of: Callable[[str], BaseModel], form: str) -> None:
    """What a device sends to Generate, Score, ComputeGradient and Adapt is what stage 1 trained on."""
    base = base_of(form)
    fields = {"product": "the mat", "ticket": "the dog <s> sat", "answer": "on the mat"}
    item = HistoryItem.make(TASK, fields)
    encoded = Encoder(base, TASK).example(fields)
    assert encoded is not None
    reader = PromptReader(base, replace(LIMITS, prompt_tokens=100, context=200, call_tokens=400))
    prompt, target = pair_of(TASK, item)
    wire = prompt_to_wire(prompt)
    assert reader.prompt(wire) == encoded.pair[0]
    example = pb.Example(prompt=wire, target=target)
    assert reader.examples([example]) == reader.update([example]) == [encoded.pair]
    assert reader.candidates([pb.Candidate(prompt=wire, answer=target)]) == [encoded.pair]
    assert base.decode(encoded.pair[1]).strip() == "on the mat" and encoded.pair[1][-1] in base.end_ids


def test_shifts_count_positions_on_the_tokens_of_the_template(base_of: Callable[[str], BaseModel]) -> None:
    """The last tokens of a chat's prompt are the template's, where the reply begins."""
    base = base_of("chatml")
    ids = base.encode_chat(TURNS)
    last = [ids[row] for row in Positions.parse("f2+l3").indices(len(ids))]
    assert base.tokenizer.decode(last[:1]) == "<|im_start|>"
    assert base.tokenizer.decode(last[2:]) == base.tokenizer.decode(ids[-3:]) and last[-1] == ids[-1]


def test_replies_end_with_the_token_that_ends_a_turn_and_texts_as_before(
    base_of: Callable[[str], BaseModel],
) -> None:
    """Gemma's tokenizer calls <eos> its end, and its turns end with <end_of_turn>."""
    base = base_of("gemma")
    end = base.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    prompt, target = base.encode_pair(TURNS, REPLY)
    assert target[-1] == end and end in base.end_ids and prompt == base.encode_chat(TURNS)
    assert base.encode_pair("the dog", " sat") == (base.encode("the dog"), base.encode_target(" sat"))
    assert base.encode_target(" sat")[-1] == base.end_id == 1


def test_a_model_without_a_template_reads_a_chat_as_text(load: Callable[[str], BaseModel]) -> None:
    base = load("llama")
    assert not base.has_chat_template
    assert base.encode_pair([("user", "the cat")], "sat") == (
        base.encode("the cat"),
        base.encode_target("sat"),
    )
