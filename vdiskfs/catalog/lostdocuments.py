"""Documents that are no disk's (policies, groups, machines): put back where that can be proven.

A document ends with a check of its own bytes. Where the bytes before it, or the check itself, are
still those of a copy, or the vault's etag is the one under which the copy was read, the copy is
what the vault had. Any other may be an older one, which would undo what somebody decided: then
it is said by which command a person makes the document anew.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, Protocol

from vdiskfs.catalog.documents import FORMAT, decode_document, encode_document, is_same_document
from vdiskfs.catalog.garbage import CLOCK, CLOCK_DOCUMENT, ClockError, store_time_ns
from vdiskfs.catalog.groups import PREFIX as GROUPS
from vdiskfs.catalog.keptdocuments import DocumentCopy
from vdiskfs.catalog.leases import is_forgotten
from vdiskfs.catalog.policy import PREFIX as POLICIES
from vdiskfs.catalog.policy import PRESETS
from vdiskfs.catalog.records import named_by
from vdiskfs.catalog.report import Healed, Left, Problem
from vdiskfs.crash import hook
from vdiskfs.errors import ConflictError, DamagedError, FormatError, NotFoundError
from vdiskfs.store import READ_LIMIT, Store

_MACHINES = "machines/"
_SITES = "sites/"
_AGAIN = {
    _SITES: "its site writes it anew with its next heartbeat; where the site is gone this command"
    " removes it a week after the last one",
    "boot/": "machines start without it, and it is written anew",
    "names/": "run it where a mount has the disk: it puts the name back",
}


class DocumentCopies(Protocol):
    """What this host has of documents. Nothing is believed without a proof."""

    async def copies(self, name: str) -> list[DocumentCopy]:
        """Return what was kept of a document."""


async def restore_document(
    store: Store, problem: Problem, copies: DocumentCopies | None = None, *, dry_run: bool
) -> Healed | Left | None:
    """Put a document back, or say how it is made anew; None: it is whole again.

    Raises:
        RefusedError: the vault lets nothing be replaced.
    """
    name = problem.object
    known = await copies.copies(name) if copies is not None else []
    try:
        stored, etag = await _stored(store, name)
    except NotFoundError:
        return Left(problem, how_anew(name, known))
    if stored is not None and _is_whole(name, stored):
        return None
    for copy in [*known, *_always(name)]:
        if not _is_whole(name, copy.data):
            continue
        is_proven = copy.data == CLOCK_DOCUMENT or bool(copy.etag and copy.etag == etag)
        if not is_proven and not (stored and is_same_document(copy.data, stored)):
            continue
        if not dry_run:
            hook("repair.document")
            try:
                await store.replace(name, copy.data, etag=etag)
            except (ConflictError, NotFoundError):
                return Left(problem, "somebody else has changed it meanwhile")
        return Healed(problem, 1, 0, 0)
    if name.startswith(_SITES) and await _is_forgotten(store, name):
        if not dry_run:
            await store.delete(name)
        problem.message += " (removed: its site has been silent for a week)"
        return Healed(problem, 1, 0, 0)
    return Left(problem, how_anew(name, known))


async def _is_forgotten(store: Store, name: str) -> bool:
    """Say whether nothing waits for a site any more whose heartbeat cannot be read."""
    try:
        return is_forgotten((await store.stat(name)).modified_ns, await store_time_ns(store))
    except (ClockError, NotFoundError):
        return False


def how_anew(name: str, copies: Sequence[DocumentCopy] = ()) -> str:
    """Return what a person has to do about a document of which nothing is proven."""
    for prefix, what in _AGAIN.items():
        if name.startswith(prefix):
            return f"no copy of it is known here; {what}"
    values: dict[str, Any] = {}
    for copy in copies:
        if _is_whole(name, copy.data):
            values = decode_document(copy.data, where=name)
    command = _command(name, values)
    if not command:
        return "no copy of it is known here"
    if values:
        return f"the copy of it that is here may be an older one; if it is right: {command}"
    return f"no copy of it is known here; make it anew: {command}"


def _command(name: str, values: dict[str, Any]) -> str:
    """Return the command that makes a document anew: as a copy of it says, if there is one."""
    for prefix in (POLICIES, GROUPS, _MACHINES):
        user_name = named_by(name, prefix) if name.startswith(prefix) else None
        if user_name is None or user_name.startswith("unreadable-"):
            continue
        quoted = shlex.quote(user_name)
        if prefix == POLICIES:
            body = values.get("policy", {})
            settings = [
                shlex.quote(f"{key}={value}") for key, value in body.items()
                if key != "name" and value
            ] or ["retention=..."]  # fmt: skip
            return f"vdiskfs policy set {quoted} {' '.join(settings)}"
        if prefix == GROUPS:
            members = values.get("group", {}).get("disks", [])
            disks = [shlex.quote(str(one["name"])) for one in members] or ["DISK..."]
            again = f"vdiskfs group create {quoted} {' '.join(disks)}"
            return f"vdiskfs group delete {quoted} && {again}"
        return f"vdiskfs machine set {quoted} --file FILE"
    return ""


def _always(name: str) -> list[DocumentCopy]:
    """Return what a document may be without anybody's copy."""
    if name == CLOCK:
        return [DocumentCopy(CLOCK_DOCUMENT)]
    preset = PRESETS.get(named_by(name, POLICIES) or "") if name.startswith(POLICIES) else None
    if preset is None:
        return []
    return [DocumentCopy(encode_document({"format": FORMAT, "policy": preset.to_body()}))]


def _is_whole(name: str, data: bytes) -> bool:
    if name == CLOCK:
        return data == CLOCK_DOCUMENT
    try:
        decode_document(data, where=name)
    except FormatError:
        return False
    return True


async def _stored(store: Store, name: str) -> tuple[bytes | None, str]:
    """Return what is left of a document, and its etag.

    Raises:
        NotFoundError: nothing is.
    """
    etag = ""
    try:
        etag = (await store.stat(name)).etag
        data, info = await store.read(name, limit=READ_LIMIT)
    except DamagedError:
        return None, etag  # of an encrypted one nothing can be read
    return data, info.etag
