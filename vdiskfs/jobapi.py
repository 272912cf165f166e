"""The control socket's routes for jobs. Translates and decides nothing, as `vdiskfs.api`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.routing import Route

from vdiskfs.requests import Document, read_body, route


class Jobs(Protocol):
    """What the socket offers of jobs; `jobcontrol` implements it."""

    async def all(self) -> Document:
        """Return all jobs, the oldest first."""

    async def one(self, job_id: str) -> Document:
        """Return one job."""

    async def cancel(self, job_id: str, *, dry_run: bool) -> Document:
        """End a job that can be ended."""


def job_routes(asked: Callable[[], Jobs]) -> list[Route]:
    """Return the routes over what a daemon has; ``asked`` may refuse."""

    async def jobs(_: Request) -> Document:
        return await asked().all()

    async def job(request: Request) -> Document:
        return await asked().one(request.path_params["job"])

    async def cancel(request: Request) -> Document:
        dry_run = (await read_body(request)).get("dry_run") is True
        return await asked().cancel(request.path_params["job"], dry_run=dry_run)

    return [
        Route("/v1/jobs", route(jobs), methods=["GET"]),
        Route("/v1/jobs/{job}", route(job), methods=["GET"]),
        Route("/v1/jobs/{job}/cancel", route(cancel), methods=["POST"]),
    ]
