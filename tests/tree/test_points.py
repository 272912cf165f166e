"""`recovery-points/` without a kernel: what is asked of whom, and what is refused."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, cast

import pytest
import trio
import trio.testing

from tests.fs.harness import FIRST_NS, PlainPoints
from tests.tree.conftest import Kept
from vdiskfs import native
from vdiskfs.errors import NotFoundError, UsageError, VaultUnreachableError
from vdiskfs.fdstore import FdStore
from vdiskfs.tree import Access, Caller, Changes, DiskName, Node, Nodes, PointRef
from vdiskfs.tree.handover import Handover
from vdiskfs.tree.listing import Entry, Listing
from vdiskfs.tree.node import POINTS_ID
from vdiskfs.tree.pointnode import PATIENCE_S, Points
from vdiskfs.tree.points import PointsDirectory
from vdiskfs.tree.static import Owner
from vdiskfs.units import NS

OWNER = Owner(1000, 1001, 5)
DAY = b"2026-11-21"


class Mount:
    """The points of one disk, as a tree."""

    def __init__(
        self, core: native.Core, count: int = 5, step_ns: int = NS, kept: Kept | None = None
    ) -> None:
        self.source = PlainPoints(core, count, step_ns)
        store = None if kept is None else cast("FdStore", kept)
        self.handover = Handover(store, None if kept is None else kept.copies())
        self.nodes = Nodes(self.handover)
        self.handover.begin(self.nodes.records)
        self.root = PointsDirectory(Points(self.nodes, core, self.source, OWNER), POINTS_ID)
        self.root.pins += 1

    async def walk(self, *names: bytes) -> Node:
        """Look names up from `recovery-points/` on, as the kernel does."""
        node: Node = self.root
        for name in names:
            node = await node.child(name)
            self.nodes.named(node)
            node.lookups += 1
        return node


@pytest.fixture
async def core() -> AsyncIterator[native.Core]:
    with native.Core() as made:
        yield made


@pytest.fixture
async def mount(core: native.Core) -> AsyncIterator[Mount]:
    mounted = Mount(core)
    yield mounted
    await mounted.nodes.forget_all()
    assert len(mounted.nodes) == 1


def entries(listing: Listing) -> list[Entry]:
    return list(listing.after(0))


def names(listing: Listing) -> list[bytes]:
    return [entry.name for entry in entries(listing)]


async def test_a_listing_of_points_asks_once_and_not_for_each(core: native.Core) -> None:
    mount = Mount(core, 10000)
    day = await mount.walk(b"web01", DAY)
    mount.source.asked.clear()
    found = entries(await day.listing())
    for entry in found:
        assert entry.find() is not None
    assert len(found) == 10000
    assert mount.source.asked == ["points"]
    await mount.nodes.forget_all()


async def test_listing_a_point_asks_nobody_and_its_attributes_are_not_believed(
    mount: Mount,
) -> None:
    point = await mount.walk(b"web01", DAY, b"01-40-05.000Z")
    mount.source.asked.clear()
    found = [entry.find() for entry in entries(await point.listing())]
    assert mount.source.asked == []
    assert all(one is not None and one[1].attr_timeout_s == 0 for one in found)


async def test_the_facts_of_an_image_are_asked_once(mount: Mount) -> None:
    image = await mount.walk(b"web01", DAY, b"01-40-05.000Z", b"web01.img")
    for _ in range(3):
        attributes = await image.getattr()
        assert attributes.size == 1 << 20
        assert attributes.blocks * 512 < attributes.size
        assert attributes.mtime_ns == FIRST_NS
    assert mount.source.asked.count("describe") == 1


@pytest.mark.parametrize("first", [[DAY], [b"latest"], [DAY, b"01-40-05.000Z"]])
async def test_an_image_is_found_below_what_a_predecessor_named(
    core: native.Core, kept: Kept, first: list[bytes]
) -> None:
    """Whichever node the kernel asks for first, over two deaths."""
    mount = Mount(core, kept=kept)
    mount.source.file = "images/system.qcow2"
    day, node = await mount.walk(b"web01", DAY), await mount.walk(b"web01", *first)
    for _ in range(2):
        mount.handover.close()
        mount = Mount(core, kept=kept)
        mount.source.file = "images/system.qcow2"
        assert mount.nodes.get(node.id).id == node.id
        point = await mount.nodes.get(day.id).child(b"01-40-05.000Z")
        mount.nodes.named(point)
        assert sorted(names(await point.listing())) == [b"point.json", b"system.qcow2"]
        assert (await point.child(b"system.qcow2")).id
    mount.handover.close()


async def test_points_of_one_millisecond_have_names_of_their_own(core: native.Core) -> None:
    mount = Mount(core, 4, step_ns=400_000)
    day = await mount.walk(b"web01", DAY)
    assert names(await day.listing()) == [
        b"01-40-05.000Z", b"01-40-05.000Z-0000000002", b"01-40-05.000Z-0000000003",
        b"01-40-05.001Z",
    ]  # fmt: skip
    epochs = []
    for entry in entries(await day.listing()):
        image = await (await day.child(entry.name)).child(b"web01.img")
        await image.open(os.O_RDONLY)
        epochs.append(image.point.epoch)  # type: ignore[attr-defined]
        await image.release()
        mount.nodes.settle(image)
    assert epochs == [1, 2, 3, 4]
    assert await day.child(b"01-40-05.000Z-1") is await day.child(b"01-40-05.000Z")
    with pytest.raises(FileNotFoundError):
        await day.child(b"01-40-05.000Z-9")
    link = await mount.walk(b"web01", b"@2026-11-21T01:40:05.000900Z")
    assert await link.readlink() == DAY + b"/01-40-05.000Z-0000000003"
    await mount.nodes.forget_all()


async def test_a_link_keeps_its_target_and_its_name_finds_the_newest(mount: Mount) -> None:
    before = await mount.walk(b"web01", b"latest")
    newest = PointRef(FIRST_NS + 86400 * NS, 6, 1)
    mount.source.all.append(newest)
    after = await mount.walk(b"web01", b"latest")
    assert await before.readlink() == DAY + b"/01-40-09.000Z"
    assert await after.readlink() == b"2026-11-22/01-40-05.000Z"
    assert (await after.getattr()).entry_timeout_s == 0
    assert await mount.walk(b"web01", b"latest") is after


async def test_links_without_a_point_are_not_there(mount: Mount) -> None:
    disk = await mount.walk(b"web01")
    assert b"latest-proven" not in names(await disk.listing())
    with pytest.raises(FileNotFoundError):
        await disk.child(b"latest-proven")
    mount.source.all.clear()
    assert names(await disk.listing()) == []
    with pytest.raises(FileNotFoundError):
        await disk.child(b"latest")


@pytest.mark.parametrize(
    "name",
    [
        b"", b".", b"..", b"2026-11-31", b"2026-11-22", b"2026-1-2", b"latestx", b"@", b"@\xff",
        b"@" + b"1" * 300, b"@2020-01-01T00:00:00Z", b"@latest-ever",
        "\uff12026-11-21".encode(),
    ],
)  # fmt: skip
async def test_what_is_no_name_is_enoent(mount: Mount, name: bytes) -> None:
    disk = await mount.walk(b"web01")
    with pytest.raises(FileNotFoundError):
        await disk.child(name)


@pytest.mark.parametrize(
    "name", [b"", b"25-00-00.000Z", b"01-40-05Z", b"01-40-05.0000Z", b"01-40-05.000Z-", b"web01"]
)
async def test_what_is_no_name_of_a_point_is_enoent(mount: Mount, name: bytes) -> None:
    day = await mount.walk(b"web01", DAY)
    with pytest.raises(FileNotFoundError):
        await day.child(name)


@pytest.mark.parametrize("error", [NotFoundError("x"), UsageError("x"), ValueError("x")])
async def test_a_time_that_is_not_understood_is_enoent(
    mount: Mount, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def find(disk: str, text: str) -> PointRef | None:
        raise error

    monkeypatch.setattr(mount.source, "find", find)
    with pytest.raises(FileNotFoundError):
        await mount.walk(b"web01", b"@x")


async def test_an_answer_that_does_not_come_is_not_waited_for_for_ever(
    core: native.Core, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    mount = Mount(core)

    async def disks() -> Sequence[DiskName]:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(mount.source, "disks", disks)
    before = trio.current_time()
    with pytest.raises(VaultUnreachableError):
        await mount.root.child(b"web01")
    assert trio.current_time() - before == pytest.approx(PATIENCE_S)


Change = Callable[[Node, Node], Coroutine[Any, Any, Any]]
ME = Caller(0, 0, 0)
CHANGES: list[Change] = [
    lambda node, other: node.create(b"x", 0o644, os.O_RDWR, ME),
    lambda node, other: node.mknod(b"x", stat.S_IFREG, ME),
    lambda node, other: node.mkdir(b"x", 0o755, ME),
    lambda node, other: node.symlink(b"x", b"y", ME),
    lambda node, other: node.link(other, b"x"),
    lambda node, other: node.unlink(b"x"),
    lambda node, other: node.rmdir(b"x"),
    lambda node, other: node.rename(b"x", other, b"y", 0),
    lambda node, other: node.setattr(Changes(mode=0o777)),
    lambda node, other: node.setattr(Changes(size=0)),
]


@pytest.mark.parametrize("change", CHANGES)
async def test_nothing_can_be_changed_anywhere(mount: Mount, change: Change) -> None:
    point = [b"web01", DAY, b"01-40-05.000Z"]
    paths = [point[:length] for length in range(4)]
    for path in [*paths, [*point, b"web01.img"], [*point, b"point.json"], [b"web01", b"latest"]]:
        node = await mount.walk(*path)
        with pytest.raises(OSError, match="Read-only") as caught:
            await change(node, mount.root)
        assert caught.value.errno == errno.EROFS
        with pytest.raises(OSError, match="Read-only"):
            node.setxattr(b"user.x", b"")
        with pytest.raises(OSError, match="Read-only"):
            node.removexattr(b"user.x")


@pytest.mark.parametrize("flags", [os.O_RDWR, os.O_WRONLY, os.O_RDONLY | os.O_TRUNC])
@pytest.mark.parametrize("name", [b"web01.img", b"point.json"])
async def test_points_are_not_opened_for_writing(mount: Mount, name: bytes, flags: int) -> None:
    file = await mount.walk(b"web01", DAY, b"01-40-05.000Z", name)
    with pytest.raises(OSError, match="Read-only"):
        await file.open(flags)
    assert file.users == 0
    assert "open" not in mount.source.asked


async def test_a_point_is_opened_once_and_closed_with_its_last_handle(mount: Mount) -> None:
    image = await mount.walk(b"web01", DAY, b"01-40-05.000Z", b"web01.img")
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(image.open, os.O_RDONLY)
    for _ in range(4):
        assert "close" not in mount.source.asked
        await image.release()
    assert mount.source.asked.count("open") == mount.source.asked.count("close") == 1


async def test_a_point_that_cannot_be_opened_can_be_tried_again(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await mount.walk(b"web01", DAY, b"01-40-05.000Z", b"web01.img")

    async def refuses(disk: str, point: PointRef) -> Any:
        raise VaultUnreachableError("away")

    with monkeypatch.context() as patch:
        patch.setattr(mount.source, "open_point", refuses)
        with pytest.raises(VaultUnreachableError):
            await image.open(os.O_RDONLY)
    await image.open(os.O_RDONLY)
    await image.release()


async def test_points_are_for_those_who_may_read_the_disk_live(
    mount: Mount, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (b"web01.img", b"point.json"):
        file = await mount.walk(b"web01", DAY, b"01-40-05.000Z", name)
        attributes = await file.getattr()
        assert (attributes.uid, attributes.gid, attributes.mode) == (
            OWNER.uid, OWNER.gid, stat.S_IFREG | 0o400,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(mount.source, "access", lambda disk: Access(7, 8, 0o440))
            attributes = await file.getattr()
        assert (attributes.uid, attributes.gid, attributes.mode) == (7, 8, stat.S_IFREG | 0o440)


@pytest.mark.parametrize(
    ("disk", "shown"),
    [
        (DiskName("d", "a.img"), b"a.img"),
        (DiskName("d", "sub/a.img"), b"a.img"),
        (DiskName("d", "../../etc/passwd"), b"passwd"),
        (DiskName("d", ".."), b"d.img"),
        (DiskName("d", ""), b"d.img"),
        (DiskName("d", "x/"), b"d.img"),
        (DiskName("d", "a\0b"), b"d.img"),
        (DiskName("d", "n" * 300), b"d.img"),
        (DiskName("d", "\udcff.img"), b"\xff.img"),
        (DiskName("d", "point.json"), b"d.img"),
        (DiskName("a/b", "a.img"), None),
        (DiskName("..", "a.img"), None),
        (DiskName("", "a.img"), None),
    ],
)
async def test_names_from_the_vault_cannot_break_a_directory(
    mount: Mount, monkeypatch: pytest.MonkeyPatch, disk: DiskName, shown: bytes | None
) -> None:
    async def disks() -> Sequence[DiskName]:
        return [disk]

    monkeypatch.setattr(mount.source, "disks", disks)
    listed = names(await mount.root.listing())
    assert listed == ([] if shown is None else [b"d"])
    if shown is not None:
        point = await mount.walk(b"d", DAY, b"01-40-05.000Z")
        assert sorted(names(await point.listing())) == sorted([shown, b"point.json"])
