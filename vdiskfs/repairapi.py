"""The control socket's routes for repairs. Translates and decides nothing, as `vdiskfs.api`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.requests import Request
from starlette.routing import Route

from vdiskfs.requests import Document, read_body, read_names, route


class Repairs(Protocol):
    """What the socket offers of repairs; `repairing` implements it."""

    def progress(self) -> Document:
        """Return what is checked now."""

    async def run(self, names: Sequence[str], *, dry_run: bool, documents: bool) -> Document:
        """Heal disks, and documents that are no disk's; return what came of it when it is done."""


def repair_routes(asked: Callable[[], Repairs]) -> list[Route]:
    """Return the routes over what a daemon has."""

    async def progress(_: Request) -> Document:
        return asked().progress()

    async def run(request: Request) -> Document:
        body = await read_body(request)
        documents = body.get("documents") is True
        names = [] if documents and body.get("disks") == [] else read_names(body)
        return await asked().run(names, dry_run=body.get("dry_run") is True, documents=documents)

    return [
        Route("/v1/repairs", route(progress), methods=["GET"]),
        Route("/v1/repairs", route(run), methods=["POST"]),
    ]
