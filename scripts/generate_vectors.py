"""Write what clients in other languages are built and tested by: `scripts/generate_vectors.py [--out DIR]`.

`errors.md` and `task.schema.json` from the code that they describe, and `vectors/*.json`: inputs with the
outputs that this project's own code gives. Bytes are hex, tensors nested lists of float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from perfit_shared import errors, task
from perfit_shared.errors import STATUS, InvalidInvite, PerfitError
from perfit_shared.invites import Invite
from perfit_shared.metrics import HIGHER_IS_BETTER
from perfit_shared.optimizer import OptimizerConfig, StiefelAdamW, learning_rate_at
from perfit_shared.positions import Positions
from perfit_shared.sealing.calls import CallHeader, CallSecret
from perfit_shared.sealing.chunks import ChunkSealer, padded_size
from perfit_shared.shifts import LayerShift, ShiftSpec, ShiftTensors, gradient_from_bytes, gradient_to_bytes
from perfit_shared.tasks import TASKS, Task
from perfit_shared.training import Schedule
from perfit_shared.types import LARGEST_PENALTY

OUT = Path(__file__).resolve().parents[1] / "docs" / "wire"
SPEC = ShiftSpec(layers=(1, 3), positions="f7+l7", collective_rank=4, personal_rank=2, hidden_size=6)
RENEWAL_CONTEXT = b"perfit-renew-v1"

# What a client does about each word; its meaning is the class's line in the tree of errors.py.
ADVICE = {
    "invalid_input": "mend the request; the same one is refused again",
    "invalid_tensors": "mend the tensors; nothing of the call touched the model",
    "invalid_prompt": "shorten the prompt or the answer (`Limits`), or mend the chat's turns",
    "not_here": "call another address of the cloud; `Renew`: call `RenewLapsed` on the enrolment listener",
    "not_found": "call `Describe` and use a name that it lists",
    "shift_mismatch": "call `Describe` and `FetchSeed`, and train again on the new version",
    "certificate_valid": "call `Renew` on the mutual-TLS channel",
    "certificate_superseded": "use the newest certificate; if you did not renew, your key was stolen",
    "invite_refused": "ask the operator for a new invite",
    "not_authenticated": "enrol with a new invite",
    "certificate_expired": "renew: `Renew` while it lasts, `RenewLapsed` for 30 days after",
    "identity_revoked": "ask the operator",
    "busy": "wait `perfit-retry-ms` and try again",
    "too_slow": "try again, with a later deadline or less in one call",
    "unavailable": "wait `perfit-retry-ms`, or some seconds, and try again",
    "seal_required": "seal the call, or dial the address that takes unsealed ones",
    "seal_broken": "seal anew, with a clock that is right; if it stays so, something on the way alters calls",
    "seal_unknown": "call `Describe`, and seal the call once more to a key of it, with the whole certificate",
    "cancelled": "nothing: the caller ended it",
    "internal": "try again, and tell the operator if it stays",
}


def codes() -> str:
    """errors.md."""
    lines = [
        "# Errors",
        "",
        "Made by `make wire` from `perfit_shared/errors.py`. Every error that the cloud raises on purpose",
        "carries the trailing metadata `perfit-code`, one of these words, and, where waiting helps,",
        "`perfit-retry-ms`, whole milliseconds. Match the word; the text is for people and changes. A status",
        "without `perfit-code` was made by gRPC itself: the connection broke, the deadline passed, or the",
        "message was too large.",
        "",
        "| `perfit-code` | gRPC status | means | what to do |",
        "|---|---|---|---|",
    ]
    tree = errors.__doc__ or ""
    meanings = {
        name: meaning.strip()
        for line in tree.splitlines()
        if "──" in line
        for name, _, meaning in [line.partition("── ")[2].partition(" ")]
    }
    for cls in wire_errors():
        status, code = STATUS[cls], cls.code
        meaning = meanings[cls.__name__].replace("`retry_ms`", "`perfit-retry-ms`") or cls.__name__
        lines.append(f"| `{code}` | {status} | {meaning} | {ADVICE[code]} |")
    lines.append(
        f"| `internal` | INTERNAL | a fault of the cloud's own; it says no more | {ADVICE['internal']} |"
    )
    return "\n".join(lines) + "\n"


def wire_errors() -> list[type[PerfitError]]:
    """Those that travel, in the order of the tree."""
    return sorted(STATUS, key=lambda cls: (errors.__doc__ or "").index(f"── {cls.__name__} "))


def schema() -> dict[str, Any]:
    """JSON Schema of `Artefact.task_json`."""
    texts = {"type": "array", "items": {"type": "string", "minLength": 1}}
    template = {"type": "string", "maxLength": task._TEMPLATE_CHARACTERS}
    described: dict[str, tuple[dict[str, Any], str]] = {
        "name": ({"type": "string", "pattern": f"^{task.TASK_NAME.pattern}$"}, "the task's name"),
        "template": (
            {**template, "pattern": r"\{[^{}]+\}"},
            "the prompt, with {field}s of an item to fill in; {{ and }} stand for braces",
        ),
        "answer": (
            {**template, "pattern": r"\{[^{}]+\}"},
            "the target: the gold field and what surrounds it, white space included",
        ),
        "metric": ({"enum": sorted(HIGHER_IS_BETTER)}, "how answers are measured"),
        "marker": ({"type": "string"}, "in LaMP's query.input, what stands before the text"),
        "labels": (texts, "all valid answers where they are a closed list, else empty"),
        "stop": (
            {**texts, "maxItems": task._STOP_TEXTS},
            f"generation ends before the first of these; at most {task._STOP_BYTES} bytes each",
        ),
        "answer_tokens": (
            {"type": "integer", "minimum": 1, "maximum": task._ANSWER_TOKENS},
            "longest answer to ask for: Sampling.max_new_tokens",
        ),
        **{
            key: (
                {"type": "number", "minimum": -LARGEST_PENALTY, "maximum": LARGEST_PENALTY},
                f"Sampling.{key} where the caller says none; absent: 0",
            )
            for key in task.PENALTIES
        },
        "lamp": ({"type": "string"}, "LaMP's own name of the task, or empty"),
        "chat": ({"type": "boolean"}, "true: the filled template is the user's turn of a Chat"),
        "system": (
            {**template, "pattern": r"\S"},
            "with chat: true, a system message in front of the user's; absent: none",
        ),
        "history_template": (
            template,
            "the prompt of items that lack fields of the template; absent: there are no such items",
        ),
    }
    # An artefact's task is resolved: its template is the chat's.
    known = [field for field in dataclasses.fields(Task) if field.name != "chat_template"]
    if set(described) != {field.name for field in known}:
        raise SystemExit("describe every field of Task here")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Artefact.task_json",
        "description": "How an item becomes a prompt and a target, and how an answer is measured.",
        "type": "object",
        "properties": {name: {**shape, "description": text} for name, (shape, text) in described.items()},
        "required": [f.name for f in known if f.default is dataclasses.MISSING],
        "additionalProperties": False,
    }


# -- vectors ---------------------------------------------------------------------------------------


def device_key() -> ec.EllipticCurvePrivateKey:
    """A key for vectors alone."""
    return ec.derive_private_key(0x7E57, ec.SECP256R1())


def invites() -> dict[str, Any]:
    key = device_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test root")])
    day = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    root = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(day)
        .not_valid_after(day.replace(year=2036))
        .sign(key, hashes.SHA256(), ecdsa_deterministic=True)
    ).public_bytes(Encoding.DER)
    made = [
        Invite("cloud.example:7444", root, 1_800_000_000, bytes(range(32))),
        Invite("[2001:db8::1]:7444", root, 1_900_000_000, bytes(range(32, 64))),
    ]
    good = made[0].encode()
    bad = {
        good.replace("perfit1-", "perfit2-"): "another prefix",
        good[:-12]: "cut",
        good[:100] + ("A" if good[100] != "A" else "B") + good[101:]: "one letter changed",
    }
    for text in bad:
        try:
            Invite.decode(text)
        except InvalidInvite:
            continue
        raise SystemExit("an invite that should be refused was read")
    return {
        "invites": [
            {
                "invite": invite.encode(),
                "address": invite.address,
                "server_ca": invite.server_ca_der.hex(),
                "expires_unix": invite.expires_unix,
                "secret": invite.secret.hex(),
            }
            for invite in made
        ],
        "refused": [{"invite": text, "why": why} for text, why in bad.items()],
    }


def renewal() -> dict[str, Any]:
    key, nonce = device_key(), bytes(range(200, 232))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "perfit device")])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    csr = builder.sign(key, hashes.SHA256(), ecdsa_deterministic=True).public_bytes(Encoding.DER)
    message = RENEWAL_CONTEXT + nonce + csr
    return {
        "key_pkcs8": key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()).hex(),
        "nonce": nonce.hex(),
        "csr": csr.hex(),
        "signed_message": message.hex(),
        "a_valid_signature": key.sign(message, ec.ECDSA(hashes.SHA256(), deterministic_signing=True)).hex(),
    }


def sealing() -> dict[str, Any]:
    """A call whose HPKE part is made up: what both sides derive of its secret, and two chunks each way."""
    header = CallHeader(
        "/perfit.v1.Personalization/Generate", "a.0011223344556677", "news_headline", 1_700_000_000_000
    )
    secret, sealed, random = bytes(range(32)), bytes(range(256)), bytes(range(100, 132))
    call = CallSecret(sealed, secret)
    made: dict[str, Any] = {
        "method": header.method,
        "key_id": header.key_id,
        "artefact": header.artefact,
        "time_ms": header.time_ms,
        "info": header.encode().hex(),
        "secret": secret.hex(),
        "encapsulated": sealed.hex(),
        "random": random.hex(),
        "signed_message": (b"perfit-seal-proof-v1" + header.encode() + sealed).hex(),
        "padded_sizes": {str(size): padded_size(size) for size in (1, 64, 65, 512, 513, 66_000)},
    }
    for name, keys in (("request", call.request_keys()), ("response", call.response_keys(random))):
        sealer = ChunkSealer(keys)
        made[name] = {
            "nonce": keys.nonce.hex(),
            "payloads": [b"first".hex(), ""],
            "chunks": [sealer.seal(b"first").hex(), sealer.seal(b"", last=True).hex()],
        }
    return made


def listed(tensors: ShiftTensors) -> dict[str, Any]:
    return {name: array.tolist() for name, array in tensors.named()}


def personal() -> ShiftTensors:
    """A shift that is not the identity."""
    rng = np.random.default_rng(1)
    start = ShiftTensors.identity(SPEC, SPEC.personal_rank, seed=2)
    return ShiftTensors(
        {
            layer: LayerShift(
                rotation,
                rotation + rng.normal(0, 0.1, rotation.shape).astype(np.float32),
                rng.normal(0, 0.1, bias.shape).astype(np.float32),
            )
            for layer, (rotation, _, bias) in start.layers.items()
        }
    )


def gradient(seed: int) -> ShiftTensors:
    rng = np.random.default_rng(seed)
    return ShiftTensors(
        {
            layer: LayerShift(*(rng.normal(0, 0.02, array.shape).astype(np.float32) for array in shift))
            for layer, shift in personal().layers.items()
        }
    )


def shifts() -> dict[str, Any]:
    tensors, rank = personal(), SPEC.personal_rank
    forms = {form: tensors.to_bytes(dtype=form) for form in ("float32", "float16", "int8")}
    return {
        "spec": SPEC.to_json(),
        "tensors": listed(tensors),
        "bytes": {form: data.hex() for form, data in forms.items()},
        "received": {form: listed(ShiftTensors.from_bytes(d, SPEC, rank)) for form, d in forms.items()},
    }


def gradients() -> dict[str, Any]:
    tensors = gradient(3)
    forms = {form: gradient_to_bytes(tensors, form) for form in ("float32", "float16")}
    return {
        "spec": SPEC.to_json(),
        "bytes": {form: data.hex() for form, data in forms.items()},
        "received": {
            form: listed(gradient_from_bytes(data, SPEC, SPEC.personal_rank)) for form, data in forms.items()
        },
    }


def optimizer() -> dict[str, Any]:
    config = OptimizerConfig(learning_rate=0.05, total_steps=5)
    steps, training, tensors = [], StiefelAdamW(config), personal()
    for step in range(config.total_steps):
        of = gradient(10 + step)
        tensors = training.step(tensors, of)
        steps.append(
            {"rate": learning_rate_at(step, config), "gradient": listed(of), "tensors": listed(tensors)}
        )
    return {"config": dataclasses.asdict(config), "start": listed(personal()), "steps": steps}


def batches() -> dict[str, Any]:
    schedule = Schedule(epochs=2, learning_rate=0.01, batch_size=4, seed=7, examples=10)
    return {
        "schedule": dataclasses.asdict(schedule),
        "rows": [schedule.batch(step) for step in range(schedule.steps)],
    }


def positions() -> list[dict[str, Any]]:
    return [
        {"positions": text, "prompt_tokens": length, "indices": Positions.parse(text).indices(length)}
        for text in ("f7+l7", "l7", "f3", "f2+l1", "s1+f7+l7", "s2+f3")
        for length in (1, 2, 3, 5, 8, 9, 14, 15, 20)
    ]


def prompts() -> list[dict[str, Any]]:
    long = " ".join(f"word{n}" for n in range(800))
    cases = [
        ("news_headline", {"text": "Ferries stood still on Monday.", "title": "No Ferries"}),
        ("news_categorize", {"text": "Crews walked out over pay.", "category": "business"}),
        ("news_headline", {"text": long, "title": "Many Words"}),
        ("tweet_paraphrase", {"text": "a tweet of a profile"}),
        ("chat", {"prompt": "How are you?", "reply": "Fine {really}."}),
    ]
    return [
        {
            "task_json": TASKS[name].resolved(False).to_json(),
            "item": item,
            "prompt": TASKS[name].example(item).prompt,
            "target": TASKS[name].example(item).target,
        }
        for name, item in cases
    ]


VECTORS = {
    "invites": invites,
    "renewal": renewal,
    "sealing": sealing,
    "shifts": shifts,
    "gradients": gradients,
    "optimizer": optimizer,
    "batches": batches,
    "positions": positions,
    "prompts": prompts,
}


def generate(out: Path) -> None:
    (out / "vectors").mkdir(parents=True, exist_ok=True)
    (out / "errors.md").write_text(codes(), "utf-8")
    (out / "task.schema.json").write_text(json.dumps(schema(), indent=1) + "\n", "utf-8")
    for name, make in VECTORS.items():
        (out / "vectors" / f"{name}.json").write_text(json.dumps(make(), indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    generate(parser.parse_args().out)
