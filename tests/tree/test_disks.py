"""`disks/`: nodes, names, handles and hooks, without a kernel."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

from tests.tree.fakes import FakeMount
from vdiskfs.errors import NotFoundError, RefusedError, UsageError
from vdiskfs.tree import Access, Caller, Changes, Node, SourceFile, open_source
from vdiskfs.tree.directory import SourceDirectory

ME = Caller(os.getuid(), os.getgid(), 0)


@pytest.fixture
async def mount(tmp_path: Path) -> AsyncIterator[FakeMount]:
    mounted = FakeMount(tmp_path)
    yield mounted
    await mounted.close()


async def known(directory: SourceDirectory, name: bytes) -> Node:
    """Look a name up as the kernel does: it counts."""
    node = await directory.child(name)
    node.lookups += 1
    return node


async def file_of(mount: FakeMount, name: bytes) -> SourceFile:
    node = await known(mount.root, name)
    assert isinstance(node, SourceFile)
    return node


async def create(mount: FakeMount, name: bytes, mode: int = 0o644) -> SourceFile:
    node = await mount.root.create(name, mode, os.O_RDWR, ME)
    node.lookups += 1
    assert isinstance(node, SourceFile)
    return node


# -- nodes ----------------------------------------------------------------


async def test_hard_links_share_a_node(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    os.link(mount.path / "a", mount.path / "b")
    assert await known(mount.root, b"a") is await known(mount.root, b"b")


async def test_a_node_lives_until_the_kernel_gave_back_every_look_up(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    node = await known(mount.root, b"a")
    await known(mount.root, b"a")
    mount.nodes.forget(node.id, 1)
    assert mount.nodes.get(node.id) is node
    mount.nodes.forget(node.id, 1)
    with pytest.raises(OSError, match="Stale") as caught:
        mount.nodes.get(node.id)
    assert caught.value.errno == errno.ESTALE
    mount.nodes.forget(node.id, 1)


async def test_an_id_is_never_given_twice(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    ids = set()
    for _ in range(10):
        node = await known(mount.root, b"a")
        assert node.id not in ids
        ids.add(node.id)
        mount.nodes.forget(node.id, 1)


async def test_an_open_or_held_file_is_not_forgotten(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    file = await file_of(mount, b"a")
    file.hold()
    await file.open(os.O_RDONLY)
    mount.nodes.forget(file.id, 1)
    assert mount.nodes.get(file.id) is file
    file.drop()
    assert mount.nodes.get(file.id) is file
    await file.release()
    with pytest.raises(OSError, match="Stale"):
        mount.nodes.get(file.id)


async def test_another_file_under_the_name_is_another_node(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    before = await known(mount.root, b"a")
    (mount.path / "b").write_bytes(b"")
    (mount.path / "b").rename(mount.path / "a")
    assert await known(mount.root, b"a") is not before


async def test_an_absent_name_is_enoent(mount: FakeMount) -> None:
    with pytest.raises(FileNotFoundError):
        await mount.root.child(b"absent")


async def test_open_descriptors_are_bounded_and_closed_ones_open_again(tmp_path: Path) -> None:
    mount = FakeMount(tmp_path, descriptors=20)
    nodes = []
    for i in range(200):
        (tmp_path / f"{i}").write_bytes(b"x" * i)
        nodes.append(await known(mount.root, f"{i}".encode()))
        await nodes[-1].getattr()
    assert mount.disks.open_descriptors <= 21
    for i, node in enumerate(nodes):
        assert (await node.getattr()).size == i
    await mount.close()


async def test_a_closed_descriptor_whose_name_leads_elsewhere_is_estale(tmp_path: Path) -> None:
    mount = FakeMount(tmp_path, descriptors=16)
    (tmp_path / "a").write_bytes(b"")
    node = await known(mount.root, b"a")
    (tmp_path / "other").write_bytes(b"")
    (tmp_path / "other").rename(tmp_path / "a")
    with pytest.raises(OSError, match="Stale"):
        await node.getattr()
    (tmp_path / "a").unlink()
    with pytest.raises(OSError, match="Stale"):
        await node.getattr()
    await mount.close()


async def test_a_link_whose_name_is_gone_keeps_its_descriptor(tmp_path: Path) -> None:
    mount = FakeMount(tmp_path, descriptors=16)
    (tmp_path / "a").write_bytes(b"x")
    os.link(tmp_path / "a", tmp_path / "b")
    node = await known(mount.root, b"a")
    await mount.root.unlink(b"a")
    for i in range(60):
        (tmp_path / f"{i}").write_bytes(b"")
        await (await known(mount.root, f"{i}".encode())).getattr()
    assert (await node.getattr()).nlink == 1
    await mount.close()


async def test_a_path_follows_the_directories_above(mount: FakeMount) -> None:
    (mount.path / "one" / "two").mkdir(parents=True)
    (mount.path / "one" / "two" / "a").write_bytes(b"")
    file = mount.disks.find("one/two/a")
    assert file.path == "one/two/a"
    await mount.root.rename(b"one", mount.root, b"uno", 0)
    assert file.path == "uno/two/a"
    assert file.status().st_size == 0
    file.drop()
    assert mount.hooks.told == ["directory one uno"]


# -- what the daemon finds ------------------------------------------------


def test_open_source_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no such source"):
        open_source(str(tmp_path / "absent"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="not a directory"):
        open_source(str(tmp_path / "file"))
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0)
        with pytest.raises(RefusedError):
            open_source(str(tmp_path / "closed"))


async def test_scan_finds_each_matching_file_once_and_holds_it(mount: FakeMount) -> None:
    (mount.path / "d").mkdir()
    for name in ("a.img", "b.txt", "d/c.img"):
        (mount.path / name).write_bytes(b"")
    os.link(mount.path / "a.img", mount.path / "z.img")
    (mount.path / "link.img").symlink_to("a.img")
    (mount.path / "out").symlink_to("/")
    os.mkfifo(mount.path / "fifo.img")
    found = mount.disks.scan(lambda path: path.endswith(".img"))
    assert [file.path for file in found] == ["z.img", "d/c.img"]
    assert mount.disks.find("a.img") is found[0]
    found[0].drop()
    for file in found:
        file.drop()
    assert len(mount.nodes) == 1  # the source


@pytest.mark.parametrize("path", ["absent", "", "..", "d", "d/..", "link", "out/hostname", "f/x"])
async def test_find_finds_only_regular_files_below_the_source(mount: FakeMount, path: str) -> None:
    (mount.path / "d").mkdir()
    (mount.path / "f").write_bytes(b"")
    (mount.path / "link").symlink_to("f")
    (mount.path / "out").symlink_to("/etc")
    with pytest.raises(NotFoundError):
        mount.disks.find(path)


# -- handles --------------------------------------------------------------


async def test_one_image_answers_for_all_handles_and_leaves_with_the_last(mount: FakeMount) -> None:
    file = await create(mount, b"a")
    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(file.open, os.O_RDWR)
    assert mount.core.attached == {file.id: file.image}
    for _ in range(6):
        assert file.is_open
        await file.release()
    assert not mount.core.attached
    assert mount.hooks.told == ["created a", "image a rw", "closed a"]


async def test_the_first_writer_after_readers_asks_for_a_writable_image(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    file = await file_of(mount, b"a")
    await file.open(os.O_RDONLY)
    first = file.image
    await file.open(os.O_RDONLY)
    await file.open(os.O_WRONLY)
    assert mount.core.attached[file.id] is not first
    assert mount.hooks.told == ["image a ro", "image a rw"]


async def test_a_refused_image_leaves_the_file_closed(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    file = await file_of(mount, b"a")
    mount.hooks.fails["image"] = PermissionError(errno.EACCES, "no")
    with pytest.raises(PermissionError):
        await file.open(os.O_RDWR)
    assert not file.is_open
    assert not mount.core.attached


async def test_truncation_by_path_goes_through_the_image(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"0123456789")
    file = await file_of(mount, b"a")
    attributes = await file.setattr(Changes(size=3, mode=stat.S_IFREG | 0o600))
    assert (attributes.size, stat.S_IMODE(attributes.mode)) == (3, 0o600)
    assert mount.hooks.told == ["image a rw", "closed a"]


async def test_only_regular_files_can_be_truncated(mount: FakeMount) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        await mount.root.setattr(Changes(size=0))


# -- hooks ----------------------------------------------------------------


async def test_a_file_that_takes_a_name_is_told_after_the_one_that_lost_it(
    mount: FakeMount,
) -> None:
    for name in (b"old", b"new"):
        await (await create(mount, name)).release()
    mount.hooks.told.clear()
    await mount.root.rename(b"new", mount.root, b"old", 0)
    assert mount.hooks.told == ["replaced old True", "renamed new old"]


async def test_a_file_with_another_name_left_is_replaced_but_not_lost(mount: FakeMount) -> None:
    await (await create(mount, b"old")).release()
    os.link(mount.path / "old", mount.path / "other")
    await (await create(mount, b"new")).release()
    mount.hooks.told.clear()
    await mount.root.rename(b"new", mount.root, b"old", 0)
    assert mount.hooks.told == ["replaced old False", "renamed new old"]
    await mount.root.unlink(b"other")
    assert mount.hooks.told[-1] == "unlinked other True"


async def test_an_exchange_is_told_for_both(mount: FakeMount) -> None:
    for name in (b"a", b"b"):
        await (await create(mount, name)).release()
    mount.hooks.told.clear()
    await mount.root.rename(b"a", mount.root, b"b", 2)
    assert mount.hooks.told == ["renamed b a", "renamed a b"]
    file = mount.disks.find("a")
    assert file.path == "a"
    file.drop()


async def test_two_names_of_one_file_rename_to_nothing(mount: FakeMount) -> None:
    await (await create(mount, b"a")).release()
    file = await file_of(mount, b"a")
    await mount.root.link(file, b"b")
    mount.hooks.told.clear()
    await mount.root.rename(b"a", mount.root, b"b", 0)
    assert mount.hooks.told == []


async def test_a_file_is_unlinked_for_good_with_its_last_name(mount: FakeMount) -> None:
    file = await create(mount, b"a")
    await mount.root.link(file, b"b")
    await mount.root.unlink(b"a")
    await mount.root.unlink(b"b")
    await file.release()
    assert mount.hooks.told[2:] == ["linked b", "unlinked a False", "unlinked b True", "closed b"]


@pytest.mark.parametrize("hook", ["created", "image"])
async def test_a_file_that_cannot_be_made_whole_is_taken_back(mount: FakeMount, hook: str) -> None:
    mount.hooks.fails[hook] = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        await mount.root.create(b"a", 0o644, os.O_RDWR, ME)
    assert not (mount.path / "a").exists()
    assert len(mount.nodes) == 1


async def test_a_created_file_that_is_there_is_opened_unless_o_excl(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"x")
    with pytest.raises(FileExistsError):
        await mount.root.create(b"a", 0o644, os.O_RDWR | os.O_EXCL, ME)
    node = await mount.root.create(b"a", 0o600, os.O_RDWR | os.O_TRUNC, ME)
    assert (mount.path / "a").stat().st_size == 0
    assert stat.S_IMODE((await node.getattr()).mode) == 0o644
    await node.release()


async def test_changes_are_told_in_their_order_though_hooks_wait(mount: FakeMount) -> None:
    async def make(number: int) -> None:
        await mount.root.mknod(f"{number}".encode(), stat.S_IFREG | 0o600, ME)
        await mount.root.rename(f"{number}".encode(), mount.root, b"same", 0)

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(make, number)
    names = {}
    for line in mount.hooks.told:
        what, *words = line.split()
        if what == "created":
            names[words[0]] = True
        elif what == "renamed":
            del names[words[0]]
            assert words[1] not in names
            names[words[1]] = True
        else:
            assert what == "replaced"
            del names[words[0]]
    assert list(names) == ["same"]


async def test_a_change_under_way_is_finished_and_told_at_the_end(mount: FakeMount) -> None:
    (mount.path / "a").write_bytes(b"")
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(mount.root.unlink, b"a")
            while (mount.path / "a").exists():
                await trio.lowlevel.checkpoint()
            scope.cancel()
    assert mount.hooks.told == ["unlinked a True"]


async def test_names_do_not_leave_the_source(mount: FakeMount) -> None:
    file = await create(mount, b"a")
    await file.release()
    elsewhere = Node(mount.nodes)
    with pytest.raises(OSError, match="Read-only"):
        await mount.root.rename(b"a", elsewhere, b"b", 0)
    with pytest.raises(OSError, match="cross-device"):
        await mount.root.link(elsewhere, b"b")
    mount.nodes.settle(elsewhere)


# -- who may read ---------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(
    ("directory", "file", "access"),
    [
        ((0, 0, 0o755), (1, 2, 0o644), Access(1, 2, 0o444)),
        ((0, 0, 0o755), (1, 2, 0o640), Access(1, 2, 0o440)),
        ((0, 0, 0o755), (1, 2, 0o200), Access(0, 0, 0o400)),
        ((0, 0, 0o700), (1, 2, 0o644), Access(0, 0, 0o400)),
        ((1, 0, 0o700), (1, 2, 0o644), Access(1, 2, 0o400)),
        ((0, 2, 0o750), (1, 2, 0o644), Access(1, 2, 0o040)),
        ((0, 3, 0o750), (1, 2, 0o644), Access(0, 0, 0o400)),
        ((0, 3, 0o705), (1, 2, 0o644), Access(0, 0, 0o400)),
    ],
)
async def test_who_may_read_is_what_the_file_and_its_directories_allow(
    mount: FakeMount,
    directory: tuple[int, int, int],
    file: tuple[int, int, int],
    access: Access,
) -> None:
    mount.path.chmod(0o755)
    (mount.path / "d").mkdir()
    (mount.path / "d" / "a").write_bytes(b"")
    for path, (uid, gid, mode) in ((mount.path / "d", directory), (mount.path / "d" / "a", file)):
        os.chown(path, uid, gid)
        path.chmod(mode)
    found = mount.disks.find("d/a")
    assert found.access() == access
    found.drop()
