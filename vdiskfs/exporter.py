"""The metrics on a TCP port of the loopback interface, for Prometheus. Off unless set."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable

import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
AGAIN_S = 15.0


def metrics_route(render: Callable[[], bytes]) -> Route:
    """Return the route ``GET /metrics``."""

    async def metrics(_: Request) -> Response:
        return Response(render(), media_type=CONTENT_TYPE)

    return Route("/metrics", metrics, methods=["GET"])


async def serve_metrics(host: str, port: int, route: Route) -> None:
    """Serve until cancelled. A port that is taken is said once, and tried again and again."""
    config = ServerConfig()
    config.accesslog = None
    config.errorlog = logging.getLogger("vdiskfs.exporter.server")
    config.graceful_timeout = 0.5
    config.shutdown_timeout = 1.0
    config.bind = [f"fd://{await _wait_bound(host, port)}"]
    await serve(Starlette(routes=[route]), config, shutdown_trigger=trio.sleep_forever)  # type: ignore[arg-type]


async def _wait_bound(host: str, port: int) -> int:
    """Return a descriptor that is bound to the port, once nobody else has it."""
    said = False
    while True:
        # hypercorn's own would be left open where the port is taken.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            return listener.detach()
        except OSError as error:
            if not said:
                log.warning("metrics_listen: %s port %d: %s; it is tried again", host, port,
                            error.strerror)  # fmt: skip
            said = True
        finally:
            listener.close()
        await trio.sleep(AGAIN_S)
