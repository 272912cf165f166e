"""The consistency groups of a mount: which disks are sealed together, and how that changes.

The vault says which groups there are (`vdiskfs.catalog.groups`); what it said last is kept in
the state directory, so that a daemon that starts while the vault is away seals as its
predecessor did. What is changed here counts at once, what another mount changes from the
next heartbeat on. No disk is restarted: the next seal takes who is a member then.
"""

from __future__ import annotations

import logging
import shlex
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import trio

from vdiskfs.catalog import Vault
from vdiskfs.catalog.groups import (
    Group,
    GroupDisk,
    by_age,
    check_free,
    check_group_name,
    create_group,
    delete_group,
    group_named,
    group_objects,
    list_groups,
    read_group,
    update_group,
)
from vdiskfs.catalog.vault import now_text
from vdiskfs.crash import hook
from vdiskfs.disk import ProtectedDisk
from vdiskfs.errors import (
    AlreadyExistsError,
    DamagedError,
    FormatError,
    LocalError,
    NotFoundError,
    StateError,
    VdiskfsError,
)
from vdiskfs.replicator import Joint, Replicator
from vdiskfs.state import read_record, write_record
from vdiskfs.together import GroupSealer

log = logging.getLogger(__name__)

_FORMAT = 1


class Groups:
    """The groups of one mount. Trio thread only."""

    def __init__(self, vault: Vault, state: Path, interval_s: float) -> None:
        """Take up what the vault said last; waits for the local disk.

        Args:
            vault: where groups are kept.
            state: the file that remembers them.
            interval_s: of epochs.
        """
        self._vault = vault
        self._state = state
        self._interval_s = interval_s
        self._groups: dict[str, Group] = {}
        self._of_disk: dict[str, Group] = {}
        self._sealers: dict[str, GroupSealer] = {}
        self._listed: dict[str, str] | None = None
        self._learning = trio.Lock()
        self._disks: Callable[[], Sequence[ProtectedDisk]] = list
        self._nursery: trio.Nursery | None = None
        self._take(self._remembered())

    def begin(self, disks: Callable[[], Sequence[ProtectedDisk]], nursery: trio.Nursery) -> None:
        """Seal the groups' disks in tasks of a nursery; before the first disk is started.

        Args:
            disks: gives those protected here.
            nursery: ends it by being cancelled; what is sealed then is captured all the same.
        """
        self._disks, self._nursery = disks, nursery
        for sealer in self._sealers.values():
            nursery.start_soon(sealer.run)

    # ---- who is a member ---------------------------------------------------------------

    def joint_of(self, disk_id: str) -> Joint | None:
        """Return what seals a disk with the others of its group, or None.

        What was written to a disk that another site has is sealed alone: it goes into a branch.
        """
        group = self._of_disk.get(disk_id)
        if group is None or any(one.disk_id == disk_id for one in self._elsewhere()):
            return None
        return self._sealers[group.id]

    def _elsewhere(self) -> list[ProtectedDisk]:
        return [one for one in self._disks() if one.line.is_elsewhere]

    def all(self) -> list[Group]:
        """Return what is known of the groups, by name."""
        return sorted(self._groups.values(), key=lambda one: one.name)

    def known(self, name: str) -> Group | None:
        """Return a group by its name, as this mount knows it."""
        return self._groups.get(name)

    def find(self, name: str) -> Group:
        """Return a group by its name, as this mount knows it.

        Raises:
            NotFoundError: there is none.
        """
        group = self.known(name)
        if group is None:
            raise NotFoundError(f"there is no group {name}", hint="vdiskfs group list")
        return group

    def members(self, group: Group) -> list[ProtectedDisk]:
        """Return a group's disks that are protected here, by name."""
        return [one for one in self._disks() if self._of_disk.get(one.disk_id) == group]

    def _replicators(self, group_id: str) -> list[Replicator]:
        group = next((one for one in self._groups.values() if one.id == group_id), None)
        if group is None:
            return []
        return [one.replicator for one in self.members(group) if not one.line.is_elsewhere]

    async def seal_last(self) -> None:
        """Seal what changed in each group: nobody writes any more.

        What cannot be sealed with the others is left to its own disk.
        """
        for sealer in list(self._sealers.values()):
            await sealer.seal_changed(last=True)

    # ---- what the vault says -------------------------------------------------------------

    async def learn(self) -> None:
        """Read the groups that have changed in the vault; one listing where none has.

        What is damaged there stays as it was here.

        Raises:
            VaultUnreachableError, RefusedError, NotFoundError, WrongVaultError: the vault
                does not answer, or is not there; all stay as they were.
        """
        async with self._learning:
            listed = await group_objects(self._vault.store)
            if listed == self._listed:
                return
            if set(self._groups) - set(map(group_named, listed)):
                # An empty folder where the vault was mounted has no groups either.
                await self._vault.check_identity()
            found = []
            for object_name in listed:
                name = group_named(object_name)
                if name is None:
                    continue
                try:
                    found.append((await read_group(self._vault.store, name))[0])
                except NotFoundError:
                    continue
                except DamagedError as error:
                    log.warning("group %s: stays as it was known here: %s", name, error)
                    if name in self._groups:
                        found.append(self._groups[name])
            changed = {one.name: one for one in found} != self._groups
            if changed:
                self._take(found)
                await self._remember()
                self._tell_disks()
            self._listed = listed

    def _take(self, groups: Sequence[Group]) -> None:
        """Let these be the groups from now on."""
        self._groups = {one.name: one for one in groups}
        self._of_disk = {}
        for group in by_age(groups):
            for disk in group.disks:
                first = self._of_disk.setdefault(disk.id, group)
                if first is not group:
                    log.warning("disk %s: is in the groups %s and %s; the first counts",
                                disk.name, first.name, group.name)  # fmt: skip
        ids = {one.id for one in groups}
        for group_id in set(self._sealers) - ids:
            self._sealers.pop(group_id).scope.cancel()
        for group in groups:
            if group.id not in self._sealers:
                self._sealers[group.id] = sealer = GroupSealer(
                    group.name, partial(self._replicators, group.id), self._interval_s
                )
                if self._nursery is not None:
                    self._nursery.start_soon(sealer.run)

    def _tell_disks(self) -> None:
        for disk in self._disks():
            disk.replicator.look_again()

    def _remembered(self) -> list[Group]:
        where = str(self._state)
        try:
            body = read_record(self._state)
            if body.get("format") != _FORMAT or body.get("vault_id") != self._vault.vault_id:
                return []
            return [Group.from_body(one, where=where) for one in body["groups"]]
        except NotFoundError:
            return []
        except (DamagedError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s: not believed, the vault is asked: %s", where, error)
            return []

    async def _remember(self) -> None:
        body = {
            "format": _FORMAT,
            "vault_id": self._vault.vault_id,
            "groups": [one.to_body() for one in self.all()],
        }
        try:
            await trio.to_thread.run_sync(write_record, self._state, body)
        except LocalError as error:
            log.error("the groups are not noted here: %s", error)
        hook("groups.noted")

    # ---- what the user asks --------------------------------------------------------------

    async def create(self, name: str, disks: Sequence[str], *, dry_run: bool) -> Group:
        """Make a group of disks of the vault. It counts here on return.

        Raises:
            UsageError: not a name.
            NotFoundError: no such disk.
            StateError: the name is a group's or a disk's, or a disk is in another group.
        """
        check_group_name(name)
        await self._vault.check_identity()
        members = await self._named(disks)
        try:
            await self._vault.find_disk(name)
        except NotFoundError:
            pass
        else:
            raise AlreadyExistsError(
                f"a group cannot be named {name}: there is a disk of that name",
                hint="another name",
            )
        group = Group(name, uuid.uuid4().hex, now_text(), members)
        if dry_run:
            if any(one.name == name for one in await list_groups(self._vault.store)):
                raise AlreadyExistsError(f"there is a group {name} already")
            check_free(await list_groups(self._vault.store), group)
            return group
        await create_group(self._vault.store, group)
        await self.learn()
        return group

    async def add(self, name: str, disks: Sequence[str], *, dry_run: bool) -> Group:
        """Let disks join a group. They are sealed with the others from now on.

        Raises:
            NotFoundError: no such group or disk.
            StateError: a disk is in this or another group.
        """
        members = await self._named(disks)

        def join(group: Group) -> Group:
            for disk in members:
                if disk.id in group.ids:
                    raise StateError(f"disk {disk.name} is in group {name} already")
            return replace(group, disks=(*group.disks, *members))

        return await self._change(name, join, dry_run=dry_run)

    async def remove(self, name: str, disks: Sequence[str], *, dry_run: bool) -> Group:
        """Let disks leave a group: they are sealed by themselves from now on.

        Raises:
            NotFoundError: no such group, or a disk is not in it.
            StateError: no disk would be left.
        """

        def leave(group: Group) -> Group:
            gone = set()
            for wanted in disks:
                found = next((d.id for d in group.disks if wanted in (d.name, d.id)), None)
                if found is None:
                    raise NotFoundError(
                        f"disk {wanted} is not in group {name}",
                        hint=f"vdiskfs group show {shlex.quote(name)}",
                    )
                gone.add(found)
            left = tuple(disk for disk in group.disks if disk.id not in gone)
            if not left:
                raise StateError(
                    f"group {name} would have no disk",
                    hint=f"vdiskfs group delete {shlex.quote(name)}",
                )
            return replace(group, disks=left)

        return await self._change(name, leave, dry_run=dry_run)

    async def delete(self, name: str, *, dry_run: bool) -> Group | None:
        """End a group; its disks and their points stay. Returns what it was; None: damaged.

        Raises:
            NotFoundError: no such group.
        """
        group: Group | None
        await self._vault.check_identity()
        try:
            group, _ = await read_group(self._vault.store, name)
        except FormatError:
            group = self.known(name)  # what is damaged can be deleted, too
        if not dry_run:
            await delete_group(self._vault.store, name)
            await self.learn()
        return group

    async def _change(self, name: str, change: Callable[[Group], Group], *, dry_run: bool) -> Group:
        store = self._vault.store
        await self._vault.check_identity()
        if dry_run:
            group = change((await read_group(store, name))[0])
            check_free(await list_groups(store), group)
            return group
        group = await update_group(store, name, change)
        await self.learn()
        return group

    async def _named(self, names: Sequence[str]) -> tuple[GroupDisk, ...]:
        found = {}
        for name in names:
            record = await self._vault.find_disk(name)
            found[record.id] = GroupDisk(record.id, record.name)
        return tuple(found.values())

    async def try_learn(self) -> VdiskfsError | None:
        """Learn if the vault answers; return why not."""
        try:
            await self.learn()
        except VdiskfsError as error:
            return error
        return None
