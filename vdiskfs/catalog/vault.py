"""A vault: its identity, its disks and their names, the sites that use it."""

from __future__ import annotations

import contextlib
import shlex
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import trio

from vdiskfs.catalog.anchor import (
    VAULT,
    check_data,
    check_identity,
    check_unclaimed,
    mark_data,
)
from vdiskfs.catalog.documents import (
    DOCUMENT_LIMIT,
    FORMAT,
    decode_document,
    encode_document,
    take,
)
from vdiskfs.catalog.indexcache import IndexCache
from vdiskfs.catalog.line import REPAIR
from vdiskfs.catalog.log import DiskLog
from vdiskfs.catalog.records import (
    DiskRecord,
    Owner,
    SiteRecord,
    UnreadableDisk,
    UnreadableSite,
    decode_disk,
    decode_site,
    encode_disk,
    encode_site,
    named_by,
    safe_name,
)
from vdiskfs.catalog.swap import disk_object, swap_disk
from vdiskfs.catalog.vaultfile import VaultFile, read_vault_file, unlock
from vdiskfs.crypto import DataKey, Secrets, Slot, make_slot, new_data_key
from vdiskfs.delta.layout import is_id
from vdiskfs.errors import (
    AlreadyExistsError,
    ConflictError,
    DamagedError,
    FormatError,
    NotFoundError,
    StateError,
    UsageError,
)
from vdiskfs.point import BlockCache
from vdiskfs.sealed import SealedStore, Seen
from vdiskfs.sealed.names import stored_name
from vdiskfs.store import PROBES, Store

_NAME_TRIES = 1000
_SWAP_TRIES = 20


@dataclass(slots=True)
class Vault:
    """An open vault. The store is the caller's and stays open."""

    store: Store
    vault_id: str
    created: str
    cache: BlockCache = field(default_factory=BlockCache)
    _site_etags: dict[str, str | None] = field(default_factory=dict)

    @classmethod
    async def init(
        cls, store: Store, given: Secrets | None = None, *,
        sending: Callable[[], None] = lambda: None,
    ) -> Vault:  # fmt: skip
        """Make an empty vault, encrypted if something is given that is to open it.

        One that failed halfway is made when it is given again: until vault.json is there, which
        is last, nothing opens. ``sending`` is called before that is sent.

        Raises:
            UsageError: the passphrase is empty or too long.
            StateError: there is a vault already, or another one's data.
        """
        await store.prepare()
        vault_id = await check_unclaimed(store) or uuid.uuid4().hex
        file = VaultFile(vault_id, now_text())
        key = None
        if given:
            key = new_data_key(vault_id)
            slot = await trio.to_thread.run_sync(_first_slot, key, given, file.created)
            file = replace(file, slots=(slot,), revision=1)
        await mark_data(store, vault_id)
        sending()
        try:
            await store.create(VAULT, file.encode(key))
        except AlreadyExistsError:
            raise StateError(f"{store.describe()} holds a vault already") from None
        return await cls.open(store, key)

    @classmethod
    async def open(
        cls, store: Store, given: Secrets | DataKey | None = None, *,
        seen: Callable[[str], Seen] | None = None,
    ) -> Vault:  # fmt: skip
        """Open a vault. Where it is encrypted its ``store`` is one around the given one.

        Args:
            store: the vault's, or that of a vault that was opened before.
            given: what opens it.
            seen: gives what this site has seen of the vault with an id.

        Raises:
            NotFoundError: there is none.
            FormatError: it is damaged, or of a newer format.
            KeyNeededError: it is encrypted, and nothing is given.
            RefusedError: what is given does not open it, or it is not encrypted.
            WrongVaultError: its keys are older than what was seen, or its data is another one's.
        """
        where = f"{store.describe()}: {VAULT}"
        file, _ = await read_vault_file(store)
        await check_data(store, file.vault_id)
        if isinstance(store, SealedStore):
            same = file.vault_id == store.key.vault_id
            if same:
                await unlock(file, store.key, where=where)
            return cls(store, file.vault_id, file.created)
        key = await unlock(file, given, where=where)
        if key is None:
            return cls(store, file.vault_id, file.created)
        remembered = seen(file.vault_id) if seen is not None else Seen()
        remembered.check(
            VAULT, file.revision, remembered.get(VAULT), where=store.describe(), name=VAULT
        )
        return cls(SealedStore(store, key, remembered), file.vault_id, file.created)

    @classmethod
    def reopened(
        cls, store: Store, vault_id: str, created: str, key: DataKey | None, seen: Seen
    ) -> Vault:
        """Return a vault that a predecessor has opened. Asks nothing."""
        return cls(store if key is None else SealedStore(store, key, seen), vault_id, created)

    @property
    def key(self) -> DataKey | None:
        """Return the vault's data key; None: it is not encrypted."""
        return self.store.key if isinstance(self.store, SealedStore) else None

    def stored_name(self, name: str) -> str:
        """Return what an object is called in the store; of a damaged one nothing else is known."""
        return name if self.key is None else stored_name(self.key, name)

    async def create_disk(
        self, name: str, *, file: str, size: int, site: str, disk_id: str | None = None,
        owner: Owner | None = None,
    ) -> DiskRecord:  # fmt: skip
        """Add a disk under its name, or name-2, name-3, ... where that is another disk's.

        With the ``disk_id`` of an earlier call that may have been cut off, this completes it.

        Raises:
            UsageError: the name is empty or too long.
        """
        disk_id = disk_id or uuid.uuid4().hex
        given = await self._claim_name(name, disk_id)
        record = DiskRecord(disk_id, given, now_text(), site, file, size, owner=owner)
        try:
            await self.store.create(disk_object(disk_id), encode_disk(record))
        except AlreadyExistsError:
            return await self.disk(disk_id)
        return record

    async def disks(self) -> list[DiskRecord]:
        """Return all disks, by name; DamagedError: one cannot be read."""
        found, unreadable = await self.read_disks()
        for one in unreadable:
            raise DamagedError(f"{one.object}: {one.why}", hint=REPAIR)
        return found

    async def read_disks(self) -> tuple[list[DiskRecord], list[UnreadableDisk]]:
        """Return all disks that can be read, by name, and those that cannot."""
        found, unreadable = [], []
        for info in [info async for info in self.store.list("names/")]:
            where, disk_id = info.name, info.metadata.get("disk", "")
            try:
                if not is_id(disk_id):
                    disk_id = await self.named_id(info.name)
                where = disk_object(disk_id)
                found.append(await self.disk(disk_id))
            except NotFoundError:
                continue  # a name was given, then its maker died: garbage, never a disk
            except DamagedError as error:
                why, name = error.message.removeprefix(f"{where}: "), named_by(info.name, "names/")
                unreadable.append(UnreadableDisk(where, why, name or info.name))
        return sorted(found, key=lambda record: record.name), unreadable

    async def disk(self, disk_id: str) -> DiskRecord:
        """Return a disk by its id; NotFoundError."""
        name = disk_object(disk_id)
        try:
            data, _ = await self.store.read(name, limit=DOCUMENT_LIMIT)
            return decode_disk(data, disk_id, where=name)
        except NotFoundError:
            raise NotFoundError(f"the vault has no disk {disk_id}") from None
        except DamagedError as error:
            error.hint = error.hint or REPAIR
            raise

    async def find_log(self, name: str) -> DiskLog:
        """Return the points of DISK, or of DISK@BRANCH; NotFoundError.

        A disk whose own name has an @ in it wins.
        """
        try:
            return self.log(await self.find_disk(name))
        except NotFoundError:
            disk, sign, branch = name.rpartition("@")
            if not sign or not disk:
                raise
        record = await self.find_disk(disk)
        generation = record.branch(branch)
        if generation is None:
            raise NotFoundError(
                f"disk {disk} has no branch {branch!r}",
                hint=f"see `vdiskfs disk branches {shlex.quote(disk)}`",
            )
        return self.log(record, generation)

    async def find_disk(self, name_or_id: str) -> DiskRecord:
        """Return a disk by its name or its id.

        Raises:
            NotFoundError: there is none.
            DamagedError: its record is damaged, or missing while its points are there.
        """
        disk_id = name_or_id
        if not is_id(name_or_id):
            try:
                disk_id = await self.named_id(name_object(name_or_id))
            except NotFoundError:
                raise NotFoundError(
                    f"the vault has no disk {name_or_id!r}", hint="see `vdiskfs disk list`"
                ) from None
        try:
            return await self.disk(disk_id)
        except NotFoundError:
            if not [info async for info in self.store.list(f"disks/{disk_id}/g")]:
                raise
            where = disk_object(disk_id)
            raise FormatError("the disk's record is missing", where=where, hint=REPAIR) from None

    async def update_disk(
        self, disk_id: str, change: Callable[[DiskRecord], DiskRecord]
    ) -> DiskRecord:
        """Change a disk's record by compare-and-swap; ``change`` may be called again.

        What ``change`` raises ends it: it sees the truth and can refuse.
        """
        return await swap_disk(self.store, disk_id, change)

    async def check_identity(self) -> None:
        """Check that the vault is still the one that was opened.

        Raises:
            NotFoundError: it is gone.
            WrongVaultError: another one is in its place.
        """
        await check_identity(self.store, self.vault_id)

    async def ask_data(self) -> None:
        """See that the store that data lies in answers: one request, for what is not there."""
        with contextlib.suppress(NotFoundError):
            await self.store.stat(f"{PROBES}heartbeat")

    async def write_site(
        self, record: SiteRecord, surprised: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        """Write a site's heartbeat: one request as long as nobody else writes it.

        Returns True if somebody else has: that is how a takeover draws its attention.
        ``surprised`` is awaited before it is written over what is not this site's last one.
        """
        met = False
        name = _site_object(record.site, record.writer)
        data = encode_site(record)
        for _ in range(_SWAP_TRIES):
            try:
                etag = self._site_etags.get(name)
                self._site_etags[name] = await self.store.replace(name, data, etag=etag)
            except (ConflictError, NotFoundError):
                met = name in self._site_etags
                if surprised is not None:
                    await surprised()
                try:
                    self._site_etags[name] = (await self.store.stat(name)).etag
                except NotFoundError:
                    self._site_etags[name] = None
            else:
                return met
        raise ConflictError(f"site {record.site}: its heartbeat is changed by others all the time")

    async def site(self, site: str, writer: str) -> SiteRecord | None:
        """Return the last heartbeat of a state directory, or None: it never wrote one."""
        name = _site_object(site, writer)
        try:
            data, _ = await self.store.read(name, limit=DOCUMENT_LIMIT)
        except NotFoundError:
            return None
        return decode_site(data, where=name)

    async def touch_site(self, site: str, writer: str) -> None:
        """Let a state directory see, at its next heartbeat, that something concerns it."""
        name = _site_object(site, writer)
        try:
            data, info = await self.store.read(name, limit=DOCUMENT_LIMIT)
            await self.store.replace(name, data, etag=info.etag)
        except (ConflictError, NotFoundError):
            return  # it writes just now, and looks at its next start; or it never ran

    async def sites(self) -> list[SiteRecord]:
        """Return all sites that can be read, by name."""
        return (await self.read_sites())[0]

    async def read_sites(self) -> tuple[list[SiteRecord], list[UnreadableSite]]:
        """Return all sites, by name, and the heartbeats that cannot be read."""
        found, unreadable = [], []
        for listed in [info async for info in self.store.list("sites/")]:
            try:
                data, _ = await self.store.read(listed.name, limit=DOCUMENT_LIMIT)
                found.append(decode_site(data, where=listed.name))
            except DamagedError as error:
                why = error.message.removeprefix(f"{listed.name}: ")
                unreadable.append(UnreadableSite(listed.name, why, listed.modified_ns))
            except NotFoundError:
                continue  # it was removed since
        return sorted(found, key=lambda record: record.site), unreadable

    def log(
        self, record: DiskRecord, generation: int | None = None, *, cache: IndexCache | None = None
    ) -> DiskLog:
        """Return the points of a disk's generation (the current one). Makes no request.

        ``cache`` keeps what joins need, so that the owner of a disk reads nothing back.
        """
        generation = record.generation if generation is None else generation
        if generation not in record.parents:
            raise NotFoundError(f"disk {record.name}: it has no generation {generation}")
        return DiskLog(
            self.store, self.vault_id, record, generation, blocks=self.cache, cache=cache
        )

    async def _claim_name(self, name: str, disk_id: str) -> str:
        if not name or len(name.encode()) > 240 or "/" in name or "\0" in name:
            raise UsageError(f"not a name for a disk: {name[:60]!r}")
        for number in range(1, _NAME_TRIES):
            wanted = name if number == 1 else f"{name}-{number}"
            object_name = name_object(wanted)
            try:
                await self.store.create(
                    object_name,
                    encode_document({"format": FORMAT, "disk": disk_id}),
                    metadata={"disk": disk_id},
                )
            except AlreadyExistsError:
                if await self.named_id(object_name) != disk_id:
                    continue
            return wanted
        raise StateError(f"the vault has too many disks named {name!r}")

    async def named_id(self, object_name: str) -> str:
        """Return the id of the disk that an object names/... means; NotFoundError."""
        data, _ = await self.store.read(object_name, limit=DOCUMENT_LIMIT)
        disk_id: str = take(
            decode_document(data, where=object_name), "disk", str, where=object_name
        )
        if not is_id(disk_id):
            raise FormatError("the name means no disk", where=object_name)
        return disk_id


def name_object(name: str) -> str:
    """Return the name of what says which disk has a name."""
    return f"names/{safe_name(name)}.json"


def _site_object(site: str, writer: str) -> str:
    # Two mounts of one host may have one name: each has its own sign of life.
    # A writer that another one has noted may be anything.
    return (
        f"sites/{safe_name(site)}.{safe_name(writer)}.json"
        if writer
        else f"sites/{safe_name(site)}.json"
    )


def _first_slot(key: DataKey, given: Secrets, created: str) -> Slot:
    return make_slot(key, given, label="first", created=created)


def now_text() -> str:
    """Return the time now as documents have it: ISO 8601, UTC, whole seconds."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
