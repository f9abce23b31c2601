"""vLLM keeps what engines promise."""

from __future__ import annotations

from tests.support.vllm_engines import VllmContract


class TestNative(VllmContract):
    """Families that vLLM has models of its own for."""

    families = ("llama", "mistral", "gemma2", "gemma3_text", "qwen2", "qwen3", "phi3", "gpt2", "opt")
