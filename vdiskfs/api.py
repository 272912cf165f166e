"""The control socket: HTTP over a Unix socket, for the command line and the user's programs.

Translates and decides nothing: each route calls one method of the daemon's `Control`. An
error becomes a status and the body ``{"error": {"kind", "message", "hint", "exit_code"}}``.
The socket lies in the state directory, which only the mount's owner may enter.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from vdiskfs.errors import (
    DamagedError,
    NotFoundError,
    RefusedError,
    StateError,
    UsageError,
    VaultUnreachableError,
    VdiskfsError,
)
from vdiskfs.registry import address_of

log = logging.getLogger(__name__)

BODY_LIMIT = 64 * 1024
"""The largest request body, in bytes."""

_STATUS: tuple[tuple[type[VdiskfsError], int], ...] = (
    (UsageError, 400),
    (NotFoundError, 404),
    (StateError, 409),
    (RefusedError, 403),
    (VaultUnreachableError, 503),
    (DamagedError, 502),
)

Document: TypeAlias = Mapping[str, object]


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

    async def create_points(self, names: list[str], label: str, *, wait: bool) -> Document:
        """Seal disks at one instant."""

    async def failovers(self) -> Document:
        """Return all failovers of this mount."""

    async def failover(self, name: str) -> Document:
        """Return one failover."""

    async def test_failover(
        self, disk: str, point: str, name: str | None, *, vm: bool, dry_run: bool
    ) -> Document:
        """Make a writable copy of a point, for tests."""

    async def cleanup(self, name: str, notes: str, *, dry_run: bool) -> Document:
        """Throw a test failover away."""

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
        body = await _body(request)
        now, cancel = body.get("now") is True, body.get("cancel") is True
        if now and cancel:
            raise UsageError("resync: now and cancel exclude each other")
        return await control.resync(request.path_params["name"], now=now, cancel=cancel)

    async def points(request: Request) -> Document:
        query = request.query_params
        return await control.points(
            request.path_params["name"], query.get("since", ""), query.get("until", ""),
            _count(query.get("limit")),
        )  # fmt: skip

    async def point(request: Request) -> Document:
        return await control.point(request.path_params["name"], request.path_params["point"])

    async def create_points(request: Request) -> Document:
        body = await _body(request)
        names = _names(body)
        if body.get("consistency", "crash") != "crash":
            raise UsageError(
                "application-consistent points are not offered by this version",
                hint="use --consistency crash",
            )
        label = _text(body, "label", 120)
        return await control.create_points(names, label, wait=body.get("wait") is True)

    async def unmount(request: Request) -> Document:
        body = await _body(request)
        return await control.unmount(drain=body.get("drain") is True, lazy=body.get("lazy") is True)

    async def upgrade(_: Request) -> Document:
        return await control.upgrade()

    get, post = ["GET"], ["POST"]
    return Starlette(
        routes=[
            Route("/v1/status", _route(status), methods=get),
            Route("/v1/health", _route(health), methods=get),
            Route("/v1/disks", _route(disks), methods=get),
            Route("/v1/disks/{name}", _route(disk), methods=get),
            Route("/v1/disks/{name}/protect", _route(protect), methods=post),
            Route("/v1/disks/{name}/unprotect", _route(unprotect), methods=post),
            Route("/v1/disks/{name}/retry", _route(retry), methods=post),
            Route("/v1/disks/{name}/pause", _route(pause), methods=post),
            Route("/v1/disks/{name}/resume", _route(resume), methods=post),
            Route("/v1/disks/{name}/resync", _route(resync), methods=post),
            Route("/v1/disks/{name}/points", _route(points), methods=get),
            Route("/v1/disks/{name}/points/{point}", _route(point), methods=get),
            Route("/v1/points", _route(create_points), methods=post),
            *_failover_routes(control),
            *_group_routes(control),
            Route("/v1/upgrade", _route(upgrade), methods=post),
            Route("/v1/umount", _route(unmount), methods=post),
        ]
    )


def _failover_routes(control: Control) -> list[Route]:
    async def failovers(_: Request) -> Document:
        return await control.failovers()

    async def failover(request: Request) -> Document:
        return await control.failover(request.path_params["name"])

    async def test_failover(request: Request) -> Document:
        body = await _body(request)
        disk, point, name = body.get("disk"), body.get("point", "latest"), body.get("name")
        if not isinstance(disk, str) or not isinstance(point, str):
            raise UsageError("disk and point: texts are needed")
        if name is not None and not isinstance(name, str):
            raise UsageError("name: a text is needed")
        if body.get("vm", "auto") not in ("auto", "none"):
            raise UsageError("vm: auto or none is needed")
        vm, dry_run = body.get("vm", "auto"), body.get("dry_run") is True
        return await control.test_failover(disk, point, name, vm=vm == "auto", dry_run=dry_run)

    async def cleanup(request: Request) -> Document:
        body = await _body(request)
        notes, dry_run = _text(body, "notes", 4096), body.get("dry_run") is True
        return await control.cleanup(request.path_params["name"], notes, dry_run=dry_run)

    return [
        Route("/v1/failovers", _route(failovers), methods=["GET"]),
        Route("/v1/failovers", _route(test_failover), methods=["POST"]),
        Route("/v1/failovers/{name}", _route(failover), methods=["GET"]),
        Route("/v1/failovers/{name}/cleanup", _route(cleanup), methods=["POST"]),
    ]


def _group_routes(control: Control) -> list[Route]:
    async def groups(_: Request) -> Document:
        return await control.groups()

    async def group(request: Request) -> Document:
        return await control.group(request.path_params["name"])

    async def create(request: Request) -> Document:
        body = await _body(request)
        name = _text(body, "name", 240)
        return await control.change_group(
            name, "create", _names(body), dry_run=body.get("dry_run") is True
        )

    async def change(request: Request) -> Document:
        body, act = await _body(request), request.path_params["change"]
        if act not in ("add", "remove", "delete"):
            raise NotFoundError(f"nothing called {act[:40]!r} is done to a group")
        names = [] if act == "delete" else _names(body)
        dry_run = body.get("dry_run") is True
        return await control.change_group(request.path_params["name"], act, names, dry_run=dry_run)

    return [
        Route("/v1/groups", _route(groups), methods=["GET"]),
        Route("/v1/groups", _route(create), methods=["POST"]),
        Route("/v1/groups/{name}", _route(group), methods=["GET"]),
        Route("/v1/groups/{name}/{change}", _route(change), methods=["POST"]),
    ]


def _route(
    act: Callable[[Request], Awaitable[Document]],
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        try:
            return JSONResponse(await act(request))
        except VdiskfsError as error:
            return _error(error, type(error).__name__)
        except Exception:
            log.exception("%s %s failed", request.method, request.url.path)
            failure = VdiskfsError("the daemon failed", hint="see its log")
            return _error(failure, "VdiskfsError", 500)

    return answer


def _error(error: VdiskfsError, kind: str, status: int | None = None) -> Response:
    if status is None:
        status = next((code for base, code in _STATUS if isinstance(error, base)), 500)
    body = {
        "kind": kind,
        "message": error.message,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
    return JSONResponse({"error": body}, status_code=status)


async def _body(request: Request) -> dict[str, Any]:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > BODY_LIMIT:
            raise UsageError("the request is too large")
    if not data:
        return {}
    try:
        body = json.loads(data)
    except ValueError:
        raise UsageError("the request is not JSON") from None
    if not isinstance(body, dict):
        raise UsageError("the request is not a JSON object")
    return body


def _names(body: dict[str, Any]) -> list[str]:
    names = body.get("disks")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UsageError("disks: a list of names is needed")
    return names


def _text(body: dict[str, Any], what: str, limit: int) -> str:
    text = body.get(what) or ""
    if not isinstance(text, str) or len(text.encode(errors="replace")) > limit:
        raise UsageError(f"{what}: a text of at most {limit} bytes is needed")
    return text


def _count(text: str | None) -> int | None:
    if text is None or text == "":
        return None
    if not text.isascii() or not text.isdigit():
        raise UsageError(f"limit: {text!r} is not a number")
    return int(text)


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
