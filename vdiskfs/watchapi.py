"""The control socket's routes for events and metrics. Translates and decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.routing import Route

from vdiskfs.exporter import metrics_route
from vdiskfs.requests import Document, read_count, route


class Watching(Protocol):
    """What the socket offers of what is watched; `watching` implements it."""

    def render(self) -> bytes:
        """Return the metrics, as Prometheus reads them."""

    async def listed(
        self, since: str, limit: int | None, *, after: int, level: str, disk: str
    ) -> Document:
        """Return what has happened, the newest last."""

    async def test(self) -> Document:
        """Send an event through every sink."""


def watch_routes(asked: Callable[[], Watching]) -> list[Route]:
    """Return the routes over what a daemon has; ``asked`` may refuse."""

    async def events(request: Request) -> Document:
        query = request.query_params
        return await asked().listed(
            query.get("since", ""), read_count(query.get("limit")),
            after=read_count(query.get("after")) or 0, level=query.get("level", "info"),
            disk=query.get("disk", ""),
        )  # fmt: skip

    async def test(_: Request) -> Document:
        return await asked().test()

    return [
        Route("/v1/events", route(events), methods=["GET"]),
        Route("/v1/events/test", route(test), methods=["POST"]),
        metrics_route(lambda: asked().render()),
    ]
