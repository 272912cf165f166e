"""Consistency groups in the vault: ``groups/NAME.json``, changed by compare-and-swap.

A disk is in one group at most. What the store can promise is one document at a time, so
whoever writes looks again afterwards, and takes back what another one has had first; a disk
that stands in two all the same (its writer was killed in between) counts for the older group.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vdiskfs.catalog.documents import (
    DOCUMENT_LIMIT,
    FORMAT,
    decode_document,
    encode_document,
    take,
)
from vdiskfs.catalog.records import named_by, safe_name
from vdiskfs.catalog.vault import Vault
from vdiskfs.crash import hook
from vdiskfs.delta.layout import is_id
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    FormatError,
    NotFoundError,
    UsageError,
)
from vdiskfs.store import Store

PREFIX = "groups/"
_BAD = re.compile(r"[\x00-\x1f\x7f/@\ud800-\udfff]")
_SWAP_TRIES = 20


@dataclass(frozen=True, slots=True)
class GroupDisk:
    """A member: the disk's id, and its name for people."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Group:
    """A consistency group: disks that are sealed at one instant. ``created`` is ISO 8601."""

    name: str
    id: str
    created: str
    disks: tuple[GroupDisk, ...]

    @property
    def ids(self) -> frozenset[str]:
        """Return the ids of the members."""
        return frozenset(disk.id for disk in self.disks)

    def to_body(self) -> dict[str, Any]:
        """Return what a document holds of it."""
        disks = [{"id": disk.id, "name": disk.name} for disk in self.disks]
        return {"name": self.name, "id": self.id, "created": self.created, "disks": disks}

    @staticmethod
    def from_body(body: dict[str, Any], *, where: str) -> Group:
        """Read what `to_body` gave.

        Raises:
            FormatError: it is not a group.
        """
        disks = []
        for values in take(body, "disks", list, where=where):
            if not isinstance(values, dict) or not is_id(str(values.get("id"))):
                raise FormatError("a member is no disk", where=where)
            disks.append(GroupDisk(values["id"], take(values, "name", str, where=where)))
        if len({disk.id for disk in disks}) != len(disks):
            raise FormatError("a disk is a member twice", where=where)
        group_id = take(body, "id", str, where=where)
        if not is_id(group_id):
            raise FormatError("the group has no id", where=where)
        name, created = (take(body, key, str, where=where) for key in ("name", "created"))
        return Group(name, group_id, created, tuple(disks))


@dataclass(frozen=True, slots=True)
class ListedGroup:
    """A group of the vault, or what is wrong with its document."""

    name: str
    group: Group | None
    error: DamagedError | None = None


def check_group_name(name: str) -> str:
    """Return a name that a group may have.

    Raises:
        UsageError: it is empty, too long, or holds what no name can.
    """
    if not name or len(name.encode(errors="replace")) > 240 or _BAD.search(name):
        raise UsageError(
            f"not a name for a group: {name[:60]!r}",
            hint="1 to 240 bytes without slash, @ and control characters",
        )
    return name


async def group_objects(store: Store) -> dict[str, str]:
    """Return the name and the etag of each group's object; one listing."""
    return {info.name: info.etag async for info in store.list(PREFIX)}


async def list_groups(store: Store) -> list[ListedGroup]:
    """Return all groups, by name. One that is damaged hides none of the others.

    Raises:
        VaultUnreachableError, RefusedError: as the store.
    """
    found = []
    for name in filter(None, map(group_named, await group_objects(store))):
        try:
            group, _ = await read_group(store, name)
        except NotFoundError:
            continue  # removed while we looked
        except DamagedError as error:
            found.append(ListedGroup(name, None, error))
        else:
            found.append(ListedGroup(name, group))
    return sorted(found, key=lambda one: one.name)


async def read_group(store: Store, name: str) -> tuple[Group, str]:
    """Return a group and the etag under which it may be replaced.

    Raises:
        NotFoundError: the vault has no group of that name.
        FormatError: its document is not one, or is another group's.
    """
    where = _object_name(name)
    try:
        data, info = await store.read(where, limit=DOCUMENT_LIMIT)
    except NotFoundError:
        raise NotFoundError(
            f"the vault has no group {name!r}", hint="see `vdiskfs group list`"
        ) from None
    values = decode_document(data, where=where)
    group = Group.from_body(take(values, "group", dict, where=where), where=where)
    if group.name != name:
        raise FormatError("the document of another group", where=where)
    return group, info.etag


async def create_group(store: Store, group: Group) -> None:
    """Put a new group into the vault; durable there on return.

    Raises:
        AlreadyExistsError: the name is taken.
        ConflictError: one of its disks is in another group.
    """
    check_free(await list_groups(store), group)
    await _write(store, group, etag=None)
    try:
        await _check_written(store, group)
    except ConflictError:
        await delete_group(store, group.name)
        raise


async def update_group(store: Store, name: str, change: Callable[[Group], Group]) -> Group:
    """Change a group by compare-and-swap; ``change`` may be called again, and may refuse.

    Raises:
        NotFoundError, FormatError: as `read_group`.
        ConflictError: a disk that it adds is in another group, or others change it all the time.
    """
    for _ in range(_SWAP_TRIES):
        group, etag = await read_group(store, name)
        changed = change(group)
        if changed == group:
            return group
        check_free(await list_groups(store), changed)
        try:
            etag = await _write(store, changed, etag=etag)
        except ConflictError:
            continue
        if not changed.ids <= group.ids:
            try:
                await _check_written(store, changed)
            except ConflictError:
                await _write(store, group, etag=etag)
                raise
        return changed
    raise ConflictError(f"group {name}: changed by others all the time")


async def delete_group(store: Store, name: str) -> None:
    """Remove a group, damaged or not; its disks and their points stay.

    Raises:
        NotFoundError: the vault has no group of that name.
    """
    try:
        await store.delete(_object_name(name))
    except NotFoundError:
        raise NotFoundError(
            f"the vault has no group {name!r}", hint="see `vdiskfs group list`"
        ) from None
    hook("group.deleted")


async def group_members(vault: Vault, name: str) -> list[str]:
    """Return the names of a group's disks, sorted.

    Raises:
        NotFoundError: the vault has no group of that name, or not one of its disks any more.
        FormatError: its document is damaged.
    """
    group, _ = await read_group(vault.store, name)
    return sorted([(await vault.disk(disk.id)).name for disk in group.disks])


def check_free(listed: Sequence[ListedGroup], wanted: Group) -> None:
    """Check that no disk of a group is in another one.

    Raises:
        ConflictError: one is; it is named.
    """
    for other in (one.group for one in listed):
        if other is None or other.name == wanted.name:
            continue
        for disk in wanted.disks:
            if disk.id in other.ids:
                raise ConflictError(
                    f"group {wanted.name}: disk {disk.name} is in group {other.name}",
                    hint=f"vdiskfs group remove {shlex.quote(other.name)} {shlex.quote(disk.name)}",
                )


def by_age(groups: Sequence[Group]) -> list[Group]:
    """Return groups in the order in which they count where a disk is in several."""
    return sorted(groups, key=lambda one: (one.created, one.id))


def group_named(object_name: str) -> str | None:
    """Return whose document an object is; None: nobody's."""
    return named_by(object_name, PREFIX)


async def _write(store: Store, group: Group, *, etag: str | None) -> str:
    document = encode_document({"format": FORMAT, "group": group.to_body()})
    try:
        new = await store.replace(_object_name(group.name), document, etag=etag)
    except (ConflictError, NotFoundError):
        if etag is None:
            raise AlreadyExistsError(
                f"there is a group {group.name} already",
                hint=f"vdiskfs group show {shlex.quote(group.name)}",
            ) from None
        raise ConflictError(
            f"group {group.name}: it was changed by somebody else meanwhile",
            hint="look at it with `vdiskfs group show`, and try again",
        ) from None
    hook("group.written")
    return new


async def _check_written(store: Store, group: Group) -> None:
    """Look again: of two writers at one time at least one sees the other, and gives way."""
    check_free(await list_groups(store), group)


def _object_name(name: str) -> str:
    return f"{PREFIX}{safe_name(name)}.json"
