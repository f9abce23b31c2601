"""What sealing adds to a call: bytes on the connection, the time of a call, and of both processors.

    python scripts/bench/sealing.py --model ../shared/models/newslm --json docs/results/bench/sealing.json

One real `perfit-cloud serve` with a random artefact, and three devices that call it over mutual TLS: one
unsealed, one sealed without padding, one sealed as devices do it. They call in turns, so that what else the
machine does falls on all alike: an answer of 16 tokens to a prompt of about 60 words (int8 tensors), the
log-likelihoods of 4 candidates, the gradient of 8 examples (float16 tensors). Bytes are counted at a relay
in between, TLS and HTTP/2 included, up and down: the median over calls. A server pads in any case: zeros
that its responses to the unpadded device hold are counted, and reckoned as padding. An answer's pieces come
in as many messages as the moment makes of them, so what sealing adds to messages is counted exactly as well.
`first` is a device's first call to a server, which shows its certificate. Ratios are of the times of a
round, with the bootstrap's interval.

`sealing itself` is the processor time of the sealing code of both sides for one such answer: encapsulate,
sign, seal, open, check, and the answer's chunks. Of an answer's time it is the share that counts where the
machine is too busy for the ratio to tell.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import common
from hardening import Caller
from workload import artefact_for, load_model, parser

from perfit_cloud.model.base import load_base
from perfit_device.cloud.channels import address_of
from perfit_device.cloud.client import Cloud
from perfit_device.cloud.enrolment import enroll
from perfit_device.cloud.identity import Enrolment, Identity
from perfit_device.cloud.sealing import SealedCall, Sealer, Sealing
from perfit_shared.invites import Invite
from perfit_shared.sealing.calls import KEY_METADATA, CallHeader, CallSecret, check_proof, sign_proof
from perfit_shared.sealing.chunks import ChunkOpener, ChunkSealer
from perfit_shared.sealing.keys import PrivateSealingKey

sys.path.append(str(Path(__file__).resolve().parents[1]))
from local import LocalCloud

_SIDES: dict[str, Sealing | None] = {"unsealed": None, "unpadded": Sealing(pads=False), "sealed": Sealing()}
_KINDS = ("answer", "score", "gradient")
_CHUNKS = 16  # of an answer
_MARK_AND_TAG = 1 + 16  # bytes that every chunk adds, without zeros
_METADATA_BYTES = len(KEY_METADATA) + 16 + 3  # the first time; an index of HTTP/2 from then on


class Relay:
    """Between one device and the cloud; counts what passes."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
            for ends in ((client, server), (server, client)):
                for end in ends:
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                with self._lock:
                    self.bytes += len(data)
                sink.sendall(data)


class Padding:
    """Counts the zeros of the responses that devices open while it is entered."""

    def __init__(self) -> None:
        self.zeros = 0

    def __enter__(self) -> Padding:
        opened = ChunkOpener.open

        def counting(chunks: ChunkOpener, chunk: bytes) -> bytes:
            payload = opened(chunks, chunk)
            self.zeros += len(chunk) - _MARK_AND_TAG - len(payload)
            return payload

        self._patch = mock.patch.object(ChunkOpener, "open", counting)
        self._patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.stop()


class Traffic(NamedTuple):
    """Of one call."""

    bytes: int
    zeros: int  # among them, in responses


class Side:
    """One device behind a relay of its own."""

    def __init__(self, cloud: LocalCloud, sealing: Sealing | None, stack: ExitStack) -> None:
        self._enrolment = enroll(Invite.decode(cloud.invite()), Identity.create())
        self.relay = Relay(address_of(self._enrolment.address))
        self._sealing = sealing
        self.caller = Caller(stack.enter_context(self._opened()))

    def _opened(self) -> Cloud:
        enrolment: Enrolment = replace(self._enrolment, address=self.relay.address)
        return Cloud(enrolment, sealing=self._sealing)

    def first(self) -> Traffic:
        """An answer on a connection that has carried a call, by a client that has made none."""
        with self._opened() as cloud:
            caller = Caller(cloud)
            with mock.patch.object(Sealer, "shows_certificate", lambda *_: True):
                return self.counted(caller.answer)

    def counted(self, call: Callable[[], None]) -> Traffic:
        before = self.relay.bytes
        with Padding() as padding:
            call()
        time.sleep(0.05)  # what answers pings and windows is under way
        return Traffic(self.relay.bytes - before, padding.zeros)


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(pairs=40)
    args = made.parse_args()
    pairs = 3 if args.small else args.pairs
    with tempfile.TemporaryDirectory() as given, ExitStack() as stack:
        folder = Path(given)
        base = load_model(args)
        base.model.save_pretrained(folder / "model")
        base.tokenizer.save_pretrained(folder / "model")
        artefact_for(load_base(str(folder / "model"))).save(folder / "artefact")
        flags = ["--front-address", "127.0.0.1:0", "--threads", str(args.threads)]
        cloud = LocalCloud(folder / "model", [folder / "artefact"], folder / "state", flags=flags)
        stack.enter_context(cloud)
        sides = {name: Side(cloud, sealing, stack) for name, sealing in _SIDES.items()}
        bytes_rows = [bytes_of("first", {name: side.first for name, side in sides.items()})]
        times: list[dict[str, Any]] = []
        added: list[dict[str, Any]] = []
        for kind in _KINDS:
            calls = {name: getattr(side.caller, kind) for name, side in sides.items()}
            counts = {name: partial(side.counted, calls[name]) for name, side in sides.items()}
            bytes_rows.append(bytes_of(kind, counts))
            added.append(added_by(kind, calls["unpadded"]))
            times.append(time_of(kind, calls, pairs))
        size = sides["sealed"].caller.request_bytes()
        own = own_ms(size, 20 if args.small else 300)
    print("Bytes, up and down\n")
    print(
        common.table(
            ["call", *_SIDES, "sealing adds", "padding adds"], [list(r.values()) for r in bytes_rows]
        )
    )
    print("\nBytes that sealing adds to the messages and metadata of a call, without padding\n")
    heads = ["call", "all", "responses", "with one response", "each further one"]
    print(common.table(heads, [list(row.values()) for row in added]))
    print("\nTime\n")
    shown = [[*list(r.values())[:3], common.Ratio(r["ratio"], *r["interval"])] for r in times]
    print(common.table(["call", "unsealed, ms", "sealed, ms", "sealed over unsealed [95 %]"], shown))
    share = own / next(row["unsealed_ms"] for row in times if row["call"] == "answer")
    print(f"\nsealing itself: {own:.2f} ms an answer of both sides, {100 * share:.2f} % of its time")
    result = {
        "model": base.name,
        "bytes": bytes_rows,
        "added": added,
        "times": times,
        "own_ms": own,
        "own_share": share,
    }
    common.finish(result, args.json)


def bytes_of(kind: str, counts: Mapping[str, Callable[[], Traffic]], times: int = 3) -> dict[str, Any]:
    for count in counts.values():
        count()
    found = {name: sorted(count() for _ in range(times))[times // 2] for name, count in counts.items()}
    unpadded = found["unpadded"].bytes - found["unpadded"].zeros
    return {
        "call": kind,
        "unsealed": found["unsealed"].bytes,
        "unpadded": unpadded,
        "sealed": found["sealed"].bytes,
        "sealing": unpadded - found["unsealed"].bytes,
        "padding": found["sealed"].bytes - unpadded,
    }


def added_by(kind: str, call: Callable[[], None]) -> dict[str, Any]:
    """Bytes that the messages of one call have more than those that they seal, exactly, without zeros."""
    requests: list[int] = []
    responses: list[int] = []
    seal, opened = SealedCall.seal, SealedCall.open
    with Padding() as padding:

        def sealing(self: SealedCall, request: Any, payload: bytes, *, last: bool) -> bytes:
            data = seal(self, request, payload, last=last)
            requests.append(len(data) - len(payload))
            return data

        def opening(self: SealedCall, data: bytes, *, is_only: bool) -> bytes | None:
            before = padding.zeros
            payload = opened(self, data, is_only=is_only)
            responses.append(len(data) - len(payload or b"") - (padding.zeros - before))
            return payload

        with mock.patch.object(SealedCall, "seal", sealing), mock.patch.object(SealedCall, "open", opening):
            call()
    whole = sum(requests) + sum(responses) + _METADATA_BYTES
    return {
        "call": kind,
        "added": whole,
        "responses": len(responses),
        "without_further_responses": whole - sum(responses[1:]),
        "each_further_response": max(responses[1:], default=0),
    }


def time_of(kind: str, calls: dict[str, Callable[[], None]], pairs: int) -> dict[str, Any]:
    chosen = {name: partial(common.timed, calls[name]) for name in ("unsealed", "sealed")}
    seconds = common.interleaved(chosen, pairs=pairs, warm_up=3)
    ratio = common.ratio(seconds["sealed"], seconds["unsealed"])
    return {
        "call": kind,
        "unsealed_ms": 1000 * median(seconds["unsealed"]),
        "sealed_ms": 1000 * median(seconds["sealed"]),
        "ratio": ratio.median,
        "interval": [ratio.low, ratio.high],
    }


def own_ms(size: int, times: int) -> float:
    """Median milliseconds of what both sides do for one answer whose request has `size` bytes."""
    key, device, payload = PrivateSealingKey.generate(), Identity.create().key, b"x" * size

    def once() -> float:
        begun = time.thread_time()
        header = CallHeader("/perfit.v1.Personalization/Generate", "a" * 16, "news_headline", 1)
        sealed = CallSecret.seal(key.public, header)
        out = ChunkSealer(sealed.request_keys())
        proof = out.seal(b"p" * 110)
        signature = sign_proof(device, header, sealed.sealed)
        request = out.seal(payload, last=True)
        opened = CallSecret.open(key, header, sealed.sealed)
        into = ChunkOpener(opened.request_keys())
        into.open(proof)
        check_proof(device.public_key(), signature, header, opened.sealed)
        into.open(request)
        answers = ChunkSealer(opened.response_keys(bytes(32)))
        read = ChunkOpener(sealed.response_keys(bytes(32)))
        for number in range(_CHUNKS + 1):
            read.open(answers.seal(b"a word", last=number == _CHUNKS))
        return 1000 * (time.thread_time() - begun)

    return median(once() for _ in range(times))


if __name__ == "__main__":
    main()
