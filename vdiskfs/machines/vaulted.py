"""Machines in the vault: ``machines/NAME.json``, changed by compare-and-swap.

Whoever can write to the vault can write these: what is read here is checked, and is still a
stranger's wish (see ``permission``).
"""

from __future__ import annotations

from dataclasses import dataclass

from vdiskfs.catalog.documents import (
    DOCUMENT_LIMIT,
    FORMAT,
    decode_document,
    encode_document,
    take,
)
from vdiskfs.catalog.records import named_by, safe_name
from vdiskfs.crash import hook
from vdiskfs.errors import ConflictError, DamagedError, FormatError, NotFoundError, UsageError
from vdiskfs.machines.definition import from_dict, to_dict
from vdiskfs.machines.machine import Machine
from vdiskfs.store import Store

_PREFIX = "machines/"


@dataclass(frozen=True, slots=True)
class Listed:
    """A machine of the vault: its definition, or what is wrong with it."""

    name: str
    machine: Machine | None
    error: DamagedError | None = None


async def list_machines(store: Store) -> list[Listed]:
    """Return all machines, by name. One that is damaged hides none of the others.

    Raises:
        VaultUnreachableError, RefusedError: as the store.
    """
    found = []
    for name in await machine_names(store):
        try:
            machine, _ = await read_machine(store, name)
        except NotFoundError:
            continue  # removed while we looked
        except DamagedError as error:
            found.append(Listed(name, None, error))
        else:
            found.append(Listed(name, machine))
    return found


async def machine_names(store: Store) -> list[str]:
    """Return the names of all machines, sorted; one listing."""
    listed = [info.name async for info in store.list(_PREFIX)]
    named = [named_by(one, _PREFIX) for one in listed]
    return sorted(name for name in named if name is not None)


async def read_machine(store: Store, name: str) -> tuple[Machine, str]:
    """Return a machine and the etag under which it may be replaced.

    Raises:
        NotFoundError: the vault has no machine of that name.
        FormatError: its document is not one, or is another machine's.
    """
    where = _object_name(name)
    try:
        data, info = await store.read(where, limit=DOCUMENT_LIMIT)
    except NotFoundError:
        raise NotFoundError(
            f"the vault has no machine {name!r}", hint="see `vdiskfs machine list`"
        ) from None
    values = decode_document(data, where=where)
    try:
        machine = from_dict(take(values, "machine", dict, where=where), where=where)
    except UsageError as error:
        raise FormatError(error.message, hint="set it again: vdiskfs machine set") from None
    if machine.name != name:
        raise FormatError("the document of another machine", where=where)
    return machine, info.etag


async def read_etag(store: Store, name: str) -> str | None:
    """Return the etag of a machine's document, damaged or not; None: there is none."""
    try:
        return (await store.stat(_object_name(name))).etag
    except NotFoundError:
        return None


async def write_machine(store: Store, machine: Machine, *, etag: str | None) -> str:
    """Put a machine in the vault and return its new etag; durable there on return.

    Args:
        store: the vault's.
        machine: its name is where it is put.
        etag: that of the definition it replaces; None: there must be none.

    Raises:
        ConflictError: somebody else was faster.
    """
    document = encode_document({"format": FORMAT, "machine": to_dict(machine)})
    try:
        new = await store.replace(_object_name(machine.name), document, etag=etag)
    except (ConflictError, NotFoundError):
        raise ConflictError(
            f"machine {machine.name}: it was changed by somebody else meanwhile",
            hint="look at it with `vdiskfs machine show`, and try again",
        ) from None
    hook("machine.written")
    return new


async def machine_of(store: Store, disk: str) -> Machine | None:
    """Return the machine that a disk belongs to, or None.

    Raises:
        FormatError: no machine that can be read has it, and one cannot be read.
    """
    damaged = None
    for listed in await list_machines(store):
        if listed.machine is None:
            damaged = damaged or listed.error
        elif disk in (one.disk for one in listed.machine.disks):
            return listed.machine
    if damaged is not None:
        raise damaged
    return None


def _object_name(name: str) -> str:
    return f"{_PREFIX}{safe_name(name)}.json"
