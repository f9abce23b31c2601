"""Small chat templates of five families' forms, with a tiny tokenizer that knows their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.models import tiny_tokenizer

if TYPE_CHECKING:
    from perfit_cloud.model.base import BaseModel

__all__ = ["FORMS", "ChatForm", "chat_base", "chat_tokenizer"]


@dataclass(frozen=True)
class ChatForm:
    template: str
    tokens: tuple[str, ...]  # special ones that the template writes
    end: str  # of a turn
    prompt: str  # what a system's text {0} and a user's {1} become


def _turns(turn: str, prompt: str, front: str = "") -> str:
    return (
        f"{front}{{% for m in messages %}}{turn}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


_REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)

FORMS = {
    # Writes a system turn of its own where there is none.
    "chatml": ChatForm(
        _turns(
            "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n",
            "<|im_start|>assistant\n",
            "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}",
        ),
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
        "<|im_start|>system\n{0}<|im_end|>\n<|im_start|>user\n{1}<|im_end|>\n<|im_start|>assistant\n",
    ),
    # Writes the beginning of sequence, which the tokenizer puts in front as well; trims.
    "llama3": ChatForm(
        _turns(
            "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "{{ bos_token }}",
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        "<s><|start_header_id|>system<|end_header_id|>\n\n{0}<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\n{1}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    # Refuses a system turn.
    "gemma": ChatForm(
        _turns(
            "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
            "{{ m.content | trim }}<end_of_turn>\n",
            "<start_of_turn>model\n",
            "{{ bos_token }}" + _REFUSES_SYSTEM,
        ),
        ("<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        "<s><start_of_turn>user\n{0}\n\n{1}<end_of_turn>\n<start_of_turn>model\n",
    ),
    # No generation prompt, and a space before a reply; leaves a system turn out in silence.
    "mistral": ChatForm(
        _turns(
            "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}",
            "",
            "{{ bos_token }}",
        ),
        ("[INST]", "[/INST]"),
        "</s>",
        "<s>[INST] {0}\n\n{1} [/INST]",
    ),
    # Ends the conversation, too.
    "phi3": ChatForm(
        _turns("<|{{ m.role }}|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n")
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|end|>",
        "<|system|>\n{0}<|end|>\n<|user|>\n{1}<|end|>\n<|assistant|>\n",
    ),
}


def chat_tokenizer(form: str) -> Any:
    """A tiny tokenizer with the template and the tokens of this form."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(FORMS[form].tokens)})
    tokenizer.chat_template = FORMS[form].template
    return tokenizer


def chat_base(plain: Path, form: str, folder: Path) -> BaseModel:
    """The tiny model of a folder with a chat tokenizer, saved to another folder and loaded."""
    from transformers import AutoModelForCausalLM

    from perfit_cloud.model.base import load_base

    tokenizer = chat_tokenizer(form)
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_base(str(folder))
