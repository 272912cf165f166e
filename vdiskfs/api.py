"""The control socket: HTTP over a Unix socket, for the command line and the user's programs.

Translates and decides nothing: each route calls one method of the daemon's `Control`. An
error becomes a status and the body ``{"error": {"kind", "message", "hint", "exit_code"}}``.
The socket lies in the state directory, which only the mount's owner may enter.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from vdiskfs.errors import NotFoundError, UsageError
from vdiskfs.failoverapi import Failovers, failover_routes
from vdiskfs.jobapi import Jobs, job_routes
from vdiskfs.registry import address_of
from vdiskfs.repairapi import Repairs, repair_routes
from vdiskfs.requests import Document, read_body, read_count, read_names, read_text, route
from vdiskfs.watchapi import Watching, watch_routes

log = logging.getLogger(__name__)


class Control(Protocol):
    """What the socket offers; the daemon implements it."""

    async def status(self) -> Document:
        """Return the document of ``vdiskfs status --json``."""

    async def disks(self) -> Document:
        """Return all disks."""

    async def disk(self, name: str) -> Document:
        """Return one disk, in detail."""

    async def protect(self, name: str) -> Document:
        """Protect a file of the source."""

    async def unprotect(self, name: str) -> Document:
        """End protection; the history stays."""

    async def retry(self, name: str) -> Document:
        """End the wait for the next try of what failed."""

    async def pause(self, name: str) -> Document:
        """Let a disk's replication stand still."""

    async def resume(self, name: str) -> Document:
        """Let a disk's replication go on."""

    async def resync(self, name: str, *, now: bool, cancel: bool) -> Document:
        """Compare a disk with the vault, or stop that."""

    async def points(self, name: str, since: str, until: str, limit: int | None) -> Document:
        """Return a disk's points, newest last."""

    async def point(self, name: str, point: str) -> Document:
        """Return one point."""

    async def create_points(
        self, names: list[str], label: str, *, application: bool, wait: bool
    ) -> Document:
        """Seal disks at one instant."""

    @property
    def failovers(self) -> Failovers:
        """What concerns failovers."""

    @property
    def jobs(self) -> Jobs:
        """What concerns jobs."""

    @property
    def repairs(self) -> Repairs:
        """What concerns repairs of the vault."""

    @property
    def watching(self) -> Watching:
        """What concerns events and metrics."""

    async def groups(self) -> Document:
        """Return all consistency groups."""

    async def group(self, name: str) -> Document:
        """Return one group, with its newest points."""

    async def change_group(
        self, name: str, change: str, disks: list[str], *, dry_run: bool
    ) -> Document:
        """Create, add to, remove from or delete a group."""

    async def unmount(self, *, drain: bool, lazy: bool) -> Document:
        """Unmount; the daemon ends."""

    async def upgrade(self) -> Document:
        """Let a successor take the mount over; the daemon ends."""


def application(control: Control) -> Starlette:  # noqa: C901 (a straight list of routes)
    """Return the routes over one daemon."""

    async def status(_: Request) -> Document:
        return await control.status()

    async def health(_: Request) -> Document:
        return {"ok": True}

    async def disks(_: Request) -> Document:
        return await control.disks()

    async def disk(request: Request) -> Document:
        return await control.disk(request.path_params["name"])

    async def protect(request: Request) -> Document:
        return await control.protect(request.path_params["name"])

    async def unprotect(request: Request) -> Document:
        return await control.unprotect(request.path_params["name"])

    async def retry(request: Request) -> Document:
        return await control.retry(request.path_params["name"])

    async def pause(request: Request) -> Document:
        return await control.pause(request.path_params["name"])

    async def resume(request: Request) -> Document:
        return await control.resume(request.path_params["name"])

    async def resync(request: Request) -> Document:
        body = await read_body(request)
        now, cancel = body.get("now") is True, body.get("cancel") is True
        if now and cancel:
            raise UsageError("resync: now and cancel exclude each other")
        return await control.resync(request.path_params["name"], now=now, cancel=cancel)

    async def points(request: Request) -> Document:
        query = request.query_params
        return await control.points(
            request.path_params["name"], query.get("since", ""), query.get("until", ""),
            read_count(query.get("limit")),
        )  # fmt: skip

    async def point(request: Request) -> Document:
        return await control.point(request.path_params["name"], request.path_params["point"])

    async def create_points(request: Request) -> Document:
        body = await read_body(request)
        names = read_names(body)
        consistency = body.get("consistency", "crash")
        if consistency not in ("crash", "application"):
            raise UsageError("consistency: crash or application is needed")
        label, application = read_text(body, "label", 120), consistency == "application"
        return await control.create_points(
            names, label, application=application, wait=body.get("wait") is True
        )

    async def unmount(request: Request) -> Document:
        body = await read_body(request)
        return await control.unmount(drain=body.get("drain") is True, lazy=body.get("lazy") is True)

    async def upgrade(_: Request) -> Document:
        return await control.upgrade()

    get, post = ["GET"], ["POST"]
    return Starlette(
        routes=[
            Route("/v1/status", route(status), methods=get),
            Route("/v1/health", route(health), methods=get),
            Route("/v1/disks", route(disks), methods=get),
            Route("/v1/disks/{name}", route(disk), methods=get),
            Route("/v1/disks/{name}/protect", route(protect), methods=post),
            Route("/v1/disks/{name}/unprotect", route(unprotect), methods=post),
            Route("/v1/disks/{name}/retry", route(retry), methods=post),
            Route("/v1/disks/{name}/pause", route(pause), methods=post),
            Route("/v1/disks/{name}/resume", route(resume), methods=post),
            Route("/v1/disks/{name}/resync", route(resync), methods=post),
            Route("/v1/disks/{name}/points", route(points), methods=get),
            Route("/v1/disks/{name}/points/{point}", route(point), methods=get),
            Route("/v1/points", route(create_points), methods=post),
            *failover_routes(lambda: control.failovers),
            *watch_routes(lambda: control.watching),
            *job_routes(lambda: control.jobs),
            *repair_routes(lambda: control.repairs),
            *_group_routes(control),
            Route("/v1/upgrade", route(upgrade), methods=post),
            Route("/v1/umount", route(unmount), methods=post),
        ]
    )


def _group_routes(control: Control) -> list[Route]:
    async def groups(_: Request) -> Document:
        return await control.groups()

    async def group(request: Request) -> Document:
        return await control.group(request.path_params["name"])

    async def create(request: Request) -> Document:
        body = await read_body(request)
        name = read_text(body, "name", 240)
        return await control.change_group(
            name, "create", read_names(body), dry_run=body.get("dry_run") is True
        )

    async def change(request: Request) -> Document:
        body, act = await read_body(request), request.path_params["change"]
        if act not in ("add", "remove", "delete"):
            raise NotFoundError(f"nothing called {act[:40]!r} is done to a group")
        names = [] if act == "delete" else read_names(body)
        dry_run = body.get("dry_run") is True
        return await control.change_group(request.path_params["name"], act, names, dry_run=dry_run)

    return [
        Route("/v1/groups", route(groups), methods=["GET"]),
        Route("/v1/groups", route(create), methods=["POST"]),
        Route("/v1/groups/{name}", route(group), methods=["GET"]),
        Route("/v1/groups/{name}/{change}", route(change), methods=["POST"]),
    ]


class _Sparse(logging.Filter):
    """A line a minute where trio says ten times a second that there is no descriptor left."""

    def __init__(self) -> None:
        super().__init__()
        self._next_s = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Take the traceback away, and all but the first line of a minute."""
        record.exc_info = None
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + 60
        return True


async def serve_socket(path: Path, control: Control, stop: Callable[[], Awaitable[None]]) -> None:
    """Serve until ``stop`` returns. The socket's directory decides who may connect."""
    config = ServerConfig()
    config.accesslog = None
    config.errorlog = logging.getLogger("vdiskfs.api.server")
    config.graceful_timeout = 1.0
    config.shutdown_timeout = 2.0
    logging.getLogger("trio.serve_listeners").addFilter(_Sparse())
    with address_of(path) as address:
        config.bind = [f"unix:{address}"]
        await serve(application(control), config, shutdown_trigger=stop)  # type: ignore[arg-type]
