"""The control socket's routes for failovers. Translates and decides nothing, as `vdiskfs.api`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from starlette.requests import Request
from starlette.routing import Route

from vdiskfs.errors import UsageError
from vdiskfs.requests import Document, read_body, read_text, route


class Failovers(Protocol):
    """What the socket offers of failovers; `failovercontrol` implements it."""

    async def all(self) -> Document:
        """Return all failovers of this mount."""

    async def one(self, name: str) -> Document:
        """Return one failover."""

    async def test(
        self, disk: str, point: str, name: str | None, *, vm: bool, dry_run: bool
    ) -> Document:
        """Make a writable copy of a point, for tests."""

    async def start(
        self, disk: str, point: str, name: str | None, *, planned: bool, vm: bool,
        rollback_s: float, dry_run: bool,
    ) -> Document:  # fmt: skip
        """Fail over for good."""

    async def change_point(self, name: str, point: str, *, dry_run: bool) -> Document:
        """Begin anew at another point."""

    async def commit(self, name: str, *, dry_run: bool) -> Document:
        """Make a failover final."""

    async def roll_back(self, name: str, *, dry_run: bool) -> Document:
        """Give the disks back."""

    async def reprotect(self, disk: str, *, dry_run: bool) -> Document:
        """Replicate from here."""

    async def bring_home(
        self, disk: str, *, full: bool, create: bool, vm: bool, dry_run: bool
    ) -> Document:
        """Begin a failback."""

    async def complete(self, disk: str, *, dry_run: bool, unasked: str) -> Document:
        """Complete a failback."""

    async def commit_failback(self, disk: str, *, dry_run: bool) -> Document:
        """Make a failback final."""

    async def cleanup(self, name: str, notes: str, *, dry_run: bool) -> Document:
        """Throw a failover away."""


def failover_routes(asked: Callable[[], Failovers]) -> list[Route]:  # noqa: C901 (a straight list of routes)
    """Return the routes over what a daemon has; ``asked`` may refuse."""

    async def failovers(_: Request) -> Document:
        return await asked().all()

    async def failover(request: Request) -> Document:
        return await asked().one(request.path_params["name"])

    async def test(request: Request) -> Document:
        body = await read_body(request)
        disk, point, name, vm = _what(body)
        return await asked().test(disk, point, name, vm=vm, dry_run=_dry(body))

    async def start(request: Request) -> Document:
        body = await read_body(request)
        disk, point, name, vm = _what(body)
        rollback_s = body.get("rollback_s", 0)
        if not isinstance(rollback_s, int | float) or not 0 <= rollback_s < 1e9:
            raise UsageError("rollback_s: seconds are needed")
        planned = body.get("planned") is True
        return await asked().start(
            disk, point, name, planned=planned, vm=vm, rollback_s=float(rollback_s),
            dry_run=_dry(body),
        )  # fmt: skip

    async def change_point(request: Request) -> Document:
        body = await read_body(request)
        point = body.get("point")
        if not isinstance(point, str):
            raise UsageError("point: a text is needed")
        name = request.path_params["name"]
        return await asked().change_point(name, point, dry_run=_dry(body))

    async def commit(request: Request) -> Document:
        body = await read_body(request)
        return await asked().commit(request.path_params["name"], dry_run=_dry(body))

    async def roll_back(request: Request) -> Document:
        body = await read_body(request)
        return await asked().roll_back(request.path_params["name"], dry_run=_dry(body))

    async def reprotect(request: Request) -> Document:
        body = await read_body(request)
        return await asked().reprotect(request.path_params["name"], dry_run=_dry(body))

    async def bring_home(request: Request) -> Document:
        body = await read_body(request)
        vm = body.get("vm", "auto") != "none"
        return await asked().bring_home(
            request.path_params["name"], full=body.get("full") is True,
            create=body.get("create") is True, vm=vm, dry_run=_dry(body),
        )  # fmt: skip

    async def complete(request: Request) -> Document:
        body = await read_body(request)
        unasked = read_text(body, "unasked", 256)
        return await asked().complete(
            request.path_params["name"], dry_run=_dry(body), unasked=unasked
        )

    async def commit_failback(request: Request) -> Document:
        body = await read_body(request)
        return await asked().commit_failback(request.path_params["name"], dry_run=_dry(body))

    async def cleanup(request: Request) -> Document:
        body = await read_body(request)
        notes = read_text(body, "notes", 4096)
        return await asked().cleanup(request.path_params["name"], notes, dry_run=_dry(body))

    one, post = "/v1/failovers/{name}", ["POST"]
    return [
        Route("/v1/failovers", route(failovers), methods=["GET"]),
        Route("/v1/failovers", route(test), methods=post),
        Route("/v1/failovers/start", route(start), methods=post),
        Route(one, route(failover), methods=["GET"]),
        Route(f"{one}/change-point", route(change_point), methods=post),
        Route(f"{one}/commit", route(commit), methods=post),
        Route(f"{one}/rollback", route(roll_back), methods=post),
        Route(f"{one}/cleanup", route(cleanup), methods=post),
        Route("/v1/reprotect/{name}", route(reprotect), methods=post),
        Route("/v1/failbacks/{name}", route(bring_home), methods=post),
        Route("/v1/failbacks/{name}/complete", route(complete), methods=post),
        Route("/v1/failbacks/{name}/commit", route(commit_failback), methods=post),
    ]


def _what(body: dict[str, object]) -> tuple[str, str, str | None, bool]:
    """Return what is to be failed over: a disk, a point, a name, with its machine or without."""
    disk, point, name = body.get("disk"), body.get("point", "latest"), body.get("name")
    if not isinstance(disk, str) or not isinstance(point, str):
        raise UsageError("disk and point: texts are needed")
    if name is not None and not isinstance(name, str):
        raise UsageError("name: a text is needed")
    vm = body.get("vm", "auto")
    if vm not in ("auto", "none"):
        raise UsageError("vm: auto or none is needed")
    return disk, point, name, vm == "auto"


def _dry(body: dict[str, object]) -> bool:
    return body.get("dry_run") is True
