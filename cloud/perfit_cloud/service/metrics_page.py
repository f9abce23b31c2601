"""The operator's HTTP page: /metrics for Prometheus, /ready and /live for load balancers and supervisors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

from perfit_cloud.config import parse_address
from perfit_shared.errors import ConfigError

__all__ = ["serve_page"]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = 10  # seconds, for a request to come; the page is open to whoever reaches it

    def log_message(self, *_: Any) -> None:
        """Nothing: it would name who asked."""


def serve_page(
    address: str, registry: CollectorRegistry, *, is_ready: Callable[[], bool], is_live: Callable[[], bool]
) -> Callable[[], None]:
    """Answer until the function returned is called. Raises ConfigError when the port is taken."""
    host, port = parse_address(address, "metrics_address")
    metrics: Any = make_wsgi_app(registry)
    checks = {"/ready": is_ready, "/live": is_live}

    def page(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        check = checks.get(environ["PATH_INFO"])
        if check is None:
            answer: Iterable[bytes] = metrics(environ, start_response)
            return answer
        well = check()
        start_response("200 OK" if well else "503 Service Unavailable", [("Content-Type", "text/plain")])
        return [b"yes\n" if well else b"no\n"]

    try:
        server = make_server(host, port, page, _Server, _Handler)
    except OSError:
        raise ConfigError(
            f"cannot listen on {address} for metrics; is the port taken, or the host not ours?"
        ) from None
    thread = threading.Thread(target=server.serve_forever, name="perfit-page", daemon=True)
    thread.start()

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
