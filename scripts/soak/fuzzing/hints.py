"""Values that reach deep into a cloud: real names, versions and tensors beside the hostile ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

from perfit_shared.shifts import ShiftSpec
from perfit_shared.starts import near_identity
from perfit_shared.wire import personalization_pb2 as pb
from soak.fuzzing.mutation import forms_of, tensor_bytes

__all__ = ["Known", "hints_for"]


@dataclass(frozen=True)
class Known:
    """One artefact of a cloud, and tensors that it takes, in every form."""

    artefact: str
    version: str
    spec: ShiftSpec
    tensors: tuple[bytes, ...]

    @classmethod
    def of(cls, artefact: str, version: str, spec: ShiftSpec) -> Known:
        shift = near_identity(spec, spec.personal_rank, seed=5, size=0.3)
        return cls(artefact, version, spec, tuple(forms_of(shift)))

    @property
    def shift(self) -> pb.Shift:
        return pb.Shift(
            mode=pb.SHIFT_MODE_PERSONAL,
            artefact=self.artefact,
            version=self.version,
            personal=self.tensors[0],
        )


def hints_for(known: Known) -> dict[str, st.SearchStrategy[Any]]:
    """For `mutation.messages`, by the names of fields; a value of its type alone also comes."""
    words = st.sampled_from(["the cat sat on the mat", "the dog ran", "to the door and the mat"])
    base = pb.Shift(mode=pb.SHIFT_MODE_BASE)
    return {
        "artefact": st.sampled_from([known.artefact, known.artefact, "chat", ""]),
        "version": st.just(known.version),
        "personal": st.integers(0, 2).map(lambda form: known.tensors[form]) | tensor_bytes(known.tensors),
        "shift": st.sampled_from([known.shift, known.shift, base]),
        "prompt": words.map(lambda text: pb.Prompt(text=text)),
        "text": words,
        "target": words.map(lambda text: f" {text}"),
        "answer": words,
        "content": words,
        "role": st.sampled_from(["user", "assistant", "system"]),
        "max_new_tokens": st.integers(1, 8),
        "temperature": st.sampled_from([0.0, 0.7]),
        "top_p": st.sampled_from([0.0, 0.9, 1.0]),
        "top_k": st.integers(0, 12),
        "frequency_penalty": st.sampled_from([0.0, 0.5, -2.0]),
        "presence_penalty": st.sampled_from([0.0, 2.0]),
        "number": st.integers(0, 3),
        "rows": st.integers(0, 4),
        "positions": st.sampled_from(["f3+l3", "l7"]),
        "layers": st.integers(0, 4),
    }
