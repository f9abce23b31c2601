"""A front that ends TLS, as a company's ingress does: it sees every message that it passes on.

In a test's own process its hooks tamper with what passes. As a process of its own (`FrontProcess`) its memory
can be searched.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import grpc
from cryptography.hazmat.primitives.asymmetric import ec

from perfit_cloud.service.identity.authority import Authority

_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", -1),
]
Messages = Callable[[str, Iterator[bytes]], Iterable[bytes]]


@dataclass(frozen=True)
class FrontSettings:
    """Texts in PEM. What a front needs to end TLS, and to reach the server behind it."""

    key: str
    certificate: str
    upstream: str  # host:port
    upstream_roots: str
    upstream_key: str = ""  # of a device of its own, where the server asks for one
    upstream_certificate: str = ""

    @classmethod
    def of(cls, authority: Authority, upstream: str, **device: str) -> FrontSettings:
        """With a certificate of the cloud's own CA, as devices trust it."""
        leaf = authority.server_identity(["localhost", "127.0.0.1"])
        return cls(
            key=leaf.key_pem.decode(),
            certificate=leaf.certificate_pem.decode(),
            upstream=upstream,
            upstream_roots=pem_text(authority.server_ca_der),
            **device,
        )


def pem_text(der: bytes) -> str:
    from tests.support.cloud import pem

    return pem(der).decode()


@dataclass
class Passed:
    """One call that passed through."""

    method: str
    metadata: list[tuple[str, str]]
    requests: list[bytes] = field(default_factory=list)
    responses: list[bytes] = field(default_factory=list)


class Front:
    """A gRPC proxy over bytes; `requests` and `responses` may change what passes, `method` where it goes."""

    def __init__(self, settings: FrontSettings) -> None:
        self.calls: list[Passed] = []
        self.requests: Messages = lambda method, messages: messages
        self.responses: Messages = lambda method, messages: messages
        self.method: Callable[[str], str] = lambda method: method
        self.metadata: Callable[[list[tuple[str, str]]], list[tuple[str, str]]] = lambda metadata: metadata
        self.upstreams = [self.upstream(settings)]  # a call goes to the next one in turn
        self._turn = 0
        pair = (settings.key.encode(), settings.certificate.encode())
        self._server = grpc.server(ThreadPoolExecutor(16), handlers=[_Handler(self)], options=_OPTIONS)
        port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    @staticmethod
    def upstream(settings: FrontSettings) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(
            settings.upstream_roots.encode(),
            settings.upstream_key.encode() or None,
            settings.upstream_certificate.encode() or None,
        )
        return grpc.secure_channel(settings.upstream, credentials, options=_OPTIONS)

    def pass_on(
        self, method: str, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        given = [(key, str(value)) for key, value in context.invocation_metadata()]
        metadata = [(key, value) for key, value in given if key.startswith("perfit-")]
        passed = Passed(method, metadata)
        self.calls.append(passed)
        upstream = self.upstreams[self._turn % len(self.upstreams)]
        self._turn += 1

        def noted(messages: Iterator[bytes], into: list[bytes]) -> Iterator[bytes]:
            for message in messages:
                into.append(message)
                yield message

        begin: Any = upstream.stream_stream(self.method(method))
        call = begin(
            iter(self.requests(method, noted(requests, passed.requests))),
            metadata=self.metadata(metadata),
            timeout=context.time_remaining(),
        )
        context.add_callback(call.cancel)
        try:
            yield from self.responses(method, noted(call, passed.responses))
        except grpc.RpcError as error:
            failed: Any = error
            context.set_trailing_metadata(failed.trailing_metadata() or ())
            context.abort(failed.code(), failed.details() or "")

    def methods(self) -> list[str]:
        return [call.method.rpartition("/")[2] for call in self.calls]

    def close(self) -> None:
        self._server.stop(None).wait()
        for upstream in self.upstreams:
            upstream.close()


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, front: Front) -> None:
        self._front = front

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        return grpc.stream_stream_rpc_method_handler(
            lambda requests, context: self._front.pass_on(method, requests, context)
        )


class FrontProcess:
    """A front as a process of its own, for the length of a with block."""

    def __init__(self, settings: FrontSettings) -> None:
        self._settings = settings

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.front"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(asdict(self._settings)) + "\n")
        self._process.stdin.flush()
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the front did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid


def new_device(authority: Authority) -> dict[str, str]:
    """Keyword arguments of `FrontSettings.of`: an identity of the front's own."""
    from tests.support.authority import csr_of, new_key
    from tests.support.cloud import key_pem

    key: ec.EllipticCurvePrivateKey = new_key()
    certificate = authority.enroll(authority.invite(60)[0], csr_of(key))
    return {"upstream_key": key_pem(key).decode(), "upstream_certificate": pem_text(certificate)}


def main() -> None:
    front = Front(FrontSettings(**json.loads(sys.stdin.readline())))
    print(front.address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
